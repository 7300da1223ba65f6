"""Addresses of a tensor's pages for native readers, updated page by page."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvq_calib.native.attend import CodeTables, PageRows
from kvq_calib.runtime.storage import PackedTensor, Page

__all__ = ["PageAddresses"]


class PageAddresses:
    """The addresses of the pages of a packed tensor.

    Args:
        packed: the tensor.
        tables: how its pages are read.
    """

    def __init__(self, packed: PackedTensor, tables: CodeTables) -> None:
        self.packed = packed
        self.rows = PageRows(tables, packed.batch)
        #: Pages, and the outlier buffers for which the addresses are valid.
        self._known: list[tuple[Page, Tensor | None]] = []
        self._state: tuple[Any, ...] = ()

    def refresh(self) -> PageRows:
        """Update the addresses. The buffers of a page change only with its outliers."""
        packed = self.packed
        pages = packed.pages
        last = pages[-1] if pages else None
        state = (packed.blocks, packed.dropped_pages, pages, last, last and last.outlier_index)
        known = self._state
        if (
            known
            and all(a is b for a, b in zip(state[2:], known[2:], strict=True))
            and state[:2] == known[:2]
        ):
            return self.rows
        if self.rows.batch != packed.batch:
            self.rows, self._known = PageRows(self.rows.tables, packed.batch), []
        same = 0
        for page, (known_page, outliers) in zip(pages[:-1], self._known, strict=False):
            if page is not known_page or page.outlier_index is not outliers:
                break
            same += 1
        self.rows.truncate(same)
        for page in pages[same:]:
            self.rows.append(
                page.codes, page.token_params, page.outlier_index, page.outlier_residual, page.outlier_start
            )
        self._known, self._state = [(page, page.outlier_index) for page in pages], state
        return self.rows
