"""Gradients of the language-modelling loss with respect to cached keys and values.

KVQuant (Hooper et al., 2024, section 3.3) weights each element by the diagonal of the Fisher information,
estimated as the squared gradient of the loss. Parameters are frozen and only activations get gradients, so the backward
pass costs about as much as the forward pass. Gradients are passed on as they are computed.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kvq_calib.errors import CalibrationError
from kvq_calib.model.backward import activations_only, head_logits, is_splittable, recomputed_layers
from kvq_calib.model.capture import LayerKV, OnBackward, OnForward, capture
from kvq_calib.model.placement import is_offloaded

__all__ = ["fisher_pass"]

_CHUNK = 256
"""Number of tokens whose logits are computed at a time."""


def fisher_pass(
    model: nn.Module,
    ids: Tensor,
    on_kv: OnBackward,
    *,
    on_forward: OnForward | None = None,
    recompute: bool = False,
) -> float:
    """Run windows of tokens forward and backward, and pass every layer's gradients to `on_kv`.

    The gradient of a window is that of the mean of its T - 1 next-token cross-entropies, in nats. Windows in a batch
    are independent, so each row of a gradient belongs to one window. Squares from batches of windows of equal length
    may be added.

    Args:
        model: causal language model in eval mode.
        ids: int64 [B, T], T at least 2, without padding.
        on_kv: called once per layer, last layer first, with (layer, gradient of pre-RoPE keys, gradient of values).
            Gradients are float32 (or wider) [B, Hkv, T, D]. It must not keep references.
        on_forward: called with every layer during the forward pass.
        recompute: keep only the input of each decoder layer, and compute the layer again in the backward pass. This is
            always done for a model with offloaded weights, because the graph of a whole pass would hold all weights.

    Returns:
        The mean loss of the batch in nats per predicted token.

    Raises:
        CalibrationError: loss or gradients are not finite, or a layer gets none.
        ModelError: the model cannot be captured.
    """
    if model.training:
        raise ValueError("the model must be in eval mode")
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"ids must be [B, T] with T of at least 2, not {tuple(ids.shape)}")
    predicted = ids.shape[1] - 1
    reached: set[int] = set()

    def scale(kv: LayerKV, grad_keys: Tensor, grad_values: Tensor) -> None:
        # The backward pass uses the sum over tokens, because gradients of the mean may underflow in float16.
        grad_keys, grad_values = _wide(grad_keys) / predicted, _wide(grad_values) / predicted
        if not bool(torch.isfinite(grad_keys.sum() + grad_values.sum())):
            raise CalibrationError(f"gradients of layer {kv.layer} are not finite; try --dtype float32")
        reached.add(kv.layer)
        on_kv(kv, grad_keys, grad_values)

    recompute = recompute or is_offloaded(model)
    split = is_splittable(model)
    with ExitStack() as stack:
        stack.enter_context(activations_only(model))
        geometry = stack.enter_context(capture(model, on_forward, scale, recompute=recompute))
        if recompute:
            stack.enter_context(recomputed_layers(model))
        stack.enter_context(torch.enable_grad())
        total = _split_backward(model, ids) if split else _plain_backward(model, ids)
    if missed := sorted(set(range(len(geometry.layers))) - reached):
        raise CalibrationError(
            f"layer {missed[0]} gets no gradient, because the model computes it without; use a nuq* recipe with "
            "--weights uniform, or a configuration in which gradients reach every layer"
        )
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
    """The same with the logits of `_CHUNK` tokens at a time, because all logits may take gigabytes."""
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
