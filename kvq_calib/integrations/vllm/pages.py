"""Layout of a page in vLLM's pool.

A page has 256 tokens of one layer, like a page of :class:`~kvq_calib.runtime.storage.PackedTensor`, in contiguous
bytes. :mod:`kvq_calib.codec.packing` describes the codes in the first two areas::

    codes of keys | codes of values | scales of keys' tokens | of values' | first tokens: keys | values

Scales exist only if the recipe has them. The exact first tokens of a sequence are in its first page, so sequences that
share this page share them. The exact newest tokens, fewer than 32, are stored unpacked at the beginning of the page
after the one that will hold them packed, as keys ``[H, 32, D]`` and values ``[H, 32, D]``. (Below two bits per element,
a page is enlarged to their size.) So a sequence always has :data:`AHEAD` page beyond those that its tokens fill, and
all of it is in its pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.shard import shard
from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS, STORAGE_BYTES
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.storage import LayerStorage, PackedTensor, Page

__all__ = ["AHEAD", "LayerPages", "SequenceStorage", "page_bytes_of_ranks", "pages_of"]

#: Number of pages that a sequence needs beyond those that its tokens fill.
AHEAD = 1
#: Alignment of areas in bytes: whole cache lines, and whole sectors of a GPU's memory.
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Area:
    """A part of a page.

    Attributes:
        start, size: offset and size of the area in bytes.
    """

    start: int
    size: int

    def of(self, row: Tensor, dtype: torch.dtype) -> Tensor:
        """The area as numbers, from a page's bytes uint8 ``[page_bytes]``."""
        return row[self.start : self.start + self.size].view(dtype)


@dataclass(frozen=True)
class _TensorAreas:
    """The areas of the keys or the values of a layer.

    Attributes:
        codes, token, sinks: areas in a page; ``token`` is empty if tokens have no scales.
        tail: area of the newest tokens, in the page after that of the open block.
    """

    codes: _Area
    token: _Area
    sinks: _Area
    tail: _Area


class LayerPages:
    """The layout of one layer's pages.

    Args:
        key, value: quantizers of the layer.
        sink_tokens: number of exact first tokens of a sequence.
        least_bytes: smallest size of a page; smaller ones are padded. vLLM requires pages of one size on all ranks, but
            the widths of their channels differ (:func:`page_bytes_of_ranks`).

    Attributes:
        page_bytes: bytes of a page.

    Raises:
        RuntimeMismatchError: the recipe does not fit the pages.
    """

    def __init__(self, key: Quantizer, value: Quantizer, sink_tokens: int, least_bytes: int = 0) -> None:
        self.quantizers = key, value
        self.sink_tokens = sink_tokens
        if key.layout.outlier_cap or value.layout.outlier_cap:
            raise RuntimeMismatchError(
                "the recipe keeps outliers, and pages of vLLM have no room for a varying number"
            )
        if sink_tokens > PAGE_TOKENS:
            raise RuntimeMismatchError(
                f"the artifact keeps {sink_tokens} first tokens exact, and a page of vLLM holds {PAGE_TOKENS}"
            )
        self._end = 0
        tails = [self._area(STORAGE_BYTES * BLOCK_TOKENS * q.layout.channels) for q in self.quantizers]
        least, self._end = self._end, 0
        codes = [self._area(4 * PAGE_BLOCKS * q.layout.words_per_block) for q in self.quantizers]
        self._end = max(self._end, least)  # tails must not overwrite scales, which must stay finite
        token = [self._area(2 * STORAGE_BYTES * PAGE_TOKENS * q.layout.token_params) for q in self.quantizers]
        sinks = [self._area(STORAGE_BYTES * sink_tokens * q.layout.channels) for q in self.quantizers]
        self.page_bytes = max(self._end, least_bytes)
        self.areas = tuple(_TensorAreas(*areas) for areas in zip(codes, token, sinks, tails, strict=True))

    def _area(self, size: int) -> _Area:
        area = _Area(self._end, size)
        self._end += _whole(size)
        return area

    def of_all(self, pool: Tensor, side: int, name: Literal["token", "sinks", "tail"]) -> Tensor:
        """An area of every page, in the storage dtype: scales ``[pages, 256, 2]``, tokens ``[pages, H, n, D]``.

        Args:
            pool: uint8 ``[pages, page_bytes]`` of the layer.
            side: 0 for keys, 1 for values.
            name: name of the area, which must not be empty.
        """
        area: _Area = getattr(self.areas[side], name)
        layout = self.quantizers[side].layout
        numbers: Tensor = pool[:, area.start : area.start + area.size].view(self.quantizers[side].storage)
        shape = (PAGE_TOKENS, 2) if name == "token" else (layout.heads, -1, layout.head_dim)
        found: Tensor = numbers.unflatten(1, shape)
        return found

    def packed_page(self, pool: Tensor, page: int, side: int) -> Page:
        """The codes and scales of a page.

        Args:
            pool: uint8 ``[pages, page_bytes]`` of the layer.
            page: its number in the pool.
            side: 0 for keys, 1 for values.
        """
        areas, quantizer = self.areas[side], self.quantizers[side]
        found = Page(areas.codes.of(pool[page], torch.int32)[None])
        if areas.token.size:
            found.token_params = areas.token.of(pool[page], quantizer.storage).view(1, PAGE_TOKENS, 2)
        return found

    def write_blocks(self, pool: Tensor, places: Sequence[tuple[int, int]], side: int, x: Tensor) -> None:
        """Code a block of each of several sequences, and store them.

        Args:
            pool: uint8 ``[pages, page_bytes]`` of the layer.
            places: for each block, its page and its number in the page.
            side: 0 for keys, 1 for values.
            x: the tokens, ``[n, H, 32, D]`` in the storage dtype, in the form that the quantizer takes.
        """
        quantizer = self.quantizers[side]
        coded = quantizer.quantize(x)
        for row, (number, block) in enumerate(places):
            page = self.packed_page(pool, number, side)
            quantizer.layout.write(page.codes, coded.codes[row : row + 1], block)
            if page.token_params is not None:
                assert coded.token_scale is not None
                assert coded.token_zero_point is not None
                if block == 0:
                    page.token_params.zero_()  # as _PooledTensor.new_page
                here = page.token_params[0, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
                here[:, 0], here[:, 1] = coded.token_scale[row], coded.token_zero_point[row]

    def sinks(self, pool: Tensor, page: int, side: int) -> Tensor:
        """The exact first tokens of a sequence that begins in ``page``: storage dtype ``[1, H, n, D]``."""
        quantizer = self.quantizers[side]
        layout, numbers = quantizer.layout, self.areas[side].sinks.of(pool[page], quantizer.storage)
        return numbers.view(1, layout.heads, self.sink_tokens, layout.head_dim)

    def tail(self, pool: Tensor, table: Sequence[int], tokens: int, side: int) -> Tensor:
        """The area for the newest tokens of a sequence of ``tokens`` tokens: storage dtype ``[1, H, 32, D]``."""
        areas, quantizer = self.areas[side], self.quantizers[side]
        page = table[tokens // PAGE_TOKENS + AHEAD]
        layout, numbers = quantizer.layout, areas.tail.of(pool[page], quantizer.storage)
        return numbers.view(1, layout.heads, BLOCK_TOKENS, layout.head_dim)


def page_bytes_of_ranks(artifact: KVArtifact, ranks: int) -> list[int]:
    """Bytes of a page of each layer, large enough for every rank.

    Args:
        artifact: artifact of the whole model.
        ranks: number of ranks that divide its key-value heads.

    Raises:
        ConfigError: the heads cannot be divided evenly.
        RuntimeMismatchError: the recipe does not fit the pages.
    """
    parts = [artifact if ranks == 1 else shard(artifact, rank, ranks) for rank in range(ranks)]
    each = (
        [
            LayerPages(pair["key"], pair["value"], part.spec.sink_tokens).page_bytes
            for pair in part.quantizers()
        ]
        for part in parts
    )
    return [max(sizes) for sizes in zip(*each, strict=True)]


def pages_of(tokens: int) -> int:
    """Number of pages that tokens fill."""
    return -(-tokens // PAGE_TOKENS)


def _whole(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _PooledTensor(PackedTensor):
    """Packed keys or values of one sequence, in pages of a pool."""

    def __init__(self, pages: LayerPages, pool: Tensor, table: Sequence[int], side: int) -> None:
        super().__init__(pages.quantizers[side], 1, pool.device)
        self._of, self._pool, self._table, self._side = pages, pool, table, side

    def hold(self, blocks: int) -> None:
        """Take over the first ``blocks`` blocks, which are in the pool already."""
        self.blocks = blocks
        self.pages = [self._page(number) for number in range(-(-blocks // PAGE_BLOCKS))]

    def _page(self, number: int) -> Page:
        return self._of.packed_page(self._pool, self._table[number], self._side)

    def new_page(self) -> Page:
        """The sequence's next page. Old codes are not cleared, but scales are: a NaN would survive a weight of zero."""
        page = self._page(len(self.pages))
        if page.token_params is not None:
            page.token_params.zero_()
        return page


class SequenceStorage(LayerStorage):
    """One sequence of one layer, stored in vLLM's pages.

    Args:
        pages: layout of the layer's pages.
        pool: uint8 ``[pages, page_bytes]`` of the layer.
        table: pages of the sequence, in order.
        length: number of tokens that are stored already.
    """

    key: _PooledTensor
    value: _PooledTensor

    def __init__(self, pages: LayerPages, pool: Tensor, table: Sequence[int], length: int) -> None:
        key, value = pages.quantizers
        super().__init__(key, value, 1, 0, pool.device)
        self._pages, self._pool, self._table = pages, pool, table
        self.key, self.value = (_PooledTensor(pages, pool, table, side) for side in range(2))
        self.key.hold(length // BLOCK_TOKENS)
        self.value.hold(length // BLOCK_TOKENS)
        self.length = length
        self.sink_key, self.sink_value = (pages.sinks(pool, table[0], side) for side in range(2))
        if length == 0:  # unfilled places must be finite
            self.sink_key.zero_()
            self.sink_value.zero_()
        self._show_tail()

    def _show_tail(self) -> None:
        held = self.length % BLOCK_TOKENS
        if held:
            self.tail_key, self.tail_value = (
                self._pages.tail(self._pool, self._table, self.length, side)[:, :, :held] for side in range(2)
            )

    def keep_tail(self) -> None:
        """Copy the newest tokens, which an append left in separate tensors, to the pool."""
        tails = self.tail_key, self.tail_value
        self._show_tail()
        if tails[0].shape[2]:
            self.tail_key.copy_(tails[0])
            self.tail_value.copy_(tails[1])
