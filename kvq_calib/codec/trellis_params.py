"""The numbers of the trellis codec in an artifact: widths, coefficients of levels, and what only coding needs."""

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
    """What the trellis codec stores; ``C`` channels, ``H`` heads of ``D`` coordinates, ``P`` RoPE pairs.

    Attributes:
        bits: uint8 ``[C]``, width of each channel.
        coefficients: of the levels (:mod:`kvq_calib.codec.computed_levels`), ``[N]``, channel after channel, those that
            a channel has; float16, or float32 where numbers are beyond that. Computed with in float32. While they are
            trained float32 ``[C, 6]``.
        pair_angle: float16 ``[H, P]``, radians by which each RoPE pair is turned. Computed with in float32.
        compensation: int8 ``[H, n]``: the entries below the diagonal of one matrix ``[D, D]`` per head, row by row, in
            steps of the head's ``compensation_scale``; with a rank a factor ``[D, rank]`` of the errors' correlations.
        compensation_scale: float32 ``[H]``.
        error_weight: float16 ``[H, D]``, not negative: what an error of each coordinate costs beside those of the
            others of its head; without a rank, what is left of that after compensation.
        token_weight: float16 ``[H, 32]``, not negative: the weight of a token by the class of its size.
        token_size_unit: float32 ``[H]``, positive: the squared size that classes are counted from.
        error_feedback: float16 ``[H]``, above -1 and below 1: what of a token's rounding error the next one takes up.
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

    #: Their number per head differs.
    shared: ClassVar[frozenset[str]] = frozenset({"coefficients"})

    def of_heads(self, spec: QuantSpec, shape: HeadShape, first: int, count: int) -> Self:
        """What belongs to some heads."""
        assert isinstance(spec, TrellisSpec)
        part = super().of_heads(spec, shape, first, count)
        stop = torch.nn.functional.pad(coefficient_counts(spec, self.bits).cumsum(0), (1, 0))
        begin, end = (int(stop[head * shape.head_dim]) for head in (first, first + count))
        return replace(part, coefficients=self.coefficients[begin:end])
