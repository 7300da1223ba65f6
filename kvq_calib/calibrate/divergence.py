"""KL divergence from a model's predictions to those with quantized keys and values, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvq_calib.codec.quantizer import roundtrip_storage
from kvq_calib.errors import CalibrationError
from kvq_calib.model.backward import head_logits, is_splittable
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.schema.spec import KINDS, Kind, KVCacheSpec

__all__ = ["Quantize", "divergence", "unquantized"]

Quantize = Sequence[Mapping[Kind, Callable[[Tensor], Tensor]]]
"""Quantizes and dequantizes ``[B, H, T, D]``, by layer and kind."""

#: Number of tokens whose logits are computed at a time.
_CHUNK = 256


@torch.no_grad()
def unquantized(model: Any, ids: Tensor) -> Tensor:
    """The unquantized model's predictions for ``ids [B, T]``, the reference of :func:`divergence`.

    Returns:
        The last hidden states ``[B, T, hidden]`` if the model's head can be applied to a part of them, else the logits.
    """
    if not is_splittable(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def divergence(
    model: Any,
    ids: Tensor,
    cache: KVCacheSpec,
    quantize: Quantize,
    *,
    backward: bool = False,
    reference: Tensor | None = None,
) -> float:
    """KL divergence from the model's predictions to those with quantized keys and values.

    Args:
        model: causal language model in eval mode.
        ids: int64 ``[B, T]``.
        cache: spec of the cache; its sink tokens stay exact.
        quantize: quantizes and dequantizes ``[B, H, T, D]``, by layer and kind.
        backward: whether to add the gradient of the divergence to the parameters that ``quantize`` trains.
        reference: result of :func:`unquantized`, if known.

    Returns:
        Nats per predicted token.

    Raises:
        CalibrationError: the divergence is not finite.
    """
    sinks = cache.sink_tokens

    def transform(kv: LayerKV) -> tuple[Tensor, Tensor]:
        seen = []
        for kind, x in zip(KINDS, (kv.keys, kv.values), strict=True):
            exact = roundtrip_storage(x[:, :, :sinks], cache.storage_dtype).float()
            seen.append(torch.cat([exact, quantize[kv.layer][kind](x)[:, :, sinks:]], dim=2))
        return seen[0], seen[1]

    split = is_splittable(model)
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    total = 0.0
    if reference is None:
        reference = unquantized(model, ids)
    with torch.set_grad_enabled(backward), intercept(model, transform):
        output = (model.base_model if split else model)(input_ids=ids, use_cache=False)
    last = output.last_hidden_state if split else output.logits
    gradient = torch.zeros_like(last)
    for start in range(0, ids.shape[1] - 1, _CHUNK):
        part = slice(start, min(start + _CHUNK, ids.shape[1] - 1))
        piece = last[:, part].detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            changed, wanted = piece, reference[:, part]
            if split:
                changed = head_logits(model, type(output), piece, ids[:, part])
                with torch.no_grad():
                    wanted = head_logits(model, type(output), wanted, ids[:, part])
            log_p, log_q = wanted.float().log_softmax(-1), changed.float().log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum() / predicted
        total += float(loss.detach())
        if backward:
            (gradient[:, part],) = torch.autograd.grad(loss, piece)
    if not math.isfinite(total):
        raise CalibrationError("the divergence of the quantized model is not finite; try --dtype float32")
    if backward:
        with intercept(model, transform):  # recomputed layers must be quantized again
            last.backward(gradient)
    return total
