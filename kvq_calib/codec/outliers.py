"""Selection of outliers, the elements of a token that keep an exact residual (KVQuant section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cap_per_token"]


def cap_per_token(outliers: Tensor, magnitude: Tensor, cap: int) -> Tensor:
    """Keep at most ``cap`` outliers of each token: the largest ``magnitude``, ties to the lower channel.

    Args:
        outliers: bool ``[..., C]``.
        magnitude: float32 ``[..., C]``, ``|u|``.
        cap: largest number of outliers to keep.
    """
    crowded = outliers.sum(-1) > cap
    if not bool(crowded.any()):
        return outliers
    ranked = magnitude[crowded].masked_fill(~outliers[crowded], -1.0)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :cap]
    kept = outliers.clone()
    kept[crowded] = torch.zeros_like(outliers[crowded]).scatter(-1, best, True)
    return kept
