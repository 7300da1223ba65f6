"""Pages for captured steps. The host opens them in advance, and tells the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.packing import PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.runtime.cuda.pages import page_rows
from kvq_calib.runtime.storage import PackedTensor, Page

__all__ = ["HostCopy", "StepPages"]


@dataclass(frozen=True)
class _Lists:
    """The outlier lists of a page while it is filled, with room for the largest number of outliers.

    Attributes:
        packed: the tensor of the page.
        page: has the starts of the lists. It gets the entries when their number is known, and has none until then.
        index, residual: entries, int16 and storage dtype.
    """

    packed: PackedTensor
    page: Page
    index: Tensor
    residual: Tensor

    @classmethod
    def of(cls, packed: PackedTensor, page: Page) -> _Lists:
        """Take the entries of a page."""
        assert page.outlier_index is not None
        assert page.outlier_residual is not None
        room = PAGE_TOKENS * packed.batch * packed.layout.outlier_cap
        made = []
        for name in ("outlier_index", "outlier_residual"):
            before = getattr(page, name)
            after = before.new_empty(room)
            after[: page.entries] = before
            made.append((name, after))
        for name, after in made:
            setattr(page, name, after[:0].clone())
        return cls(packed, page, *(after for _, after in made))

    def roomy(self) -> Page:
        """The page with these lists instead of its own."""
        page = self.page
        return Page(page.codes, page.token_params, self.index, self.residual, page.outlier_start)

    def entries(self, blocks: int) -> Tensor:
        """Number of entries in the first ``blocks`` blocks of the page, on the device."""
        assert self.page.outlier_start is not None
        return self.page.outlier_start[blocks * self.packed.batch * self.packed.layout.heads]

    def close(self, entries: int) -> None:
        """Copy the first ``entries`` entries to the page."""
        self.page.outlier_index = self.index[:entries].clone()
        self.page.outlier_residual = self.residual[:entries].clone()


class StepPages:
    """The pages of all layers while captured steps fill them.

    A page with outliers has room for their largest number while it is filled, and for one block after that. In the
    meantime, the actual number is copied to the host, so the host does not have to wait.

    Args:
        packed: keys and values of all layers, with equal numbers of blocks.
        room: number of pages to allocate in the table.

    Attributes:
        table: addresses of pages by their number, int64 ``[len(packed), room, 6]``; see :class:`PageTable`.
    """

    def __init__(self, packed: Sequence[PackedTensor], room: int) -> None:
        self.packed = packed
        self.table = torch.zeros(len(packed), room, 6, dtype=torch.int64, device=packed[0].device)
        self._open: list[_Lists] = []
        #: Lists of the previous page, numbers of their entries, and the number of that page.
        self._full: tuple[list[_Lists], HostCopy, int] | None = None
        for row, tensor in zip(self.table, packed, strict=True):
            first = tensor.dropped_pages
            row[first : first + len(tensor.pages)] = page_rows(tensor.pages).to(row.device)
        if self.blocks % PAGE_BLOCKS:
            self._make_room(self.blocks // PAGE_BLOCKS)

    @property
    def blocks(self) -> int:
        """Number of packed blocks."""
        return self.packed[0].blocks

    def before_block(self) -> None:
        """Prepare for one more block, without waiting for the device."""
        if self._full is not None:
            lists, entries, number = self._full
            self._full = None
            for each, count in zip(lists, entries.read(), strict=True):
                each.close(count)
            self._tell(number)
        if self.blocks % PAGE_BLOCKS == 0:
            number = self.blocks // PAGE_BLOCKS
            if self._open:
                counts = torch.stack([each.entries(PAGE_BLOCKS) for each in self._open])
                self._full = self._open, HostCopy(counts), number - 1
                self._open = []
            for tensor in self.packed:
                tensor.pages.append(tensor.new_page())
            self._make_room(number)

    def after_block(self) -> None:
        """Count a packed block."""
        for tensor in self.packed:
            tensor.blocks += 1

    def close(self) -> None:
        """Give all pages their own lists again, and remove a page without blocks."""
        if self._full is not None:
            lists, entries, _ = self._full
            for each, count in zip(lists, entries.read(), strict=True):
                each.close(count)
        held = -(-self.blocks // PAGE_BLOCKS)
        for each in self._open:
            each.close(int(each.entries(self.blocks - PAGE_BLOCKS * max(held - 1, 0))))
        for tensor in self.packed:
            del tensor.pages[held - tensor.dropped_pages :]
        self._open, self._full = [], None

    def _make_room(self, number: int) -> None:
        self._open = [
            _Lists.of(tensor, tensor.pages[-1]) for tensor in self.packed if tensor.layout.outlier_cap
        ]
        self._tell(number)

    def _tell(self, number: int) -> None:
        """Write the address of this page of every tensor to the table."""
        roomy = {id(each.page): each.roomy() for each in self._open}
        rows = torch.zeros(len(self.packed), 6, dtype=torch.int64)
        for row, tensor in zip(rows, self.packed, strict=True):
            if number >= tensor.dropped_pages:  # otherwise it is not read any more
                page = tensor.pages[number - tensor.dropped_pages]
                row.copy_(page_rows([roomy.get(id(page), page)])[0])
        # A copy from pinned memory does not wait. Torch frees the memory after it was read.
        on_gpu = self.table.device.type == "cuda"
        self.table[:, number].copy_(rows.pin_memory() if on_gpu else rows, non_blocking=True)


class HostCopy:
    """A copy of numbers from the device to the host that does not wait.

    Args:
        numbers: integers ``[n]``.
    """

    def __init__(self, numbers: Tensor) -> None:
        on_gpu = numbers.device.type == "cuda"
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        self._numbers.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event() if on_gpu else None
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Wait for the copy, and return it."""
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._numbers.tolist()
        return found
