"""What layers share in a step of vLLM: the new tokens, their sequences, and their pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_TOKENS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.pages import AHEAD, pages_of
from kvq_calib.model.rope import RopeTable
from kvq_calib.native.pooled import PooledSequences
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.schema.geometry import RopeSpec

__all__ = ["NewTokens", "Row", "Step"]


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of one sequence.

    Attributes:
        start, stop: they are tokens ``start`` to ``stop - 1`` of the step.
        length: number of tokens of the sequence, including these.
        sink_tokens: number of exact first tokens of a sequence.
    """

    start: int
    stop: int
    length: int
    sink_tokens: int

    @property
    def count(self) -> int:
        """Number of new tokens."""
        return self.stop - self.start

    @property
    def held(self) -> int:
        """Number of earlier tokens."""
        return self.length - self.count

    @property
    def is_next(self) -> bool:
        """Whether there is one new token, which is not a first token."""
        return self.count == 1 and self.held >= self.sink_tokens

    @property
    def only_kept(self) -> bool:
        """Whether there is one new token, which completes no block and is not a first token."""
        return self.is_next and self.length % BLOCK_TOKENS != 0


@dataclass(frozen=True)
class Row(NewTokens):
    """The new tokens of one sequence, and its pages.

    Attributes:
        table: the pages, in order.
    """

    table: Sequence[int]

    @cached_property
    def slots(self) -> SlotTable:
        """The slots of the sequence: token ``i`` is at position ``i``."""
        table = SlotTable(1, self.sink_tokens, 0, torch.device("cpu"))
        for first, stop in ((0, self.held), (self.held, self.length)):
            if first < stop:
                table.append(torch.arange(first, stop, dtype=torch.int32)[None], None)
        return table


@dataclass(frozen=True)
class Next:
    """The next tokens of sequences with one new token, except first tokens. All are stored at once, in the areas for
    newest tokens, which have room for a block.

    Attributes:
        rows: rows of these sequences.
    """

    rows: Sequence[Row]

    @cached_property
    def token(self) -> Tensor:
        """Their numbers in the step, int64 ``[n]``."""
        return torch.tensor([row.start for row in self.rows], dtype=torch.int64)

    @cached_property
    def place(self) -> Tensor:
        """Their indices among the newest tokens of their sequences, int64 ``[n]``."""
        return torch.tensor([row.held % BLOCK_TOKENS for row in self.rows], dtype=torch.int64)

    @cached_property
    def page(self) -> Tensor:
        """Their pages, which are those after the pages of their blocks: int64 ``[n]``."""
        return torch.tensor([_page_ahead(row) for row in self.rows], dtype=torch.int64)

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """For each token that completes a block: the page of the block, and its number in the page."""
        return [
            (row.table[row.held // PAGE_TOKENS], row.held % PAGE_TOKENS // BLOCK_TOKENS)
            for row in self._complete
        ]

    @cached_property
    def blocks_page(self) -> Tensor:
        """The pages of the newest tokens of these blocks, int64 ``[n]``."""
        return torch.tensor([_page_ahead(row) for row in self._complete], dtype=torch.int64)

    @property
    def _complete(self) -> list[Row]:
        return [row for row in self.rows if not row.only_kept]


def _page_ahead(row: Row) -> int:
    return row.table[row.held // PAGE_TOKENS + AHEAD]


@dataclass(eq=False)
class Step:
    """One step, the same object for all layers.

    Attributes:
        starts: first new token of each sequence, and the end of the last.
        lengths: number of tokens of each sequence, including new ones.
        tables: int ``[sequences, pages]``, pages of each sequence.
        sink_tokens: number of exact first tokens of a sequence.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    tables: Tensor
    sink_tokens: int
    #: Keyed by identity of rotary embeddings, which layers share. Comparing them would take longer than everything
    #: else.
    _unturning: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _by_coordinate: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _ropes: list[RopeSpec] = field(default_factory=list)
    _sequences: PooledSequences | None = None

    @property
    def tokens(self) -> int:
        """Number of new tokens of all sequences."""
        return self.starts[-1]

    @cached_property
    def rows(self) -> list[Row]:
        """The sequences that have new tokens."""
        return list(self._rows())

    def _rows(self) -> Iterator[Row]:
        for number, length in enumerate(self.lengths):
            start, stop = self.starts[number], self.starts[number + 1]
            if start < stop:
                table = self.tables[number].tolist()
                if not 0 < stop - start <= length or pages_of(length) + AHEAD > len(table):
                    raise RuntimeMismatchError(f"{length} tokens do not fit {len(table)} pages")
                yield Row(start, stop, length, self.sink_tokens, table)

    @cached_property
    def single(self) -> Tensor:
        """Numbers in the step of the tokens that are the only new one of their sequence, int64 ``[R]``."""
        return torch.tensor([row.start for row in self.rows if row.count == 1], dtype=torch.int64)

    @cached_property
    def next(self) -> Next:
        """Those of them that are not first tokens."""
        return Next([row for row in self.rows if row.is_next])

    def sequences(self, pool_pages: int) -> PooledSequences:
        """The sequences with one new token, in the form for native kernels."""
        if self._sequences is None or self._sequences.pool_pages != pool_pages:
            rows = [row for row in self.rows if row.count == 1]
            self._sequences = PooledSequences(
                [row.length for row in rows], [row.table for row in rows], self.sink_tokens, pool_pages
            )
        return self._sequences

    @cached_property
    def positions(self) -> Tensor:
        """Positions of the new tokens, int32 ``[tokens]``."""
        parts = [torch.arange(row.held, row.length, dtype=torch.int32) for row in self.rows]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    def unturning(self, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        """Angles for :meth:`RopeTable.rotate_` to undo RoPE in the new tokens: float32 ``[P, tokens]`` each."""
        found = self._unturning.get(id(rope))
        if found is None:
            self._ropes.append(rope)  # keeps the object alive, so that its identity stays valid
            cos, sin = RopeTable(rope, torch.device("cpu")).cos_sin(self.positions[None])
            found = self._unturning[id(rope)] = (
                cos[0, 0] / rope.attention_scaling,
                -sin[0, 0] / rope.attention_scaling,
            )
        return found

    def by_coordinate(self, rope: RopeSpec, size: int) -> tuple[Tensor, Tensor]:
        """The same by coordinate, float32 ``[1, tokens, size]`` each, for :class:`~kvq_calib.native.join.Joiner`."""
        found = self._by_coordinate.get(id(rope))
        if found is None:
            cos, sin = (part.mT for part in self.unturning(rope))
            cosine, sine = torch.ones(1, self.tokens, size), torch.zeros(1, self.tokens, size)
            for side in range(2):
                at = [pair[side] for pair in rope.pairs]
                cosine[0, :, at], sine[0, :, at] = cos, sin
            found = self._by_coordinate[id(rope)] = cosine, sine
        return found
