"""Packs the block that a step of one token completes, of all layers in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.native_blocks import block_tables
from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, OutlierLists
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.native.close import BlockCoder, BlockTables, NewBlock, OutlierBlock
from kvq_calib.native.loader import Library
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage, PackedTensor, Page

__all__ = ["NativeCloser"]


class NativeCloser:
    """Packs one block of all layers in one native call; see :class:`kvq_calib.runtime.closing.LayersCloser`.

    It stores the same bits as the layers one after another. It leaves a layer to itself if torch must code it: if the
    native encoder does not support its quantizer, parameters or tokens need gradients, or a number on the way is not
    finite. It also does if more than one block is complete.

    Args:
        library: the library to call.
        layers: quantizers of keys and values of each layer, on the CPU.
    """

    def __init__(self, library: Library, layers: Sequence[tuple[Quantizer, Quantizer]]) -> None:
        self._library, self._layers = library, layers

    @cached_property
    def _coder(self) -> tuple[BlockCoder, list[int | None]]:
        """Made when the first block is complete: the coder, and for each layer the number of its keys among the coder's
        sides. Its values come next. ``None``: the layer is left to itself.
        """
        numbers: list[int | None] = []
        sides: list[BlockTables] = []
        for pair in self._layers:
            key, value = map(block_tables, pair)
            numbers.append(None if key is None or value is None else len(sides))
            if key is not None and value is not None:
                sides += [key, value]
        return BlockCoder(self._library, sides), numbers

    def close_blocks(self, storages: Sequence[LayerStorage], table: SlotTable) -> None:
        """Pack the block that ``table`` lists last in every storage that this supports.

        Args:
            storages: storages of all layers, in order.
            table: slot table of the cache.
        """
        coder, sides = self._coder
        place = (table.blocks - 1) % PAGE_BLOCKS
        taken: list[tuple[LayerStorage, list[tuple[PackedTensor, Page]]]] = []
        blocks: list[NewBlock] = []
        for number, (storage, side) in enumerate(zip(storages, sides, strict=True)):
            if side is None or not self._serves(number, storage, table):
                continue
            pages = [(packed, packed.open_page()) for packed in (storage.key, storage.value)]
            tails = storage.tail_key, storage.tail_value
            blocks += [
                NewBlock(side + each, tail, page.codes, page.token_params)
                for each, (tail, (_, page)) in enumerate(zip(tails, pages, strict=True))
            ]
            taken.append((storage, pages))
        found = coder.close(blocks, place)
        for number, (storage, pages) in enumerate(taken):
            results = found[2 * number : 2 * number + 2]
            if any(result is False for result in results):
                continue
            for (packed, page), result in zip(pages, results, strict=True):
                packed.add_blocks(page, 1, _lists(result))
            storage.shorten_tail(BLOCK_TOKENS)

    def _serves(self, number: int, storage: LayerStorage, table: SlotTable) -> bool:
        """Whether a layer's next block can be packed with those of the others."""
        if storage.length != table.length or table.blocks != storage.key.blocks + 1:
            return False
        needed: list[Tensor] = [storage.tail_key, storage.tail_value]
        if torch.is_grad_enabled():
            needed += [
                part for quantizer in self._layers[number] for part in quantizer.params.tensors().values()
            ]
            if any(tensor.requires_grad for tensor in needed):
                return False
        return all(tail.stride()[2:] == (tail.shape[3], 1) for tail in needed[:2])


def _lists(result: OutlierBlock | bool) -> OutlierLists | None:
    if isinstance(result, OutlierBlock):
        return OutlierLists(result.index, result.residual, result.counts)
    return None
