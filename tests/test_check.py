"""What a configuration tells about a model, and `kvq-calibrate --check`."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from models_zoo import HYBRIDS, REPEATED, UNTOLD, tiny_config
from transformers import CONFIG_MAPPING, AutoConfig

from kvq_calib.cli.calibrate import calibrate_command
from kvq_calib.errors import ModelError, NothingToQuantizeError
from kvq_calib.model import check as check_module
from kvq_calib.model.check import check_configuration
from kvq_calib.model.compat import states_are_common

pytestmark = pytest.mark.model

_OF_JAMBA = ("hidden_size", "num_attention_heads", "num_key_value_heads", "mamba_d_state", "vocab_size")


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


def test_every_kind_of_layer_is_tried():
    for family in HYBRIDS:
        verdict = check_configuration(tiny_config(family))
        assert verdict.geometry.state_bytes > 0
        assert verdict.layers == tiny_config(family).num_hidden_layers


@pytest.mark.parametrize("family", [*UNTOLD, *REPEATED])
def test_sizes_that_depend_on_others(family):
    """Widths of states and of attention follow the hidden state; layers may be counted as often as they run."""
    if family not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    config = tiny_config(family)
    verdict = check_configuration(config)
    assert verdict.layers == config.num_hidden_layers
    assert verdict.serving.materialized is (family in REPEATED)


def test_sizes_in_parts_of_the_configuration():
    config = AutoConfig.for_model(
        "dbrx",
        d_model=64,
        n_heads=4,
        n_layers=2,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    )
    if not states_are_common():  # its code takes one width for the other
        with pytest.raises(
            ModelError, match=r"does not run with this configuration and transformers 5\..*RuntimeError"
        ):
            check_configuration(config)
        return
    (layer, _) = check_configuration(config).geometry.layers
    assert (layer.num_query_heads, layer.num_kv_heads, layer.head_dim) == (2, 1, 16)


@pytest.mark.parametrize("extra", [{}, {"num_attention_heads": 4}])
def test_a_model_without_attention_heads(extra):
    config = AutoConfig.for_model("rwkv", vocab_size=128, hidden_size=64, num_hidden_layers=2, **extra)
    with pytest.raises(NothingToQuantizeError, match="there is nothing to quantize"):
        check_configuration(config)


def test_a_model_without_attention_is_made_narrow():
    config = AutoConfig.for_model("rwkv")  # its initialization takes long for thousands of channels
    model = check_module._small_model(config)
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000


def test_what_is_no_causal_model_is_said_at_once(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    found = check(tmp_path)
    assert found.exit_code == 1
    assert str(found.exception) == "t5 is not a causal language model that transformers can load"


def test_layers_of_a_hybrid_are_found_wherever_they_begin():
    config = AutoConfig.for_model(
        "jamba", **{name: v for name, v in tiny_config("jamba").to_dict().items() if name in _OF_JAMBA},
        num_hidden_layers=12, attn_layer_period=6, attn_layer_offset=5, use_mamba_kernels=False,
    )  # fmt: skip
    verdict = check_configuration(config)
    assert verdict.layers == 12
    assert len(verdict.geometry.layers) == 1


def test_blocks_under_another_name_are_fewer_too():
    config = AutoConfig.for_model("xlstm", hidden_size=128, num_heads=2, num_hidden_layers=24)
    assert check_module._smaller(config, True, True, True).num_blocks == 2
    with pytest.raises(NothingToQuantizeError, match=r"keeps no keys and values in (its|a) cache"):
        check_configuration(config)


def test_a_number_of_layers_that_cannot_be_set():
    config = AutoConfig.for_model(
        "prophetnet", hidden_size=64, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, decoder_ffn_dim=64, encoder_ffn_dim=64,
    )  # fmt: skip
    with pytest.raises(ModelError, match="ProphetNetForCausalLM cannot generate with a packed cache"):
        check_configuration(config)


def test_a_model_that_does_not_run_is_made_less_small(monkeypatch):
    tried = []

    def too_few_heads(text):
        tried.append(text.num_attention_heads)
        text.num_attention_heads = 3

    monkeypatch.setattr(check_module, "_thin", too_few_heads)
    verdict = check_configuration(tiny_config("llama"))
    assert tried == [4, 4]
    assert verdict.geometry.layers[0].num_query_heads == 4


def test_a_small_model_that_would_not_be_small(monkeypatch):
    monkeypatch.setattr(check_module, "_PARAMETERS", 1000)
    with pytest.raises(
        ModelError, match=r"cannot be built \(it would have [\d,]+ parameters\); calibrate to see"
    ):
        check_configuration(tiny_config("llama"))


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
