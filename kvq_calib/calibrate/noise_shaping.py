"""Fits noise shaping: the correlation of the gradients of neighbouring tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics

__all__ = ["NeighbourGradients"]

#: Largest magnitude of the feedback. Above it, errors would decay too slowly.
_MOST = 0.9


class NeighbourGradients(Statistics):
    """Sums over pairs of neighbouring tokens: products of their gradients, and mean squares.

    Args:
        heads: key-value heads ``H``.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"products": "sum", "squares": "sum"}
    not_negative = frozenset({"squares"})

    def __init__(self, heads: int) -> None:
        self.products = torch.zeros(heads, dtype=torch.float64)
        self.squares = torch.zeros(heads, dtype=torch.float64)

    def update(self, gradient: Tensor) -> None:
        """Add the tokens of one window, float ``[N, C]`` on the CPU, in order."""
        by_head = gradient.double().unflatten(1, (len(self.products), -1))
        before, after = by_head[:-1], by_head[1:]
        self.products += (before * after).sum((0, 2))
        self.squares += (before.square() + after.square()).sum((0, 2)) / 2

    def feedback(self) -> Tensor:
        """The share of a token's rounding error that is added to the next: the correlation of neighbours, float16
        ``[H]``.

        If the correlation of gradients falls by this factor from token to token, ``1 - feedback ** 2`` of the errors'
        cost remains, which is the minimum.
        """
        tiny = torch.finfo(torch.float64).tiny
        return (self.products / self.squares.clamp(min=tiny)).clamp(-_MOST, _MOST).half()
