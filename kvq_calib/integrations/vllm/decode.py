"""Decode steps with the native kernels, which read block tables directly: one call per layer for all sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.integrations.vllm.pages import LayerPages
from kvq_calib.integrations.vllm.step import Step
from kvq_calib.native.attend import Turns
from kvq_calib.native.join import Joiner
from kvq_calib.native.pooled import PagePlaces, PooledKernel, PooledTurns
from kvq_calib.runtime.native_ops import NativeOps
from kvq_calib.runtime.ops import Ops
from kvq_calib.runtime.storage import not_finite

__all__ = ["NativeDecoding", "NativeLayer"]


class NativeLayer:
    """Un-rotates, stores and attends single new tokens in one layer.

    Args:
        ops: operations of the layer.
        pages: layout of its pages.
        turns: cosines and sines of its rotary embedding, which layers share; or ``None``.
    """

    def __init__(self, ops: NativeOps, pages: LayerPages, turns: PooledTurns | None) -> None:
        key, value = pages.areas
        places = PagePlaces(
            pages.page_bytes,
            codes=(key.codes.start, value.codes.start),
            token=(key.token.start, value.token.start),
            sinks=(key.sinks.start, value.sinks.start),
            tail=(key.tail.start, value.tail.start),
            sink_tokens=pages.sink_tokens,
        )
        self._pages = pages
        self._kernel = PooledKernel(ops.kernel, turns, places)
        self._storage = pages.quantizers[0].storage
        self._turns = turns
        self._joiner = Joiner(ops.kernel.library, self._storage, None if turns is None else turns.turns.pair)
        self._nothing = [
            torch.empty(1, q.layout.heads, 0, q.layout.head_dim, dtype=self._storage)
            for q in pages.quantizers
        ]
        self._tails: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def unturned(self, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens in the form in which they are stored, ``[H, T, D]`` each in the storage dtype, from ``[T, H, D]``.

        Raises:
            RuntimeMismatchError: a number does not fit the storage dtype.
        """
        rope, angles = self._pages.quantizers[0].read_rope, None
        if rope is not None and self._turns is not None:
            angles = step.by_coordinate(rope, keys.shape[-1])
        rows = [x.float().transpose(0, 1)[None] for x in (keys, values)]
        found = self._joiner.join((self._nothing[0], self._nothing[1]), (rows[0], rows[1]), angles)
        if found is None:
            raise not_finite(self._storage)
        return found[0][0], found[1][0]

    def store(self, step: Step, pool: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store the next tokens of sequences. Then blocks that they complete are coded, those of all sequences at once.

        The encoder works on many blocks in nearly the time of one.

        Args:
            step: the step, whose :attr:`Step.next` names these tokens.
            pool: uint8 ``[pages, page_bytes]``.
            keys, values: keys and values of all new tokens, ``[H, T, D]`` in the storage dtype.
        """
        new = step.next
        if not new.rows:
            return
        for side, (view, x) in enumerate(zip(self._tail_views(pool), (keys, values), strict=True)):
            view[new.page, :, new.place] = x[:, new.token].transpose(0, 1)
            if new.blocks:
                self._pages.write_blocks(pool, new.blocks, side, view[new.blocks_page])

    def _tail_views(self, pool: Tensor) -> tuple[Tensor, ...]:
        """The areas for newest tokens of all pages, ``[pages, H, 32, D]`` each."""
        if self._tails is None or self._tails[0].data_ptr() != pool.data_ptr():
            self._tails = pool, tuple(self._pages.of_all(pool, side, "tail") for side in range(2))
        return self._tails[1]

    def attend(
        self, step: Step, pool: Tensor, query: Tensor, out: Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Attention for the sequences with one new token. Arguments are as in the layer."""
        single = step.single
        if not len(single):
            return
        rows = query.float().contiguous() if len(single) == len(query) else query[single].float()
        found = self._kernel.attend(step.sequences(len(pool)), pool, rows, scaling, softcap)
        if len(single) == len(out):
            out.copy_(found)
        else:
            out[single] = found.to(out.dtype)


class NativeDecoding:
    """Makes the native part of layers, with shared tables."""

    def __init__(self) -> None:
        self._turns: dict[int, tuple[Turns, PooledTurns]] = {}

    def of(self, ops: Ops, pages: LayerPages) -> NativeLayer | None:
        """The native part of a layer; ``None`` if its operations are not native."""
        if not isinstance(ops, NativeOps):
            return None
        turns = ops.kernel.turns
        if turns is None:
            return NativeLayer(ops, pages, None)
        _, shared = self._turns.setdefault(id(turns), (turns, PooledTurns(turns)))
        return NativeLayer(ops, pages, shared)
