"""Token weighting: what an error of a token counts in the choice of a path, by the size of its vector.

Loss gradients of a token's keys, or of its values, differ by orders of magnitude from token to token, for much of the
attention goes to few. Who is to be one of them is not known when a block is coded, but their sizes tell: tokens that
take up attention that is needed nowhere else have small values. (``docs/explanation/token-weighting.md``)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SIZE_CLASSES", "size_classes", "size_edges", "squared_size", "token_weights"]

#: Classes of a token's size that weights tell apart.
SIZE_CLASSES = 32
#: Edges between the classes, in units: half octaves of the squared size from 2 ** -10 on.
_EDGES = tuple(2.0 ** ((step - 20) / 2) for step in range(SIZE_CLASSES - 1))


def size_edges(unit: Tensor) -> Tensor:
    """Sums of squares between the classes, float32: ``[H]``, the units, to ``[H, 31]``."""
    return unit[:, None] * torch.tensor(_EDGES, dtype=torch.float32, device=unit.device)


def squared_size(y: Tensor, heads: int) -> Tensor:
    """Sum of squares of each head, from its first coordinate on, every square and sum rounded.

    Args:
        y: float32 ``[..., C]``.
        heads: key-value heads ``H`` in ``C``.

    Returns:
        float32 ``[..., H]``.
    """
    square = y.unflatten(-1, (heads, -1)).square().movedim(-1, 0).contiguous()
    total: Tensor = square[0].clone()
    for term in square[1:]:
        total += term
    return total


def size_classes(unit: Tensor, size: Tensor) -> Tensor:
    """The class of every token of a head: number of edges below its squared size.

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
    """What errors of each token count.

    Args:
        y: float32 ``[B, T, C]``.
        weight: ``[H, 32]``, the weight of a token by its class.
        unit: float32 ``[H]``, the squared size that classes are counted from.

    Returns:
        float32 ``[B, T, H]``.
    """
    place = size_classes(unit, squared_size(y, len(unit)))
    return weight.float()[torch.arange(place.shape[-1], device=place.device), place]
