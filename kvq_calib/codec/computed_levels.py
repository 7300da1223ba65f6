"""Computed levels: a polynomial with a few coefficients for each channel, so that decoding needs no table.

Level ``i`` of ``L`` is, with every operation rounded to float32::

    u     = (2 i + 1) / L - 1
    level = c[0] + u (c[1] + u (c[2] + u (c[3] + u (c[4] + u c[5]))))

A channel of up to 32 levels has four coefficients, but no more than it has levels. A channel of more levels has six.
The other coefficients are 0.

Stored are an offset, a scale and, from the third coefficient on, a *shape* in 128ths of the scale::

    c[0] = offset
    c[k] = scale shape[k] / 128                                for k >= 2
    c[1] = scale (128 - |shape[2]| - ... - |shape[5]|) / 128

So the scale is the sum of the magnitudes of all coefficients but the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvq_calib.schema.spec import TrellisSpec

__all__ = [
    "FIRST_OF_SHAPE",
    "MOST_COEFFICIENTS",
    "SHAPE_STEPS",
    "StoredLevels",
    "coefficient_counts",
    "computed_levels",
    "has_coefficient",
    "level_counts",
    "level_places",
    "shape_counts",
    "store_levels",
    "stored_coefficients",
    "within_scale",
]

MOST_COEFFICIENTS = 6
#: The first coefficient that belongs to the shape.
FIRST_OF_SHAPE = 2
#: Steps of the shape in the scale.
SHAPE_STEPS = 128
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


def shape_counts(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Length of the shape of channels with these widths, int64 of the same shape as ``bits``."""
    return (coefficient_counts(spec, bits) - FIRST_OF_SHAPE).clamp(min=0)


class StoredLevels(NamedTuple):
    """Levels as stored.

    Attributes:
        offset: ``[C]``, float16 if its range suffices, else float32.
        scale: ``[C]``, not negative, likewise.
        shape: int8 ``[N]``, channel after channel. The magnitudes of a channel sum to at most 127.
    """

    offset: Tensor
    scale: Tensor
    shape: Tensor


def store_levels(spec: TrellisSpec, bits: Tensor, coefficients: Tensor) -> StoredLevels:
    """Round each coefficient to what can be stored.

    Args:
        spec: spec of the keys or values.
        bits: integer ``[C]``.
        coefficients: float ``[C, 6]``, zero for coefficients that a channel does not have; the second is not negative.
    """
    scale = coefficients[:, 1:].abs().sum(1)
    steps = coefficients[:, FIRST_OF_SHAPE:] / scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]
    shape = within_scale((SHAPE_STEPS * steps).round())
    has = has_coefficient(spec, bits)[:, FIRST_OF_SHAPE:]
    return StoredLevels(_narrowed(coefficients[:, 0]), _narrowed(scale), shape[has].to(torch.int8))


def within_scale(shape: Tensor) -> Tensor:
    """Shapes ``[C, 4]`` whose magnitudes sum to at most 127: the largest number gives way."""
    magnitude = shape.abs()
    over = (magnitude.sum(1) - (SHAPE_STEPS - 1)).clamp(min=0)
    largest = torch.nn.functional.one_hot(magnitude.argmax(1), shape.shape[1])
    return shape - shape.sign() * largest * over[:, None]


def _narrowed(numbers: Tensor) -> Tensor:
    """Numbers in float16 if its range suffices, else in float32."""
    far = bool((numbers.abs() > _LARGEST_HALF).any())
    return numbers.float() if far else numbers.half()


def stored_coefficients(spec: TrellisSpec, bits: Tensor, stored: StoredLevels) -> Tensor:
    """Coefficients, float32 ``[C, 6]``, zero for those that a channel does not have."""
    has = has_coefficient(spec, bits)
    steps = torch.zeros(has.shape, device=stored.shape.device)
    steps[:, FIRST_OF_SHAPE:][has[:, FIRST_OF_SHAPE:]] = stored.shape.float()
    steps[:, 1] = (SHAPE_STEPS - steps.abs().sum(1)) * has[:, 1]
    found = stored.scale.float()[:, None] * steps / SHAPE_STEPS
    found[:, 0] = stored.offset.float()
    return found
