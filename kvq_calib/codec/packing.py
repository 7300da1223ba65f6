"""Bit layout of the packed cache. No other Python code depends on it.

``docs/reference/kernels.md`` states it for other readers.

A **block** is 32 tokens and a **page** 8 blocks. Inside a page, every (sequence, channel) has one contiguous region of
``8 * bits`` 32-bit words: block after block, ``bits`` words each. So every region is a multiple of 32 bytes at any
width. Eight lanes of a warp read the eight blocks of a channel with full sectors, and channels of different widths need
no padding.

The ``bits`` words of a *unit* (one channel, one block) hold 32 codes in nibble slices. Eight tokens are one slice,
one nibble each, so that ``word & mask`` yields eight selectors for a byte-permute lookup:

========  ==========================================================================================
width     token ``t`` (0..31) stands in
========  ==========================================================================================
4         word ``t // 8``, nibble ``t % 8``
3         t < 24: word ``t // 8``, low 3 bits of nibble ``t % 8``; t >= 24: bit ``p`` of the code is the
          top bit of nibble ``t % 8`` of word ``p``
2         word ``t // 16``, nibble ``t % 8``, low pair of bits if ``t % 16 < 8``, else the high pair
1         the word, nibble ``t % 8``, bit ``t // 8``
5 to 8    four words of the low 4 bits as width 4, then the high bits as width ``bits - 4``
0         nothing
========  ==========================================================================================

Outliers of a page are lists, one per (block, sequence, head) in this order. An entry is a ``uint16`` index
``token_in_block << 11 | coordinate`` and the residual in the storage dtype. The starts of the lists are ``int16`` if
that suffices for the most entries a page can have, else ``int32``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from kvq_calib.native.loader import library
from kvq_calib.native.pack import list_outliers, pack_codes

BLOCK_TOKENS = 32
PAGE_BLOCKS = 8
PAGE_TOKENS = BLOCK_TOKENS * PAGE_BLOCKS
WORD_BYTES = 4
#: Bits in an outlier index for the coordinate within the head.
COORDINATE_BITS = 11
OUTLIER_INDEX_BYTES = 2
#: Exact tokens, residuals and per-token scales are 16-bit floats of either kind.
STORAGE_BYTES = 2


def _sliced(width: int) -> list[list[tuple[int, int, int]]]:
    """Positions of the codes of each 8-token slice: a list of (word, shift in the nibble, bit of the code).

    Widths 1, 2 and 4 would need only runs of adjacent bits. Naming single bits covers width 3 with the same code.
    """
    if width == 4:
        return [[(s, bit, bit) for bit in range(4)] for s in range(4)]
    if width == 3:
        return [[(s, bit, bit) for bit in range(3)] for s in range(3)] + [[(bit, 3, bit) for bit in range(3)]]
    if width == 2:
        return [[(s // 2, 2 * (s % 2) + bit, bit) for bit in range(2)] for s in range(4)]
    return [[(0, s, 0)] for s in range(4)]


def _pack_nibbles(codes: Tensor, width: int) -> Tensor:
    slices = codes.to(torch.int64).unflatten(-1, (4, 8))
    words = torch.zeros(*codes.shape[:-1], width, dtype=torch.int64, device=codes.device)
    nibble = 4 * torch.arange(8, device=codes.device)
    for s, places in enumerate(_sliced(width)):
        for word, shift, bit in places:
            words[..., word] |= (((slices[..., s, :] >> bit) & 1) << (nibble + shift)).sum(-1)
    return words


def pack_units(codes: Tensor, bits: int) -> Tensor:
    """Pack blocks of 32 codes.

    Args:
        codes: integer ``[..., 32]``, each in ``[0, 2 ** bits)``.
        bits: width, 0 to 8.

    Returns:
        int32 ``[..., bits]``.
    """
    if bits == 0:
        return codes.new_zeros((*codes.shape[:-1], 0), dtype=torch.int32)
    if bits <= 4:
        words = _pack_nibbles(codes, bits)
    else:
        words = torch.cat([_pack_nibbles(codes & 15, 4), _pack_nibbles(codes >> 4, bits - 4)], dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_units(words: Tensor, bits: int) -> Tensor:
    """Invert :func:`pack_units`: int32 ``[..., bits]`` to uint8 ``[..., 32]``."""
    if bits == 0:
        return torch.zeros((*words.shape[:-1], BLOCK_TOKENS), dtype=torch.uint8, device=words.device)
    if bits <= 4:
        pairs, mask = slice_bytes(words, bits), (1 << bits) - 1
        return torch.stack((pairs & mask, pairs >> 4 & mask), dim=-1).flatten(-3)
    return unpack_units(words[..., :4], 4) | unpack_units(words[..., 4:], bits - 4) << 4


def slice_bytes(words: Tensor, bits: int) -> Tensor:
    """The four 8-token slices of blocks with all codes in the low bits of nibbles, for byte-wise lookups.

    Args:
        words: int32 ``[..., bits]``, as :func:`pack_units` makes them.
        bits: width, 1 to 4.

    Returns:
        uint8 ``[..., 4, 4]``: byte ``j`` of slice ``s`` has token ``8 * s + 2 * j`` in its low nibble and the next
        token in its high nibble. The bits of a nibble above the code are undefined.
    """
    if bits == 3:
        top = [words[..., p, None] >> (3 - p) & (0x11111111 << p) for p in range(3)]
        words = torch.cat((words, top[0] | top[1] | top[2]), dim=-1)
    elif bits < 4:
        words = torch.stack([words >> shift for shift in range(0, 4, bits)], dim=-1).flatten(-2)
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)


@lru_cache(maxsize=4096)
def _width_groups(widths: tuple[int, ...]) -> tuple[tuple[int, Tensor, Tensor], ...]:
    """For each width in use: (width, channels ``[n]``, rows ``[n, width]`` of the page as ``[W, 8]`` words)."""
    of_channel = torch.tensor(widths, dtype=torch.int64)
    offsets = of_channel.cumsum(0) - of_channel
    groups = []
    for width in sorted(set(widths) - {0}):
        channels = torch.nonzero(of_channel == width).flatten()
        groups.append((width, channels, offsets[channels, None] + torch.arange(width)))
    return tuple(groups)


@dataclass(frozen=True)
class PageLayout:
    """The layout of a page for one layer's keys or values.

    Attributes:
        widths: width of each channel in bits, ``C = heads * head_dim`` numbers from 0 to 8.
        heads, head_dim: shape of a token.
        token_params: whether a scale and a zero point per token are stored.
        outlier_cap: largest number of outliers of a token; 0 without outlier lists.
    """

    widths: tuple[int, ...]
    heads: int
    head_dim: int
    token_params: bool
    outlier_cap: int

    def __post_init__(self) -> None:
        if len(self.widths) != self.channels:
            raise ValueError(f"{len(self.widths)} widths for {self.channels} channels")

    @property
    def channels(self) -> int:
        """``heads * head_dim``."""
        return self.heads * self.head_dim

    @cached_property
    def words_per_block(self) -> int:
        """32-bit words of one sequence and block: the sum of the widths."""
        return sum(self.widths)

    @cached_property
    def word_offsets(self) -> tuple[int, ...]:
        """Sum of the widths before each channel. The channel's region in a page starts at word ``8 * offset``."""
        offsets, total = [], 0
        for width in self.widths:
            offsets.append(total)
            total += width
        return tuple(offsets)

    @cached_property
    def width_table(self) -> Tensor:
        """The widths, uint8 ``[C]``."""
        return torch.tensor(self.widths, dtype=torch.uint8)

    def groups(self, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Channels by width: ``(width, channels int64 [n], rows int64 [n, width])``.

        ``page.view(B, W, 8)[:, rows]`` has the words of these channels, in order of block and word.
        """
        for width, channels, rows in _width_groups(self.widths):
            yield width, channels.to(device), rows.to(device)

    def new_page(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """The code words of a new page, all zero: int32 ``[batch, 8 * W]``."""
        return torch.zeros(batch, PAGE_BLOCKS * self.words_per_block, dtype=torch.int32, device=device)

    def write(self, page: Tensor, codes: Tensor, first_block: int) -> None:
        """Pack whole blocks into a page, in place.

        Args:
            page: int32 ``[B, 8 * W]``.
            codes: uint8 ``[B, 32 * n, C]``.
            first_block: block of the page for the first token; ``first_block + n`` is at most 8.
        """
        batch, tokens, _ = codes.shape
        if not tokens:
            return
        blocks = tokens // BLOCK_TOKENS
        if tokens % BLOCK_TOKENS or first_block + blocks > PAGE_BLOCKS:
            raise ValueError(f"{tokens} tokens at block {first_block} do not fill whole blocks of one page")
        if page.device.type == "cpu" and codes.dtype == torch.uint8 and (native := library()) is not None:
            pack_codes(native, self.width_table, codes.contiguous(), page, first_block)
            return
        rows_view = page.view(batch, self.words_per_block, PAGE_BLOCKS)
        units = codes.transpose(1, 2).unflatten(-1, (blocks, BLOCK_TOKENS))
        for width, channels, rows in self.groups(page.device):
            region = rows_view[:, rows].view(batch, len(channels), PAGE_BLOCKS, width)
            region[:, :, first_block : first_block + blocks] = pack_units(units[:, channels], width)
            rows_view[:, rows] = region.view(batch, len(channels), width, PAGE_BLOCKS)

    def read(self, page: Tensor, blocks: int = PAGE_BLOCKS) -> Tensor:
        """Unpack the first ``blocks`` blocks: int32 ``[B, 8 * W]`` to uint8 ``[B, C, 32 * blocks]``."""
        batch = page.shape[0]
        rows_view = page.view(batch, self.words_per_block, PAGE_BLOCKS)
        codes = torch.zeros(
            batch, self.channels, blocks * BLOCK_TOKENS, dtype=torch.uint8, device=page.device
        )
        for width, channels, rows in self.groups(page.device):
            region = rows_view[:, rows].view(batch, len(channels), PAGE_BLOCKS, width)[:, :, :blocks]
            codes[:, channels] = unpack_units(region, width).flatten(-2)
        return codes

    def start_dtype(self, batch: int) -> torch.dtype:
        """Dtype of the starts of a page's lists: the narrowest that holds the most entries a page can have."""
        most = PAGE_TOKENS * batch * self.outlier_cap
        return torch.int16 if most <= torch.iinfo(torch.int16).max else torch.int32

    def page_bytes(self, batch: int = 1) -> dict[str, int]:
        """Bytes of one page's buffers without outlier entries, by kind of buffer."""
        sizes = {"codes": WORD_BYTES * PAGE_BLOCKS * self.words_per_block * batch}
        if self.token_params:
            sizes["token_scales"] = 2 * STORAGE_BYTES * PAGE_TOKENS * batch
        if self.outlier_cap:
            sizes["outlier_starts"] = self.start_dtype(batch).itemsize * (
                PAGE_BLOCKS * batch * self.heads + 1
            )
        return sizes


@dataclass(frozen=True)
class OutlierLists:
    """Outliers of ``n`` whole blocks, sorted by (block, sequence, head, token, coordinate).

    Attributes:
        index: int16 ``[E]`` (the bit pattern of a uint16): ``token_in_block << 11 | coordinate``.
        residual: storage dtype ``[E]``: what is added to the dequantized code.
        counts: int32 ``[n, B, heads]``: number of entries of each list.
    """

    index: Tensor
    residual: Tensor
    counts: Tensor


def pack_outliers(mask: Tensor, residual: Tensor, heads: int) -> OutlierLists:
    """Collect outliers into lists.

    Args:
        mask: bool ``[B, 32 * n, C]``.
        residual: ``[B, 32 * n, C]`` in the storage dtype; read where ``mask`` is set.
        heads: number of key-value heads in ``C``.
    """
    if mask.device.type == "cpu" and (native := library()) is not None:
        return OutlierLists(*list_outliers(native, mask.contiguous(), residual.contiguous(), heads))
    order = mask.unflatten(1, (-1, BLOCK_TOKENS)).unflatten(-1, (heads, -1)).permute(1, 0, 3, 2, 4)
    values = residual.unflatten(1, (-1, BLOCK_TOKENS)).unflatten(-1, (heads, -1)).permute(1, 0, 3, 2, 4)
    places = order.nonzero()
    index = (places[:, 3] << COORDINATE_BITS) | places[:, 4]
    return OutlierLists(
        index=torch.where(index >= 1 << 15, index - (1 << 16), index).to(torch.int16),
        residual=values[order],
        counts=order.flatten(-2).sum(-1, dtype=torch.int32),
    )


def unpack_outliers(lists: OutlierLists, head_dim: int) -> tuple[Tensor, Tensor]:
    """Invert :func:`pack_outliers`.

    Returns:
        ``flat`` int64 ``[E]``, positions in a ``[B, 32 * n, heads * head_dim]`` tensor, and ``residual`` ``[E]``.
    """
    blocks, batch, heads = lists.counts.shape
    owner = torch.repeat_interleave(lists.counts.flatten().to(torch.int64))
    block, row, head = owner // (batch * heads), (owner // heads) % batch, owner % heads
    index = lists.index.to(torch.int64) & 0xFFFF
    token = block * BLOCK_TOKENS + (index >> COORDINATE_BITS)
    channel = head * head_dim + (index & ((1 << COORDINATE_BITS) - 1))
    flat = (row * blocks * BLOCK_TOKENS + token) * heads * head_dim + channel
    return flat, lists.residual
