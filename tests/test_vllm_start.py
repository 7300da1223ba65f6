"""Checks at the start of a server, without vLLM: a configuration is only an object with attributes here."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from artifact_factory import artifact_for, random_artifact, recipe
from click.testing import CliRunner
from models_zoo import tiny_model

from kvq_calib import KVArtifact
from kvq_calib.cli.artifact import artifact_group
from kvq_calib.errors import KVQError
from kvq_calib.integrations.vllm.checks import (
    ARTIFACT_KEY,
    TESTED,
    artifact_of,
    check_artifact,
    check_attention,
    check_configuration,
    check_layer,
)
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

DENSE = {"outliers": {}}
VERSION = f"{TESTED[-1]}.0"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A model's configuration, and an artifact for it."""
    model = tiny_model("llama")
    file = tmp_path_factory.mktemp("vllm") / "a.kvq.safetensors"
    artifact_for(model, recipe(key=DENSE, value=DENSE)).save(file)
    return model.config, str(file)


def configuration(hf_config: Any, file: str | None, **changes: dict[str, Any]) -> Any:
    """vLLM's, as far as it is read; ``changes`` by section."""
    sections: dict[str, dict[str, Any]] = {
        "cache_config": {"cache_dtype": "auto", "user_specified_block_size": False, "block_size": 16},
        "parallel_config": {
            "tensor_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "model_config": {"hf_config": hf_config, "dtype": torch.float16},
    }
    made = {name: SimpleNamespace(**{**known, **changes.get(name, {})}) for name, known in sections.items()}
    whole = {
        "speculative_config": None,
        "kv_transfer_config": None,
        "additional_config": {ARTIFACT_KEY: file},
    }
    return SimpleNamespace(**made, **{**whole, **changes.get("whole", {})})


def test_what_is_served_passes(served):
    check_configuration(configuration(*served), VERSION, "cpu")
    with_size = {"user_specified_block_size": True, "block_size": 256}
    check_configuration(configuration(*served, cache_config=with_size), VERSION, "cpu")
    check_configuration(configuration(*served, parallel_config={"tensor_parallel_size": 2}), VERSION, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"whole": {"additional_config": {}}}, "needs an artifact: --additional-config"),
        ({"whole": {"speculative_config": object()}}, "leave out --speculative-config"),
        ({"whole": {"kv_transfer_config": object()}}, "leave out --kv-transfer-config"),
        ({"cache_config": {"cache_dtype": "fp8"}}, "--kv-cache-dtype is 'fp8'"),
        ({"cache_config": {"user_specified_block_size": True, "block_size": 16}}, "--block-size is 16"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "use --tensor-parallel-size alone"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "use --tensor-parallel-size alone"),
        ({"parallel_config": {"tensor_parallel_size": 3}}, "3 ranks cannot"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused_in_one_line(served, changes, words):
    with pytest.raises(KVQError, match=re.escape(words)) as caught:
        check_configuration(configuration(*served, **changes), VERSION, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "platform", "words"),
    [("0.31.2", "cpu", "tested with vLLM 0.32"), ("0.3", "cpu", "this is 0.3"), (VERSION, "tpu", "'tpu'")],
)
def test_other_versions_and_platforms_are_refused(served, version, platform, words):
    with pytest.raises(KVQError, match=re.escape(words)):
        check_configuration(configuration(*served), version, platform)


def test_a_gpu_takes_half_precision(served):
    check_configuration(configuration(*served), VERSION, "cuda")
    single = {"hf_config": served[0], "dtype": torch.float32}
    check_configuration(configuration(*served, model_config=single), VERSION, "cpu")
    with pytest.raises(KVQError, match="use float16 or bfloat16"):
        check_configuration(configuration(*served, model_config=single), VERSION, "cuda")


def test_another_model_is_refused(served):
    other = tiny_model("llama", num_key_value_heads=1).config
    with pytest.raises(KVQError, match="num_key_value_heads"):
        check_configuration(configuration(other, served[1]), VERSION, "cpu")


def test_a_file_that_is_not_there_is_refused(served, tmp_path):
    with pytest.raises(KVQError, match=r"gone\.kvq"):
        check_configuration(configuration(served[0], str(tmp_path / "gone.kvq.safetensors")), VERSION, "cpu")


def artifact(
    spec: Any, rope: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **layer: Any
) -> KVArtifact:
    known = {"pairs": ((0, 4), (1, 5)), "inv_freq": (1.0, 0.5), **(rope or {})}
    shape = {"num_query_heads": 2, "num_kv_heads": 2, "head_dim": 8, "rope": 0, **layer}
    geometry = KVGeometry(layers=(LayerGeometry(**shape),), ropes=(RopeSpec(**known),), **(model or {}))
    return replace(random_artifact(geometry, spec), calibration={"recipe": "nuq4-1p"})


def dense(**options: Any) -> KVArtifact:
    return artifact(recipe(key=DENSE, value=DENSE), **options)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: artifact(recipe()), "the recipe nuq4-1p keeps outliers"),
        (lambda: artifact(recipe()), "calibrate with --config nuq4, or kvq3"),
        (lambda: artifact(recipe(key=DENSE, value=DENSE, recent_tokens=64)), "--set cache.recent_tokens=0"),
        (lambda: dense(sliding_window=64), "sliding windows"),
        (lambda: dense(rope={"length_dependent": True}), "length of the text"),
        (lambda: dense(model={"attends_to": (0, 0)}), "layers share their keys and values"),
        (lambda: dense(model={"attends_to": (None, 0)}), "a state beside keys and values"),
        (lambda: dense(model={"state_bytes": 64}), "a state beside keys and values"),
        (lambda: dense(swapped=True), "layer 0 caches a latent"),
        (lambda: dense(value_head_dim=16), "8 channels in keys and 16 in values"),
        (lambda: artifact(recipe(key={**DENSE, "pre_rope": False}, value=DENSE)), "cache.key.pre_rope=true"),
        (lambda: artifact(recipe(key=DENSE, value=DENSE, sink_tokens=300)), "300 first tokens"),
    ],
)
def test_an_artifact_that_pages_cannot_hold_is_refused(made, words):
    with pytest.raises(KVQError, match=re.escape(words)) as caught:
        check_artifact(made())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"alibi_slopes": [0.5]}, "alibi slopes"),
        ({"sliding_window": 64}, "sliding windows"),
        ({"sinks": torch.zeros(2)}, "attention sinks in the softmax"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "layers that share their cache"),
    ],
)
def test_attention_that_is_not_served_is_refused(asked, words):
    none = dict.fromkeys(("alibi_slopes", "sliding_window", "sinks", "kv_sharing_target_layer_name"))
    check_attention(**none)
    with pytest.raises(KVQError, match=words) as caught:
        check_attention(**{**none, **asked})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "words"),
    [((1, 2, 2, 8), "1 layers, and the model a layer 1"), ((0, 4, 2, 8), "(2, 2, 8)"), ((0, 2, 2, 16), "16")],
)
def test_layers_that_differ_from_the_artifact_are_refused(layer, words):
    geometry = dense().geometry
    check_layer(geometry, 0, 2, 2, 8)
    with pytest.raises(KVQError, match=re.escape(words)):
        check_layer(geometry, *layer)


def test_ranks_have_parts_of_their_own(served):
    whole, part = artifact_of(served[1]), artifact_of(served[1], 1, 2)
    heads = [each.geometry.layers[0].num_kv_heads for each in (whole, part)]
    assert heads == [2, 1]
    own = part.quantizers()[0]["key"].scale
    assert torch.equal(own, whole.quantizers()[0]["key"].scale[len(own) :])


@pytest.mark.parametrize("installed", [True, False])
def test_the_options_are_printed_for_a_shell(served, installed, monkeypatch):
    named = [SimpleNamespace(name="kvq_calib")] if installed else []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: named)
    found = CliRunner().invoke(artifact_group, ["vllm-args", served[1]])
    assert found.exit_code == 0
    assert ("vLLM would not find its plug-in" in found.stderr) != installed
    assert found.stdout == (
        f'--attention-backend CUSTOM --additional-config \'{{"{ARTIFACT_KEY}": "{served[1]}"}}\'\n'
    )


def test_no_options_for_what_cannot_be_served(tmp_path):
    file = tmp_path / "outliers.kvq.safetensors"
    artifact(recipe()).save(file)
    found = CliRunner().invoke(artifact_group, ["vllm-args", str(file)])
    assert found.exit_code != 0
    assert "--attention-backend" not in found.output
