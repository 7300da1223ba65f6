"""Decode attention for many sequences with pages in one pool: one call for all, which reads block tables directly."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvq_calib.native.attend import PAGE_FIELDS, LayerKernel, Turns
from kvq_calib.native.checks import are_numbers, check
from kvq_calib.native.layout import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.native.loader import KvqAttention

__all__ = ["PagePlaces", "PooledKernel", "PooledSequences", "PooledTurns"]

_CALL = np.dtype(KvqAttention)
#: Columns of ``KvqPage`` that are not zero.
_CODES, _TOKEN, _BATCH = 0, 1, 7

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PagePlaces:
    """The layout of a page in a pool, in bytes from its beginning; pairs are for keys and values.

    Attributes:
        page_bytes: size of a page.
        codes, token, sinks, tail: offsets of codes, of tokens' scales, of a sequence's first tokens, and of its newest
            tokens, which are in the page after that of the open block.
        sink_tokens: number of first tokens for which a first page has room.
    """

    page_bytes: int
    codes: tuple[int, int]
    token: tuple[int, int]
    sinks: tuple[int, int]
    tail: tuple[int, int]
    sink_tokens: int


class PooledTurns:
    """Cosines and sines that all sequences share, because their positions begin at 0. Tables grow as needed.

    Args:
        turns: the rotary embedding.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        #: Of blocks, float32 ``[n, P, 2, 8]``; see ``KvqTurns.block``.
        self.block = torch.empty(0, len(turns.pair), 2, PAGE_BLOCKS)
        #: Of single tokens, float32 ``[256 * n, 2, P]``.
        self.token = torch.empty(0, 2, len(turns.pair))

    def reach(self, pages: int) -> None:
        """Grow the tables to at least ``pages`` pages."""
        if pages <= len(self.block):
            return
        pages = max(2 * len(self.block), pages, 8)
        first = torch.arange(pages * PAGE_BLOCKS, dtype=torch.int32) * BLOCK_TOKENS
        self.block = torch.empty(pages, len(self.turns.pair), 2, PAGE_BLOCKS)
        self.turns.of_blocks(first, self.block)
        positions = torch.arange(pages * PAGE_BLOCKS * BLOCK_TOKENS, dtype=torch.int32)
        self.token = self.turns.of_tokens(positions[None])[0]


@dataclass(eq=False)
class PooledSequences:
    """The sequences of a step, which are the same for all layers. Each has one new token, which is stored already.

    Args:
        lengths: number of tokens of each sequence.
        tables: pages of each sequence: at least those that its tokens fill, and the page after.
        sink_tokens: number of exact first tokens of a sequence.
        pool_pages: number of pages in the pool.

    Raises:
        ValueError: a page is not in the pool, or a table is too short.
    """

    lengths: Sequence[int]
    tables: Sequence[Sequence[int]]
    sink_tokens: int
    pool_pages: int
    #: Cosines and sines of exact tokens, by rotary embedding.
    _exact_turns: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compute once what all layers need."""
        length = np.asarray(self.lengths, dtype=np.int64)
        blocks = length // BLOCK_TOKENS
        self.tail = length % BLOCK_TOKENS
        self.sinks = np.minimum(self.sink_tokens, blocks * BLOCK_TOKENS)
        self.count = -(-blocks // PAGE_BLOCKS)
        self.first = np.concatenate(([0], self.count.cumsum()))
        pages = [
            page for table, n in zip(self.tables, self.count.tolist(), strict=True) for page in table[:n]
        ]
        self.pages: Numbers = np.asarray(pages, dtype=np.int64)
        self.begin: Numbers = np.asarray([table[0] for table in self.tables], dtype=np.int64)
        self._open = blocks // PAGE_BLOCKS
        exact = self.sinks + self.tail
        self.exact_first = np.concatenate(([0], exact.cumsum()))
        self.exact_seen = torch.ones(int(exact.max(initial=0)) or 1, dtype=torch.bool)
        known = np.concatenate((self.pages, self.begin, [0]))
        if len(length) == 0 or length.min() < 1 or len(self.pages) != self.first[-1]:
            raise ValueError("lengths: a sequence has no token, or fewer pages than tokens fill")
        if known.min() < 0 or known.max() >= self.pool_pages:
            raise ValueError(f"tables: a page is not one of {self.pool_pages}")
        self.seen = self._seen(blocks)

    def _seen(self, blocks: Numbers) -> Tensor:
        """A bit for each attended token of blocks, int32 ``[8 * n]``; exact first tokens are left out."""
        place = np.arange(8 * len(self.pages)) - np.repeat(
            PAGE_BLOCKS * self.first[:-1], PAGE_BLOCKS * self.count
        )
        seen = np.where(place < np.repeat(blocks, PAGE_BLOCKS * self.count), -1, 0)
        hidden = np.clip(self.sink_tokens - BLOCK_TOKENS * place, 0, BLOCK_TOKENS)
        seen = np.where(hidden == BLOCK_TOKENS, 0, seen & (-1 << np.minimum(hidden, BLOCK_TOKENS - 1)))
        return torch.from_numpy(seen.astype(np.int32))

    @cached_property
    def ahead(self) -> Numbers:
        """For each sequence, the page after that of the open block; 0 if no block is open.

        Raises:
            ValueError: the page is not in the pool.
        """
        each = zip(self.tables, self._open.tolist(), self.tail.tolist(), strict=True)
        numbers: Numbers = np.asarray(
            [table[at + 1] if tail else 0 for table, at, tail in each], dtype=np.int64
        )
        if numbers.min() < 0 or numbers.max() >= self.pool_pages:
            raise ValueError(f"tables: a page is not one of {self.pool_pages}")
        return numbers

    def exact_turns(self, turns: PooledTurns) -> Tensor:
        """Cosines and sines of exact tokens, float32 ``[sum S, 2, P]``, first tokens before newest ones."""
        found = self._exact_turns.get(id(turns))
        if found is None:
            turns.reach(int(self._open.max()) + 1)
            sinks, tail = self.sinks.tolist(), self.tail.tolist()
            starts = (np.asarray(self.lengths) - self.tail).tolist()
            parts = [[*range(n), *range(at, at + t)] for n, at, t in zip(sinks, starts, tail, strict=True)]
            found = turns.token[torch.tensor(list(chain(*parts)), dtype=torch.int64)]
            self._exact_turns[id(turns)] = found
        return found


class PooledKernel:
    """Decode attention of one layer over a pool.

    Args:
        kernel: kernel of the layer.
        turns: cosines and sines, which layers share; ``None`` if keys are stored as attention uses them.
        places: layout of a page.
    """

    def __init__(self, kernel: LayerKernel, turns: PooledTurns | None, places: PagePlaces) -> None:
        if (turns is None) != (kernel.turns is None):
            raise ValueError("turns: needed where the kernel has a rotary embedding, and only then")
        self.kernel, self.turns, self.places = kernel, turns, places
        self._lock = threading.Lock()
        self._calls = np.zeros(0, dtype=_CALL)
        self._rows = (np.zeros((0, PAGE_FIELDS), dtype=np.int64), np.zeros((0, PAGE_FIELDS), dtype=np.int64))

    def attend(
        self,
        sequences: PooledSequences,
        pool: Tensor,
        query: Tensor,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention for one new token of each sequence.

        Args:
            sequences: the sequences of the step.
            pool: uint8 ``[pages, page_bytes]``.
            query: float32 ``[R, Hq, D]``, contiguous, rotated by the model.
            scaling: factor on the scores.
            softcap: scores become ``softcap * tanh(score / softcap)``; ``None`` for no cap.

        Returns:
            float32 ``[R, Hq, Dv]``.

        Raises:
            ValueError: the arguments do not fit.
            MemoryError: out of memory.
        """
        count, heads = len(sequences.begin), self.kernel.key.heads
        query_heads = query.shape[1]
        check("query", query, torch.float32, (count, query_heads, self.kernel.key.size))
        check("pool", pool, torch.uint8, (sequences.pool_pages, self.places.page_bytes))
        if query_heads % heads or sequences.sink_tokens > self.places.sink_tokens:
            raise ValueError(
                f"query: {query_heads} heads do not fit {heads}, or pages have no room for first tokens"
            )
        out = torch.empty(count, query_heads, self.kernel.value.size)
        with self._lock:
            calls = self._prepared(count)
            calls["group"], calls["scale"], calls["softcap"] = query_heads // heads, scaling, softcap or 0.0
            calls["query"] = _each(query, count)
            calls["out"] = _each(out, count)
            self._describe_pages(calls, sequences, pool)
            self._describe_exact(calls, sequences, pool)
            kept = self._describe_turns(calls, sequences)
            functions, threads = self.kernel.library.functions, torch.get_num_threads()
            key, value, _ = self.kernel.arguments
            are_numbers(functions.kvq_attend_each(key, value, calls.ctypes.data, count, threads))
            del kept
        return out

    def _prepared(self, count: int) -> npt.NDArray[np.void]:
        """Prepared calls for so many sequences, with the fields that never change."""
        if len(self._calls) < count:
            template = np.frombuffer(bytes(self.kernel.template), dtype=_CALL)
            self._calls = np.repeat(template, max(count, 2 * len(self._calls)))
            self._calls["batch"] = 1
            self._calls["sinks"]["key_stride"][:, 1] = self.places.sink_tokens * self.kernel.key.size
            self._calls["sinks"]["value_stride"][:, 1] = self.places.sink_tokens * self.kernel.value.size
            self._calls["tail"]["key_stride"][:, 1] = BLOCK_TOKENS * self.kernel.key.size
            self._calls["tail"]["value_stride"][:, 1] = BLOCK_TOKENS * self.kernel.value.size
        return self._calls[:count]

    def _describe_pages(self, calls: npt.NDArray[np.void], sequences: PooledSequences, pool: Tensor) -> None:
        pages, places = len(sequences.pages), self.places
        if len(self._rows[0]) < pages:
            for rows in (made := [np.zeros((2 * pages, PAGE_FIELDS), dtype=np.int64) for _ in range(2)]):
                rows[:, _BATCH] = 1
            self._rows = made[0], made[1]
        at = sequences.pages * places.page_bytes + pool.data_ptr()
        first = sequences.first[:-1]
        for side, name in enumerate(("key_page", "value_page")):
            rows = self._rows[side]
            rows[:pages, _CODES] = at + places.codes[side]
            rows[:pages, _TOKEN] = at + places.token[side]
            calls[name] = rows.ctypes.data + first * rows.strides[0]
        calls["pages"] = calls["table_pages"] = sequences.count
        calls["seen"] = sequences.seen.data_ptr() + 4 * PAGE_BLOCKS * first

    def _describe_exact(self, calls: npt.NDArray[np.void], sequences: PooledSequences, pool: Tensor) -> None:
        places, base = self.places, pool.data_ptr()
        for side, name in enumerate(("key", "value")):
            calls["sinks"][name] = base + sequences.begin * places.page_bytes + places.sinks[side]
            calls["tail"][name] = base + sequences.ahead * places.page_bytes + places.tail[side]
        calls["sinks"]["tokens"], calls["tail"]["tokens"] = sequences.sinks, sequences.tail
        calls["exact_seen"] = sequences.exact_seen.data_ptr()

    def _describe_turns(self, calls: npt.NDArray[np.void], sequences: PooledSequences) -> Tensor | None:
        if self.turns is None:
            return None
        exact = sequences.exact_turns(self.turns)
        calls["turns"]["block"] = self.turns.block.data_ptr()
        calls["turns"]["exact"] = exact.data_ptr() + 4 * 2 * self.kernel.pairs * sequences.exact_first[:-1]
        return exact


def _each(x: Tensor, count: int) -> Numbers:
    """Addresses of the rows of a tensor."""
    step = x.stride(0) * x.element_size()
    return np.arange(x.data_ptr(), x.data_ptr() + max(count * step, 1), step or 1, dtype=np.int64)[:count]
