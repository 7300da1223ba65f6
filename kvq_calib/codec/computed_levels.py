"""Computed levels: each channel has a polynomial with a few coefficients, so that reading needs no table.

Level ``i`` of ``L`` is, with every operation rounded to float32::

    u     = (2 i + 1) / L - 1
    level = c[0] + u (c[1] + u (c[2] + u (c[3] + u (c[4] + u c[5]))))

A channel of up to 32 levels has four coefficients, but no more than levels, so any four levels can be had; one of more
levels has six. The others are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.schema.spec import TrellisSpec

__all__ = [
    "MOST_COEFFICIENTS",
    "coefficient_counts",
    "computed_levels",
    "has_coefficient",
    "level_counts",
    "level_places",
    "pack_coefficients",
    "unpack_coefficients",
]

MOST_COEFFICIENTS = 6
#: Coefficients of channels of up to so many levels.
_FEW_COEFFICIENTS, _FEW_LEVELS = 4, 32
_LARGEST_HALF = torch.finfo(torch.float16).max


def level_counts(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Levels of channels of these widths, int64 of the same shape."""
    by_width = torch.tensor([spec.level_count(width) for width in range(spec.max_bits + 1)])
    return by_width.to(bits.device)[bits.to(torch.int64)]


def coefficient_counts(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Coefficients of channels of these widths, int64 of the same shape."""
    levels = level_counts(spec, bits)
    return torch.where(levels > _FEW_LEVELS, MOST_COEFFICIENTS, levels.clamp(max=_FEW_COEFFICIENTS))


def level_places(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """``u`` of every level, float32 ``[C, L]``, exact; a row of fewer levels repeats its last one.

    Args:
        spec: of the tensor.
        bits: integer ``[C]``.
    """
    count = level_counts(spec, bits)[:, None]
    index = torch.arange(int(count.max()), device=bits.device).minimum(count - 1)
    return (2 * index + 1).float() / count - 1


def computed_levels(coefficients: Tensor, places: Tensor) -> Tensor:
    """Levels by Horner's rule, differentiable in the coefficients.

    Args:
        coefficients: ``[C, 6]``, zero where a channel has fewer.
        places: ``[C, L]``, from :func:`level_places`, of the same dtype.

    Returns:
        ``[C, L]``.
    """
    levels = coefficients[:, -1:].expand_as(places)
    for column in reversed(range(MOST_COEFFICIENTS - 1)):
        levels = levels * places + coefficients[:, column : column + 1]
    return levels


def has_coefficient(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Which coefficients channels have: bool ``[C, 6]``."""
    return torch.arange(MOST_COEFFICIENTS, device=bits.device) < coefficient_counts(spec, bits)[:, None]


def pack_coefficients(spec: TrellisSpec, bits: Tensor, coefficients: Tensor) -> Tensor:
    """Coefficients as they are stored: channel after channel, those that a channel has.

    Args:
        spec: of the tensor.
        bits: integer ``[C]``.
        coefficients: float ``[C, 6]``.

    Returns:
        ``[N]``, float16 if it reaches that far, else float32.
    """
    packed = coefficients[has_coefficient(spec, bits)]
    far = bool((packed.abs() > _LARGEST_HALF).any())
    return packed.float() if far else packed.half()


def unpack_coefficients(spec: TrellisSpec, bits: Tensor, packed: Tensor) -> Tensor:
    """Invert :func:`pack_coefficients`: float32 ``[C, 6]``, zero where a channel has fewer."""
    has = has_coefficient(spec, bits)
    found = torch.zeros(has.shape, device=packed.device)
    found[has] = packed.float()
    return found
