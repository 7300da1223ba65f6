"""Storage and attention of one layer in vLLM's pages on a GPU, with the CUDA kernels.

It stores the same bits as :class:`~kvq_calib.runtime.cache.KVQCache`. The host knows the lengths of sequences and which
blocks become full. Their pages are only in the device's memory, which is never read here, so that the host does not
wait. For the same reason, NaN and infinity are not detected, but stored.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.gpu_step import GpuRow, GpuStep
from kvq_calib.integrations.vllm.pages import LayerPages, pages_of
from kvq_calib.runtime.cuda.append_rows import append_to_rows
from kvq_calib.runtime.cuda.decode import DecodeKernel, DecodeStep, PagePool
from kvq_calib.runtime.cuda.dequantize import dequantize
from kvq_calib.runtime.cuda.ops import CudaOps
from kvq_calib.runtime.ops import LayerQuantizers

__all__ = ["GpuLayer"]

#: Largest number of queries in one call of torch's attention, which bounds the mask.
_QUERY_ROWS = 256


class GpuLayer:
    """Keys, values and attention of one layer.

    Args:
        quantizers: quantizers of the layer.
        ops: operations of the layer.
        sink_tokens: number of exact first tokens of a sequence.
        scaling: factor on the scores.
        softcap: must be ``None``, because torch's attention, which prompts use, does not support it.
        least_bytes: smallest size of a page; see :class:`~kvq_calib.integrations.vllm.pages.LayerPages`.

    Raises:
        RuntimeMismatchError: there is no kernel for the layer.
    """

    def __init__(
        self,
        quantizers: LayerQuantizers,
        ops: CudaOps,
        sink_tokens: int,
        scaling: float,
        softcap: float | None = None,
        least_bytes: int = 0,
    ) -> None:
        if softcap is not None:
            raise RuntimeMismatchError(
                "the model caps its scores, which is not served in vLLM on a GPU; use KVQCache"
            )
        self.pages = LayerPages(quantizers["key"], quantizers["value"], sink_tokens, least_bytes)
        self.ops, self.scaling = ops, scaling
        self._tables = ops.key_tables, ops.value_tables
        self._kernel = DecodeKernel(ops.launcher, *self._tables)
        self._rope = id(quantizers["key"].read_rope)
        key, value = self.pages.areas
        starts = key.sinks.start, key.tail.start, value.sinks.start, value.tail.start
        self._exact_starts = torch.tensor(starts, dtype=torch.int64, device=self._tables[0].device)

    def forward(
        self, step: GpuStep, pool: Tensor, query: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> None:
        """Store the new tokens of all sequences, then attend. The host never waits.

        Args:
            step: describes the tokens.
            pool: uint8 ``[pages, page_bytes]``.
            query: float16 or bfloat16 ``[T, Hq, D]``, rotated by the model.
            keys, values: ``[T, H, D]``, with keys rotated by the model.
            out: ``[T, Hq, D]``, filled in place.

        Raises:
            RuntimeMismatchError: a dtype, shape or device is wrong.
        """
        if not step.rows:
            return
        query, keys, values = (x[: step.tokens] for x in (query, keys, values))
        stored = self._unturned(step, keys, values)
        self._keep(step, pool, stored)
        for row in step.rows:
            if not row.only_kept:
                self._store(row, pool, stored)
        self._attend_single(step, pool, query, out)
        for row in step.rows:
            if row.count > 1:
                self._attend_many(row, pool, query, out)

    def _unturned(self, step: GpuStep, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens in the form in which they are stored, ``[H, T, D]`` each, contiguous."""
        storage = self.pages.quantizers[0].storage
        x = keys.permute(1, 2, 0).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if self.ops.rope is not None:
            self.ops.rope.rotate_(x, *step.unturning(self.ops.rope, self._rope))
        return x.mT.to(storage).contiguous(), values.transpose(0, 1).to(storage).contiguous()

    # ---- storing ----

    def _keep(self, step: GpuStep, pool: Tensor, stored: tuple[Tensor, Tensor]) -> None:
        """Store the new tokens that complete no block, all at once."""
        kept = step.kept
        if kept is None:
            return
        for side, x in enumerate(stored):
            tail = self.pages.of_all(pool, side, "tail")
            tail[kept.page, :, kept.place] = x[:, kept.token].transpose(0, 1)

    def _store(self, row: GpuRow, pool: Tensor, stored: tuple[Tensor, Tensor]) -> None:
        """Store the new tokens of a sequence: first tokens, whole blocks, and the rest."""
        held, first_block = row.held % BLOCK_TOKENS, row.held // BLOCK_TOKENS
        tokens = []
        for side, whole in enumerate(stored):
            x = whole[:, row.start : row.stop]
            self._store_sinks(row, pool, side, x)
            if held:
                newest = self._exact(pool, side, "tail", row.page_ahead(row.held))
                x = torch.cat((newest[0, :, :held], x), dim=1)
            tokens.append(x)
        blocks = tokens[0].shape[1] // BLOCK_TOKENS
        if blocks:
            page, place = divmod(first_block, PAGE_BLOCKS)
            stop = pages_of(BLOCK_TOKENS * (first_block + blocks))
            self._open(row, pool, page + (place > 0), stop)
            rows = self._rows(row, pool, 0, page, stop), self._rows(row, pool, 1, page, stop)
            new = [x[None, :, : BLOCK_TOKENS * blocks].contiguous() for x in tokens]
            append_to_rows(self.ops.launcher, self._tables, rows, place, (new[0], new[1]))
        for side, x in enumerate(tokens):
            rest = x[:, BLOCK_TOKENS * blocks :]
            if rest.shape[1]:
                tail = self.pages.of_all(pool, side, "tail")
                tail[row.page_ahead(row.length), :, : rest.shape[1]] = rest[None]

    def _store_sinks(self, row: GpuRow, pool: Tensor, side: int, x: Tensor) -> None:
        stop = min(row.length, row.sink_tokens)
        if row.held < stop:
            sinks = self.pages.of_all(pool, side, "sinks")
            sinks[row.table[:1], :, row.held : stop] = x[None, :, : stop - row.held]

    def _open(self, row: GpuRow, pool: Tensor, first: int, stop: int) -> None:
        """Set the scales of new pages to 0, because a NaN would survive a weight of zero."""
        for side, areas in enumerate(self.pages.areas):
            if areas.token.size and first < stop:
                self.pages.of_all(pool, side, "token")[row.table[first:stop]] = 0

    def _rows(self, row: GpuRow, pool: Tensor, side: int, first: int, stop: int) -> Tensor:
        """Addresses of the pages of a sequence, as in :func:`~kvq_calib.runtime.cuda.pages.page_rows`."""
        areas = self.pages.areas[side]
        base = row.table[first:stop] * pool.stride(0) + pool.data_ptr()
        rows = torch.zeros(stop - first, 6, dtype=torch.int64, device=pool.device)
        rows[:, 0] = base + areas.codes.start
        if areas.token.size:
            rows[:, 1] = base + areas.token.start
        return rows

    # ---- attention ----

    def _attend_single(self, step: GpuStep, pool: Tensor, query: Tensor, out: Tensor) -> None:
        """Attend for all sequences with one new token at once."""
        single = step.single
        if single is None:
            return
        key, value = self.pages.areas
        addresses = step.exact_pages.repeat(1, 2) * pool.stride(0) + self._exact_starts + pool.data_ptr()
        paged = PagePool(
            pool,
            step.table,
            key_codes=key.codes.start,
            value_codes=value.codes.start,
            value_token=value.token.start,
            exact=addresses,
            exact_counts=(step.sink_tokens, BLOCK_TOKENS),
        )
        found = self._kernel.attend(
            DecodeStep(query[single.token], None, None, (), step.context, self.scaling, pool=paged)
        )
        out[single.token] = found.to(out.dtype)

    def _attend_many(self, row: GpuRow, pool: Tensor, query: Tensor, out: Tensor) -> None:
        """Attend for a sequence with several new tokens. Packed blocks are dequantized for torch's attention."""
        keys, values = (self._read(row, pool, side, query.dtype) for side in range(2))
        mine = query[row.start : row.stop].transpose(0, 1)[None]
        place = torch.arange(row.length, device=pool.device)
        for start in range(0, row.count, _QUERY_ROWS):
            part = mine[:, :, start : start + _QUERY_ROWS]
            stop = row.held + start + part.shape[2]
            seen = place[None, :stop] <= place[row.held + start : stop, None]
            found = nn.functional.scaled_dot_product_attention(
                part, keys[:, :, :stop], values[:, :, :stop], seen, scale=self.scaling, enable_gqa=True
            )
            first = row.start + start
            out[first : first + part.shape[2]] = found[0].transpose(0, 1)

    def _read(self, row: GpuRow, pool: Tensor, side: int, dtype: torch.dtype) -> Tensor:
        """Keys or values of all tokens of a sequence, as attention uses them: ``[1, H, length, D]``."""
        blocks = row.length // BLOCK_TOKENS
        packed = BLOCK_TOKENS * blocks
        turned = side == 0 and self.ops.rope is not None
        positions = torch.arange(packed, dtype=torch.int32, device=pool.device)[None] if turned else None
        rows = self._rows(row, pool, side, 0, pages_of(packed))
        x = dequantize(self.ops.launcher, self._tables[side], rows, 1, range(blocks), dtype, positions)
        sinks = min(row.sink_tokens, packed)
        if sinks:
            first = self._exact(pool, side, "sinks", row.table[:1])[:, :, :sinks]
            x[:, :, :sinks] = self._turned(first, side, 0).to(dtype)
        if row.length == packed:
            return x
        newest = self._exact(pool, side, "tail", row.page_ahead(row.length))[:, :, : row.length - packed]
        return torch.cat((x, self._turned(newest, side, packed).to(dtype)), dim=2)

    def _exact(self, pool: Tensor, side: int, name: Literal["sinks", "tail"], page: Tensor) -> Tensor:
        return self.pages.of_all(pool, side, name).index_select(0, page)

    def _turned(self, x: Tensor, side: int, first: int) -> Tensor:
        """Exact tokens ``[1, H, t, D]`` from position ``first`` on, as attention uses them."""
        rope = self.ops.rope
        if side or rope is None:
            return x
        positions = torch.arange(first, first + x.shape[2], dtype=torch.int32, device=x.device)[None]
        return rope.scale_(rope.rotate_(x.mT.float().contiguous(), *rope.cos_sin(positions))).mT
