"""Layers that share keys and values or differ in shape, latent attention, and models with custom attention code."""

from __future__ import annotations

import logging

import pytest
import torch
from artifact_factory import RECIPES, artifact_for, recipe
from models_zoo import LATENT, OWN_ATTENTION, SHARING, UNEVEN, tiny_model, token_ids
from transformers import DynamicCache
from whole_chain import (
    assert_crops,
    assert_memory_is_what_buffers_hold,
    assert_the_whole_chain,
    calibrated,
    logits_after,
    model_of,
)

from kvq_calib.errors import ModelError
from kvq_calib.model.compat import states_are_common, with_cache
from kvq_calib.model.inspect import check_generation, inspect_model
from kvq_calib.runtime import KVQCache
from kvq_calib.runtime.materialized_layer import MaterializedLayer

pytestmark = pytest.mark.model


def caches_latents(model) -> bool:
    """Whether this release caches the latent; older ones expand it first."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(1, 3), **with_cache(cache))
    return cache.layers[0].keys.shape[1] == 1


def assert_crops_and_counts(model, artifact):
    """A cropped cache goes on as one that never saw more, and holds what the artifact says."""
    assert_crops(model, artifact)
    cache = KVQCache(artifact, model)
    logits_after(model, cache, token_ids(2, 100, seed=4))
    held = {kind: size for kind, size in cache.memory().items() if kind not in ("tables", "outlier_entries")}
    said = artifact.storage(100, 2)
    assert held == {kind: size for kind, size in said.items() if kind in held}
    assert_memory_is_what_buffers_hold(cache)


# --------------------------------------------------------------------------------- sharing, uneven


def sharing_model(family: str):
    model = model_of(family)
    try:
        check_generation(model, inspect_model(model))
    except ModelError as error:
        # gemma3n of 5.2 computes keys of its own in such layers where it has no cache.
        pytest.skip(f"not in this transformers: {error}")
    return model


@pytest.mark.parametrize("family", SHARING)
def test_layers_that_share_keys_and_values(family):
    model = sharing_model(family)
    geometry = inspect_model(model)
    assert geometry.attends_to == (0, 1, 0, 1)
    sizes = [layer.head_dim for layer in geometry.layers]
    assert sizes == ([16, 32] if family == "gemma4_text" else [16, 16])
    assert [layer.sliding_window for layer in geometry.layers] == [16, None]
    assert all(layer.rope is not None for layer in geometry.layers)
    artifact = assert_the_whole_chain(model)
    assert len(KVQCache(artifact, model).packed) == 2
    assert len(artifact.layers) == 2
    assert_crops(model, artifact)


@pytest.mark.parametrize("family", SHARING)
def test_recomputed_layers_that_share_give_the_same_artifact(family):
    model = sharing_model(family)
    once, again = (calibrated(model, "nuq3-1p", settings) for settings in ((), ("recompute=true",)))
    for layer, other in zip(once.layers, again.layers, strict=True):
        for kind in ("key", "value"):
            tensors, others = getattr(layer, kind).tensors(), getattr(other, kind).tensors()
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo3", *UNEVEN])
def test_layers_that_differ(family):
    model = model_of(family)
    artifact = assert_the_whole_chain(model)
    layers = artifact.geometry.layers
    assert {layer.sliding_window for layer in layers} == {None, 16}
    assert len(artifact.geometry.ropes) == (2 if family in ("gemma3_text", "mimo_v2_flash") else 1)
    if family == "mimo_v2_flash":
        assert {(layer.head_dim, layer.value_head_dim) for layer in layers} == {(16, 8)}
    assert_crops(model, artifact)


# ------------------------------------------------------------------------------------------ latent


@pytest.mark.parametrize("family", LATENT)
def test_latent_attention(family):
    model = model_of(family)
    artifact = assert_the_whole_chain(model)
    (layer, _) = artifact.geometry.layers
    assert_crops_and_counts(model, artifact)
    if not caches_latents(model):
        assert (layer.num_kv_heads, layer.head_dim) == (4, 24)
        return
    assert (layer.num_kv_heads, layer.head_dim, layer.value_head_dim) == (1, 8, 24)
    assert layer.swapped
    assert (layer.rope is None) is (family == "deepseek_v2")  # whose rotation is of complex numbers
    assert artifact.elements(100) == 2 * 100 * (8 + 24)


# --------------------------------------------------------------------------- attention of their own


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_attention_that_is_the_models_own(family):
    model = model_of(family)
    geometry = inspect_model(model)
    if family == "doge" and not states_are_common():
        pytest.skip("its masks in 5.2 do not hide later tokens")
    serving = check_generation(model, geometry)
    artifact = assert_the_whole_chain(model)
    layers = KVQCache(artifact, model).packed
    assert [isinstance(layer, MaterializedLayer) for layer in layers] == [serving.materialized] * 2
    if family != "diffllama":  # whose code came to the interface by and by
        assert serving.materialized
    assert_crops_and_counts(model, artifact)


def test_a_geometry_of_other_shapes_is_refused():
    """As when a release of transformers caches latents that another expanded."""
    model = tiny_model("bloom")
    geometry = inspect_model(model)
    layers = tuple(layer.model_copy(update={"head_dim": 8}) for layer in geometry.layers)
    with pytest.raises(ModelError, match="caches keys and values of other shapes than at calibration"):
        check_generation(model, geometry.model_copy(update={"layers": layers}))


def test_that_it_is_slower_is_said_once(caplog):
    model = tiny_model("bloom")
    with caplog.at_level(logging.WARNING, logger="kvq_calib"):
        for _ in range(2):
            inspect_model(model)
            check_generation(model, inspect_model(model))
    (line,) = [record.getMessage() for record in caplog.records if "dequantizes all" in record.getMessage()]
    assert "decoding is slower" in line
    assert "do not call transformers' attention interface" in line


def test_what_is_read_back_is_what_was_packed():
    """Materialized pages of several sequences, with padding and sinks, against the quantizers themselves."""
    model = tiny_model("falcon")
    spec = recipe(key={"bits": 4}, value={"bits": 3}, sink_tokens=2, recent_tokens=3)
    cache = KVQCache(artifact_for(model, spec), model)
    seen = []
    for layer in cache.packed:
        update = layer.update

        def watched(keys, values, *args, update=update, **kwargs):
            whole = update(keys, values, *args, **kwargs)
            seen.append((values, whole[1]))
            return whole

        layer.update = watched
    ids = token_ids(2, 300, seed=2)
    logits_after(model, cache, ids)
    for layer, (new, whole) in zip(cache.packed, seen, strict=True):
        quantizer = layer.quantizers[1]
        assert whole.shape == new.shape
        packed = cache.table.packed_slots
        assert packed == 288
        assert torch.equal(whole[:, :, :2], new[:, :, :2].half().float())  # sinks
        assert torch.equal(whole[:, :, packed:], new[:, :, packed:].half().float())
        expected = quantizer(new[:, :, :packed].half().float())[:, :, 2:]
        assert torch.allclose(whole[:, :, 2:packed], expected, atol=1e-5)


def test_a_materialized_cache_is_for_its_model():
    model, other = tiny_model("bloom"), tiny_model("bloom")
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model)
    with pytest.raises(Exception, match="this cache is for another model, or the model was detached"):
        logits_after(other, cache, token_ids(1, 4))
