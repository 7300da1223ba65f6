"""Quantize and pack whole blocks: the kernels of ``append.cu``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.launcher import Launcher
from kvq_calib.runtime.cuda.pages import page_rows
from kvq_calib.runtime.cuda.structs import (
    MAX_GRID,
    TYPES,
    AppendParams,
    AppendSide,
    PlaceParams,
    PlaceSide,
    pointer,
)
from kvq_calib.runtime.cuda.tables import QuantizerTables
from kvq_calib.runtime.storage import LayerStorage, PackedTensor, Page

__all__ = ["Outliers", "append_blocks", "launch_append", "launch_place", "place_side", "side_params"]

#: Largest number of pages per launch of the append kernel, which limits its work space.
APPEND_PAGES = 64
_THREADS, _WARPS = 512, 16
_SOURCE = "append.cu"


def append_blocks(
    launcher: Launcher,
    key: QuantizerTables,
    value: QuantizerTables,
    storage: LayerStorage,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Quantize and pack whole blocks, keys and values in one launch.

    Outliers go to a work space first. Once per 32 tokens, the host reads how many there are in each page, and allocates
    exactly as much memory. A second kernel moves them there.

    Args:
        launcher: runs the kernels.
        key, value: the layer's tables, for heads of the same size.
        storage: storage for the blocks.
        keys, values: input of the quantizers, storage dtype ``[B, H, 32 * n, D]`` with contiguous ``D``.

    Raises:
        RuntimeMismatchError: a shape, dtype, stride or device is wrong.
    """
    blocks = keys.shape[2] // BLOCK_TOKENS
    done = 0
    while done < blocks:
        place = storage.key.blocks % PAGE_BLOCKS
        count = min(APPEND_PAGES * PAGE_BLOCKS - place, blocks - done)
        here = slice(done * BLOCK_TOKENS, (done + count) * BLOCK_TOKENS)
        sides = (_Side(key, storage.key, keys[:, :, here]), _Side(value, storage.value, values[:, :, here]))
        _append(launcher, sides)
        done += count


@dataclass(frozen=True)
class Outliers:
    """The work space of a launch, with room for the largest number of outliers.

    Attributes:
        index, residual: int16 and storage dtype ``[n, B, 32 * cap]``.
        count: number in each list, int32 ``[n, B, H]``.
    """

    index: Tensor
    residual: Tensor
    count: Tensor

    @classmethod
    def of(cls, table: QuantizerTables, blocks: int, batch: int) -> Outliers | None:
        """Allocate the work space for new blocks. Returns ``None`` without outliers."""
        if not table.cap:
            return None
        shape = (blocks, batch, BLOCK_TOKENS * table.cap)
        return cls(
            torch.empty(shape, dtype=torch.int16, device=table.device),
            torch.empty(shape, dtype=table.storage, device=table.device),
            torch.empty(*shape[:2], table.heads, dtype=torch.int32, device=table.device),
        )


class _Side:
    """New blocks of keys or values that are packed into pages."""

    def __init__(self, table: QuantizerTables, packed: PackedTensor, x: Tensor) -> None:
        self.table, self.packed, self.x = table, packed, x
        self.batch, self.blocks = x.shape[0], x.shape[2] // BLOCK_TOKENS
        self._check()
        #: Place of the first new block in its page, and number of pages with new blocks.
        self.place = packed.blocks % PAGE_BLOCKS
        self.page_count = -(-(self.place + self.blocks) // PAGE_BLOCKS)
        self.outliers: Outliers | None = None

    def _check(self) -> None:
        table, x = self.table, self.x
        expected = (self.batch, table.heads, self.blocks * BLOCK_TOKENS, table.head_dim)
        if self.batch > MAX_GRID:
            raise RuntimeMismatchError(
                f"{self.batch} sequences are more than one launch can handle; use smaller batches"
            )
        if x.device != table.device or x.shape != expected:
            raise RuntimeMismatchError(
                f"new {table.kind}s are {tuple(x.shape)} on {x.device}, expected {expected} on {table.device}"
            )
        if x.stride(3) != 1 or x.dtype not in TYPES:
            raise RuntimeMismatchError(
                f"new {table.kind}s are {x.dtype} with strides {x.stride()}; make them contiguous"
            )

    def open_pages(self) -> None:
        """Allocate the pages that the blocks need, and a work space for their outliers."""
        new = self.page_count if self.place == 0 else self.page_count - 1
        self.packed.pages.extend(self.packed.new_page() for _ in range(new))
        self.outliers = Outliers.of(self.table, self.blocks, self.batch)

    @property
    def pages(self) -> list[Page]:
        """The pages with new blocks."""
        return self.packed.pages[len(self.packed.pages) - self.page_count :]

    def rows(self) -> Tensor:
        """Addresses of these pages, on the device."""
        return page_rows(self.pages).to(self.table.device)

    def make_room(self, totals: list[int]) -> None:
        """Allocate memory in the pages for the outliers of new blocks. ``totals`` has the number in each block."""
        for number, page in enumerate(self.pages):
            first = max(number * PAGE_BLOCKS - self.place, 0)
            entries = sum(totals[first : (number + 1) * PAGE_BLOCKS - self.place])
            assert page.outlier_index is not None
            assert page.outlier_residual is not None
            # At most the seven blocks before are copied, so the cost does not grow with the cache.
            page.outlier_index = torch.cat((page.outlier_index, page.outlier_index.new_empty(entries)))
            page.outlier_residual = torch.cat(
                (page.outlier_residual, page.outlier_residual.new_empty(entries))
            )


def side_params(table: QuantizerTables, x: Tensor, rows: Tensor, outliers: Outliers | None) -> AppendSide:
    """The kernel's parameters to pack keys or values ``[B, H, T, D]`` into the pages with the addresses ``rows``."""
    side = AppendSide(
        x=x.data_ptr(),
        pages=rows.data_ptr(),
        scale=pointer(table.scale),
        reciprocal=pointer(table.reciprocal),
        zero_point=pointer(table.zero_point),
        levels=pointer(table.levels),
        boundaries=pointer(table.boundaries),
        coefficients=pointer(table.coefficients),
        bits=table.bits.data_ptr(),
        word_offset=table.word_offset.data_ptr(),
        compensation=pointer(table.compensation),
        refinement=pointer(table.refinement),
        token_weight=pointer(table.token_weight),
        weight_edge=pointer(table.weight_edges),
        feedback=pointer(table.feedback),
        refinements=table.refinements,
        type=TYPES[x.dtype],
        words=table.words,
        per_token=int(table.token),
        channel_normalized=int(table.channel_normalized),
        per_side=table.per_side,
        cap=table.cap,
        capacity=BLOCK_TOKENS * table.cap,
        storage_bfloat=int(table.storage_bfloat),
        paths=int(table.paths),
    )
    side.stride[:] = x.stride()[:3]
    if table.pair_rotation is not None:
        side.cosine, side.sine, side.partner = (part.data_ptr() for part in table.pair_rotation)
    if outliers is not None:
        side.outlier_index = outliers.index.data_ptr()
        side.outlier_residual = outliers.residual.data_ptr()
        side.outlier_count = outliers.count.data_ptr()
    return side


def place_side(table: QuantizerTables, rows: Tensor, outliers: Outliers) -> PlaceSide:
    """The kernel's parameters to move outliers from the work space to the pages with the addresses ``rows``."""
    return PlaceSide(
        index=outliers.index.data_ptr(),
        residual=outliers.residual.data_ptr(),
        count=outliers.count.data_ptr(),
        pages=rows.data_ptr(),
        capacity=BLOCK_TOKENS * table.cap,
    )


def _append(launcher: Launcher, sides: tuple[_Side, _Side]) -> None:
    """Pack both sides with one launch, and move their outliers with another."""
    key = sides[0]
    for side in sides:
        side.open_pages()
    table = key.table
    params = AppendParams(batch=key.batch, heads=table.heads, head_dim=table.head_dim, first_block=key.place)
    rows = [side.rows() for side in sides]
    params.side[:] = [
        side_params(side.table, side.x, addresses, side.outliers)
        for side, addresses in zip(sides, rows, strict=True)
    ]
    launch_append(launcher, (key.table, sides[1].table), params, key.blocks)
    counts = [(number, side, side.outliers) for number, side in enumerate(sides) if side.outliers is not None]
    if counts:
        totals = torch.stack([outliers.count.flatten(1).sum(1) for _, _, outliers in counts])
        place = PlaceParams(heads=table.heads, blocks=key.blocks, first_block=key.place, batch=key.batch)
        for (number, side, outliers), of_blocks in zip(
            counts, totals.tolist(), strict=True
        ):  # the host reads
            side.make_room(of_blocks)
            rows[number] = side.rows()
            place.side[number] = place_side(side.table, rows[number], outliers)
        launch_place(launcher, place, key.page_count)
    for side in sides:
        side.packed.blocks += side.blocks


def launch_append(
    launcher: Launcher, tables: tuple[QuantizerTables, QuantizerTables], params: AppendParams, blocks: int
) -> None:
    """Code and pack blocks of keys and values."""
    params.head_warps, shared = _shared_memory(launcher, tables)
    kernel = launcher.kernel(_SOURCE, (), "append_blocks", AppendParams)
    kernel((blocks, params.batch, 2), _THREADS, shared, params)


def launch_place(launcher: Launcher, params: PlaceParams, pages: int) -> None:
    """Move the outliers of keys and values to this number of pages."""
    launcher.kernel(_SOURCE, (), "place_outliers", PlaceParams)((pages, 2, 1), _THREADS, 4 * _WARPS, params)


def _shared_memory(launcher: Launcher, tables: tuple[QuantizerTables, QuantizerTables]) -> tuple[int, int]:
    """Number of heads coded at once with error compensation, and bytes of shared memory (``Work``, ``HeadWork``)."""
    heads, size = tables[0].heads, tables[0].head_dim
    chunks = -(-size // 32)
    shared = 4 * 5 * BLOCK_TOKENS + 4 * heads * (BLOCK_TOKENS + 1) + 4 * BLOCK_TOKENS * heads * chunks
    if all(table.compensation is None for table in tables):
        return 0, shared
    of_head = 4 * (size * (BLOCK_TOKENS + 1) + BLOCK_TOKENS * 4) + 32 * (BLOCK_TOKENS + 4)
    head_warps = min(heads, _WARPS, max(launcher.shared_limit // of_head, 1))
    return head_warps, max(shared, head_warps * of_head)
