"""Sinks and tail: the exact tokens."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.visibility import Visibility

__all__ = ["ExactTokens"]


class ExactTokens:
    """Sinks whose slots are packed, then the tail: ``S`` columns, which are the same for all layers.

    Args:
        table: current slot table of the cache.

    Attributes:
        sinks: number of columns of sinks, which come first; 0 if no sink is packed.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._start = table.packed_slots
        first, stop = table.sink_range
        self.sinks = table.sink_slots.shape[1] if first < min(stop, self._start) else 0

    def parts(self, storage: LayerStorage) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Keys and values of sinks, then of the tail, in the storage dtype: ``[B, H, t, D]`` each."""
        sinks = storage.sink_key, storage.sink_value
        if not self.sinks:
            sinks = storage.sink_key[:, :, :0], storage.sink_value[:, :, :0]
        return sinks, (storage.tail_key, storage.tail_value)

    @cached_property
    def slots(self) -> Tensor:
        """The slot of every column: int64 ``[B, S]``, -1 for none; ``[1, S]`` if all sequences have the same."""
        tail = torch.arange(self._start, self._table.length, device=self._table.device)[None]
        if not self.sinks:
            return tail
        sinks = self._table.sink_slots.to(torch.int64)
        sinks = sinks.masked_fill(sinks >= self._start, -1)  # these are in the tail
        return torch.cat((sinks, tail.expand(len(sinks), -1)), dim=1)

    @cached_property
    def positions(self) -> Tensor:
        """RoPE positions, int32 ``[B, S]``; arbitrary for columns without a token."""
        table = self._table
        tail = table.positions(self._start, table.length)
        if not self.sinks:
            return tail
        first, stop = table.sink_range
        slots = table.sink_slots.to(torch.int64)
        of_sinks = table.positions(first, stop).gather(1, (slots - first).clamp(min=0))
        return torch.cat((of_sinks, tail), dim=1)

    def mask(self, visibility: Visibility) -> Tensor | None:
        """The mask of the columns: additive, broadcastable to ``[B, Hq, T, S]``; ``None`` if every query sees all."""
        table = self._table
        first, stop = table.sink_range
        if self.sinks:
            complete = stop <= self._start and not table.missing_sinks
        else:
            first, complete = self._start, True
        if complete and visibility.sees_all(first, table.length):
            return None
        return visibility.additive(self.slots)
