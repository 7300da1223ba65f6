"""Computed levels: a polynomial with a few coefficients for each channel, so that decoding needs no table.

Level ``i`` of ``L`` is, with every operation rounded to float32::

    u     = (2 i + 1) / L - 1
    level = c[0] + u (c[1] + u (c[2] + u (c[3] + u (c[4] + u c[5]))))

A channel of up to 32 levels has four coefficients, but no more than it has levels, so any four levels are possible. A
channel of more levels has six. The other coefficients are 0.
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
#: Number of levels up to which a channel has so many coefficients.
_FEW_COEFFICIENTS, _FEW_LEVELS = 4, 32
_LARGEST_HALF = torch.finfo(torch.float16).max


def level_counts(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Number of levels of channels with these widths, int64 of the same shape."""
    by_width = torch.tensor([spec.level_count(width) for width in range(spec.max_bits + 1)])
    return by_width.to(bits.device)[bits.to(torch.int64)]


def coefficient_counts(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Number of coefficients of channels with these widths, int64 of the same shape."""
    levels = level_counts(spec, bits)
    return torch.where(levels > _FEW_LEVELS, MOST_COEFFICIENTS, levels.clamp(max=_FEW_COEFFICIENTS))


def level_places(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """``u`` of every level, float32 ``[C, L]``, exact. A channel with fewer levels repeats its last ``u``.

    Args:
        spec: spec of the keys or values.
        bits: integer ``[C]``.
    """
    count = level_counts(spec, bits)[:, None]
    index = torch.arange(int(count.max()), device=bits.device).minimum(count - 1)
    return (2 * index + 1).float() / count - 1


def computed_levels(coefficients: Tensor, places: Tensor) -> Tensor:
    """Levels by Horner's rule. Differentiable with respect to the coefficients.

    Args:
        coefficients: ``[C, 6]``, zero for coefficients that a channel does not have.
        places: ``[C, L]``, from :func:`level_places`, of the same dtype.

    Returns:
        ``[C, L]``.
    """
    levels = coefficients[:, -1:].expand_as(places)
    for column in reversed(range(MOST_COEFFICIENTS - 1)):
        levels = levels * places + coefficients[:, column : column + 1]
    return levels


def has_coefficient(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Mask of the coefficients that channels have: bool ``[C, 6]``."""
    return torch.arange(MOST_COEFFICIENTS, device=bits.device) < coefficient_counts(spec, bits)[:, None]


def pack_coefficients(spec: TrellisSpec, bits: Tensor, coefficients: Tensor) -> Tensor:
    """Coefficients as stored: channel after channel, without those that a channel does not have.

    Args:
        spec: spec of the keys or values.
        bits: integer ``[C]``.
        coefficients: float ``[C, 6]``.

    Returns:
        ``[N]``, float16 if its range suffices, else float32.
    """
    packed = coefficients[has_coefficient(spec, bits)]
    far = bool((packed.abs() > _LARGEST_HALF).any())
    return packed.float() if far else packed.half()


def unpack_coefficients(spec: TrellisSpec, bits: Tensor, packed: Tensor) -> Tensor:
    """Invert :func:`pack_coefficients`: float32 ``[C, 6]``, zero for coefficients that a channel does not have."""
    has = has_coefficient(spec, bits)
    found = torch.zeros(has.shape, device=packed.device)
    found[has] = packed.float()
    return found
