"""Token weighting: the weight of a token's error in the choice of a path depends on the size of its vector.

Loss gradients of keys and values differ by orders of magnitude from token to token, because a few tokens get most of
the attention. Future attention is not known when a block is coded, but the size of the vectors predicts it. For
example, tokens that absorb unneeded attention have small values. See ``docs/explanation/token-weighting.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SIZE_CLASSES", "size_classes", "size_edges", "squared_size", "token_weights"]

#: Number of size classes with separate weights.
SIZE_CLASSES = 32
#: Edges between the classes, in units of the head: half octaves of the squared size, starting at 2 ** -10.
_EDGES = tuple(2.0 ** ((step - 20) / 2) for step in range(SIZE_CLASSES - 1))


def size_edges(unit: Tensor) -> Tensor:
    """Edges between the classes as sums of squares, float32 ``[H, 31]``, from the units ``[H]``."""
    return unit[:, None] * torch.tensor(_EDGES, dtype=torch.float32, device=unit.device)


def squared_size(y: Tensor, heads: int) -> Tensor:
    """Sum of squares of each head, starting with its first coordinate, with every square and sum rounded.

    Args:
        y: float32 ``[..., C]``.
        heads: number of key-value heads ``H`` in ``C``.

    Returns:
        float32 ``[..., H]``.
    """
    square = y.unflatten(-1, (heads, -1)).square().movedim(-1, 0).contiguous()
    total: Tensor = square[0].clone()
    for term in square[1:]:
        total += term
    return total


def size_classes(unit: Tensor, size: Tensor) -> Tensor:
    """The size class of every token of a head: the number of edges below its squared size.

    Args:
        unit: float32 ``[H]``.
        size: float32 ``[..., H]``, from :func:`squared_size`.

    Returns:
        int64 ``[..., H]``.
    """
    by_head = size.movedim(-1, 0).contiguous()
    place = torch.searchsorted(size_edges(unit), by_head.flatten(1))
    classes: Tensor = place.view(by_head.shape).movedim(0, -1)
    return classes


def token_weights(y: Tensor, weight: Tensor, unit: Tensor) -> Tensor:
    """The weight of each token's errors.

    Args:
        y: float32 ``[B, T, C]``.
        weight: ``[H, 32]``, weight by size class.
        unit: float32 ``[H]``, unit of the squared size.

    Returns:
        float32 ``[B, T, H]``.
    """
    place = size_classes(unit, squared_size(y, len(unit)))
    return weight.float()[torch.arange(place.shape[-1], device=place.device), place]
