"""Rotation of RoPE pairs of keys by calibrated angles, so that the two coordinates of a pair are uncorrelated.

Rotations within a pair commute with RoPE, so a reader may rotate the query instead of the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.schema.geometry import RopeSpec

__all__ = ["turn_pairs"]


def turn_pairs(x: Tensor, angle: Tensor, rope: RopeSpec, sign: float = 1.0) -> Tensor:
    """Rotate each pair of channels by its angle.

    Args:
        x: float32 ``[B, H, T, D]``.
        angle: ``[H, P]`` in radians.
        rope: defines which channels are pairs.
        sign: -1 undoes the rotation.

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
