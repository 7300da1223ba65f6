"""A decode step with the same launches for every token. Everything that changes is on the device.

:class:`StepContext` holds the visible tokens and the places of new ones (``step.cu``). :class:`StepLayer` stores them
and attends. A block that a step completes is packed at the beginning of the next one: before that, attention reads its
tokens exactly, as in steps that are not captured. Nothing here waits for the device, so every step, even one that
closes a block, can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.append import Outliers, launch_append, launch_place, place_side, side_params
from kvq_calib.runtime.cuda.decode import DecodeKernel, DecodeStep
from kvq_calib.runtime.cuda.launcher import Launcher
from kvq_calib.runtime.cuda.structs import (
    TYPES,
    AppendParams,
    PlaceParams,
    StepParams,
    StepState,
    check,
    pointer,
)
from kvq_calib.runtime.slot_view import MASKED, DecodeContext
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.visibility import AttentionRequest

__all__ = ["STATE_WORDS", "StepContext", "StepLayer"]

#: int32 words of ``StepState``.
STATE_WORDS = ctypes.sizeof(StepState) // 4
_THREADS = 128


class StepContext:
    """The visible tokens of a step, on the device. All layers with the same window share it.

    Args:
        launcher: runs the kernel.
        table: slots of the cache, after its sinks were found.
        context: context of the current slots, for any window.
        window: number of slots that a query sees, including its own; ``None``: all.
        room: number of blocks to allocate.
        positions: positions of the new tokens, int64 ``[B]`` on the device; read at every step.
        state: int32 ``[STATE_WORDS]``; its device is that of the kernels.

    Attributes:
        capacity: room for exact tokens behind the blocks.
        decode: context for the decode kernel.
    """

    def __init__(
        self,
        launcher: Launcher,
        table: SlotTable,
        context: DecodeContext,
        window: int | None,
        room: int,
        positions: Tensor,
        state: Tensor,
    ) -> None:
        self.launcher, self.positions, self.state = launcher, positions, state
        self.capacity = table.recent_tokens + BLOCK_TOKENS
        device, batch, sinks = state.device, table.batch, table.sink_slots.shape[1]
        check("positions of new tokens", positions, (batch,), torch.int64, device)
        self._exact = torch.full((batch, self.capacity), MASKED, dtype=torch.int32, device=device)
        self._sinks = torch.full((batch, sinks), MASKED, dtype=torch.int32, device=device)
        self._sink_slots = table.sink_slots.contiguous()
        held = table.length - table.packed_slots
        columns = context.exact_positions.shape[1]
        self._exact[:, :held] = context.exact_positions[:, columns - held :]
        if columns > held:
            self._sinks.copy_(context.exact_positions[:, : columns - held])
        blocks = torch.zeros(batch, room, 2, dtype=torch.int32, device=device)
        blocks[:, : table.blocks] = context.blocks[:, : table.blocks]
        seen = torch.full((batch, sinks + self.capacity), MASKED, dtype=torch.int32, device=device)
        self.decode = DecodeContext(blocks, seen)
        begin = StepState(length=table.length, held=held, packed=table.packed_slots, blocks=table.blocks)
        state.copy_(torch.tensor(list(memoryview(begin).cast("B").cast("i")), dtype=torch.int32))
        self._params = StepParams(
            state=state.data_ptr(),
            position=positions.data_ptr(),
            exact=self._exact.data_ptr(),
            sink=pointer(self._sinks),
            sink_slot=pointer(self._sink_slots),
            blocks=blocks.data_ptr(),
            seen=seen.data_ptr(),
            batch=batch,
            sinks=sinks,
            capacity=self.capacity,
            block_stride=room,
            window=window or 0,
        )

    def advance(self) -> None:
        """Begin a step with a new token for every sequence."""
        kernel = self.launcher.kernel("step.cu", (), "advance_step", StepParams)
        kernel((1, 1, 1), _THREADS, 0, self._params)


class StepLayer:
    """Packing and attention of a layer in a step.

    Args:
        kernel: decode kernel of the layer.
        context: context of its window.
        storage: storage of the layer. It is read here, and not changed.
        pages: addresses of the pages of keys and of values, int64 ``[P, 6]`` each.
    """

    def __init__(
        self, kernel: DecodeKernel, context: StepContext, storage: LayerStorage, pages: tuple[Tensor, Tensor]
    ) -> None:
        self._kernel, self._context, self._pages = kernel, context, pages
        self._launcher, self._tables = kernel.launcher, (kernel.key, kernel.value)
        self._sinks = storage.sink_key, storage.sink_value
        held = storage.tail_key.shape[2]
        made = []
        for tail in (storage.tail_key, storage.tail_value):
            batch, heads, _, size = tail.shape
            exact = tail.new_zeros(batch, heads, context.capacity, size)
            exact[:, :, :held] = tail
            made.append(exact)
        self._exact = made[0], made[1]
        outliers = [Outliers.of(table, 1, batch) for table in self._tables]
        self._outliers = outliers
        key = self._tables[0]
        self._append = AppendParams(
            state=context.state.data_ptr(),
            batch=batch,
            heads=key.heads,
            head_dim=key.head_dim,
            tail=context.capacity - BLOCK_TOKENS,
        )
        self._append.side[:] = [
            side_params(table, exact, rows, own)
            for table, exact, rows, own in zip(self._tables, self._exact, pages, outliers, strict=True)
        ]
        self._place: PlaceParams | None = None
        if any(own is not None for own in outliers):
            self._place = PlaceParams(state=context.state.data_ptr(), heads=key.heads, blocks=1, batch=batch)
            for side, own in enumerate(outliers):
                if own is not None:
                    self._place.side[side] = place_side(self._tables[side], pages[side], own)

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Pack the block that the step before has completed, if any, and store new tokens.

        Args:
            keys, values: input of the quantizers, ``[B, H, 1, D]``.

        Raises:
            RuntimeMismatchError: a shape, dtype, stride or device is wrong.
        """
        for number, (x, exact) in enumerate(zip((keys, values), self._exact, strict=True)):
            batch, heads, _, size = exact.shape
            if x.device != exact.device or x.shape != (batch, heads, 1, size):
                raise RuntimeMismatchError(
                    f"new tokens are {tuple(x.shape)} on {x.device}, expected {(batch, heads, 1, size)} on "
                    f"{exact.device}"
                )
            if x.dtype not in TYPES or x.stride(3) != 1:
                raise RuntimeMismatchError(
                    f"new tokens are {x.dtype} with strides {x.stride()}; make them contiguous"
                )
            side = self._append.side[number]
            side.token, side.token_type = x.data_ptr(), TYPES[x.dtype]
            side.token_stride[:] = x.stride()[:2]
        launch_append(self._launcher, self._tables, self._append, 1)
        if self._place is not None:
            launch_place(self._launcher, self._place, 1)

    def attend(self, request: AttentionRequest) -> Tensor:
        """Attend to the visible tokens of the context: ``[B, 1, Hq, D]``, in the dtype of the query."""
        step = DecodeStep(
            query=request.query[:, :, 0].contiguous(),
            key_pages=self._pages[0],
            value_pages=self._pages[1],
            exact=(self._sinks, self._exact),
            context=self._context.decode,
            scaling=request.scaling,
            softcap=request.softcap,
            sink_logits=request.sinks,
            state=self._context.state,
        )
        return self._kernel.attend(step)[:, None]

    def tail(self, held: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of the first ``held`` exact tokens behind the packed blocks."""
        keys, values = self._exact
        return keys[:, :, :held].clone(), values[:, :, :held].clone()
