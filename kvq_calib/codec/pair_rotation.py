"""Turning the RoPE pairs of keys by angles of their own, so that the two halves of a pair are uncorrelated.

A turn within a pair commutes with RoPE, so a reader may turn the query instead of the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.schema.geometry import RopeSpec

__all__ = ["turn_pairs"]


def turn_pairs(x: Tensor, angle: Tensor, rope: RopeSpec, sign: float = 1.0) -> Tensor:
    """Turn each pair of channels by its angle.

    Args:
        x: float32 ``[B, H, T, D]``.
        angle: ``[H, P]`` in radians.
        rope: says which channels are pairs.
        sign: -1 undoes the turn.

    Returns:
        float32 ``[B, H, T, D]``.
    """
    pairs = torch.tensor(rope.pairs, dtype=torch.int64, device=angle.device)
    first, second = pairs[:, 0], pairs[:, 1]
    angle = angle.float()[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    x0, x1 = x[..., first], x[..., second]
    turned = x.clone()
    turned[..., first] = cos * x0 - sign * sin * x1
    turned[..., second] = sign * sin * x0 + cos * x1
    return turned
