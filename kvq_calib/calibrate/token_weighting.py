"""Fits token weighting: the cost of a token's error by the size of its vector.

Squared gradients differ from token to token by orders of magnitude, because most of the attention goes to few tokens.
An encoder that chooses codes for 32 tokens at once could give those tokens smaller errors, but it does not know future
attention. The size of a token's vector predicts it: in many models, tokens that absorb unneeded attention have much
smaller values than others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.codec.token_weighting import SIZE_CLASSES, size_classes, squared_size

__all__ = ["TokenCosts"]

#: Number of tokens of mean cost that are added to every class, because single gradients are noisy.
_PRIOR_TOKENS = 20


class TokenCosts(Statistics):
    """Sum of the squared gradients of the tokens of each size class, and their number.

    Args:
        heads: key-value heads ``H``.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"sums": "sum"}
    not_negative = frozenset({"sums"})

    def __init__(self, heads: int) -> None:
        self.sums = torch.zeros(2, heads, SIZE_CLASSES, dtype=torch.float64)

    def update(self, y: Tensor, gradient: Tensor, unit: Tensor) -> None:
        """Add tokens.

        Args:
            y, gradient: the values to quantize, and the gradients of the loss with respect to them; float ``[N, C]`` on
                the CPU.
            unit: float32 ``[H]``, the same in every call: unit of the squared size, from which classes are counted.
        """
        heads = self.sums.shape[1]
        place = size_classes(unit, squared_size(y.float(), heads)).T
        cost = gradient.double().square().unflatten(1, (heads, -1)).sum(-1).T
        self.sums[0].scatter_add_(1, place, cost)
        self.sums[1].scatter_add_(1, place, torch.ones_like(cost))

    def weights(self, shrinkage: float) -> Tensor:
        """Mean squared gradient of each class, divided by that of all tokens: float16 ``[H, 32]``.

        Args:
            shrinkage: how far weights are moved towards 1, from 0 to 1.
        """
        cost, count = self.sums
        mean = (cost.sum(1, keepdim=True) / count.sum(1, keepdim=True).clamp(min=1)).clamp(
            min=torch.finfo(torch.float64).tiny
        )
        share: Tensor = (cost / mean + _PRIOR_TOKENS) / (count + _PRIOR_TOKENS)
        weight = (1 - shrinkage) * share + shrinkage
        return weight.clamp(max=torch.finfo(torch.float16).max).half()
