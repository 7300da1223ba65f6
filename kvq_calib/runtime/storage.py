"""The storage of one layer: packed blocks, exact tail, exact sinks. It only stores, and never quantizes.

The argument ``pack`` of :meth:`LayerStorage.append` codes whole blocks and stores them with
:meth:`PackedTensor.append_codes`. The slots of a block are the same for all layers and sequences, and are in
:class:`~kvq_calib.runtime.slots.SlotTable`.

Every token is rounded to the storage dtype before it is quantized, and blocks are quantized independently. So the codes
of a text do not depend on how it was divided into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvq_calib.codec.packing import (
    BLOCK_TOKENS,
    PAGE_BLOCKS,
    PAGE_TOKENS,
    OutlierLists,
    PageLayout,
    pack_outliers,
)
from kvq_calib.codec.quantizer import Quantized
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.slots import SlotTable

__all__ = ["LayerStorage", "PackedTensor", "Page", "StorageMark", "Stored", "not_finite"]


class Stored(Protocol):
    """The part of a quantizer that a storage uses: the layout of codes, and the dtype of exact numbers."""

    @property
    def layout(self) -> PageLayout:
        """The layout of a page, and the shape of a token."""

    @property
    def storage(self) -> torch.dtype:
        """Dtype of exact tokens, residuals and scales of tokens."""


@dataclass
class Page:
    """Up to 8 blocks of one layer's keys or values; see ``packing.py`` for the layout.

    Attributes:
        codes: int32 ``[B, 8 * W]``, allocated for the whole page.
        token_params: storage dtype ``[B, 256, 2]``, scale and zero point of each token, allocated for the whole page;
            or ``None``.
        outlier_index, outlier_residual: int16 and storage dtype ``[E]``, as many as there are; or ``None``.
        outlier_start: ``layout.start_dtype(B)`` ``[8 * B * H + 1]``: list ``(block * B + sequence) * H + head`` is
            entries ``start[i]`` to ``start[i + 1] - 1``. Lists of unwritten blocks are empty. Or ``None``.
    """

    codes: Tensor
    token_params: Tensor | None = None
    outlier_index: Tensor | None = None
    outlier_residual: Tensor | None = None
    outlier_start: Tensor | None = None

    @property
    def entries(self) -> int:
        """Number of outlier entries ``E``."""
        return 0 if self.outlier_index is None else self.outlier_index.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not ``None``, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def select(self, rows: Tensor, layout: PageLayout) -> Page:
        """The page of other sequences: row ``i`` is the present row ``rows[i]``."""
        page = Page(self.codes[rows], None if self.token_params is None else self.token_params[rows])
        if self.outlier_start is not None:
            assert self.outlier_index is not None
            assert self.outlier_residual is not None
            start = self.outlier_start.to(torch.int64)
            shape = (PAGE_BLOCKS, self.codes.shape[0], layout.heads)
            counts = start.diff().view(shape)[:, rows].flatten()
            begin = start[:-1].view(shape)[:, rows].flatten()
            new_start = torch.zeros(len(counts) + 1, dtype=torch.int64, device=start.device)
            torch.cumsum(counts, 0, out=new_start[1:])
            offset = torch.repeat_interleave(begin - new_start[:-1], counts)
            source = offset + torch.arange(len(offset), device=start.device)
            page.outlier_start = new_start.to(layout.start_dtype(len(rows)))
            page.outlier_index = self.outlier_index[source]
            page.outlier_residual = self.outlier_residual[source]
        return page


class PackedTensor:
    """The packed keys or values of one layer.

    Args:
        stored: layout of the codes.
        batch: number of sequences ``B``.
        device: device of the tensors.

    Attributes:
        layout: layout of a page.
        dtype: dtype of residuals and scales of tokens.
        pages: the pages in memory, oldest first.
        dropped_pages: number of older pages that were freed after a sliding window had passed; ``pages[i]`` is page
            ``dropped_pages + i`` of the block table.
        blocks: number of written blocks, including those in dropped pages.
    """

    def __init__(self, stored: Stored, batch: int, device: torch.device) -> None:
        self.layout = stored.layout
        self.dtype = stored.storage
        self.batch = batch
        self.device = device
        self.pages: list[Page] = []
        self.dropped_pages = 0
        self.blocks = 0

    @property
    def room(self) -> int:
        """Number of blocks that fit into the open page; 8 if a new one begins."""
        return PAGE_BLOCKS - self.blocks % PAGE_BLOCKS

    def append_codes(self, q: Quantized) -> None:
        """Pack whole blocks, no more than fit into the open page. Earlier pages are not changed."""
        layout, place, page = self.layout, self.blocks % PAGE_BLOCKS, self.open_page()
        layout.write(page.codes, q.codes, place)
        if page.token_params is not None:
            assert q.token_scale is not None
            assert q.token_zero_point is not None
            here = slice(place * BLOCK_TOKENS, place * BLOCK_TOKENS + q.codes.shape[1])
            page.token_params[:, here, 0] = q.token_scale
            page.token_params[:, here, 1] = q.token_zero_point
        lists = None
        if page.outlier_start is not None:
            assert q.outliers is not None
            assert q.residual is not None
            lists = pack_outliers(q.outliers, q.residual, layout.heads)
        self.add_blocks(page, q.codes.shape[1] // BLOCK_TOKENS, lists)

    def open_page(self) -> Page:
        """The page for the next block. A new one is not in :attr:`pages` until :meth:`add_blocks`."""
        return self.pages[-1] if self.blocks % PAGE_BLOCKS else self.new_page()

    def add_blocks(self, page: Page, count: int, lists: OutlierLists | None) -> None:
        """Count blocks that were written to the open page behind those it has, and store their outliers.

        Args:
            page: the result of :meth:`open_page`.
            count: number of new blocks.
            lists: their outliers; ``None`` without.
        """
        place = self.blocks % PAGE_BLOCKS
        if place == 0:
            self.pages.append(page)
        if lists is not None:
            assert page.outlier_start is not None
            assert page.outlier_index is not None
            assert page.outlier_residual is not None
            ends = (page.entries + lists.counts.flatten().cumsum(0)).to(page.outlier_start.dtype)
            begin = place * self.batch * self.layout.heads + 1
            page.outlier_start[begin : begin + len(ends)] = ends
            page.outlier_start[begin + len(ends) :] = ends[-1]
            # At most the seven blocks before this one are copied, so the cost is bounded by the page.
            page.outlier_index = torch.cat((page.outlier_index, lists.index))
            page.outlier_residual = torch.cat((page.outlier_residual, lists.residual))
        self.blocks += count

    def new_page(self) -> Page:
        """Make an empty page of this tensor. It is not in :attr:`pages` yet."""
        layout, storage = self.layout, self.dtype
        page = Page(layout.new_page(self.batch, self.device))
        if layout.token_params:
            page.token_params = torch.zeros(self.batch, PAGE_TOKENS, 2, dtype=storage, device=self.device)
        if layout.outlier_cap:
            page.outlier_index = torch.empty(0, dtype=torch.int16, device=self.device)
            page.outlier_residual = torch.empty(0, dtype=storage, device=self.device)
            lists = PAGE_BLOCKS * self.batch * layout.heads
            starts = layout.start_dtype(self.batch)
            page.outlier_start = torch.zeros(lists + 1, dtype=starts, device=self.device)
        return page

    def truncate(self, blocks: int) -> None:
        """Drop all blocks from ``blocks`` on. Their codes in a remaining page will be overwritten."""
        self.blocks = blocks
        del self.pages[-(-blocks // PAGE_BLOCKS) - self.dropped_pages :]
        place = blocks % PAGE_BLOCKS
        if place == 0 or not self.pages:
            return
        page = self.pages[-1]
        if page.outlier_start is not None:
            assert page.outlier_index is not None
            assert page.outlier_residual is not None
            lists = place * self.batch * self.layout.heads
            entries = int(page.outlier_start[lists])
            page.outlier_start[lists + 1 :] = entries
            page.outlier_index = page.outlier_index[:entries].clone()
            page.outlier_residual = page.outlier_residual[:entries].clone()

    def pages_before(self, slot: int, table: SlotTable) -> int:
        """Number of pages in memory that end before ``slot``."""
        count = 0
        while (last := PAGE_BLOCKS * (self.dropped_pages + count + 1) - 1) < self.blocks and (
            table.first[last] + table.fill[last] <= slot
        ):
            count += 1
        return count

    def drop(self, count: int) -> None:
        """Free the oldest ``count`` pages."""
        del self.pages[:count]
        self.dropped_pages += count

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        self.batch = len(rows)
        self.pages = [page.select(rows, self.layout) for page in self.pages]

    @property
    def outlier_entries(self) -> int:
        """Number of outlier entries of all pages in memory."""
        return sum(page.entries for page in self.pages)

    def memory(self) -> dict[str, int]:
        """Bytes held, by kind, as :func:`kvq_calib.codec.packing.storage_bytes` names them."""
        kinds = {
            "codes": "codes",
            "token_params": "token_scales",
            "outlier_start": "outlier_starts",
            "outlier_index": "outlier_entries",
            "outlier_residual": "outlier_entries",
        }
        sizes = dict.fromkeys(self.layout.page_bytes(), 0)
        if self.layout.outlier_cap:
            sizes["outlier_entries"] = 0
        for page in self.pages:
            for name, tensor in page.tensors().items():
                sizes[kinds[name]] += tensor.nbytes
        return sizes


@dataclass(frozen=True)
class StorageMark:
    """The state that :meth:`LayerStorage.restore` restores.

    Attributes:
        blocks: number of packed blocks.
        tail_key, tail_value: the exact tail.
        length: number of slots.
    """

    blocks: int
    tail_key: Tensor
    tail_value: Tensor
    length: int


class LayerStorage:
    """Keys and values of one layer: packed blocks, exact tail, exact sinks.

    Keys are un-rotated if attention rotates them on every read, else as attention uses them. Keys and values have the
    same number of heads, but may have different head sizes.

    Args:
        key, value: layouts of keys and values.
        batch: number of sequences ``B``.
        sink_tokens: number of sinks ``n``.
        device: device of the tensors.

    Attributes:
        key, value: packed blocks.
        tail_key, tail_value: storage dtype ``[B, H, t, D]``, the slots after the last block.
        sink_key, sink_value: storage dtype ``[B, H, n, D]``, for the slots ``SlotTable.sink_slots``. Attention uses
            them instead of the packed copies.
        length: number of slots.
    """

    def __init__(
        self, key: Stored, value: Stored, batch: int, sink_tokens: int, device: torch.device
    ) -> None:
        self.key = PackedTensor(key, batch, device)
        self.value = PackedTensor(value, batch, device)

        def zeros(packed: PackedTensor, tokens: int) -> Tensor:
            shape = (batch, packed.layout.heads, tokens, packed.layout.head_dim)
            return torch.zeros(shape, dtype=packed.dtype, device=device)

        self.tail_key, self.tail_value = zeros(self.key, 0), zeros(self.value, 0)
        self.sink_key, self.sink_value = zeros(self.key, sink_tokens), zeros(self.value, sink_tokens)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor, table: SlotTable, pack: Pack) -> None:
        """Add tokens that are already in ``table``, and pack the blocks that it lists.

        Args:
            keys, values: ``[B, H, T, D]``, any float dtype.
            table: slot table of the cache; its last ``T`` slots are these tokens.
            pack: codes whole blocks, ``[B, H, 32 * n, D]`` each in the storage dtype, and stores them here.

        Raises:
            RuntimeMismatchError: a number does not fit the storage dtype; :meth:`restore` undoes what was stored.
        """
        storage = self.tail_key.dtype
        keys, values = keys.to(storage), values.to(storage)
        # Checking numbers makes the host wait for the GPU, so there they are checked once per block.
        if keys.device.type == "cpu":
            self._check_finite(keys)
            self._check_finite(values)
        keys = torch.cat((self.tail_key, keys), dim=2)
        values = torch.cat((self.tail_value, values), dim=2)
        self.hold(keys, values, table, pack)

    def hold(self, keys: Tensor, values: Tensor, table: SlotTable, pack: Pack) -> None:
        """Replace the tail by one with new tokens appended, and pack the blocks that ``table`` lists.

        Args:
            keys, values: storage dtype ``[B, H, t + T, D]``, finite: the tail, then the last ``T`` slots of ``table``.
            table, pack: as for :meth:`append`.
        """
        start, held = self.length, self.tail_key.shape[2]
        if table.sinks_found_at == start and table.sink_slots.shape[1]:
            self._store_sinks(keys[:, :, held:], values[:, :, held:], table.sink_slots, start)
        self.tail_key, self.tail_value = keys, values
        self.length = table.length
        self.close_blocks(table, pack)

    def close_blocks(self, table: SlotTable, pack: Pack) -> None:
        """Pack the blocks that ``table`` lists and that are in the tail yet, if any.

        Args:
            table, pack: as for :meth:`append`.

        Raises:
            RuntimeMismatchError: on a GPU, a number does not fit the storage dtype.
        """
        packed = (table.blocks - self.key.blocks) * BLOCK_TOKENS
        if not packed:
            return
        if self.tail_key.device.type != "cpu":
            self._check_finite(self.tail_key)
            self._check_finite(self.tail_value)
        pack(self, self.tail_key[:, :, :packed], self.tail_value[:, :, :packed])
        self.shorten_tail(packed)

    def shorten_tail(self, packed: int) -> None:
        """Drop the oldest ``packed`` tokens of the tail, which are in pages now."""
        self.tail_key = self.tail_key[:, :, packed:].clone()
        self.tail_value = self.tail_value[:, :, packed:].clone()

    @staticmethod
    def _check_finite(x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise not_finite(x.dtype)

    def _store_sinks(self, keys: Tensor, values: Tensor, slots: Tensor, start: int) -> None:
        row, place = (slots >= start).nonzero(as_tuple=True)
        token = slots[row, place].to(torch.int64) - start
        self.sink_key[row, :, place] = keys[row, :, token]
        self.sink_value[row, :, place] = values[row, :, token]

    def mark(self) -> StorageMark:
        """The current state. It costs nothing, because an append makes a new tail."""
        return StorageMark(self.key.blocks, self.tail_key, self.tail_value, self.length)

    def restore(self, mark: StorageMark) -> None:
        """Undo all appends since ``mark``, bit for bit. Pages that were freed since stay freed."""
        self.key.truncate(mark.blocks)
        self.value.truncate(mark.blocks)
        self.tail_key, self.tail_value, self.length = mark.tail_key, mark.tail_value, mark.length

    def crop(self, table: SlotTable) -> None:
        """Drop the same slots as ``table`` after its :meth:`SlotTable.crop`."""
        if table.blocks < self.key.blocks:
            self.key.truncate(table.blocks)
            self.value.truncate(table.blocks)
        kept = table.length - table.packed_slots
        self.tail_key = self.tail_key[:, :, :kept].clone()
        self.tail_value = self.tail_value[:, :, :kept].clone()
        self.length = table.length

    def drop_before(self, slot: int, table: SlotTable) -> None:
        """Free pages with only slots before ``slot``. Their blocks stay listed in ``table``."""
        count = self.key.pages_before(slot, table)
        self.key.drop(count)
        self.value.drop(count)

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        self.key.select(rows)
        self.value.select(rows)
        for name in ("tail_key", "tail_value", "sink_key", "sink_value"):
            setattr(self, name, getattr(self, name)[rows])

    def memory(self) -> Iterator[tuple[str, int]]:
        """Bytes in use, as (kind, bytes). Kinds may repeat."""
        yield from self.key.memory().items()
        yield from self.value.memory().items()
        yield "exact_recent", self.tail_key.nbytes + self.tail_value.nbytes
        yield "exact_sinks", self.sink_key.nbytes + self.sink_value.nbytes


def not_finite(storage: torch.dtype) -> RuntimeMismatchError:
    """The error for numbers that do not fit the storage dtype."""
    return RuntimeMismatchError(
        f"keys or values are not finite in {str(storage).removeprefix('torch.')}; "
        "check the model's dtype, or calibrate with --set cache.storage_dtype=bfloat16"
    )


#: Codes whole blocks of keys and values, ``[B, H, 32 * n, D]`` each, and stores them.
Pack = Callable[[LayerStorage, Tensor, Tensor], None]
