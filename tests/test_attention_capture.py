import functools

import pytest
import torch
from custom_attention import CustomAttention, custom_model
from models_zoo import FAMILIES, tiny_model, token_ids
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, T5Config, T5ForConditionalGeneration

from kvq_calib.errors import ModelError
from kvq_calib.model.capture import capture, intercept
from kvq_calib.model.compat import cache_of, with_cache
from kvq_calib.model.inspect import inspect_model
from kvq_calib.model.intercept import intercept_calls
from kvq_calib.schema.geometry import LayerGeometry

pytestmark = pytest.mark.model
TOKENS = 24


def heads(x, num, dim):
    """[B, T, H, D] or [B, T, H * D] or [B, H, T, D] to [B, H, T, D]."""
    if x.ndim == 3:
        x = x.unflatten(-1, (num, dim))
    return x if x.shape[1] == num and x.shape[2] == TOKENS else x.transpose(1, 2)


class Oracle:
    """Pre-RoPE keys and values read from the projections of each family, not from the attention interface."""

    def __init__(self, model, family):
        self.keys, self.values, self.sources = {}, {}, {}
        config = model.config
        num = config.num_key_value_heads if family != "gpt_neox" else config.num_attention_heads
        queries = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // queries
        self.handles = []
        for module in model.modules():
            layer = getattr(module, "layer_idx", None)
            if family == "gpt_neox" and hasattr(module, "query_key_value"):

                def fused(mod, args, out, layer=layer):
                    _, k, v = out.unflatten(-1, (num, 3 * dim)).chunk(3, dim=-1)
                    self.keep(layer, out, k, v)

                self.hook(module.query_key_value, fused)
            elif family == "phi3" and hasattr(module, "qkv_proj"):

                def split(mod, args, out, layer=layer):
                    _, k, v = out.split([queries * dim, num * dim, num * dim], dim=-1)
                    self.keep(layer, out, k.unflatten(-1, (num, dim)), v.unflatten(-1, (num, dim)))

                self.hook(module.qkv_proj, split)
            elif hasattr(module, "k_proj"):
                source = module.k_norm if hasattr(module, "k_norm") else module.k_proj

                def key(mod, args, out, layer=layer):
                    self.keep_one(self.keys, ("k", layer), out, heads(out, num, dim), layer)

                def value(mod, args, out, layer=layer):
                    self.keep_one(self.values, ("v", layer), out, heads(out, num, dim), layer)

                self.hook(source, key)
                self.hook(module.v_proj, value)
        self.num, self.dim, self.queries, self.family = num, dim, queries, family

    def hook(self, module, function):
        self.handles.append(module.register_forward_hook(function))

    def keep_one(self, where, name, out, shaped, layer):
        if out.requires_grad:
            out.retain_grad()
        self.sources[name] = out
        where[layer] = shaped.detach()

    def keep(self, layer, out, k, v):
        self.keep_one(self.keys, ("qkv", layer), out, heads(k, self.num, self.dim), layer)
        self.values[layer] = heads(v, self.num, self.dim).detach()

    def gradients(self, layer):
        if ("qkv", layer) not in self.sources:
            return [heads(self.sources[kind, layer].grad, self.num, self.dim) for kind in ("k", "v")]
        grad = self.sources["qkv", layer].grad
        if self.family == "gpt_neox":
            _, k, v = grad.unflatten(-1, (self.num, 3 * self.dim)).chunk(3, dim=-1)
        else:
            sizes = [self.queries * self.dim, self.num * self.dim, self.num * self.dim]
            _, k, v = grad.split(sizes, dim=-1)
        return [heads(k, self.num, self.dim), heads(v, self.num, self.dim)]

    def remove(self):
        for handle in self.handles:
            handle.remove()


def close(got, want, relative=1e-5):
    return got.shape == want.shape and float((got - want).abs().max()) <= relative * float(want.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_values_and_gradients_match_the_projections(family):
    model, ids = tiny_model(family), token_ids(2, TOKENS)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    oracle = Oracle(model, family)
    embedding = model.get_input_embeddings().register_forward_hook(
        lambda m, a, out: out.detach().requires_grad_()
    )
    forward, backward = {}, {}

    def on_forward(kv):
        assert kv.layer not in forward
        assert not kv.keys.requires_grad
        forward[kv.layer] = (kv.keys.clone(), kv.values.clone())

    def on_backward(kv, grad_keys, grad_values):
        assert kv.layer not in backward
        assert close(kv.keys, oracle.keys[kv.layer])
        backward[kv.layer] = (grad_keys.clone(), grad_values.clone())

    with capture(model, on_forward, on_backward) as geometry:
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    oracle.remove()
    embedding.remove()

    layers = model.config.num_hidden_layers
    assert torch.equal(logits.detach(), plain)
    assert len(geometry.layers) == layers
    assert list(forward) == list(range(layers))
    assert list(backward) == list(reversed(range(layers)))
    for layer in range(layers):
        assert close(forward[layer][0], oracle.keys[layer])
        assert close(forward[layer][1], oracle.values[layer])
        want_keys, want_values = oracle.gradients(layer)
        assert float(want_keys.abs().max()) > 0
        assert close(backward[layer][0], want_keys)
        assert close(backward[layer][1], want_values)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "stablelm", "glm", "smollm3"])
def test_replaced_keys_and_values_reach_attention(family):
    model, ids = tiny_model(family), token_ids(1, TOKENS)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with intercept(model, lambda kv: (kv.keys, kv.values)):
            same = model(ids, use_cache=False).logits
        with intercept(model, lambda kv: (kv.keys, torch.zeros_like(kv.values))):
            without = model(ids, use_cache=False).logits
        with intercept(model, lambda kv: (2 * kv.keys, kv.values)):
            sharper = model(ids, use_cache=False).logits
    assert close(same, plain, 1e-4)
    assert not close(without, plain, 1e-2)
    assert not close(sharper, plain, 1e-3)


def test_zero_values_make_attention_mute():
    # With all values zero a token learns nothing of the others: its logits depend on it alone.
    model = tiny_model("llama")
    a, b = token_ids(1, 8, seed=1), token_ids(1, 8, seed=2)
    b[:, -1] = a[:, -1]
    with torch.no_grad(), intercept(model, lambda kv: (kv.keys, torch.zeros_like(kv.values))):
        assert torch.allclose(
            model(a, use_cache=False).logits[:, -1], model(b, use_cache=False).logits[:, -1]
        )


def test_transform_is_differentiable():
    model, ids = tiny_model("llama").double(), token_ids(1, TOKENS)

    def loss(factor):
        with intercept(model, lambda kv: (factor * kv.keys, kv.values)):
            logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])

    factor = torch.ones((), requires_grad=True, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss(factor), factor)
    difference = (loss(1.01) - loss(0.99)) / 0.02  # wide steps: the model's norms compute in float32
    assert float(gradient) == pytest.approx(float(difference), rel=2e-3)


def snapshot(model):
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return {
        "implementation": [config._attn_implementation for config in configs.values()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs))
            for m in model.modules()
        ],
        "forwards": [m.__dict__.get("forward") for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "frozen": [p.requires_grad for p in model.parameters()],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_left_as_it_was(family):
    model, ids = tiny_model(family), token_ids(1, 8)
    before = snapshot(model)
    with capture(model, lambda kv: None), torch.no_grad():
        assert snapshot(model) != before
        model(ids, use_cache=False)
    assert snapshot(model) == before

    def fail(kv):
        raise KeyError("from a callback")

    with pytest.raises(KeyError, match="from a callback"), capture(model, fail):
        model(ids, use_cache=False)
    assert snapshot(model) == before


def test_contexts_nest_and_do_not_touch_other_models():
    model, other, ids = tiny_model("llama"), tiny_model("llama", seed=1), token_ids(1, 8)
    outer, inner = [], []
    with torch.no_grad(), capture(model, lambda kv: outer.append(kv.layer)):
        with capture(model, lambda kv: inner.append(kv.layer)):
            model(ids, use_cache=False)
            other(ids, use_cache=False)
        model(ids, use_cache=False)
    assert inner == [0, 1]
    assert outer == [0, 1, 0, 1]


def test_padding_mask_still_reaches_the_original_implementation():
    for family in ("llama", "gemma2"):  # sdpa and eager
        model, ids = tiny_model(family), token_ids(2, 10)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        with torch.no_grad():
            plain = model(ids, attention_mask=mask, use_cache=False).logits
            with capture(model, lambda kv: None):
                seen = model(ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(seen, plain)


def test_filled_cache_is_refused():
    model, ids = tiny_model("llama"), token_ids(1, 8)
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        with pytest.raises(ModelError, match="use_cache=False"), capture(model, lambda kv: None):
            model(ids, **with_cache(cache))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
        ("llama4_text", {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64}),
        ("hunyuan_v1_dense", {"head_dim": 16}),
    ],
)
def test_positions_that_cannot_be_undone_stay_in_the_keys(family, overrides):
    model = tiny_model(family, **overrides)
    before = snapshot(model)
    assert [layer.rope for layer in inspect_model(model).layers] == [None, None]
    assert snapshot(model) == before
    ids, seen = token_ids(1, 8), []
    with torch.no_grad(), capture(model, lambda kv: seen.append(kv.keys is kv.rotated_keys)):
        model(ids, use_cache=False)
    assert seen == [True, True]


def test_what_cannot_be_captured_is_refused_and_left_as_it_was():
    class Outside(CustomAttention):
        """Hands keys and values to the cache, and attends to others without the interface."""

        def forward(self, *args, **kwargs):
            raise NotImplementedError("no such thing")

    model = custom_model(Outside)
    before = snapshot(model)
    with pytest.raises(
        ModelError,
        match=r"does not run with this configuration and transformers [\d.]+ \(NotImplementedError: no such thing\)$",
    ):
        inspect_model(model)
    assert snapshot(model) == before


def test_encoder_decoder_is_refused():
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        inspect_model(T5ForConditionalGeneration(config).eval())


def test_geometry_of_a_grouped_query_model_and_its_reuse():
    model = tiny_model("mistral")
    found = inspect_model(model)
    assert found.layers[1] == LayerGeometry(
        num_kv_heads=2, num_query_heads=4, head_dim=16, sliding_window=16, rope=0
    )
    calls = []
    with intercept_calls(model, lambda call: calls.append(call)):
        assert inspect_model(model) is found  # kept: no further pass
    assert calls == []


def test_absolute_positions_need_no_rope():
    model, ids = tiny_model("gpt2", n_embd=64, n_layer=2, n_head=4), token_ids(1, 8)
    assert [layer.rope for layer in inspect_model(model).layers] == [None, None]
    seen = {}
    with torch.no_grad(), capture(model, lambda kv: seen.update({kv.layer: kv.keys is kv.rotated_keys})):
        model(ids, use_cache=False)
    assert seen == {0: True, 1: True}


def test_half_precision_model_is_captured():
    model, ids = tiny_model("llama").bfloat16(), token_ids(1, 8)
    kinds = []
    with torch.no_grad(), capture(model, lambda kv: kinds.append((kv.keys.dtype, kv.values.dtype))):
        model(ids, use_cache=False)
    assert kinds == [(torch.float32, torch.bfloat16)] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_each_layer_is_reported_once_where_layers_are_recomputed(reentrant):
    model, ids = tiny_model("llama"), token_ids(1, TOKENS)
    hook = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
    forward, gradients = [], []

    def run():
        backward = {}
        with capture(
            model, lambda kv: forward.append(kv.layer), lambda kv, *g: backward.update({kv.layer: g})
        ):
            model(ids, use_cache=False).logits.log_softmax(-1)[..., 0].mean().backward()
        gradients.append(backward)

    run()
    for layer in model.model.layers:
        layer.forward = functools.partial(
            lambda plain, *args, **kwargs: checkpoint(
                functools.partial(plain, **kwargs), *args, use_reentrant=reentrant
            ),
            layer.forward,
        )
    run()
    hook.remove()
    assert forward == [0, 1, 0, 1]
    assert list(gradients[0]) == list(gradients[1]) == [1, 0]
    for layer, plain in gradients[0].items():
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients[1][layer], strict=True))
