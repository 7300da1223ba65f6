"""Parameters of the trellis codec: widths, coefficients of levels, and what only the encoder needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvq_calib.codec.computed_levels import coefficient_counts
from kvq_calib.codec.params import Params
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import QuantSpec, TrellisSpec

__all__ = ["TrellisParams"]


@dataclass(frozen=True)
class TrellisParams(Params):
    """Parameters of the trellis codec, for ``C`` channels, ``H`` heads of ``D`` coordinates, ``P`` RoPE pairs.

    Attributes:
        bits: uint8 ``[C]``, width of each channel.
        coefficients: coefficients of the levels (:mod:`kvq_calib.codec.computed_levels`), ``[N]``, channel after
            channel. Stored as float16, or as float32 if numbers are out of its range. Computations use float32. During
            training they are float32 ``[C, 6]``.
        pair_angle: float16 ``[H, P]``, angle of each RoPE pair in radians. Computations use float32.
        compensation: int8 ``[H, n]``: per head, the entries below the diagonal of a matrix ``[D, D]``, row by row, in
            steps of the head's ``compensation_scale``; with a rank, a factor ``[D, rank]`` of the errors' correlations.
        compensation_scale: float32 ``[H]``.
        error_weight: float16 ``[H, D]``, not negative: cost of an error of each coordinate, relative to the other
            coordinates of the head; without a rank, the cost that remains after compensation.
        token_weight: float16 ``[H, 32]``, not negative: weight of a token by its size class.
        token_size_unit: float32 ``[H]``, positive: unit of the squared size, from which classes are counted.
        error_feedback: float16 ``[H]``, above -1 and below 1: share of a token's rounding error that the next one adds.
    """

    bits: Tensor
    coefficients: Tensor
    pair_angle: Tensor | None = None
    compensation: Tensor | None = None
    compensation_scale: Tensor | None = None
    error_weight: Tensor | None = None
    token_weight: Tensor | None = None
    token_size_unit: Tensor | None = None
    error_feedback: Tensor | None = None

    #: Their number differs from head to head.
    shared: ClassVar[frozenset[str]] = frozenset({"coefficients"})

    def of_heads(self, spec: QuantSpec, shape: HeadShape, first: int, count: int) -> Self:
        """The parameters of some heads."""
        assert isinstance(spec, TrellisSpec)
        part = super().of_heads(spec, shape, first, count)
        stop = torch.nn.functional.pad(coefficient_counts(spec, self.bits).cumsum(0), (1, 0))
        begin, end = (int(stop[head * shape.head_dim]) for head in (first, first + count))
        return replace(part, coefficients=self.coefficients[begin:end])
