"""Dequantizes packed pages in torch, on any device.

In the workspace a tensor is ``[B, H, D, S]``. Tokens are the last dimension, as in the pages, so nothing is transposed.
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

#: Number of spans for which outliers and scales of tokens are prepared at once.
SPANS_READY = 8


@dataclass(frozen=True)
class _Group:
    """Channels of one width.

    Attributes:
        width: width in bits.
        channels: int64 ``[n]``, or ``None`` for all channels in order.
        rows: int64 ``[n * width]``, rows of the page as ``[W, 8]`` words, or ``None`` for all in order.
        levels: float32 ``[n * L]``, channel after channel; or ``[L]``, the same for all.
        start: int32 ``[n, 1]``, start of each channel's levels, or ``None`` if all channels share them.
    """

    width: int
    channels: Tensor | None
    rows: Tensor | None
    levels: Tensor
    start: Tensor | None


class PageReader:
    """Decodes pages of one layer's keys or values.

    Shared levels of up to 4 bits are looked up two at a time: a byte of a nibble slice selects a pair of float32, which
    is moved as one float64.

    Args:
        quantizer: quantizer of the tensor.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.layout = quantizer.layout
        self.device = quantizer.device
        #: Whether scale and zero point are per channel and are applied last. Then they can be applied to a weighted sum
        #: of normalized values instead of every value.
        self.separable = quantizer.has_channel_thresholds and not (
            self.layout.token_params or self.layout.outlier_cap
        )
        self._groups = list(self._by_width())
        #: Float64 ``[256]``, the pair of levels for each byte; or ``None``.
        self._pairs = self._pair_table()

    def _by_width(self) -> Iterator[_Group]:
        shared, widths = self.quantizer.shared_levels, set(self.layout.widths)
        if shared is not None and len(widths) == 1 and 0 not in widths:
            yield _Group(widths.pop(), None, None, shared.clone(), None)
            return
        groups = list(self.layout.groups(self.device))
        without = torch.tensor(self.layout.widths, device=self.device).eq(0).nonzero().flatten()
        if len(without):
            groups.append((0, without, without[:0]))
        levels = self.quantizer.levels
        for width, channels, rows in groups:
            count = self.quantizer.level_count(width)
            start = torch.arange(0, count * len(channels), count, dtype=torch.int32, device=self.device)
            yield _Group(width, channels, rows.flatten(), levels[channels, :count].flatten(), start[:, None])

    def _pair_table(self) -> Tensor | None:
        first = self._groups[0]
        if first.start is not None or first.width > 4 or self.quantizer.codes_in_blocks:
            return None
        byte, mask = torch.arange(256, device=self.device), (1 << first.width) - 1
        selected = torch.stack((byte & mask, byte >> 4 & mask), dim=-1)
        return first.levels[selected].view(torch.float64).flatten()

    def tensors(self) -> list[Tensor]:
        """All tensors beside the quantizer's parameters."""
        found = [self._pairs]
        for group in self._groups:
            found += [group.channels, group.rows, group.levels, group.start]
        return [tensor for tensor in found if tensor is not None]

    def read(self, pages: Sequence[Page], normalized: bool = False) -> Tensor:
        """Decode whole pages: float32 ``[B, H, D, 256 * n]``, in the basis of :meth:`Quantizer.transform`.

        Places without a token give finite but meaningless numbers.

        Args:
            pages: one or more.
            normalized: leave scale and zero point to :meth:`affine`; only if ``separable``.
        """
        return next(self.spans(pages, len(pages), normalized))

    def spans(self, pages: Sequence[Page], size: int, normalized: bool = False) -> Iterator[Tensor]:
        """Decode pages like :meth:`read`, ``size`` at a time.

        Small tensors are prepared for :data:`SPANS_READY` spans at once, because calls cost more than the work.
        """
        whole = len(pages) - len(pages) % size
        for start in range(0, whole, SPANS_READY * size):
            yield from self._alike(pages[start : min(start + SPANS_READY * size, whole)], size, normalized)
        if whole < len(pages):
            yield from self._alike(pages[whole:], len(pages) - whole, normalized)

    def _alike(self, pages: Sequence[Page], size: int, normalized: bool) -> Iterator[Tensor]:
        """:meth:`spans` for whole spans, whose small tensors are prepared together."""
        batch, layout = pages[0].codes.shape[0], self.layout
        tokens = self._token_params(pages) if layout.token_params else None
        corrections = self._corrections(pages, size) if layout.outlier_cap else None
        for start in range(0, len(pages), size):
            codes = torch.stack([page.codes for page in pages[start : start + size]])
            y = self._levels(codes.view(size, batch, -1, PAGE_BLOCKS))
            if tokens is not None:
                scale, zero_point = tokens[..., start * PAGE_TOKENS : (start + size) * PAGE_TOKENS]
                torch.addcmul(zero_point, y, scale, out=y)
            elif self.quantizer.has_channel_thresholds and not normalized:
                self._scale_channels(y)
            if corrections is not None:
                y.view(-1).index_add_(0, *next(corrections))
            if self.quantizer.channel_normalised:
                self._scale_channels(y)
            yield y.view(batch, layout.heads, layout.head_dim, -1)

    def _scale_channels(self, y: Tensor) -> None:
        """Apply scales and zero points of channels to ``y [B, C, S]`` in place."""
        y.mul_(self.quantizer.scale[:, None]).add_(self.quantizer.zero_point[:, None])

    @staticmethod
    def _token_params(pages: Sequence[Page]) -> Tensor:
        """Scales and zero points of the tokens, float32 ``[2, B, 1, 256 * n]``."""
        found = torch.cat([page.token_params for page in pages if page.token_params is not None], dim=1)
        out = torch.empty(2, len(found), 1, found.shape[1], device=found.device)
        return out.copy_(found.permute(2, 0, 1)[:, :, None])

    def _corrections(self, pages: Sequence[Page], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For every ``size`` pages, positions of outliers in ``y [B, C, S]``, int32, and float32 residuals."""
        places = size * PAGE_TOKENS
        start = torch.stack([page.outlier_start for page in pages if page.outlier_start is not None])
        index = torch.cat([page.outlier_index for page in pages if page.outlier_index is not None])
        residual = torch.cat([page.outlier_residual for page in pages if page.outlier_residual is not None])
        # The position of a list's block and head.
        device, stop = start.device, len(pages[0].codes) * self.layout.channels * places
        page = torch.arange(len(pages), dtype=torch.int32, device=device).remainder_(size)
        block = torch.arange(0, PAGE_TOKENS, BLOCK_TOKENS, dtype=torch.int32, device=device)
        head = torch.arange(0, stop, self.layout.head_dim * places, dtype=torch.int32, device=device)
        begin = (page[:, None, None] * PAGE_TOKENS + block[:, None] + head).flatten()
        count = start.to(torch.int32).diff().flatten()
        target = begin.repeat_interleave(count, output_size=len(index))
        index = index.to(torch.int32)
        target.add_(index & ((1 << COORDINATE_BITS) - 1), alpha=places)
        # The sign bit is the highest bit of the token.
        target.add_(index.bitwise_right_shift_(COORDINATE_BITS).bitwise_and_(BLOCK_TOKENS - 1))
        counts = [sum(page.entries for page in pages[at : at + size]) for at in range(0, len(pages), size)]
        return zip(target.split(counts), residual.float().split(counts), strict=True)

    def affine(self, mixed: Tensor, weight: Tensor) -> Tensor:
        """Convert weighted sums of normalized values to those of values.

        Args:
            mixed: ``[B, H, Q, D]``, sums of the result of ``read(..., normalized=True)``.
            weight: ``[B, H, Q, 1]``, sums of the weights.
        """
        shape = (self.layout.heads, 1, self.layout.head_dim)
        return mixed * self.quantizer.scale.view(shape) + weight * self.quantizer.zero_point.view(shape)

    def _levels(self, words: Tensor) -> Tensor:
        """Levels of all channels, float32 ``[B, C, 256 * pages]``.

        Args:
            words: codes of the pages, int32 ``[pages, B, W, 8]``.
        """
        first = self._groups[0]
        if self._pairs is not None:
            data = slice_bytes(self._units(first, words), first.width).flatten(3)
            return self._look_up(data, self._pairs, None)
        if first.channels is None:
            return self._of_group(first, words)
        places = PAGE_TOKENS * words.shape[0]
        y = torch.empty(words.shape[1], self.layout.channels, places, device=words.device)
        for group in self._groups:
            assert group.channels is not None
            y.index_copy_(1, group.channels, self._of_group(group, words))
        return y

    def _of_group(self, group: _Group, words: Tensor) -> Tensor:
        """Levels of the channels of one width, float32 ``[B, n, 256 * pages]``."""
        codes = unpack_units(self._units(group, words), group.width)
        index = self.quantizer.level_index(codes)
        return self._look_up(index.flatten(3), group.levels, group.start)

    def _units(self, group: _Group, words: Tensor) -> Tensor:
        """Words of the channels of one width, int32 ``[pages, B, n, 8, width]``."""
        count = self.layout.channels
        if group.rows is not None and group.channels is not None:
            words, count = words.index_select(2, group.rows), len(group.channels)
        return words.view(*words.shape[:2], count, PAGE_BLOCKS, group.width)

    @staticmethod
    def _look_up(data: Tensor, table: Tensor, start: Tensor | None) -> Tensor:
        """Entries of a table, float32 ``[B, n, S]``, at integers ``[pages, B, n, x]`` plus each channel's start."""
        data = data.permute(1, 2, 0, 3)
        index = torch.empty(data.shape, dtype=torch.int32, device=data.device)
        if start is None:
            index.copy_(data)
        else:
            torch.add(data, start[..., None], out=index)
        found = table.index_select(0, index.flatten()).view(torch.float32)
        return found.view(*data.shape[:2], -1)
