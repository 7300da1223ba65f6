"""Measures the cost of the errors of each head's keys and values on the model's output.

The weighted error of an allocation is a second-order estimate, separately for each head. Here all heads are measured
together, at their real errors. The quantized keys of every head, and the values, become ``x + a (x' - x)`` with a
separate factor ``a = 1``. One backward pass of the KL divergence gives its derivative with respect to every ``a``. If
an error costs ``c a^2``, the derivative is ``2 c``. Interactions between the errors of heads and layers are included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.distributed import reduce_over_ranks, world
from kvq_calib.calibrate.divergence import divergence
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.model.backward import activations_only, recomputed_layers
from kvq_calib.model.placement import input_device
from kvq_calib.schema.cached import CachedTensor
from kvq_calib.schema.spec import KINDS, Kind

__all__ = ["error_sensitivity"]


def error_sensitivity(
    model: Any, pieces: Tensor, draft: KVArtifact, *, recompute: bool = False
) -> dict[CachedTensor, Tensor]:
    """Derivative of the KL divergence with respect to a factor on the errors of each head's keys, and of its values.

    Args:
        model: causal language model in eval mode.
        pieces: token ids int64 ``[N, T]``, which ranks share.
        draft: the parameters to measure.
        recompute: recompute layers in the backward pass.

    Returns:
        Nats per predicted token, float64 ``[H]`` by layer and kind.
    """
    geometry = draft.geometry
    device = input_device(model)
    heads = max(layer.num_kv_heads for layer in geometry.layers)
    factors = torch.ones(len(draft.layers), len(KINDS), heads, device=device, requires_grad=True)

    def scaled(layer: int, kind: Kind, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
        def through(x: Tensor) -> Tensor:
            with torch.no_grad():
                error = quantizer.to(x.device)(x) - x
            factor = factors[layer, KINDS.index(kind), : x.shape[1]].to(x.device)
            return x.float() + factor[:, None, None] * error

        return through

    quantize: list[Mapping[Kind, Callable[[Tensor], Tensor]]] = [
        {kind: scaled(layer, kind, quantizer) for kind, quantizer in own.items()}
        for layer, own in enumerate(draft.quantizers())
    ]
    rank, ranks = world()
    with ExitStack() as stack:
        stack.enter_context(activations_only(model))
        if recompute:
            stack.enter_context(recomputed_layers(model))
        stack.enter_context(torch.enable_grad())
        for piece in pieces[rank::ranks]:
            divergence(model, piece[None].to(device), draft.spec, quantize, backward=True)
    found = torch.zeros_like(factors) if factors.grad is None else factors.grad
    found = found.double().cpu()
    reduce_over_ranks(found, "sum")
    found /= len(pieces)
    return {
        CachedTensor(layer, kind): found[layer, number, : shape.num_kv_heads]
        for layer, shape in enumerate(geometry.layers)
        for number, kind in enumerate(KINDS)
    }
