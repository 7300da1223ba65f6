"""Packed keys or values in pages of 16 tokens and of one size, as paged attention allocates them.

Our own pages hold 256 tokens, and as many outliers as there are. An engine such as vLLM hands out physical pages of 16
tokens of one sequence, all of the same number of bytes, and a table says which page holds which tokens. Here codes move
between the two bit for bit; nothing is quantized again. Where each token is quantized by itself, a page can be packed
alone as soon as its tokens are known; codes that depend on others of their block of 32 tokens need its two pages
together.

A page is 16-bit words, in this order:

==================  ===================================================================================================
part                words
==================  ===================================================================================================
codes               ``W``, the sum of the widths: ``bits`` for each channel, in order of channels
token parameters    32 where scales are per token: scale and zero point of each token, as bits of the storage dtype
outlier starts      ``H + 1`` where there are outliers: entries of head ``h`` are ``start[h]`` to ``start[h + 1] - 1``
outlier indices     one per slot: ``token << 11 | coordinate``, by head, token and coordinate
outlier residuals   one per slot, as bits of the storage dtype
(padding)           up to a multiple of 16 bytes
==================  ===================================================================================================

The ``bits`` words of a channel are a unit of :mod:`kvq_calib.codec.packing` with 4 nibbles to a word instead of 8, and
4 tokens to a slice instead of 8. So two pages joined word by word, one the low and one the high half, are a unit that
the same look-ups serve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.packing import (
    BLOCK_TOKENS,
    COORDINATE_BITS,
    PAGE_BLOCKS,
    PAGE_TOKENS,
    OutlierLists,
    pack_units,
    unpack_outliers,
    unpack_units,
)
from kvq_calib.codec.quantizer import Quantized, Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.storage import PackedTensor

__all__ = ["TOKENS", "PagedLayout", "codes_of", "packed_tensor"]

#: Tokens of a page; vLLM's default block size.
TOKENS = 16
_ALIGNMENT = 16
_WORD_BYTES = 2
_MOST_OUTLIERS = (1 << 16) - 1


def _as_int16(numbers: Tensor) -> Tensor:
    """Numbers from 0 to 65535 as the int16 with the same bits."""
    return torch.where(numbers >= 1 << 15, numbers - (1 << 16), numbers).to(torch.int16)


def _unsigned(words: Tensor) -> Tensor:
    """Invert :func:`_as_int16`, as int64."""
    return words.to(torch.int64) & 0xFFFF


@dataclass(frozen=True)
class PagedLayout:
    """Where everything stands in a page of 16 tokens of one layer's keys or values.

    Attributes:
        quantizer: what made the codes; its widths, shapes and storage dtype decide the layout.
        outlier_slots: entries that a page has room for. Pages of one size cannot grow: choose it from the outliers that
            were counted, not from the mean (:meth:`outliers_of_pages`).
    """

    quantizer: Quantizer
    outlier_slots: int = 0

    def __post_init__(self) -> None:
        most = TOKENS * self.quantizer.outlier_cap
        if not 0 <= self.outlier_slots <= min(most, _MOST_OUTLIERS):
            raise RuntimeMismatchError(
                f"{self.outlier_slots} outlier slots for a page that can have 0 to {min(most, _MOST_OUTLIERS)} "
                "outliers"
            )

    @property
    def _sections(self) -> tuple[int, int, int, int]:
        """Words before the token parameters, the outlier starts, the indices, and all without padding."""
        layout = self.quantizer.layout
        codes = layout.words_per_block
        params = codes + (2 * TOKENS if layout.token_params else 0)
        starts = params + (layout.heads + 1 if layout.outlier_cap else 0)
        return codes, params, starts, starts + 2 * self.outlier_slots

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, a multiple of 16."""
        return -(-self._sections[3] * _WORD_BYTES // _ALIGNMENT) * _ALIGNMENT

    def pool(self, pages: int, device: torch.device | str = "cpu") -> Tensor:
        """Physical memory for ``pages`` pages, zeroed: int16 ``[pages, page_bytes / 2]``."""
        return torch.zeros(pages, self.page_bytes // _WORD_BYTES, dtype=torch.int16, device=device)

    def outliers_of_pages(self, quantized: Quantized) -> Tensor:
        """Outliers of every page, int64 ``[B, n]``."""
        batch, tokens, _ = quantized.codes.shape
        if quantized.outliers is None:
            return torch.zeros(batch, tokens // TOKENS, dtype=torch.int64, device=quantized.codes.device)
        return quantized.outliers.view(batch, tokens // TOKENS, -1).sum(-1)

    def pack(self, quantized: Quantized) -> Tensor:
        """Pages of whole groups of 16 tokens.

        Args:
            quantized: of ``16 * n`` tokens of ``B`` sequences.

        Returns:
            int16 ``[B, n, page_bytes / 2]``.

        Raises:
            RuntimeMismatchError: the tokens do not fill pages, or a page has more outliers than slots.
        """
        layout = self.quantizer.layout
        batch, tokens, channels = quantized.codes.shape
        if tokens % TOKENS:
            raise RuntimeMismatchError(f"{tokens} tokens do not fill whole pages of {TOKENS}")
        pages = tokens // TOKENS
        out = self.pool(batch * pages, quantized.codes.device).view(batch, pages, -1)
        codes_end, params_end, _, _ = self._sections
        units = quantized.codes.view(batch, pages, TOKENS, channels).transpose(2, 3)
        offsets = torch.tensor(layout.word_offsets, dtype=torch.int64)
        for width, members, _ in layout.groups(out.device):
            words = offsets[members.cpu(), None] + torch.arange(width)
            out[:, :, words.to(out.device)] = _pack_words(units[:, :, members], width)
        if layout.token_params:
            assert quantized.token_scale is not None and quantized.token_zero_point is not None
            pair = torch.stack((quantized.token_scale, quantized.token_zero_point), dim=-1)
            out[:, :, codes_end:params_end] = pair.view(torch.int16).view(batch, pages, -1)
        if layout.outlier_cap:
            assert quantized.outliers is not None and quantized.residual is not None
            self._pack_outliers(out[:, :, params_end:], quantized.outliers, quantized.residual)
        return out

    def _pack_outliers(self, out: Tensor, mask: Tensor, residual: Tensor) -> None:
        heads, (batch, pages) = self.quantizer.layout.heads, out.shape[:2]

        def by_page(x: Tensor) -> Tensor:  # [B, n, H, 16, D]
            split: Tensor = x.view(batch, pages, TOKENS, heads, -1)
            return split.transpose(2, 3)

        order = by_page(mask)
        ends = order.flatten(-2).sum(-1).cumsum(-1)
        most = int(ends.max()) if ends.numel() else 0
        if most > self.outlier_slots:
            raise RuntimeMismatchError(
                f"a page of {TOKENS} tokens has {most} outliers and room for {self.outlier_slots}; give it "
                f"{most} slots or more"
            )
        out[:, :, 1 : heads + 1] = _as_int16(ends)
        row, page, _, token, coordinate = order.nonzero(as_tuple=True)
        counts = ends[..., -1].flatten()
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        slot = heads + 1 + torch.arange(len(row), device=out.device) - before
        out[row, page, slot] = _as_int16((token << COORDINATE_BITS) | coordinate)
        out[row, page, slot + self.outlier_slots] = by_page(residual)[order].view(torch.int16)

    def unpack(self, pages: Tensor) -> Quantized:
        """Invert :meth:`pack`: int16 ``[B, n, page_bytes / 2]`` to the codes of ``16 * n`` tokens."""
        layout, storage = self.quantizer.layout, self.quantizer.storage
        batch, count, _ = pages.shape
        codes_end, params_end, starts_end, entries_end = self._sections
        codes = torch.zeros(batch, count, layout.channels, TOKENS, dtype=torch.uint8, device=pages.device)
        offsets = torch.tensor(layout.word_offsets, dtype=torch.int64)
        for width, members, _ in layout.groups(pages.device):
            words = offsets[members.cpu(), None] + torch.arange(width)
            codes[:, :, members] = _unpack_words(pages[:, :, words.to(pages.device)], width)
        found = Quantized(codes.transpose(2, 3).reshape(batch, count * TOKENS, layout.channels))
        scale = zero_point = outliers = residual = None
        if layout.token_params:
            pair = pages[:, :, codes_end:params_end].contiguous().view(storage)
            scale, zero_point = pair.view(batch, count * TOKENS, 2).unbind(-1)
        if layout.outlier_cap:
            starts = _unsigned(pages[:, :, params_end:starts_end])
            index = pages[:, :, starts_end : starts_end + self.outlier_slots]
            values = pages[:, :, starts_end + self.outlier_slots : entries_end].contiguous().view(storage)
            outliers, residual = self._unpack_outliers(starts, _unsigned(index), values)
        return Quantized(found.codes, outliers, residual, scale, zero_point)

    def _unpack_outliers(self, starts: Tensor, index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        layout, (batch, count) = self.quantizer.layout, starts.shape[:2]
        slots = torch.arange(self.outlier_slots, device=starts.device).expand(batch, count, -1)
        row, page, slot = (slots < starts[..., -1:]).nonzero(as_tuple=True)
        head = (starts[row, page, 1:] <= slot[:, None]).sum(-1)
        entry = index[row, page, slot]
        token = page * TOKENS + (entry >> COORDINATE_BITS)
        channel = head * layout.head_dim + (entry & ((1 << COORDINATE_BITS) - 1))
        shape = (batch, count * TOKENS, layout.channels)
        outliers = torch.zeros(shape, dtype=torch.bool, device=starts.device)
        residual = torch.zeros(shape, dtype=values.dtype, device=starts.device)
        outliers[row, token, channel] = True
        residual[row, token, channel] = values[row, page, slot]
        return outliers, residual


def _pack_words(codes: Tensor, width: int) -> Tensor:
    """Codes ``[..., 16]`` to int16 ``[..., width]``: the low halves of a unit whose other 16 codes are zero."""
    slices = codes.unflatten(-1, (4, 4))
    words = pack_units(torch.cat((slices, torch.zeros_like(slices)), dim=-1).flatten(-2), width)
    return _as_int16(words.to(torch.int64) & 0xFFFF)


def _unpack_words(words: Tensor, width: int) -> Tensor:
    """Invert :func:`_pack_words`, to uint8 ``[..., 16]``."""
    codes = unpack_units(_unsigned(words).to(torch.int32), width)
    own: Tensor = codes.unflatten(-1, (4, 8))[..., :4]
    return own.flatten(-2)


def codes_of(packed: PackedTensor) -> Quantized:
    """What our own pages hold, as it was before packing.

    Tokens that a sliding window has dropped are left out: the first one is number ``256 * packed.dropped_pages``.
    """
    layout = packed.layout
    blocks = packed.blocks - PAGE_BLOCKS * packed.dropped_pages
    parts: list[tuple[Tensor | None, ...]] = []
    for number, page in enumerate(packed.pages):
        held = min(blocks - number * PAGE_BLOCKS, PAGE_BLOCKS)
        tokens = held * BLOCK_TOKENS
        codes = layout.read(page.codes, held).transpose(1, 2)
        scale = zero_point = outliers = residual = None
        if page.token_params is not None:
            scale, zero_point = page.token_params[:, :tokens].unbind(-1)
        if page.outlier_start is not None:
            assert page.outlier_index is not None and page.outlier_residual is not None
            counts = page.outlier_start.to(torch.int64).diff().view(PAGE_BLOCKS, packed.batch, layout.heads)
            lists = OutlierLists(page.outlier_index, page.outlier_residual, counts[:held])
            flat, values = unpack_outliers(lists, layout.head_dim)
            outliers = torch.zeros(codes.shape, dtype=torch.bool, device=packed.device)
            residual = torch.zeros(codes.shape, dtype=values.dtype, device=packed.device)
            outliers.view(-1)[flat], residual.view(-1)[flat] = True, values
        parts.append((codes, outliers, residual, scale, zero_point))
    if not parts:
        raise RuntimeMismatchError(f"nothing is packed before {BLOCK_TOKENS} tokens are stored")
    joined = [
        None if column[0] is None else torch.cat([part for part in column if part is not None], dim=1)
        for column in zip(*parts, strict=True)
    ]
    assert joined[0] is not None
    return Quantized(joined[0], *joined[1:])


def packed_tensor(quantized: Quantized, quantizer: Quantizer) -> PackedTensor:
    """Our own pages of the codes of ``32 * n`` tokens; inverts :func:`codes_of`.

    Raises:
        RuntimeMismatchError: the tokens do not fill blocks of 32.
    """
    batch, tokens, _ = quantized.codes.shape
    if tokens % BLOCK_TOKENS:
        raise RuntimeMismatchError(f"{tokens} tokens do not fill whole blocks of {BLOCK_TOKENS}")
    packed = PackedTensor(quantizer, batch, quantized.codes.device)
    for start in range(0, tokens, PAGE_TOKENS):
        part = slice(start, start + PAGE_TOKENS)
        packed.append_codes(Quantized(**{n: t[:, part] for n, t in vars(quantized).items() if t is not None}))
    return packed
