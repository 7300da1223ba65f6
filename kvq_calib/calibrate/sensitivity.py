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
from kvq_calib.calibrate.divergence import divergence, unquantized
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.model.backward import activations_only, is_splittable, recomputed_layers
from kvq_calib.model.placement import input_device
from kvq_calib.schema.cached import CachedTensor
from kvq_calib.schema.spec import KINDS, Kind

__all__ = ["ErrorSensitivity"]


class ErrorSensitivity:
    """Measures the derivative of the KL divergence with respect to a factor on the errors of each head.

    The unquantized model's last hidden states are computed once for all measurements. (Logits would be too large.)

    Args:
        model: causal language model in eval mode.
        pieces: token ids int64 ``[N, T]``, which ranks share.
        recompute: recompute layers in the backward pass.
    """

    def __init__(self, model: Any, pieces: Tensor, *, recompute: bool = False) -> None:
        self._model, self._recompute = model, recompute
        self._pieces = pieces.to(input_device(model))
        self._references: dict[int, Tensor] = {}

    def measure(self, draft: KVArtifact) -> dict[CachedTensor, Tensor]:
        """Measure the errors of these parameters: nats per predicted token, float64 ``[H]`` by layer and kind."""
        layers = draft.geometry.layers
        heads = max(layer.num_kv_heads for layer in layers)
        factors = torch.ones(len(layers), len(KINDS), heads, device=self._pieces.device, requires_grad=True)
        quantize: list[Mapping[Kind, Callable[[Tensor], Tensor]]] = [
            {kind: _scaled(factors[layer, KINDS.index(kind)], quantizer) for kind, quantizer in own.items()}
            for layer, own in enumerate(draft.quantizers())
        ]
        rank, ranks = world()
        with ExitStack() as stack:
            stack.enter_context(activations_only(self._model))
            if self._recompute:
                stack.enter_context(recomputed_layers(self._model))
            stack.enter_context(torch.enable_grad())
            for number in range(rank, len(self._pieces), ranks):
                ids, reference = self._pieces[number, None], self._reference(number)
                divergence(self._model, ids, draft.spec, quantize, backward=True, reference=reference)
        found = torch.zeros_like(factors) if factors.grad is None else factors.grad
        found = found.double().cpu()
        reduce_over_ranks(found, "sum")
        found /= len(self._pieces)
        return {
            CachedTensor(layer, kind): found[layer, number, : shape.num_kv_heads]
            for layer, shape in enumerate(layers)
            for number, kind in enumerate(KINDS)
        }

    def _reference(self, number: int) -> Tensor | None:
        """The unquantized model's last hidden states for a piece, if its head can be applied to them."""
        if not is_splittable(self._model):
            return None
        if number not in self._references:
            self._references[number] = unquantized(self._model, self._pieces[number, None])
        return self._references[number]


def _scaled(factors: Tensor, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
    """Adds the errors of quantization, each head's multiplied by its factor."""

    def through(x: Tensor) -> Tensor:
        with torch.no_grad():
            error = quantizer.to(x.device)(x) - x
        factor = factors[: x.shape[1]].to(x.device)
        return x.float() + factor[:, None, None] * error

    return through
