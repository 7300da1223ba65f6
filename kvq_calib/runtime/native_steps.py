"""Slots and masks in the form for native attention, shared by layers that see the same tokens in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.native.attend import DecodeStep, Turns
from kvq_calib.native.loader import Library
from kvq_calib.runtime.slot_view import MASKED, DecodeContext, SlotView
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.visibility import Visibility
from kvq_calib.schema.geometry import RopeSpec

__all__ = ["BlockTurns", "StepView"]


class BlockTurns:
    """Cosines and sines of the first positions of blocks, computed once for each page and rotary embedding.

    Args:
        turns: the rotary embedding.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        #: Positions, cosines and sines of the newest tokens. The next decode step drops them.
        self._angles: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self.forget()

    def forget(self) -> None:
        """Drop all positions."""
        self._angles = None
        self._positions = torch.empty(0, 0, dtype=torch.int32)
        #: Float32 ``[B, n, P, 2, 8]``, with unused pages.
        self.table = torch.empty(0, 0, len(self.turns.pair), 2, PAGE_BLOCKS)

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        latest = [] if self._angles is None else [self._angles[0], *self._angles[1]]
        return [
            self.table,
            self._positions,
            *latest,
            self.turns.pair,
            self.turns.frequency,
            self.turns.within,
        ]

    def of_positions(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of tokens, float32 ``[B, S, P]`` each. Layers share them.

        Args:
            positions: int32 ``[B, S]``.
        """
        if self._angles is None or not torch.equal(positions, self._angles[0]):
            angle = positions[..., None].float() * self.turns.frequency.float()
            self._angles = positions, (angle.cos(), angle.sin())
        return self._angles[1]

    def of(self, positions: Tensor, pages: int) -> Tensor:
        """The table of at least ``pages`` pages.

        Args:
            positions: int32 ``[B, 8 * n]``, position of the first token of each block.
            pages: smallest number of pages in the table.
        """
        self._angles = None
        batch, blocks = positions.shape
        if self.table.shape[:2] != (batch, pages):
            self.table = torch.empty(batch, pages, *self.table.shape[2:])
            self._positions = torch.empty(batch, 0, dtype=torch.int32)
        known = min(self._positions.shape[1], blocks)
        if known and not torch.equal(self._positions[:, :known], positions[:, :known]):
            known = 0  # other layers may still read the old table
            self.table = torch.empty_like(self.table)
        first = known // PAGE_BLOCKS
        if known < blocks:
            for row in range(batch):
                new = positions[row, first * PAGE_BLOCKS :].contiguous()
                self.turns.of_blocks(new, self.table[row, first : blocks // PAGE_BLOCKS])
        self._positions = positions
        return self.table


class StepView:
    """Converts a cache's slots and a step's mask to the form for native attention; one for all layers of a cache.

    Args:
        library: the library to call.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._slots = SlotView()
        self._turns: dict[RopeSpec, BlockTurns] = {}
        self._steps: dict[tuple[int, int], tuple[DecodeContext, DecodeStep]] = {}

    def turns(self, rope: RopeSpec) -> BlockTurns:
        """The tables for a rotary embedding."""
        if rope not in self._turns:
            made = Turns(self.library, rope.pairs, rope.inv_freq, rope.attention_scaling)
            self._turns[rope] = BlockTurns(made)
        return self._turns[rope]

    def tensors(self) -> list[Tensor]:
        """All tensors that are kept between steps."""
        found = self._slots.tensors()
        for turns in self._turns.values():
            found += turns.tensors()
        for context, step in self._steps.values():
            parts = (context.blocks, context.exact_positions, step.seen, step.exact_seen)
            found += [*parts, *(part for part in (step.block_turns, step.exact_turns) if part is not None)]
        return found

    def forget(self) -> None:
        """Drop everything that depends on a text."""
        self._slots = SlotView()
        self._steps.clear()
        for turns in self._turns.values():
            turns.forget()

    def step(self, visibility: Visibility, table: SlotTable, turns: BlockTurns | None) -> DecodeStep | None:
        """The step for one new token of each sequence; ``None`` if a kernel does not support it.

        See :meth:`~kvq_calib.runtime.slot_view.SlotView.context`.
        """
        context = self._slots.context(visibility, table)
        if context is None:
            return None
        key = (id(context), id(turns))
        known = self._steps.get(key)
        if known is not None and known[0] is context:
            return known[1]
        step = self._make(context, turns)
        self._steps = {k: each for k, each in self._steps.items() if self._slots.remembers(each[0])}
        self._steps[key] = context, step
        return step

    @staticmethod
    def _make(context: DecodeContext, turns: BlockTurns | None) -> DecodeStep:
        batch, blocks, _ = context.blocks.shape
        pages = _with_room(blocks // PAGE_BLOCKS)
        seen = torch.zeros(batch, pages * PAGE_BLOCKS, dtype=torch.int32)
        seen[:, :blocks] = context.blocks[..., 1]
        positions = context.exact_positions
        exact_seen = positions != MASKED
        if turns is None:
            return DecodeStep(seen, exact_seen, None, None, context.first_token)
        table = turns.of(context.blocks[..., 0].contiguous(), pages)
        exact = turns.turns.of_tokens(positions.masked_fill(~exact_seen, 0))
        return DecodeStep(seen, exact_seen, table, exact, context.first_token)


def _with_room(pages: int) -> int:
    """The number plus up to a quarter, so that tables rarely grow."""
    step = max(1 << max(pages.bit_length() - 3, 0), 4)
    return -(-max(pages, 1) // step) * step
