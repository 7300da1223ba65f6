"""What the layers of a model share in a step of vLLM: which tokens are new, of which sequences, in which pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.pages import pages_of
from kvq_calib.model.rope import RopeTable
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.schema.geometry import RopeSpec

__all__ = ["Row", "Step"]


@dataclass(frozen=True)
class Row:
    """The new tokens of one sequence.

    Attributes:
        start, stop: they are tokens ``start`` to ``stop - 1`` of the step.
        length: tokens of the sequence, these included.
        table: its pages, in order.
        sink_tokens: exact first tokens of a sequence.
    """

    start: int
    stop: int
    length: int
    table: Sequence[int]
    sink_tokens: int

    @property
    def count(self) -> int:
        """New tokens."""
        return self.stop - self.start

    @property
    def held(self) -> int:
        """Tokens that were there before."""
        return self.length - self.count

    @cached_property
    def slots(self) -> SlotTable:
        """The slots of the sequence: token ``i`` stands at position ``i``."""
        table = SlotTable(1, self.sink_tokens, 0, torch.device("cpu"))
        for first, stop in ((0, self.held), (self.held, self.length)):
            if first < stop:
                table.append(torch.arange(first, stop, dtype=torch.int32)[None], None)
        return table


@dataclass(eq=False)
class Step:
    """One step; all layers are given the same one.

    Attributes:
        starts: of each sequence's new tokens, and the end of the last.
        lengths: tokens of each sequence, the new ones included.
        tables: int ``[sequences, pages]``, the pages of each.
        sink_tokens: exact first tokens of a sequence.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    tables: Tensor
    sink_tokens: int
    _unturning: dict[RopeSpec, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
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
                if not 0 < stop - start <= length or pages_of(length) >= len(table):
                    raise RuntimeMismatchError(f"{length} tokens do not fit {len(table)} pages")
                yield Row(start, stop, length, table, self.sink_tokens)

    @cached_property
    def positions(self) -> Tensor:
        """Of the new tokens, int32 ``[tokens]``."""
        parts = [torch.arange(row.held, row.length, dtype=torch.int32) for row in self.rows]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

    def unturning(self, rope: RopeSpec) -> tuple[Tensor, Tensor]:
        """What :meth:`RopeTable.rotate_` takes to undo RoPE in the new tokens: float32 ``[P, tokens]`` each."""
        found = self._unturning.get(rope)
        if found is None:
            cos, sin = RopeTable(rope, torch.device("cpu")).cos_sin(self.positions[None])
            found = self._unturning[rope] = (
                cos[0, 0] / rope.attention_scaling,
                -sin[0, 0] / rope.attention_scaling,
            )
        return found
