"""Indexers beside keys and values, modules that run for several layers, encoders that decode, positions to be told."""

from __future__ import annotations

import copy

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from models_zoo import DECODING, INDEXED, INDEXED_HYBRIDS, PICTURES, REPEATED, UNTOLD, tiny_model, token_ids
from transformers import DynamicCache
from whole_chain import (
    ROUNDING,
    assert_crops,
    assert_the_whole_chain,
    calibrated,
    logits_after,
    model_of,
    through,
)

from kvq_calib.errors import CalibrationError, ModelError, NothingToQuantizeError, RuntimeMismatchError
from kvq_calib.model.compat import states_are_common, with_cache
from kvq_calib.model.inspect import check_generation, inspect_model, next_pass
from kvq_calib.runtime import KVQCache

pytestmark = pytest.mark.model

needs_common_states = pytest.mark.skipif(
    not states_are_common(), reason="states have common cache layers from transformers 5.5 on"
)


def check(model):
    return check_generation(model, inspect_model(model))


# ---------------------------------------------------------------------------------------- indexers


#: Before transformers 5.5 the indexer of glm_moe_dsa saw later tokens.
_MARKS = {"glm_moe_dsa": [needs_common_states]}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=_MARKS.get(family, ())) for family in (*INDEXED, *INDEXED_HYBRIDS)]
)
def test_an_indexer_keeps_its_keys_beside(family, tmp_path):
    model = model_of(family)
    artifact = assert_the_whole_chain(model)
    geometry = artifact.geometry
    assert geometry.state_bytes_per_token >= 4 * 16 * len(geometry.layers)
    cache, ids, more = KVQCache(artifact, model), token_ids(2, 50, seed=4), token_ids(2, 5, seed=6)
    logits_after(model, cache, ids)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.memory()["states"] == 2 * geometry.held_state(50)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQCache.load(tmp_path / "cache.safetensors", artifact, model)
    assert loaded.memory()["states"] == cache.memory()["states"]
    other = KVQCache(artifact, model)
    logits_after(model, other, ids.flip(0))
    want = logits_after(model, other, more)
    for each in (copy.deepcopy(cache), loaded, cache):
        assert torch.allclose(logits_after(model, each, more), want, atol=1e-4)
    cache.reset()
    assert cache.memory()["states"] == 0


def test_what_an_indexer_keeps_is_cropped():
    model = model_of("deepseek_v32")
    assert_crops(model, artifact_for(model, RECIPES["nuq4-1p"]))


@pytest.mark.parametrize(
    ("family", "few"), [("deepseek_v32", "index_topk"), ("qwen4_exp_text", "indexer_budget")]
)
def test_an_indexer_chooses_as_with_the_models_own_cache(family, few):
    model = model_of(family, **{few: 8})
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model, recent_tokens=10**6)
    ids = token_ids(2, 40)
    got, want = (
        through(model, each, ids, (17, 22, 1)) for each in (cache, DynamicCache(config=model.config))
    )
    assert float((got - want).abs().max()) < ROUNDING * float(want.abs().max())
    all_chosen = tiny_model(family)  # the weights are the same
    with torch.no_grad():
        whole = all_chosen(ids, use_cache=False).logits
    assert float((whole - want).abs().max()) > 2 * ROUNDING * float(want.abs().max())


def test_a_saved_state_of_another_kind_is_refused(tmp_path, monkeypatch):
    model = model_of("deepseek_v32")
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    cache = KVQCache(artifact, model)
    logits_after(model, cache, token_ids(1, 40))
    tensors = cache.states.tensors()
    for name, match in (
        ("0.what", r"what layer 0 kept .*0\.what"),
        ("7.indexer_keys", "no layer for the state 7"),
    ):
        monkeypatch.setattr(cache.states, "tensors", lambda name=name: {**tensors, name: torch.zeros(1, 2)})
        cache.save(tmp_path / "cache.safetensors")
        with pytest.raises(RuntimeMismatchError, match=match):
            KVQCache.load(tmp_path / "cache.safetensors", artifact, model)


# ------------------------------------------------------------------------- modules, positions, encoders


@pytest.mark.parametrize(
    ("family", "numbers"),
    [("zamba2", (1, 3)), ("hrm_text", (0, 1, 2, 3))],
)
def test_a_module_that_runs_for_several_layers(family, numbers):
    assert family in REPEATED
    model = model_of(family)
    artifact = assert_the_whole_chain(model)
    if family == "hrm_text":  # the other keeps states that cannot be taken back
        assert_crops(model, artifact)
    assert artifact.geometry.numbers == numbers


def test_a_layer_that_no_gradient_reaches_is_an_error():
    model = model_of("hrm_text", L_cycles=2, L_bp_cycles=[1, 1])
    with pytest.raises(CalibrationError, match=r"layer 0 gets no gradient.*--weights uniform"):
        calibrated(model)
    assert len(calibrated(model, "nuq4", ("fit.weights=uniform",)).layers) == 6


@pytest.mark.parametrize("family", UNTOLD)
def test_positions_are_told_where_a_model_does_not_know_them(family):
    model = model_of(family)
    artifact = assert_the_whole_chain(model)
    # A release of transformers may mend a model: then it is told nothing.
    told = next_pass(model, token_ids(1, 3), DynamicCache(), 5).get("position_ids")
    needed = check_generation(model, artifact.geometry).positions
    assert (None if told is None else told.tolist()) == ([[5, 6, 7]] if needed else None)
    if not states_are_common():
        assert needed


@pytest.mark.parametrize("family", PICTURES)
def test_single_tokens_that_get_wrong_positions_are_noticed(family):
    model = model_of(family)
    if states_are_common():
        assert_crops(model, assert_the_whole_chain(model))
        return
    with pytest.raises(ModelError, match="it gives other output with its own cache than without"):
        check(model)


@pytest.mark.parametrize("family", DECODING)
def test_an_encoder_that_decodes(family):
    model = model_of(family)
    assert_crops(model, assert_the_whole_chain(model))
    with pytest.raises(ModelError, match=r'; if it is to be one, set "is_decoder": true in its config'):
        check(tiny_model(family, is_decoder=False))


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("family", ["rwkv", "openai-gpt"])
def test_a_model_without_a_cache_has_nothing_to_quantize(family):
    with pytest.raises(NothingToQuantizeError, match="keeps no keys and values in a cache: there is nothing"):
        check(model_of(family, num_key_value_heads=None))


def test_one_tensor_for_keys_and_values_is_refused(monkeypatch):
    model = model_of("bloom")
    attention = type(model.transformer.h[0].self_attention)
    split = attention._reshape
    monkeypatch.setattr(attention, "_reshape", lambda *args: (split(*args)[0], *[split(*args)[1]] * 2))
    with pytest.raises(
        ModelError, match="caches one tensor as keys and as values, which would be stored twice"
    ):
        inspect_model(model)


@needs_common_states
def test_a_pass_that_was_interrupted_gives_no_positions_to_the_next():
    def fail(*args):
        raise KeyboardInterrupt

    model, ids = model_of("qwen4_exp_text"), token_ids(1, 32)  # whose attention gets no positions
    cache, clean = (KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model) for _ in range(2))
    hook = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(ids[:, :1], position_ids=torch.full((1, 1), 7), **with_cache(cache))
    hook.remove()
    cache.reset()
    with torch.no_grad():
        got, want = (model(ids, **with_cache(each)).logits for each in (cache, clean))
    assert torch.equal(got, want)
