"""Thresholds: the scale and zero point that normalise numbers to the range of the levels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["online_thresholds", "reciprocal", "token_thresholds"]


def reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale`` in float32; 0 for a scale of 0. Then all elements are equal, and get the level nearest to 0."""
    return torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)


def token_thresholds(values: Tensor, per_side: int, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each token, leaving out its ``per_side`` largest and smallest elements.

    The zero point is the middle of the remaining range, rounded to the storage dtype. The scale is the largest distance
    from it, rounded up, so that rounding makes no remaining element an outlier.

    Args:
        values: float32 ``[..., C]``.
        per_side: number of elements to leave out at each end.
        storage: dtype of the result.

    Returns:
        ``(scale, zero_point)``, each ``[...]`` in the storage dtype.
    """
    channels = values.shape[-1]
    if 2 * per_side >= channels:
        raise ValueError(f"cannot trim {per_side} elements from both ends of {channels}")
    if per_side == 0:
        low, high = values.amin(-1), values.amax(-1)
    else:
        high = values.topk(per_side + 1, dim=-1).values[..., -1]
        low = values.topk(per_side + 1, dim=-1, largest=False).values[..., -1]
    # If zeros of both signs occur, either may be the minimum. Adding 0 gives both the same sign.
    zero_point = ((low + high) * 0.5 + 0.0).to(storage)
    exact = torch.maximum(high - zero_point.float(), zero_point.float() - low) + 0.0
    scale = exact.to(storage)
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    return torch.where(scale.float() < exact, above, scale), zero_point


def online_thresholds(y: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each sequence and channel, from the text itself.

    Args:
        y: float32 ``[B, T, C]``.
        fraction: share of elements outside the range, half of them at each end.

    Returns:
        ``(scale, zero_point)``, each float32 ``[B, 1, C]``.
    """
    tail = fraction / 2
    low, high = torch.quantile(y, torch.tensor([tail, 1 - tail], device=y.device, dtype=y.dtype), dim=1)
    return ((high - low) * 0.5)[:, None], ((high + low) * 0.5)[:, None]
