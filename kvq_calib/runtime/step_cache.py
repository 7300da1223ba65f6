"""A cache for captured steps of one token: its state on the device, and the host's counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.cache_layer import unknown_options
from kvq_calib.model.intercept import AttentionCall
from kvq_calib.runtime.cache import KVQCache
from kvq_calib.runtime.cache_layer import KVQCacheLayer, request_of
from kvq_calib.runtime.cuda.ops import CudaOps
from kvq_calib.runtime.cuda.step import STATE_WORDS, StepContext, StepLayer
from kvq_calib.runtime.cuda.step_pages import HostCopy, StepPages
from kvq_calib.runtime.cuda.structs import StepState
from kvq_calib.runtime.slot_view import DecodeContext
from kvq_calib.runtime.visibility import Visibility

__all__ = ["StepCache"]

_FIRST_FAULT = StepState.faults.offset // 4
#: Errors in steps, in the order of ``StepState.faults``. The last two are found by torch operations in the graph.
_FAULTS = (
    "positions of new tokens do not follow each other, which steps that are captured cannot express",
    "keys or values are not finite in the storage dtype; check the model's dtype, or calibrate with "
    "--set cache.storage_dtype=bfloat16",
    "the attention mask hides other tokens than it did before, which steps that are captured cannot express",
    "keys are rotated by other angles than at calibration (RoPE that depends on the length of the text?); calibrate "
    "with --set cache.key.pre_rope=false, or this model anew",
)
_MASK, _ROPE = _FIRST_FAULT + 2, _FIRST_FAULT + 3


class StepCache:
    """The storage of a cache while its steps are captured; made by :meth:`of`.

    While it is in use, the cache's storages lack the newest tokens, and the block that the last step completed is not
    packed yet. :meth:`~kvq_calib.runtime.contents.CacheContents.settle` makes up for both. After it, this object must
    not be used.

    Args:
        cache: a cache with CUDA operations that has tokens.
        mask: bool ``[B, S]`` of the slots, false for hidden ones, or ``None`` if none is hidden.
        context: context of the slots.
        room: number of allocated blocks, a multiple of 8.

    Attributes:
        taken: number of steps so far.
    """

    def __init__(self, cache: KVQCache, mask: Tensor | None, context: DecodeContext, room: int) -> None:
        table = cache.table
        assert table is not None
        self.taken, self.cache, self.table, self.room = 0, cache, table, room
        self._mask = mask
        windows = list(dict.fromkeys(cache.contents.windows))
        device = table.device
        self._positions = torch.zeros(table.batch, dtype=torch.int64, device=device)
        self._state = torch.zeros(len(windows), STATE_WORDS, dtype=torch.int32, device=device)
        launcher = _ops(cache.packed[0]).launcher
        self._contexts = {
            window: StepContext(launcher, table, context, window, room, self._positions, state)
            for window, state in zip(windows, self._state, strict=True)
        }
        storages = cache.contents.storages
        self._pages = StepPages(
            [packed for storage in storages for packed in (storage.key, storage.value)], room // PAGE_BLOCKS
        )
        rows = self._pages.table.unflatten(0, (-1, 2))
        self._layers = [
            StepLayer(_ops(layer).kernel, self._contexts[window], storage, (pair[0], pair[1]))
            for layer, window, storage, pair in zip(
                cache.packed, cache.contents.windows, storages, rows, strict=True
            )
        ]
        self._closes = False
        self._copied: HostCopy | None = None
        self._settle = cache.contents.settle = self._settled

    @classmethod
    def of(cls, cache: KVQCache, mask: Tensor | None, room: int) -> StepCache | None:
        """Make one from a cache, for a step with a mask ``[B, S + 1]``. Returns ``None`` if its slots are not
        supported.

        It reads the mask, and so waits for the device.
        """
        table = cache.table
        assert table is not None
        held = None if mask is None else mask[:, :-1] != 0
        if held is not None and bool(held.all()):
            held = None
        if (table.ragged or (table.blocks and table.fill[-1] % 32)) and any(cache.contents.windows):
            return None
        visibility = Visibility(None if held is None else held.long(), table.length, 1, None)
        context = _ops(cache.packed[0]).view.context(visibility, table)
        return None if context is None else cls(cache, held, context, room)

    def goes_on(self, mask: Tensor | None) -> bool:
        """Whether the next step can be taken."""
        contents = self.cache.contents
        current = contents.settle is self._settle and contents.table is self.table
        return current and self.table.blocks < self.room and (mask is not None or self._mask is None)

    def before(self, positions: Tensor, mask: Tensor | None) -> None:
        """Prepare a step. It waits for no work of the device except the errors of 32 steps ago.

        Args:
            positions: positions of the new tokens, int64 ``[B, 1]``.
            mask: ``[B, S + 1]``, or ``None``.
        """
        table = self.table
        self._closes = table.blocks > self._pages.blocks
        if self._closes:
            if self._copied is not None:
                self._refuse(self._copied.read())
            for storage, window in zip(
                self.cache.contents.storages, self.cache.contents.windows, strict=True
            ):
                if window is not None:
                    storage.drop_before(storage.length + 1 - window, table)
            self._pages.before_block()
        self._positions.copy_(positions[:, 0])
        if mask is not None:
            known = 0 if self._mask is None else self._mask.shape[1]
            changed = (mask[:, known:] == 0).any()
            if self._mask is not None:
                changed = changed | ((mask[:, :known] != 0) != self._mask).any()
            self._state[0, _MASK] |= changed.int()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let attention of a forward pass store and read here. Its launches are the same in every step."""
        for context in self._contexts.values():
            context.advance()
        for layer, own in zip(self.cache.packed, self._layers, strict=True):
            layer.step = lambda call, layer=layer, own=own: self._attend(layer, own, call)
        try:
            yield
        finally:
            for layer in self.cache.packed:
                layer.step = None

    def _attend(self, layer: KVQCacheLayer, own: StepLayer, call: AttentionCall) -> Tensor:
        if unknown := unknown_options(call):
            raise RuntimeMismatchError(
                f"layer {layer.index}: attention was given {sorted(unknown)[0]}, which a packed cache does not know"
            )
        if call.layer == layer.number:
            rotation = None if layer.ops.rope is None else layer.rotation_of(call)
            keys = call.key if rotation is None else rotation.unrotate(call.key)
            if rotation is not None and layer.checks_rope:
                wrong = layer.wrong_rope(keys, call.key, self._positions[:, None])
                self._state[0, _ROPE] |= wrong.int()
            own.store(keys, call.value)
        return own.attend(request_of(call, Visibility(None, self.table.length + 1, 1, None)))

    def after(self) -> None:
        """Count a finished step."""
        self.table.append(self._positions[:, None], None)
        if self._closes:
            self._pages.after_block()
            self._copied = HostCopy(self._state.flatten())
        for storage in self.cache.contents.storages:
            storage.length = self.table.length
        self.taken += 1

    def abandon(self) -> None:
        """Handle a failed step. If it was the first, the cache is unchanged; otherwise it is emptied."""
        contents = self.cache.contents
        if contents.settle is not self._settle:
            return
        contents.settle = contents.nothing_to_settle
        if self.taken:
            self.cache.reset()
        else:
            self._pages.close()

    def _settled(self) -> None:
        """Copy everything to the cache's storages, and pack the block that the last step completed."""
        contents, table = self.cache.contents, self.table
        contents.settle = contents.nothing_to_settle
        self._pages.close()
        self._refuse(self._state.flatten().tolist())
        waiting = table.first[self._pages.blocks] if table.blocks > self._pages.blocks else table.packed_slots
        for storage, own, layer in zip(contents.storages, self._layers, self.cache.packed, strict=True):
            storage.tail_key, storage.tail_value = own.tail(table.length - waiting)
            storage.close_blocks(table, layer.ops.pack)

    def _refuse(self, state: list[int]) -> None:
        for number, message in enumerate(_FAULTS):
            if any(state[_FIRST_FAULT + number :: STATE_WORDS]):
                self.cache.contents.settle = self.cache.contents.nothing_to_settle
                self.cache.reset()
                raise RuntimeMismatchError(f"{message}; the cache is empty now, so begin anew")


def _ops(layer: KVQCacheLayer) -> CudaOps:
    assert isinstance(layer.ops, CudaOps)
    return layer.ops
