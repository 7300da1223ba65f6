"""Fits increasing polynomials to the levels of many channels, by weighted least squares that keeps levels in order.

A *basis* is float64 ``[C, L, K]``: the powers ``1, u, u ** 2, ...`` at every level of a channel, and zero for
coefficients that the channel does not have. A channel with fewer than ``L`` levels repeats its last level.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chord", "evaluate", "least_squares", "nearest_polynomial", "toward"]

#: Smallest step between neighbouring levels, relative to the mean step.
_LEAST_STEP = 0.02
#: Smallest slope of a chord: the smallest positive float16.
_LEAST_RISE = 2.0**-24
_RIDGE = 1e-9
_TINY = torch.finfo(torch.float64).tiny


def evaluate(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Levels ``[C, L]`` from coefficients ``[C, K]``."""
    return (basis @ coefficients[..., None])[..., 0]


def least_squares(basis: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Coefficients with the least weighted squared error; 0 for coefficients that a channel does not have.

    Args:
        basis: ``[C, L, K]``.
        weight, target: ``[C, L]``; a level without weight is ignored.

    Returns:
        ``[C, K]``.
    """
    weighted = basis * weight[..., None]
    normal, right = weighted.mT @ basis, weighted.mT @ target[..., None]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    largest = diagonal.amax(-1, keepdim=True)
    # An additional row makes undetermined coefficients 0.
    own = torch.where(diagonal > 0, _RIDGE * largest, torch.where(largest > 0, largest, 1.0))
    solution: Tensor = torch.linalg.solve(normal + torch.diag_embed(own), right)
    return solution[..., 0]


def _steps(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring rows, ``[C, L - 1, K]``, and whether both levels exist, ``[C, L - 1]``."""
    steps = basis.diff(dim=1)
    return steps, steps[..., 1] > 0


def toward(basis: Tensor, current: Tensor, wanted: Tensor) -> Tensor:
    """Move from increasing levels towards wanted coefficients, as far as every step stays large enough.

    Steps change linearly along the way, so the distance follows in closed form. A channel whose wanted levels increase
    gets them.

    Args:
        basis: ``[C, L, K]``.
        current, wanted: ``[C, K]``.

    Returns:
        ``[C, K]``.
    """
    if basis.shape[1] == 1:  # no channel has two levels
        return wanted
    steps, there = _steps(basis)
    old, new = evaluate(steps, current), evaluate(steps, wanted)
    least = _LEAST_STEP * (old.sum(1) / there.sum(1).clamp(min=1))[:, None]
    old = torch.maximum(old, least)
    short = there & (new < least)
    share = torch.where(short, (old - least) / (old - new).clamp(min=_TINY), 1.0).amin(1)
    return torch.lerp(current, wanted, share[:, None])


def chord(basis: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Straight lines ``[C, K]`` through the outer levels ``low`` and ``high``, ``[C]``. They always increase."""
    line = torch.zeros(basis.shape[0], basis.shape[-1], dtype=basis.dtype)
    line[:, 0] = (low + high) / 2
    if basis.shape[-1] > 1:
        span = (basis[:, -1] - basis[:, 0])[:, 1]
        rise = ((high - low) / span.clamp(min=_TINY)).clamp(min=_LEAST_RISE)
        line[:, 1] = torch.where(span > 0, rise, 0.0)
    return line


def nearest_polynomial(basis: Tensor, levels: Tensor, density: float) -> Tensor:
    """Increasing polynomials ``[C, K]`` near the given levels, closest where levels are dense.

    Args:
        basis: ``[C, L, K]``.
        levels: float64 ``[C, L]``, sorted; a channel with fewer levels repeats its last one.
        density: the weight of a level is this power of the density of levels; with 0 all weights are equal.
    """
    _, there = _steps(basis)
    gap = torch.zeros_like(levels)
    step = levels.diff(dim=1)
    gap[:, :-1] += step
    gap[:, 1:] += step * there
    own = torch.nn.functional.pad(there, (1, 0), value=True)
    span = gap.sum(1, keepdim=True).clamp(min=_TINY)
    weight = own * (gap / span).clamp(min=1e-4) ** -density
    wanted = least_squares(basis, weight, levels)
    ends = evaluate(basis[:, [0, -1]], wanted)
    return toward(basis, chord(basis, *ends.T), wanted)
