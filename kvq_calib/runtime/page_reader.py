"""Packed pages back to numbers, in torch on any device.

Within a work space a tensor is ``[B, H, D, S]``: tokens stand last, as in the pages, so nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.packing import (
    BLOCK_TOKENS,
    COORDINATE_BITS,
    PAGE_BLOCKS,
    PAGE_TOKENS,
    slice_bytes,
    unpack_units,
)
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.runtime.storage import Page

__all__ = ["PageReader"]

#: Work spaces for which outliers and scales of tokens are made ready at once.
SPANS_READY = 8
#: Codebooks of one width up to which byte-wise tables (2 KiB each) are kept.
MAX_BYTE_TABLES = 4


@dataclass(frozen=True)
class _Group:
    """Channels of one width.

    Attributes:
        width: bits.
        channels: int64 ``[n]``, or ``None`` for all channels in order.
        rows: int64 ``[n * width]`` of the page seen as ``[W, 8]`` words, or ``None`` for all in order.
        codebooks: int64, the rows of the codebook that the channels use.
        part: int64 ``[n]``, which of these each channel uses.
        count: levels of a channel.
    """

    width: int
    channels: Tensor | None
    rows: Tensor | None
    codebooks: Tensor
    part: Tensor
    count: int

    @property
    def paired(self) -> bool:
        """Whether the levels of two codes are looked up at once."""
        return 0 < self.width <= 4 and len(self.codebooks) <= MAX_BYTE_TABLES


class PageReader:
    """Decodes pages of one layer's keys or values.

    Up to 4 bits, levels are looked up two at a time: a byte of a nibble slice selects a pair of float32, moved as one
    float64; where levels depend on the codes before, the byte and the lowest bits of the two codes before it. Bytes are
    brought into the order of the channels first, being an eighth of what they become, so that one lookup serves all
    widths.

    Args:
        quantizer: of the tensor.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.layout = quantizer.layout
        self.device = quantizer.device
        #: Whether scale and zero point are numbers of a channel and act last, so that a weighted sum of
        #: normalized values can take them instead of every value.
        self.separable = not (self.layout.token_params or self.layout.outlier_cap)
        groups = list(self._widths())
        self._paired = [group for group in groups if group.paired]
        #: Float64 ``[rows]`` of level pairs, a table after the other, and int32 ``[C, 1]`` where each channel's starts.
        table = quantizer.table
        self._pairs, self._pairs_start = self._pair_tables(table)
        #: Int64 ``[C]``: where each channel stands among the paired ones, or ``None`` for the same place.
        self._order = self._paired_order()
        #: The other channels, float32 ``[L * r]`` levels, and int32 ``[n, 1]`` where each channel's start.
        self._single = [(group, *self._level_table(group, table)) for group in groups if not group.paired]

    def _widths(self) -> Iterator[_Group]:
        index = self.quantizer.table_index

        def group(width: int, channels: Tensor | None, rows: Tensor | None) -> _Group:
            used, part = torch.unique(index if channels is None else index[channels], return_inverse=True)
            return _Group(width, channels, rows, used, part, self.quantizer.level_count(width))

        widths = set(self.layout.widths)
        if len(widths) == 1 and 0 not in widths:
            yield group(widths.pop(), None, None)
            return
        for width, channels, rows in self.layout.groups(self.device):
            yield group(width, channels, rows.flatten())
        if 0 in widths:
            channels = torch.tensor(self.layout.widths, device=self.device).eq(0).nonzero().flatten()
            yield group(0, channels, channels[:0])

    def _pair_tables(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        start = torch.zeros(self.layout.channels, 1, dtype=torch.int32, device=self.device)
        tables: list[Tensor] = []
        first = 0
        for group in self._paired:
            rows = self.quantizer.pair_index(group.width).to(self.device)
            chosen = slice(None) if group.channels is None else group.channels
            start[chosen, 0] = (first + len(rows) * group.part).to(torch.int32)
            tables.append(table[group.codebooks][:, rows])
            first += len(rows) * len(group.codebooks)
        if not tables:
            return torch.empty(0, dtype=torch.float64, device=self.device), None
        pairs = torch.cat(tables).contiguous().view(torch.float64).flatten()
        return pairs, start if bool(start.any()) else None

    def _paired_order(self) -> Tensor | None:
        order = torch.zeros(self.layout.channels, dtype=torch.int64, device=self.device)
        done = 0
        for group in self._paired:
            if group.channels is None:
                return None
            order[group.channels] = torch.arange(done, done + len(group.part), device=self.device)
            done += len(group.part)
        return order

    def _level_table(self, group: _Group, table: Tensor) -> tuple[Tensor, Tensor | None]:
        levels = table[group.codebooks, : group.count].flatten().clone()
        if len(group.codebooks) == 1:
            return levels, None
        return levels, (group.part * group.count).to(torch.int32)[:, None]

    def tensors(self) -> list[Tensor]:
        """Everything held beside the quantizer's parameters."""
        found = [self._pairs, self._pairs_start, self._order]
        for group in self._paired:
            found += [group.channels, group.rows, group.codebooks, group.part]
        for group, levels, start in self._single:
            found += [group.channels, group.rows, group.codebooks, group.part, levels, start]
        return [tensor for tensor in found if tensor is not None]

    def read(self, pages: Sequence[Page], normalized: bool = False) -> Tensor:
        """Decode whole pages: float32 ``[B, H, D, 256 * n]``, as :meth:`Quantizer.transform` left them.

        Places that hold no token yet come out finite but meaningless.

        Args:
            pages: one or more.
            normalized: leave scale and zero point to :meth:`affine`; only where ``separable``.
        """
        return next(self.spans(pages, len(pages), normalized))

    def spans(self, pages: Sequence[Page], size: int, normalized: bool = False) -> Iterator[Tensor]:
        """Decode pages, ``size`` at a time, each time as :meth:`read` does.

        What is small is made ready for :data:`SPANS_READY` spans at once, for the calls cost more than the work.
        """
        whole = len(pages) - len(pages) % size
        for start in range(0, whole, SPANS_READY * size):
            yield from self._alike(pages[start : min(start + SPANS_READY * size, whole)], size, normalized)
        if whole < len(pages):
            yield from self._alike(pages[whole:], len(pages) - whole, normalized)

    def _alike(self, pages: Sequence[Page], size: int, normalized: bool) -> Iterator[Tensor]:
        """What :meth:`spans` does, for whole spans that are decoded while what is ready for them is kept."""
        batch, layout = pages[0].codes.shape[0], self.layout
        tokens = self._token_params(pages) if layout.token_params else None
        corrections = self._corrections(pages, size) if layout.outlier_cap else None
        for start in range(0, len(pages), size):
            codes = torch.stack([page.codes for page in pages[start : start + size]])
            y = self._levels(codes.view(size, batch, -1, PAGE_BLOCKS))
            if tokens is not None:
                scale, zero_point = tokens[..., start * PAGE_TOKENS : (start + size) * PAGE_TOKENS]
                torch.addcmul(zero_point, y, scale, out=y)
            elif not normalized:
                self._scale_channels(y)
            if corrections is not None:
                y.view(-1).index_add_(0, *next(corrections))
            if self.quantizer.channel_normalised:
                self._scale_channels(y)
            yield y.view(batch, layout.heads, layout.head_dim, -1)

    def _scale_channels(self, y: Tensor) -> None:
        """Apply the channels' scales and zero points to ``y [B, C, S]`` in place."""
        y.mul_(self.quantizer.scale[:, None]).add_(self.quantizer.zero_point[:, None])

    @staticmethod
    def _token_params(pages: Sequence[Page]) -> Tensor:
        """Scales and zero points of the tokens, float32 ``[2, B, 1, 256 * n]``."""
        found = torch.cat([page.token_params for page in pages if page.token_params is not None], dim=1)
        out = torch.empty(2, len(found), 1, found.shape[1], device=found.device)
        return out.copy_(found.permute(2, 0, 1)[:, :, None])

    def _corrections(self, pages: Sequence[Page], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For every ``size`` pages, where in ``y [B, C, S]`` their outliers stand, int32, and the float32 residuals."""
        places = size * PAGE_TOKENS
        start = torch.stack([page.outlier_start for page in pages if page.outlier_start is not None])
        index = torch.cat([page.outlier_index for page in pages if page.outlier_index is not None])
        residual = torch.cat([page.outlier_residual for page in pages if page.outlier_residual is not None])
        # A list's entries begin where its block and head do.
        device, stop = start.device, len(pages[0].codes) * self.layout.channels * places
        page = torch.arange(len(pages), dtype=torch.int32, device=device).remainder_(size)
        block = torch.arange(0, PAGE_TOKENS, BLOCK_TOKENS, dtype=torch.int32, device=device)
        head = torch.arange(0, stop, self.layout.head_dim * places, dtype=torch.int32, device=device)
        begin = (page[:, None, None] * PAGE_TOKENS + block[:, None] + head).flatten()
        count = start.to(torch.int32).diff().flatten()
        target = begin.repeat_interleave(count, output_size=len(index))
        index = index.to(torch.int32)
        target.add_(index & ((1 << COORDINATE_BITS) - 1), alpha=places)
        # The sign bit is the token's highest.
        target.add_(index.bitwise_right_shift_(COORDINATE_BITS).bitwise_and_(BLOCK_TOKENS - 1))
        counts = [sum(page.entries for page in pages[at : at + size]) for at in range(0, len(pages), size)]
        return zip(target.split(counts), residual.float().split(counts), strict=True)

    def affine(self, mixed: Tensor, weight: Tensor) -> Tensor:
        """Weighted sums of values from those of normalized values.

        Args:
            mixed: ``[B, H, Q, D]``, sums of what ``read(..., normalized=True)`` returns.
            weight: ``[B, H, Q, 1]``, sums of the weights.
        """
        shape = (self.layout.heads, 1, self.layout.head_dim)
        return mixed * self.quantizer.scale.view(shape) + weight * self.quantizer.zero_point.view(shape)

    def _levels(self, words: Tensor) -> Tensor:
        """Levels of all channels, float32 ``[B, C, 256 * pages]``.

        Args:
            words: codes of the pages, int32 ``[pages, B, W, 8]``.
        """
        y = self._look_up(self._pair_places(words), self._pairs, self._pairs_start) if self._paired else None
        for group, levels, start in self._single:
            codes = unpack_units(self._units(group, words), group.width)
            part = self._look_up(self.quantizer.level_index(codes).flatten(3), levels, start)
            if group.channels is None:
                return part
            if y is None:
                y = torch.empty(part.shape[0], self.layout.channels, part.shape[-1], device=part.device)
            y.index_copy_(1, group.channels, part)
        assert y is not None
        return y

    def _pair_places(self, words: Tensor) -> Tensor:
        """What selects level pairs, integers ``[pages, B, C, 128]``; anything for channels without pairs."""
        parts = [slice_bytes(self._units(group, words), group.width).flatten(3) for group in self._paired]
        data = parts[0] if self._order is None else torch.cat(parts, dim=2).index_select(2, self._order)
        before = self.quantizer.before_pairs(data.unflatten(-1, (PAGE_BLOCKS, -1)))
        if before is None:
            return data
        return before.flatten(-2).to(torch.int16).bitwise_left_shift_(8).bitwise_or_(data)

    @staticmethod
    def _units(group: _Group, words: Tensor) -> Tensor:
        """Words of one width's channels, int32 ``[pages, B, n, 8, width]``."""
        if group.rows is not None:
            words = words.index_select(2, group.rows)
        return words.view(*words.shape[:2], len(group.part), PAGE_BLOCKS, group.width)

    @staticmethod
    def _look_up(data: Tensor, table: Tensor, start: Tensor | None) -> Tensor:
        """Entries of a table, float32 ``[B, n, S]``, by integers ``[pages, B, n, x]`` from each channel's start."""
        data = data.permute(1, 2, 0, 3)
        index = torch.empty(data.shape, dtype=torch.int32, device=data.device)
        if start is None:
            index.copy_(data)
        else:
            torch.add(data, start[..., None], out=index)
        found = table.index_select(0, index.flatten()).view(torch.float32)
        return found.view(*data.shape[:2], -1)
