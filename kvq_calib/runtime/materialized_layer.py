"""A layer of a packed cache that returns dequantized keys and values, for models with custom attention code."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.errors import ModelError, RuntimeMismatchError
from kvq_calib.model.intercept import AttentionCall, without_gradient
from kvq_calib.model.updates import update_call
from kvq_calib.runtime.cache_layer import KVQCacheLayer
from kvq_calib.runtime.page_reader import PageReader
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import PackedTensor

__all__ = ["MaterializedLayer"]


class MaterializedLayer(KVQCacheLayer):
    """Stores like :class:`KVQCacheLayer`. ``update`` returns all keys and values dequantized, with keys rotated again.

    Args:
        args: as for :class:`KVQCacheLayer`.
        quantizers: quantizers of keys and values.
        swapped: see :class:`kvq_calib.schema.geometry.LayerGeometry`.
    """

    def __init__(self, *args: Any, quantizers: tuple[Quantizer, Quantizer], swapped: bool) -> None:
        super().__init__(*args)
        self.quantizers = quantizers
        self.swapped = swapped

    @cached_property
    def readers(self) -> tuple[PageReader, PageReader]:
        """Readers of packed keys and values."""
        key, value = self.quantizers
        return PageReader(key), PageReader(value)

    def tables(self) -> list[Tensor]:
        """Tensors beside the artifact's parameters and those of the operations."""
        return [tensor for reader in self.readers for tensor in reader.tensors()]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, and return all that a query of this pass can see.

        Args:
            key_states, value_states: ``[B, H, T, D]`` and ``[B, H, T, Dv]``, as the model caches them.
            args, kwargs: not used.

        Returns:
            Both for all slots from the first visible one on, in the model's dtype and order.

        Raises:
            RuntimeMismatchError: they do not fit the cache, which is then in its state before this pass.
        """
        inputs = (key_states, value_states)
        try:
            call = update_call(self.number, key_states.detach(), value_states.detach(), self.sliding_window)
        except ModelError as error:
            raise RuntimeMismatchError(
                f"{error}: this cache is for another model, or the model was detached; make KVQCache(artifact, model) "
                "for this model"
            ) from error
        call = call.swap() if self.swapped else call
        with torch.no_grad():
            whole = self.forward_pass.attention(call, lambda: self._whole(call))
        keys, values = (
            without_gradient(x.to(new.dtype), inputs)
            for x, new in zip(whole, (call.key, call.value), strict=True)
        )
        return (values, keys) if self.swapped else (keys, values)

    def _whole(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        tokens = call.key.shape[2]
        _, first = self.get_mask_sizes(tokens)
        storage, table = self._take(call, self._visibility(call, self.length + tokens))
        keys = self._read(storage.key, storage.sink_key, storage.tail_key, 0, table)
        values = self._read(storage.value, storage.sink_value, storage.tail_value, 1, table)
        begin = table.length - keys.shape[2]
        keys, values = keys[:, :, first - begin :], values[:, :, first - begin :]
        rope = self.ops.rope
        if rope is not None:
            turned = rope.rotate_(keys.mT.contiguous(), *rope.cos_sin(table.positions(first, table.length)))
            keys = rope.scale_(turned).mT
        return keys, values

    def _read(self, packed: PackedTensor, sinks: Tensor, tail: Tensor, side: int, table: SlotTable) -> Tensor:
        """All slots in pages, with sinks in their places, then the tail: float32 ``[B, H, S, D]``."""
        if not packed.pages:
            return tail.float()
        first = packed.dropped_pages * PAGE_BLOCKS
        slots = table.block_slots(first, packed.blocks)
        read = self.readers[side].read(packed.pages)[..., : BLOCK_TOKENS * (packed.blocks - first)]
        read = read[..., slots >= 0].flatten(1, 2).mT  # [B, S, C]
        numbers = self.quantizers[side].inverse_transform(read)
        begin, end = table.first[first], table.packed_slots
        row, place = ((table.sink_slots >= begin) & (table.sink_slots < end)).nonzero(as_tuple=True)
        numbers[row, :, table.sink_slots[row, place].long() - begin] = sinks[row, :, place].float()
        return torch.cat((numbers, tail.float()), dim=2)
