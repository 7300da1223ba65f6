"""Parameters of the trellis codec: widths, levels, and what only the encoder needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvq_calib.codec.computed_levels import StoredLevels, shape_counts, stored_coefficients
from kvq_calib.codec.params import Params
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import QuantSpec, TrellisSpec

__all__ = ["TrellisParams"]


@dataclass(frozen=True)
class TrellisParams(Params):
    """Parameters of the trellis codec, for ``C`` channels, ``H`` heads of ``D`` coordinates, ``P`` RoPE pairs.

    Attributes:
        bits: uint8 ``[C]``, width of each channel.
        level_offset, level_scale: ``[C]``, for the levels (:mod:`kvq_calib.codec.computed_levels`); float16, or float32
            if numbers are out of its range. Computations use float32.
        level_shape: int8 ``[N]``, channel after channel.
        pair_angle: float16 ``[H, P]``, angle of each RoPE pair in radians. Computations use float32.
        compensation: int8 ``[H, n]``: per head, the entries below the diagonal of a matrix ``[D, D]``, row by row, in
            steps of the head's ``compensation_scale``; with a rank, a factor ``[D, rank]`` of the errors' correlations.
        compensation_scale: float32 ``[H]``.
        error_weight: float16 ``[H, D]``, not negative: cost of an error of each coordinate, relative to the other
            coordinates of the head; without a rank, the cost that remains after compensation.
        token_weight: float16 ``[H, 32]``, not negative: weight of a token by its size class.
        token_size_unit: float32 ``[H]``, positive: unit of the squared size, from which classes are counted.
        error_feedback: float16 ``[H]``, above -1 and below 1: share of a token's rounding error that the next one adds.
        coefficients: float32 ``[C, 6]``, only during fitting and training: coefficients of the levels, instead of what
            is stored of them.
    """

    bits: Tensor
    level_offset: Tensor | None = None
    level_scale: Tensor | None = None
    level_shape: Tensor | None = None
    pair_angle: Tensor | None = None
    compensation: Tensor | None = None
    compensation_scale: Tensor | None = None
    error_weight: Tensor | None = None
    token_weight: Tensor | None = None
    token_size_unit: Tensor | None = None
    error_feedback: Tensor | None = None
    coefficients: Tensor | None = None

    #: Their number differs from head to head.
    shared: ClassVar[frozenset[str]] = frozenset({"level_shape"})

    def with_levels(self, levels: StoredLevels) -> Self:
        """The same with these levels."""
        offset, scale, shape = levels
        return replace(self, level_offset=offset, level_scale=scale, level_shape=shape, coefficients=None)

    def level_coefficients(self, spec: TrellisSpec) -> Tensor:
        """Coefficients of the levels, float32 ``[C, 6]``, zero for coefficients that a channel does not have."""
        if self.coefficients is not None:
            return self.coefficients
        assert self.level_offset is not None and self.level_scale is not None and self.level_shape is not None
        return stored_coefficients(
            spec, self.bits, StoredLevels(self.level_offset, self.level_scale, self.level_shape)
        )

    def of_heads(self, spec: QuantSpec, shape: HeadShape, first: int, count: int) -> Self:
        """The parameters of some heads."""
        assert isinstance(spec, TrellisSpec)
        part = super().of_heads(spec, shape, first, count)
        assert self.level_shape is not None
        stop = torch.nn.functional.pad(shape_counts(spec, self.bits).cumsum(0), (1, 0))
        begin, end = (int(stop[head * shape.head_dim]) for head in (first, first + count))
        return replace(part, level_shape=self.level_shape[begin:end])
