"""The numbers of the trellis codec, as artifacts hold them: widths, thresholds, and tables that channels share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvq_calib.codec.params import Params
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import MAX_BITS, QuantSpec, TrellisSpec

__all__ = [
    "MAX_CODEBOOKS",
    "TrellisParams",
    "codebook_table",
    "pack_codebooks",
    "storable_levels",
    "storable_thresholds",
]

#: Most codebooks of one layer's keys or values that a ``codebook_index`` can name.
MAX_CODEBOOKS = 256
_LARGEST_HALF = torch.finfo(torch.float16).max
#: The smallest positive float16.
_SMALLEST_HALF = 2.0**-24


@dataclass(frozen=True)
class TrellisParams(Params):
    """What the trellis codec stores; ``C`` channels, ``H`` heads of ``D`` coordinates, ``P`` RoPE pairs.

    Attributes:
        bits: uint8 ``[C]``, width of each channel.
        codebook: float16 ``[N]``: the non-decreasing rows ``0 .. G - 1`` one after the other, without padding. Row
            ``g`` holds the levels of the channels whose ``codebook_index`` is ``g``; they are there, and of one width.
            While levels are trained float32 ``[G, L]``, :func:`codebook_table`.
        codebook_index: uint8 ``[C]``, the row of each channel.
        scale, zero_point: ``[C]``, thresholds ``zero_point -+ scale``; float16, or float32 where numbers are beyond
            that. Computed with in float32.
        pair_angle: float16 ``[H, P]``, radians by which each RoPE pair is turned. Computed with in float32.
        compensation: int8 ``[H, n]``: the entries below the diagonal of one matrix ``[D, D]`` per head, row by row, in
            steps of the head's ``compensation_scale``; with a rank a factor ``[D, rank]`` of the errors' correlations.
        compensation_scale: float32 ``[H]``.
        error_weight: float16 ``[H, D]``, not negative: what an error of each coordinate costs beside those of the
            others of its head; without a rank, what is left of that after compensation.
        token_weight: float16 ``[H, 32]``, not negative: the weight of a token by the class of its size.
        token_size_unit: float32 ``[H]``, positive: the squared size that classes are counted from.
    """

    bits: Tensor
    codebook: Tensor
    codebook_index: Tensor
    scale: Tensor
    zero_point: Tensor
    pair_angle: Tensor | None = None
    compensation: Tensor | None = None
    compensation_scale: Tensor | None = None
    error_weight: Tensor | None = None
    token_weight: Tensor | None = None
    token_size_unit: Tensor | None = None

    shared: ClassVar[frozenset[str]] = frozenset({"codebook"})

    def of_heads(self, spec: QuantSpec, shape: HeadShape, first: int, count: int) -> Self:
        """What belongs to some heads; rows of the codebook that other heads use alone stay with them."""
        assert isinstance(spec, TrellisSpec)
        part = super().of_heads(spec, shape, first, count)
        codebook, index = pack_codebooks(spec, part.bits, codebook_table(spec, self), part.codebook_index)
        return replace(part, codebook=codebook, codebook_index=index)


def codebook_table(spec: TrellisSpec, params: TrellisParams) -> Tensor:
    """Levels by codebook: float32 ``[G, L]``; a row of fewer than ``L`` levels repeats its last one."""
    if params.codebook.ndim == 2:
        return params.codebook
    index, device = params.codebook_index.to(torch.int64), params.codebook.device
    width = torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=device)
    width[index] = params.bits.to(torch.int64)  # one for all channels of a row
    count = torch.tensor([spec.level_count(bits) for bits in width.tolist()], device=device)
    stop = count.cumsum(0)[:, None]
    place = stop - count[:, None] + torch.arange(int(count.max()), device=device)
    return params.codebook[place.minimum(stop - 1)].float()


def pack_codebooks(spec: TrellisSpec, bits: Tensor, table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks as they are stored, the inverse of :func:`codebook_table`.

    Rows that no channel uses are left out; of a row that channels of several widths use, each width gets the part that
    it reads.

    Args:
        spec: of the tensor.
        bits: uint8 ``[C]``.
        table: float32 ``[G, L]``, levels representable in float16.
        index: integer ``[C]``, the row of each channel.

    Returns:
        ``codebook``, float16 ``[N]``, and ``codebook_index``, uint8 ``[C]``.

    Raises:
        ValueError: rounding to float16 would change a level, or the rows are more than :data:`MAX_CODEBOOKS`.
    """
    rows, packed = torch.unique(index.to(torch.int64) * (MAX_BITS + 1) + bits, return_inverse=True)
    if len(rows) > MAX_CODEBOOKS:
        raise ValueError(f"has {len(rows)} codebooks, a codebook_index can name {MAX_CODEBOOKS}")
    levels = torch.cat(
        [table[row // (MAX_BITS + 1), : spec.level_count(row % (MAX_BITS + 1))] for row in rows.tolist()]
    )
    rounded = levels.half()
    if not bool((rounded.float() == levels).all()):
        raise ValueError("has levels that are no float16 numbers")
    return rounded, packed.to(torch.uint8)


def storable_levels(table: Tensor) -> Tensor:
    """Sort levels ``[G, L]`` and round them to float16, so that look-ups in half precision lose nothing."""
    return table.sort(1).values.half().float()


def storable_thresholds(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the channels as artifacts hold them: float16, if it reaches that far, else float32.

    Args:
        scale, zero_point: float ``[C]``, ``scale`` positive.
    """
    if float(torch.maximum(scale, zero_point.abs()).max()) > _LARGEST_HALF:
        return scale.float(), zero_point.float()
    return scale.half().clamp(min=_SMALLEST_HALF), zero_point.half()
