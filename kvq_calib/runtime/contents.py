"""The contents of a cache: slots, which all layers share, and the storage of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage, Stored

__all__ = ["CacheContents"]


class CacheContents:
    """Slots and storages of a cache.

    Args:
        stored: layouts of the keys and values of each layer.
        windows: number of tokens that a query of each layer sees, or ``None`` for all.
        sink_tokens: number of first real tokens of every sequence that stay exact.
        recent_tokens: number of newest slots that stay exact.
        device: device of the tensors.

    Attributes:
        table: ``None`` while empty.
        storages: storages of the layers in order; empty while the cache is.
    """

    def __init__(
        self,
        stored: Sequence[tuple[Stored, Stored]],
        windows: Sequence[int | None],
        sink_tokens: int,
        recent_tokens: int,
        device: torch.device,
    ) -> None:
        self.stored = stored
        self.windows = windows
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self.device = device
        self.table: SlotTable | None = None
        self.storages: list[LayerStorage] = []
        #: Lets the storages have what captured steps keep elsewhere (:mod:`kvq_calib.runtime.step_cache`); called
        #: before anybody else reads or changes them.
        self.settle: Callable[[], None] = self.nothing_to_settle

    @staticmethod
    def nothing_to_settle() -> None:
        """The storages have everything."""

    @property
    def length(self) -> int:
        """Number of slots in use."""
        return 0 if self.table is None else self.table.length

    def length_of(self, layer: int) -> int:
        """Number of slots of a layer. During a forward pass, later layers still have fewer."""
        return self.storages[layer].length if self.storages else 0

    def new_storage(self, layer: int, batch: int) -> LayerStorage:
        """An empty storage for a layer."""
        return LayerStorage(*self.stored[layer], batch, self.sink_tokens, self.device)

    def start(self, batch: int) -> SlotTable:
        """Allocate for the first tokens of ``batch`` sequences."""
        self.table = SlotTable(batch, self.sink_tokens, self.recent_tokens, self.device)
        self.storages = [self.new_storage(layer, batch) for layer in range(len(self.stored))]
        return self.table

    def reset(self) -> None:
        """Free everything."""
        self.settle = self.nothing_to_settle
        self.table = None
        self.storages = []

    def check_crop(self, length: int) -> None:
        """Refuse a length that :meth:`crop` cannot keep.

        Raises:
            RuntimeMismatchError: a sliding window has freed slots that would be visible again.
        """
        self.settle()
        table = self.table
        assert table is not None
        for layer, (storage, window) in enumerate(zip(self.storages, self.windows, strict=True)):
            dropped = PAGE_BLOCKS * storage.key.dropped_pages
            if not dropped or window is None:
                continue
            if table.first[dropped - 1] + table.fill[dropped - 1] > length - window + 1:
                raise RuntimeMismatchError(
                    f"cannot crop to {length} tokens: layer {layer} has freed what its window of "
                    f"{window} would show again; reset() the cache"
                )

    def crop(self, length: int) -> None:
        """Keep the first ``length`` slots, at least one but not all. Nothing is quantized again.

        Args:
            length: a length that :meth:`check_crop` accepts.
        """
        self.settle()
        assert self.table is not None
        self.table.crop(length)
        for storage in self.storages:
            storage.crop(self.table)

    def select(self, rows: Tensor) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``."""
        self.settle()
        table = self.table
        if table is None:
            return
        rows = rows.to(self.device)
        if len(rows) == table.batch and bool((rows == torch.arange(len(rows), device=self.device)).all()):
            return
        table.select(rows)
        for storage in self.storages:
            storage.select(rows)

    def memory(self) -> dict[str, int]:
        """Bytes in use, by kind."""
        self.settle()
        if self.table is None:
            return {}
        sizes = self.table.memory()
        for storage in self.storages:
            for kind, size in storage.memory():
                sizes[kind] = sizes.get(kind, 0) + size
        return sizes
