"""Packs the blocks that are complete after a pass, for all layers of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage

__all__ = ["BlockCloser", "LayersCloser", "close_blocks"]


class LayersCloser(Protocol):
    """Packs blocks of several layers in one call. The layers of a cache share it."""

    def close_blocks(self, storages: Sequence[LayerStorage], table: SlotTable) -> None:
        """Pack the block that ``table`` lists last in every storage that it can. The others stay as they are.

        Args:
            storages: storages of all layers, in order.
            table: slot table of the cache.
        """


class BlockCloser(Protocol):
    """What packs the blocks of a layer: its :class:`~kvq_calib.runtime.ops.Ops`."""

    @property
    def closer(self) -> LayersCloser | None:
        """What packs blocks of all layers in one call; ``None`` if every layer packs its own."""

    def pack(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Code whole blocks and store them; see :meth:`kvq_calib.runtime.ops.Ops.pack`."""


def close_blocks(closers: Sequence[BlockCloser], storages: Sequence[LayerStorage], table: SlotTable) -> None:
    """List the blocks that are complete, and pack them in all layers.

    Args:
        closers: one for each layer, in order.
        storages: the storages of the layers.
        table: their slot table.

    Raises:
        RuntimeMismatchError: on a GPU, a number does not fit the storage dtype.
    """
    if not table.complete:
        return
    table.close_blocks()
    if (together := closers[0].closer) is not None:
        together.close_blocks(storages, table)
    for closer, storage in zip(closers, storages, strict=True):
        if storage.length == table.length:  # a layer that did not run is found at the next pass
            storage.close_blocks(table, closer.pack)
