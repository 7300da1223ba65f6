import pytest
import torch
from models_zoo import FAMILIES, tiny_model, token_ids
from test_attention_capture import snapshot
from transformers import T5Config, T5ForConditionalGeneration

from kvq_calib.calibrate import gradients as passes
from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.errors import CalibrationError, ModelError
from kvq_calib.model import backward

pytestmark = pytest.mark.model


def run(model, ids, **options):
    gradients, forward = {}, []

    def on_kv(kv, grad_keys, grad_values):
        assert kv.layer not in gradients
        assert grad_keys.shape == grad_values.shape == kv.keys.shape
        assert not grad_keys.requires_grad
        assert not grad_values.requires_grad
        gradients[kv.layer] = (grad_keys.clone(), grad_values.clone(), kv.keys.clone())

    loss = fisher_pass(model, ids, on_kv, on_forward=lambda kv: forward.append(kv.layer), **options)
    return loss, gradients, forward


def plain(model, ids):
    """The same by autograd on keys and values that are replaced by leaves, and the model's own loss."""
    from kvq_calib.model.capture import intercept

    leaves = {}

    def transform(kv):
        leaves[kv.layer] = [kv.keys.detach().requires_grad_(), kv.values.detach().requires_grad_()]
        offset = [
            leaf - leaf.detach() for leaf in leaves[kv.layer]
        ]  # zero, so that earlier layers get theirs
        return kv.keys + offset[0], kv.values + offset[1]

    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
    with intercept(model, transform):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    hook.remove()
    return float(loss.detach()), {layer: [leaf.grad for leaf in pair] for layer, pair in leaves.items()}


def worst(got, want):
    return max(
        float((a - b).abs().max()) / float(b.abs().max())
        for layer in want
        for a, b in zip(got[layer], want[layer], strict=False)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_models_own_loss_with_logits_in_pieces(family, monkeypatch):
    monkeypatch.setattr(passes, "_CHUNK", 5)
    model, ids = tiny_model(family), token_ids(1, 18)
    want_loss, want = plain(model, ids)
    before = snapshot(model)
    loss, gradients, forward = run(model, ids)
    layers = list(range(model.config.num_hidden_layers))
    assert backward._SPLITTABLE[model]  # no family falls back to whole logits
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert worst(gradients, want) < 1e-4
    assert forward == layers
    assert list(gradients) == layers[::-1]
    assert snapshot(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())

    again_loss, again, forward = run(model, ids, recompute=True)
    assert again_loss == loss
    assert forward == layers
    assert worst(again, gradients) < 1e-5
    assert snapshot(model) == before


def test_falls_back_to_whole_logits_where_a_body_cannot_be_called_alone(monkeypatch):
    model, ids = tiny_model("llama"), token_ids(1, 18)
    loss, gradients, _ = run(model, ids)
    plain_forward = type(model).forward
    body_alone = type(model.base_model).forward
    inside = []

    def whole(self, *args, **kwargs):
        inside.append(None)
        try:
            return plain_forward(self, *args, **kwargs)
        finally:
            inside.pop()

    def body(self, *args, **kwargs):
        if not inside:
            raise TypeError("only as a part of the whole")
        return body_alone(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", whole)
    monkeypatch.setattr(type(model.base_model), "forward", body)
    other = tiny_model("llama")
    other_loss, other_gradients, _ = run(other, ids)
    assert backward._SPLITTABLE[other] is False
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert worst(other_gradients, gradients) < 1e-5


def test_windows_of_a_batch_do_not_mix():
    model, ids = tiny_model("qwen3"), token_ids(3, 12)
    loss, together, _ = run(model, ids)
    alone = [run(model, ids[row : row + 1]) for row in range(3)]
    assert loss == pytest.approx(sum(one[0] for one in alone) / 3, rel=1e-5)
    for row, (_, gradients, _) in enumerate(alone):
        for layer, (keys, values, _) in gradients.items():
            assert torch.allclose(together[layer][0][row], keys[0], atol=1e-6)
            assert torch.allclose(together[layer][1][row], values[0], atol=1e-6)


def test_trainable_parameters_stay_trainable_and_get_no_gradient():
    model, ids = tiny_model("llama").requires_grad_(True), token_ids(1, 8)
    run(model, ids)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_nothing_is_kept_after_the_pass():
    import gc
    import weakref

    model, ids = tiny_model("llama"), token_ids(1, 8)
    held = []
    fisher_pass(model, ids, lambda kv, gk, gv: held.extend(map(weakref.ref, (kv.keys, kv.values, gk, gv))))
    gc.collect()
    assert held
    assert all(reference() is None for reference in held)


def test_recomputation_holds_no_layer_between_the_passes():
    import weakref

    model, ids = tiny_model("llama"), token_ids(1, 8)
    held, alive = [], []

    def on_kv(kv, grad_keys, grad_values):
        if not alive:  # the last layer, before the first was computed again
            alive.append(held[0]() is not None)

    fisher_pass(model, ids, on_kv, on_forward=lambda kv: held.append(weakref.ref(kv.values)), recompute=True)
    assert alive == [False]


def test_half_precision_gradients_follow_float32():
    model, ids = tiny_model("llama"), token_ids(1, 16)
    _, exact, _ = run(model, ids)
    _, rounded, _ = run(tiny_model("llama").bfloat16(), ids)
    for layer in exact:
        for a, b in zip(rounded[layer][:2], exact[layer][:2], strict=True):
            assert a.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_broken_numbers_are_reported():
    model, ids = tiny_model("llama"), token_ids(1, 8)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="loss is not finite"):
        run(model, ids)

    model = tiny_model("llama")

    def poison(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: grad * float("inf"))

    model.model.layers[1].self_attn.v_proj.register_forward_hook(poison)
    model.model.layers[0].mlp.register_forward_hook(poison)
    with pytest.raises(CalibrationError, match="gradients of layer 0 are not finite"):
        run(model, ids)


def test_wrong_use_is_refused():
    model, ids = tiny_model("llama"), token_ids(1, 8)
    with pytest.raises(ValueError, match="eval mode"):
        run(model.train(), ids)
    model.eval()
    with pytest.raises(ValueError, match="at least 2"):
        run(model, ids[:, :1])
    config = T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        run(T5ForConditionalGeneration(config).eval(), ids)


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_keeps_no_scores_and_no_mask_of_all_pairs_of_tokens(monkeypatch, recompute):
    """Memory grows with the length of a window and not with its square, so windows of 32K tokens are possible."""
    model, ids = tiny_model("llama"), token_ids(1, 40)
    plain_sdpa, masks, squares = torch.nn.functional.scaled_dot_product_attention, [], []

    def sdpa(query, key, value, attn_mask=None, **options):
        masks.append((attn_mask, options["is_causal"]))
        return plain_sdpa(query, key, value, attn_mask=attn_mask, **options)

    def look(tensor):
        if tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2] == ids.shape[1]:
            squares.append(tensor.shape)
        return tensor

    run(model, ids)  # looks the model over
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        run(model, ids, recompute=recompute)
    assert masks == [(None, True)] * (2 + 2 * recompute)
    assert not squares
