"""Different head sizes of keys and values, and of layers."""

from __future__ import annotations

import pytest
import torch
from custom_attention import custom_model
from models_zoo import tiny_model, token_ids
from transformers import CONFIG_MAPPING

from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.evaluate.prefill import PrefillQuantizer
from kvq_calib.model.capture import capture, intercept
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import check_generation, inspect_model
from kvq_calib.runtime import KVQCache, attached
from kvq_calib.schema.geometry import LayerGeometry
from kvq_calib.schema.recipe import calibration_config

pytestmark = pytest.mark.model
IDS = token_ids(2, 24)


def sizes(model):
    return [(layer.head_dim, layer.value_head_dim) for layer in inspect_model(model).layers]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_geometry_and_generation(implementation):
    model = custom_model(value_head_dims=[8, 8], implementation=implementation)
    geometry = inspect_model(model)
    assert geometry.layers == (
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=16, value_head_dim=8, rope=0),
    ) * len(geometry.layers)
    check_generation(model, geometry)


def test_layers_that_differ():
    model = custom_model(head_dims=[16, 32], value_head_dims=[24, 16])
    assert sizes(model) == [(16, 24), (32, 16)]
    found = inspect_model(model)
    assert [layer.rope for layer in found.layers] == [0, 0]  # the wider one is rotated in part, alike
    check_generation(model, found)
    assert sizes(custom_model()) == [(16, None), (16, None)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_capture_with_gradients(implementation):
    model = custom_model(value_head_dims=[8, 24], implementation=implementation)
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
    leaf = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
    projected, forward, backward = {}, {}, {}

    def keep(index, out):
        if out.requires_grad:
            out.retain_grad()
            projected[index] = out

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out, index=index: keep(index, out))
    with capture(
        model,
        lambda kv: forward.update({kv.layer: (kv.keys.shape, kv.values.clone())}),
        lambda kv, keys, values: backward.update({kv.layer: (keys.shape, values.clone())}),
    ):
        logits = model(IDS, use_cache=False).logits
        logits.log_softmax(-1)[..., 0].mean().backward()
    leaf.remove()
    assert torch.equal(logits.detach(), want)
    for layer, size in enumerate([8, 24]):
        assert forward[layer][0] == backward[layer][0] == (2, 2, 24, 16)

        def by_head(x, size=size):
            return x.unflatten(-1, (2, size)).transpose(1, 2)

        assert torch.equal(forward[layer][1], by_head(projected[layer]))
        assert torch.allclose(backward[layer][1], by_head(projected[layer].grad), rtol=1e-4, atol=1e-7)


def test_replaced_keys_and_values_reach_attention():
    model = custom_model(value_head_dims=[8, 24], head_dims=[16, 32])
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        with intercept(model, lambda kv: (kv.keys, kv.values)):
            same = model(IDS, use_cache=False).logits
        with intercept(model, lambda kv: (kv.keys, torch.zeros_like(kv.values))):
            without = model(IDS, use_cache=False).logits
        alone = model(IDS[:, :1], use_cache=False).logits
        with intercept(model, lambda kv: (2 * kv.keys, kv.values)):
            sharper = model(IDS, use_cache=False).logits
            assert torch.allclose(model(IDS[:, :1], use_cache=False).logits, alone)  # one token sees itself
    assert torch.allclose(same, want, atol=1e-4 * float(want.abs().max()))
    assert not torch.allclose(without, want, rtol=0.1)
    assert not torch.allclose(sharper, want, rtol=0.01)


@pytest.mark.parametrize("recipe", ["uniform4", "nuq4-1p"])
def test_calibration_prefill_evaluation_and_the_packed_cache_agree(recipe):
    model = custom_model(value_head_dims=[8, 24], head_dims=[16, 32])
    text = token_ids(3, 96)
    artifact = calibrate(
        model,
        TokenWindows(text, {"sha256": "x"}),
        {"r": calibration_config(recipe)},
        model_id="x",
        model_config=model_fingerprint(model),
    ).artifacts["r"]
    ids = text[:1, :64]  # whole blocks, so that nothing is exact but the first tokens
    with torch.no_grad():
        want = model(ids, use_cache=False).logits.log_softmax(-1)

        def divergence(logits):
            return float((want.exp() * (want - logits.log_softmax(-1))).sum(-1).mean())

        with intercept(model, PrefillQuantizer.of(artifact, model)):
            prefill = divergence(model(ids, use_cache=False).logits)
        with attached(model):
            packed = divergence(model(ids, **with_cache(KVQCache(artifact, model))).logits)
        with intercept(model, lambda kv: (kv.keys, torch.zeros_like(kv.values))):
            nothing = divergence(model(ids, use_cache=False).logits)
    assert 0 < prefill < 0.2 * nothing
    # Numbers half way between two levels fall either way with the rounding of un-rotation.
    assert packed == pytest.approx(prefill, rel=0.1)


@pytest.mark.skipif("mimo_v2_flash" not in CONFIG_MAPPING, reason="needs a newer transformers")
def test_a_family_that_has_both():
    model = tiny_model(
        "mimo_v2_flash",
        head_dim=16,
        v_head_dim=8,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=16,
    )
    found = inspect_model(model)
    assert all(layer.value_head_dim == 8 and layer.head_dim == 16 for layer in found.layers)
    assert {layer.num_kv_heads for layer in found.layers} == {2, 4}
    check_generation(model, found)
    assert model_fingerprint(model)["value_head_dim"] == 8


def test_fingerprint_of_configurations_that_differ_by_layer():
    base = model_fingerprint(tiny_model("llama"))
    assert "value_head_dim" not in base
    model = tiny_model("llama")

    class Differing:
        """A configuration that has, as newer releases do, some attributes by layer only."""

        per_layer_config = tuple(
            type("Layer", (), {"head_dim": size, "num_key_value_heads": 2}) for size in (16, 32)
        )

        def __getattr__(self, name):
            if name == "head_dim":
                raise ValueError("ambiguous")
            return getattr(tiny_model("llama").config, name)

        def get_text_config(self, decoder=None):
            return self

    model.config = Differing()
    found = model_fingerprint(model)
    assert found["head_dim"] == [16, 32]
    assert found["num_key_value_heads"] == 2
    assert found["sha256"] != base["sha256"]
