"""Calls that dequantize packed blocks to ordinary tensors. Everything is checked before a pointer is passed."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from kvq_calib.native.attend import CodeTables, PageRows, Turns
from kvq_calib.native.checks import are_numbers, check
from kvq_calib.native.layout import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.native.loader import KvqDequantize, Library

__all__ = ["Dequantizer"]


class Dequantizer:
    """Dequantizes the packed keys or values of a layer.

    Args:
        library: the library to call.
        tables: how codes are read.
        turns: RoPE, or ``None`` if nothing is rotated.
        own_angle: float32 ``[H, P]``, angle by which each pair was rotated before coding, or ``None``.
    """

    def __init__(
        self,
        library: Library,
        tables: CodeTables,
        turns: Turns | None = None,
        own_angle: Tensor | None = None,
    ) -> None:
        self.library, self.tables, self.turns = library, tables, turns
        #: Keeps the tensors that the C structure points to.
        self._codes, self._held = tables.described()
        self._call = KvqDequantize(scaling=1.0)
        #: Copies of a cache share this object, and threads may have one each.
        self._lock = threading.Lock()
        if turns is not None and len(turns.pair):
            if int(turns.pair.max()) >= tables.size:
                raise ValueError(f"turns: a pair lies outside heads of {tables.size}")
            self._call.scaling, self._call.pair = turns.scaling, turns.pair.data_ptr()
            if own_angle is not None:
                check(
                    "own_angle", own_angle, torch.float32, (tables.heads, len(turns.pair)), contiguous=False
                )
                cosine, sine = own_angle.cos().contiguous(), own_angle.sin().contiguous()
                self._call.own_cosine, self._call.own_sine = cosine.data_ptr(), sine.data_ptr()
                self._held += [cosine, sine]

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return self._held

    def read(
        self, pages: PageRows, first: int, blocks: int, angles: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Dequantize blocks.

        Args:
            pages: the pages of keys or values.
            first: first block to read, counted from the first page.
            blocks: number of blocks to read.
            angles: cosines and sines of the tokens' positions, float32 ``[B, 32 * blocks, P]`` each, contiguous; with
                RoPE, and only then.

        Returns:
            float32 ``[B, H, 32 * blocks, D]``.

        Raises:
            ValueError: the arguments do not fit.
        """
        with self._lock:
            tables, call, batch = self.tables, self._call, pages.batch
            if pages.tables is not tables or not 0 <= first <= first + blocks <= PAGE_BLOCKS * pages.count:
                raise ValueError(
                    f"pages: blocks {first} to {first + blocks} of {pages.count} pages of this tensor"
                )
            pairs = 0 if self.turns is None else len(self.turns.pair)
            tokens = BLOCK_TOKENS * blocks
            if (angles is None) != (pairs == 0):
                raise ValueError("angles: needed with RoPE, and only then")
            if angles is not None:
                for each in angles:
                    check("angles", each, torch.float32, (batch, tokens, pairs))
                call.cosine, call.sine = angles[0].data_ptr(), angles[1].data_ptr()
            out = torch.empty(batch, tables.heads, tokens, tables.size)
            call.batch, call.pages, call.first_block, call.blocks = batch, pages.count, first, blocks
            call.threads, call.pairs = torch.get_num_threads(), pairs
            call.page, call.out = pages.address, out.data_ptr()
            are_numbers(self.library.functions.kvq_dequantize(ctypes.byref(self._codes), ctypes.byref(call)))
            return out
