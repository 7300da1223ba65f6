"""Addresses of a tensor's pages on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvq_calib.runtime.cuda.structs import pointer
from kvq_calib.runtime.storage import PackedTensor, Page

__all__ = ["PageTable", "page_rows"]


def page_rows(pages: Sequence[Page]) -> Tensor:
    """Buffer addresses of pages, and bytes of a list start: ``PagePointers`` in ``common.cuh``, int64 ``[n, 6]``."""
    rows = [
        [
            *(
                pointer(buffer) or 0
                for buffer in (
                    page.codes,
                    page.token_params,
                    page.outlier_index,
                    page.outlier_residual,
                    page.outlier_start,
                )
            ),
            0 if page.outlier_start is None else page.outlier_start.element_size(),
        ]
        for page in pages
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 6)


class PageTable:
    """A table of the addresses of a tensor's pages, int64 ``[n, 6]``, which is updated page by page."""

    def __init__(self, packed: PackedTensor) -> None:
        self.packed = packed
        self._pages: list[Page] = []
        self._list: list[Page] | None = None
        self._host = torch.empty(0, 6, dtype=torch.int64)
        #: The state at the last update: the last page and its outliers, and numbers of pages, blocks, dropped pages.
        self._last: tuple[Page | None, Tensor | None] = None, None
        self._counts = -1, -1, -1
        self.tensor = self._host

    def refresh(self) -> Tensor:
        """The table, int64 ``[pages, 6]`` on the device."""
        packed = self.packed
        pages = packed.pages
        last = pages[-1] if pages else None
        outliers = None if last is None else last.outlier_index
        counts = len(pages), packed.blocks, packed.dropped_pages
        if (
            counts == self._counts
            and self._last[0] is last
            and self._last[1] is outliers
            and pages is self._list
        ):
            return self.tensor
        same = 0
        while same < min(len(pages), len(self._pages)) - 1 and pages[same] is self._pages[same]:
            same += 1
        self._host = torch.cat((self._host[:same], page_rows(pages[same:])))
        self._pages, self._list = list(pages), pages
        self._last, self._counts = (last, outliers), counts
        self.tensor = self._host.to(self.packed.device)
        return self.tensor
