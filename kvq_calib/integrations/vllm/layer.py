"""Storage and attention of one layer in vLLM's pages.

It stores and computes the same as :class:`~kvq_calib.runtime.cache.KVQCache` with any backend, because the operations
are the same. Only the tensors of the storage are views of the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.integrations.vllm.decode import NativeDecoding
from kvq_calib.integrations.vllm.pages import LayerPages, SequenceStorage
from kvq_calib.integrations.vllm.step import Row, Step
from kvq_calib.runtime.ops import LayerQuantizers, Ops
from kvq_calib.runtime.visibility import AttentionRequest, Visibility

__all__ = ["PagedLayer"]


class PagedLayer:
    """Keys, values and attention of one layer.

    Args:
        quantizers: quantizers of the layer.
        ops: operations of the layer.
        sink_tokens: number of exact first tokens of a sequence.
        scaling: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; ``None`` for no cap.
        decoding: the native part for sequences with one new token; shared by all layers.
        least_bytes: smallest size of a page; see :class:`~kvq_calib.integrations.vllm.pages.LayerPages`.
    """

    def __init__(
        self,
        quantizers: LayerQuantizers,
        ops: Ops,
        sink_tokens: int,
        scaling: float,
        softcap: float | None = None,
        decoding: NativeDecoding | None = None,
        least_bytes: int = 0,
    ) -> None:
        self.pages = LayerPages(quantizers["key"], quantizers["value"], sink_tokens, least_bytes)
        self.ops = ops
        self.scaling, self.softcap = scaling, softcap
        self._native = None if decoding is None else decoding.of(ops, self.pages)

    def forward(
        self, step: Step, pool: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        """Store the new tokens of all sequences, then attend.

        All tokens are stored before attention, because a sequence may share pages that another fills in the same step.

        Args:
            step: describes the tokens.
            pool: uint8 ``[pages, page_bytes]``.
            query: ``[T, Hq, D]``, rotated by the model, any float dtype.
            keys, values: ``[T, H, D]``, with keys rotated by the model.
            out: ``[T, Hq, Dv]``, filled in place.

        Raises:
            RuntimeMismatchError: a number does not fit the storage dtype, or the pages do not fit the tokens.
        """
        if not step.rows:
            return
        query, keys, values = (x[: step.tokens] for x in (query, keys, values))
        stored = self._store(step, pool, *self.unturned(step, keys, values))
        if self._native is not None:
            self._native.attend(step, pool, query, out, self.scaling, self.softcap)
        for row in step.rows:
            if self._native is None or row.count > 1:
                self._attend(row, stored[row.start], query, out)

    def unturned(self, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens as they are stored, with keys before RoPE: ``[H, T, D]`` each, from ``[T, H, D]``."""
        if self._native is not None:
            return self._native.unturned(step, keys, values)
        x = keys.permute(1, 2, 0).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rope = self.pages.quantizers[0].read_rope
        if rope is not None and self.ops.rope is not None:
            self.ops.rope.rotate_(x, *step.unturning(rope))
        return x.mT, values.transpose(0, 1)

    def _store(self, step: Step, pool: Tensor, keys: Tensor, values: Tensor) -> dict[int, SequenceStorage]:
        """Store the tokens. Return the storages that were made, by first new token of the sequence."""
        if self._native is not None:
            self._native.store(step, pool, keys, values)
        stored = {}
        for row in step.rows:
            if self._native is not None and row.is_next:
                continue
            storage = stored[row.start] = SequenceStorage(self.pages, pool, row.table, row.held)
            new = slice(row.start, row.stop)
            storage.append(keys[None, :, new], values[None, :, new], row.slots, self.ops.pack)
            storage.keep_tail()
        return stored

    def _attend(self, row: Row, storage: SequenceStorage, query: Tensor, out: Tensor) -> None:
        new = slice(row.start, row.stop)
        request = AttentionRequest(
            query[new].transpose(0, 1)[None],
            Visibility(None, row.length, row.count, None),
            self.scaling,
            self.softcap,
        )
        out[new] = self.ops.attend(request, storage, row.slots)[0]
