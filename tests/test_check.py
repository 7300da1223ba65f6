"""What a configuration tells about a model, and `kvq-calibrate --check`."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from models_zoo import HYBRIDS, tiny_config
from transformers import AutoConfig

from kvq_calib.cli.calibrate import calibrate_command
from kvq_calib.errors import ModelError
from kvq_calib.model.check import check_configuration
from kvq_calib.model.compat import states_are_common

pytestmark = pytest.mark.model


def check(folder, *arguments):
    return CliRunner().invoke(calibrate_command, ["--check", str(folder), *arguments])


def test_a_model_as_it_comes_is_checked_without_weights(tmp_path):
    config = AutoConfig.for_model("llama")  # of seven billion parameters
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    found = check(tmp_path)
    assert found.exit_code == 0, found.output
    first, *facts = found.output.splitlines()
    assert first == f"{tmp_path} (llama, 32 layers) can be calibrated and used"
    assert facts == ["  caches keys and values of heads of 128", "  attends to packed pages"]


def test_attention_of_its_own_is_said(tmp_path):
    AutoConfig.for_model("bloom").save_pretrained(tmp_path)
    found = check(tmp_path)
    assert found.exit_code == 0, found.output
    assert "quantized as cached: no rotary embedding that can be undone" in found.output
    assert "gets them dequantized, a layer at a time" in found.output


def test_a_model_that_cannot_be_used_is_refused_with_the_reason(tmp_path):
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    found = check(tmp_path)
    assert found.exit_code == 1
    assert isinstance(found.exception, ModelError)
    assert "it is no causal model" in str(found.exception)


@pytest.mark.skipif(
    not states_are_common(), reason="states have common cache layers from transformers 5.5 on"
)
def test_every_kind_of_layer_is_tried():
    for family in HYBRIDS:
        verdict = check_configuration(tiny_config(family))
        assert verdict.geometry.state_bytes > 0
        assert verdict.layers == tiny_config(family).num_hidden_layers


def test_a_configuration_that_nothing_can_be_built_of():
    config = tiny_config("llama")
    config.hidden_act = "no such function"
    with pytest.raises(
        ModelError, match=r"small model of this configuration cannot be built .*calibrate to see"
    ):
        check_configuration(config)


def test_an_output_is_needed_otherwise(tmp_path):
    found = CliRunner().invoke(calibrate_command, [str(tmp_path)])
    assert found.exit_code == 2
    assert "Missing option '-o' / '--output'" in found.output
