"""Gradients of the language-modelling loss with respect to cached keys and values.

KVQuant (Hooper et al., 2024, section 3.3) weights each element by the diagonal of the Fisher information,
estimated as the squared gradient of the loss. Only activations get gradients here: parameters are frozen, so
the backward pass costs about as much as the forward pass, and gradients are handed on as they appear.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer

from kvq_calib.errors import CalibrationError, ModelError
from kvq_calib.model.capture import LayerKV, OnBackward, OnForward, capture
from kvq_calib.model.intercept import carried
from kvq_calib.model.placement import input_device, is_offloaded

__all__ = ["activations_only", "fisher_pass", "head_logits", "is_splittable", "recomputed_layers"]

_CHUNK = 256
"""Tokens whose logits exist at one time."""

_SPLITTABLE: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def fisher_pass(
    model: nn.Module,
    ids: Tensor,
    on_kv: OnBackward,
    *,
    on_forward: OnForward | None = None,
    recompute: bool = False,
) -> float:
    """Run windows of tokens forward and backward; hand every layer's gradients to `on_kv`.

    The gradient of a window is that of the mean of its T - 1 next-token cross-entropies, in nats. Windows of
    a batch do not mix, so each row of a gradient belongs to its own window's mean alone: squares of any
    batches of windows of one length may simply be added.

    Args:
        model: causal language model in eval mode.
        ids: int64 [B, T], T at least 2, without padding.
        on_kv: called with (layer, gradient of pre-RoPE keys, gradient of values), gradients float32 (or
            wider) [B, Hkv, T, D], once per layer, last layer first; must keep no reference.
        on_forward: called with every layer during the forward pass.
        recompute: keep only the input of each decoder layer and compute the layer again in the backward pass. A
            model with offloaded weights always does: the graph of a whole pass would hold all of them.

    Returns:
        The mean loss of the batch in nats per predicted token.

    Raises:
        CalibrationError: loss or gradients are not finite.
        ModelError: the model cannot be captured.
    """
    if model.training:
        raise ValueError("the model must be in eval mode")
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"ids must be [B, T] with T of at least 2, not {tuple(ids.shape)}")
    predicted = ids.shape[1] - 1

    def scale(kv: LayerKV, grad_keys: Tensor, grad_values: Tensor) -> None:
        # The backward pass runs on the sum over tokens, whose gradients do not underflow in float16.
        grad_keys, grad_values = _wide(grad_keys) / predicted, _wide(grad_values) / predicted
        if not bool(torch.isfinite(grad_keys.sum() + grad_values.sum())):
            raise CalibrationError(f"gradients of layer {kv.layer} are not finite; try --dtype float32")
        on_kv(kv, grad_keys, grad_values)

    recompute = recompute or is_offloaded(model)
    split = is_splittable(model)
    with ExitStack() as stack:
        stack.enter_context(activations_only(model))
        stack.enter_context(capture(model, on_forward, scale, recompute=recompute))
        if recompute:
            stack.enter_context(recomputed_layers(model))
        stack.enter_context(torch.enable_grad())
        total = _split_backward(model, ids) if split else _plain_backward(model, ids)
    return total / (ids.shape[0] * predicted)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        _wide(logits).flatten(0, 1), targets.to(logits.device).flatten(), reduction="sum"
    )


def _finite(total: float) -> float:
    if not (total < float("inf")):  # false for NaN too
        raise CalibrationError("the model's loss is not finite; try --dtype float32")
    return total


def _plain_backward(model: nn.Module, ids: Tensor) -> float:
    loss = _loss_sum(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    total = _finite(float(loss.detach()))
    loss.backward()
    return total


def _split_backward(model: nn.Module, ids: Tensor) -> float:
    """Do the same with the logits of `_CHUNK` tokens at a time; all of them may take gigabytes."""
    body: Any = model.base_model
    output = body(input_ids=ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    gradient = torch.zeros_like(hidden)
    total = 0.0
    last = ids.shape[1] - 1
    for start in range(0, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        piece = hidden[:, start:stop].detach().requires_grad_()
        logits = head_logits(model, type(output), piece, ids[:, start:stop])
        loss = _loss_sum(logits, ids[:, start + 1 : stop + 1])
        total += float(loss.detach())
        (gradient[:, start:stop],) = torch.autograd.grad(loss, piece)
    _finite(total)
    hidden.backward(gradient)
    return total


def head_logits(model: nn.Module, output: Callable[..., Any], hidden: Tensor, ids: Tensor) -> Tensor:
    """Return the model's logits for final hidden states.

    The model's own forward computes them, with its body replaced by one that returns `hidden`: so whatever a
    family does to its logits (softcap, scale, bias) is done.
    """
    body: Any = model.base_model
    with _instance_forward(body, lambda *args, **kwargs: output(last_hidden_state=hidden)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def _instance_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module object another `forward`."""
    previous = module.__dict__.get("forward")  # accelerate's hooks keep theirs here
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def is_splittable(model: nn.Module) -> bool:
    """Whether body and head called apart give the model's logits; tried once per model on a few tokens."""
    known = _SPLITTABLE.get(model)
    if known is None:
        known = _SPLITTABLE[model] = _try_split(model)
    return known


def _try_split(model: nn.Module) -> bool:
    body: Any = model.base_model
    if body is model:
        return False
    ids = torch.arange(1, 8, device=input_device(model))[None]
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        try:
            output = body(input_ids=ids, use_cache=False)
            hidden = output.last_hidden_state
            pieces = [
                head_logits(model, type(output), hidden[:, s], ids[:, s]) for s in (slice(0, 3), slice(3, 7))
            ]
        except Exception:  # whatever a family's forward makes of it, the plain loss is right
            return False
    got = torch.cat(pieces, dim=1)
    tolerance = max(1e-4, 8 * float(torch.finfo(want.dtype).eps)) * float(want.abs().max())
    return got.shape == want.shape and float((got - want).abs().max()) <= tolerance


@contextmanager
def activations_only(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters and let gradients start at the embedded tokens."""

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_() if torch.is_grad_enabled() else output

    unfrozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(leaf)
    try:
        for parameter in unfrozen:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in unfrozen:
            parameter.requires_grad_(True)


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Checkpoint every decoder layer.

    transformers' own switch works in training mode only, which would turn dropout on. A layer is computed again to its
    end, though its last product is not needed: only then do accelerate's hooks let offloaded weights go.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers that can be recomputed; leave recompute off")

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            again = carried(forward)  # by autograd, in a thread of its own where the model is on a GPU
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    with ExitStack() as stack:
        if is_offloaded(model):
            stack.enter_context(set_checkpoint_early_stop(False))
        for layer in layers:
            stack.enter_context(_instance_forward(layer, checkpointed(layer.forward)))
        yield
