"""Rising polynomials through the levels of many channels: weighted least squares that keeps levels in order.

A *basis* is float64 ``[C, L, K]``: the powers of ``u`` at every level of a channel, all zero for coefficients that it
does not have; the first power is 1 and the second ``u``. A row of fewer than ``L`` levels repeats its last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chord", "evaluate", "least_squares", "nearest_polynomial", "toward"]

#: Least step between neighbouring levels, as a share of the mean one.
_LEAST_STEP = 0.02
#: Least rise of a chord: the smallest float16.
_LEAST_RISE = 2.0**-24
_RIDGE = 1e-9
_TINY = torch.finfo(torch.float64).tiny


def evaluate(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Levels ``[C, L]`` of coefficients ``[C, K]``."""
    return (basis @ coefficients[..., None])[..., 0]


def least_squares(basis: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Coefficients of least weighted squared error; 0 where a channel has none.

    Args:
        basis: ``[C, L, K]``.
        weight, target: ``[C, L]``; a level without weight is not looked at.

    Returns:
        ``[C, K]``.
    """
    weighted = basis * weight[..., None]
    normal, right = weighted.mT @ basis, weighted.mT @ target[..., None]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    largest = diagonal.amax(-1, keepdim=True)
    # A coefficient that nothing decides is 0 by a row of its own.
    own = torch.where(diagonal > 0, _RIDGE * largest, torch.where(largest > 0, largest, 1.0))
    solution: Tensor = torch.linalg.solve(normal + torch.diag_embed(own), right)
    return solution[..., 0]


def _steps(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring rows ``[C, L - 1, K]``, and whether both levels exist ``[C, L - 1]``."""
    steps = basis.diff(dim=1)
    return steps, steps[..., 1] > 0


def toward(basis: Tensor, current: Tensor, wanted: Tensor) -> Tensor:
    """From rising levels as far towards wanted coefficients as keeps every step at its least.

    Steps are linear in the way, so how far that is follows in closed form; a channel whose wanted levels rise gets
    them.

    Args:
        basis: ``[C, L, K]``.
        current, wanted: ``[C, K]``.

    Returns:
        ``[C, K]``.
    """
    if basis.shape[1] == 1:  # no two levels anywhere
        return wanted
    steps, there = _steps(basis)
    old, new = evaluate(steps, current), evaluate(steps, wanted)
    least = _LEAST_STEP * (old.sum(1) / there.sum(1).clamp(min=1))[:, None]
    old = torch.maximum(old, least)
    short = there & (new < least)
    share = torch.where(short, (old - least) / (old - new).clamp(min=_TINY), 1.0).amin(1)
    return torch.lerp(current, wanted, share[:, None])


def chord(basis: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Straight lines ``[C, K]`` through the outer levels ``low`` and ``high [C]``, rising whatever these are."""
    line = torch.zeros(basis.shape[0], basis.shape[-1], dtype=basis.dtype)
    line[:, 0] = (low + high) / 2
    if basis.shape[-1] > 1:
        span = (basis[:, -1] - basis[:, 0])[:, 1]
        rise = ((high - low) / span.clamp(min=_TINY)).clamp(min=_LEAST_RISE)
        line[:, 1] = torch.where(span > 0, rise, 0.0)
    return line


def nearest_polynomial(basis: Tensor, levels: Tensor, density: float) -> Tensor:
    """Rising polynomials ``[C, K]`` near given levels, closer where these are dense.

    Args:
        basis: ``[C, L, K]``.
        levels: float64 ``[C, L]``, sorted; a shorter row repeats its last one.
        density: power of the levels' density that weighs them; with 0 all count alike.
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
