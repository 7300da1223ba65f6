"""Codes and packs one block of many layers' keys and values in one call. Everything is checked before a pointer is
passed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.native.checks import are_numbers, check, pointer
from kvq_calib.native.encode import TrellisTables
from kvq_calib.native.encode_scalar import ScalarTables
from kvq_calib.native.layout import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.native.loader import KvqBlock, KvqScalar, KvqTrellis, Library

__all__ = ["BlockCoder", "BlockTables", "NewBlock", "OutlierBlock"]


@dataclass(frozen=True, eq=False)
class BlockTables:
    """How keys or values of a layer are coded and packed, with ``C = H D`` channels.

    Attributes:
        tables: tables of the encoder.
        by_size: whether a trellis encoder uses the weights of the tokens' size classes.
        widths: uint8 ``[C]`` on the CPU, width of each channel in bits.
        storage: float16 or bfloat16, the dtype of exact tokens, of residuals and of tokens' scales.
    """

    tables: TrellisTables | ScalarTables
    by_size: bool
    widths: Tensor
    storage: torch.dtype

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a tensor has a wrong dtype or shape, or the fields do not fit together.
        """
        tables = self.tables
        check("widths", self.widths, torch.uint8, (tables.heads * tables.size,))
        if int(self.widths.max()) > 8:
            raise ValueError(f"widths: {int(self.widths.max())} bits")
        if self.storage not in (torch.float16, torch.bfloat16):
            raise ValueError(f"storage: {self.storage}")
        if isinstance(tables, ScalarTables):
            if self.by_size or tables.storage != self.storage:
                raise ValueError("tables: have no size classes, or another storage dtype")
        elif not tables.is_exact or (self.by_size and tables.class_weight is None):
            raise ValueError(
                "tables: the encoder would not find the codes of torch, or there are no size classes"
            )

    @property
    def outlier_cap(self) -> int:
        """Largest number of outliers of a token."""
        return self.tables.outlier_cap if isinstance(self.tables, ScalarTables) else 0

    @property
    def token_scales(self) -> bool:
        """Whether tokens have scales and zero points."""
        return isinstance(self.tables, ScalarTables) and self.tables.token_scales

    def described(self) -> KvqTrellis | KvqScalar:
        """The encoder's C structure."""
        if isinstance(self.tables, ScalarTables):
            return self.tables.described()
        return self.tables.described(compensated=True, by_size=self.by_size, turns=True)


@dataclass(frozen=True, eq=False)
class NewBlock:
    """A block to code, and where it goes.

    Attributes:
        side: number of the keys or values among those of the :class:`BlockCoder`.
        x: storage dtype ``[B, H, t, D]``, contiguous within a head. The first 32 tokens are the block.
        page: int32 ``[B, 8 * W]``, ``W`` the sum of the widths; written.
        token: scales and zero points of the page's tokens, storage dtype ``[B, 256, 2]``; written. ``None`` without.
    """

    side: int
    x: Tensor
    page: Tensor
    token: Tensor | None


@dataclass(frozen=True)
class OutlierBlock:
    """The outliers of a coded block, in order of sequence and head, sorted by token, then coordinate.

    Attributes:
        index: int16 ``[E]``, ``token << 11 | coordinate``.
        residual: storage dtype ``[E]``.
        counts: int32 ``[1, B, H]``, number of outliers in each list.
    """

    index: Tensor
    residual: Tensor
    counts: Tensor


class BlockCoder:
    """Codes and packs a block of many layers' keys and values. The descriptions of the codecs are made once.

    Args:
        library: the library to call.
        sides: keys and values of the layers, in any order.
    """

    def __init__(self, library: Library, sides: Sequence[BlockTables]) -> None:
        self.library, self.sides = library, tuple(sides)
        self._codecs = [side.described() for side in self.sides]
        self._words = [PAGE_BLOCKS * int(side.widths.sum()) for side in self.sides]
        self._blocks = (KvqBlock * max(len(self.sides), 1))()
        #: Copies of a cache share this object, and threads may have one each.
        self._lock = threading.Lock()

    def close(self, blocks: Sequence[NewBlock], place: int) -> list[OutlierBlock | bool]:
        """Code and pack blocks, with the same result as torch, on as many threads as torch uses.

        Args:
            blocks: at most one for each of the sides, all of as many sequences.
            place: block of the pages, 0 to 7.

        Returns:
            For each block: its outliers, or true if the codec has none. False if torch must compute because a number on
            the way is not finite; what was written at its place must then be written again.

        Raises:
            ValueError: a tensor has a wrong dtype, shape or layout, or a number does not fit.
            MemoryError: out of memory.
        """
        if not blocks:
            return []
        if len({block.side for block in blocks}) < len(blocks) or not 0 <= place < PAGE_BLOCKS:
            raise ValueError(f"blocks: two of one side, or at place {place} of a page")
        batch = blocks[0].x.shape[0]
        with self._lock:
            outliers = [
                self._describe(to, block, batch) for to, block in zip(self._blocks, blocks, strict=False)
            ]
            status = self.library.functions.kvq_close_blocks(
                ctypes.addressof(self._blocks), len(blocks), batch, place, torch.get_num_threads()
            )
            sound = are_numbers(status)
            failed = [not sound and self._blocks[number].status != 0 for number in range(len(blocks))]
        return [
            False if bad else True if found is None else _compact(*found)
            for bad, found in zip(failed, outliers, strict=True)
        ]

    def _describe(self, to: KvqBlock, block: NewBlock, batch: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Fill in the description of a block. Returns room for its outliers, ``None`` without."""
        if not 0 <= block.side < len(self.sides):
            raise ValueError(f"side: {block.side} of {len(self.sides)}")
        side, codec, x = self.sides[block.side], self._codecs[block.side], block.x
        heads, size = side.tables.heads, side.tables.size
        if x.ndim != 4 or x.shape[2] < BLOCK_TOKENS or batch < 1:
            raise ValueError(f"x: {list(x.shape)} has no whole block")
        check("x", x, side.storage, (batch, heads, x.shape[2], size), contiguous=False)
        if x.stride()[2:] != (size, 1):
            raise ValueError("x: tokens of a head do not follow each other")
        check("page", block.page, torch.int32, (batch, self._words[block.side]))
        if side.token_scales:
            if block.token is None:
                raise ValueError("token: scales of tokens are missing")
            check("token", block.token, side.storage, (batch, PAGE_TOKENS, 2))
        room = None
        if side.outlier_cap:
            entries = batch, BLOCK_TOKENS * side.outlier_cap
            room = (
                torch.empty(entries, dtype=torch.int16),
                torch.empty(entries, dtype=side.storage),
                torch.empty(batch, heads, dtype=torch.int32),
            )
        trellis = isinstance(codec, KvqTrellis)
        address = ctypes.addressof(codec)
        to.trellis, to.scalar = (address, None) if trellis else (None, address)
        to.width, to.x = side.widths.data_ptr(), x.data_ptr()
        to.stride[0], to.stride[1] = x.stride()[:2]
        to.page, to.token = block.page.data_ptr(), pointer(block.token)
        to.index, to.listed, to.counts = map(pointer, room or (None, None, None))
        to.bfloat, to.status = side.storage == torch.bfloat16, 0
        return room


def _compact(index: Tensor, residual: Tensor, counts: Tensor) -> OutlierBlock:
    """The outliers without the room between those of sequences."""
    entries = counts.sum(1).tolist()
    if len(entries) == 1:
        parts = index[0, : entries[0]], residual[0, : entries[0]]
    else:
        there = torch.arange(index.shape[1]) < counts.sum(1)[:, None]
        parts = index[there], residual[there]
    return OutlierBlock(*parts, counts[None])
