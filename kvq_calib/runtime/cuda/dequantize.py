"""Dequantize packed blocks: the kernel of ``dequantize.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.launcher import Launcher
from kvq_calib.runtime.cuda.structs import MAX_GRID, TYPES, DequantizeParams, check, pointer
from kvq_calib.runtime.cuda.tables import QuantizerTables

__all__ = ["dequantize"]

_THREADS = 128


def dequantize(
    launcher: Launcher,
    table: QuantizerTables,
    pages: Tensor,
    batch: int,
    blocks: range,
    dtype: torch.dtype,
    positions: Tensor | None = None,
) -> Tensor:
    """Dequantize keys or values of whole blocks.

    Args:
        launcher: runs the kernel.
        table: tables of the keys or values.
        pages: int64 ``[n, 6]``, see :class:`~kvq_calib.runtime.cuda.pages.PageTable`.
        batch: number of sequences ``B``.
        blocks: the ``m`` blocks to dequantize, counted from the first of ``pages``.
        dtype: dtype of the result, float16, bfloat16 or float32.
        positions: int32 ``[B, 32 * m]``: apply RoPE at these positions, and undo pair rotation. ``None``: neither.

    Returns:
        ``[B, H, 32 * m, D]``.

    Raises:
        RuntimeMismatchError: a shape, dtype or device is wrong, or has no kernel.
    """
    heads, size, tokens = table.heads, table.head_dim, BLOCK_TOKENS * len(blocks)
    if size % 2:
        raise RuntimeMismatchError(f"there is no kernel for heads of {size} channels, only for even numbers")
    if blocks.stop > pages.shape[0] * PAGE_BLOCKS:
        raise RuntimeMismatchError(f"block {blocks.stop - 1} is beyond the {pages.shape[0]} pages")
    if heads > MAX_GRID or batch > MAX_GRID:
        raise RuntimeMismatchError(f"{batch} sequences of {heads} heads are more than one launch can handle")
    check("pages", pages, (pages.shape[0], 6), torch.int64, table.device)
    if positions is not None:
        check("positions", positions, (batch, tokens), torch.int32, table.device)
    out = torch.empty(batch, heads, tokens, size, dtype=dtype, device=table.device)
    if not blocks:
        return out
    params = DequantizeParams(
        pages=pages.data_ptr(),
        levels=pointer(table.levels),
        scale=pointer(table.scale),
        zero_point=pointer(table.zero_point),
        coefficients=pointer(table.coefficients),
        bits=table.bits.data_ptr(),
        word_offset=table.word_offset.data_ptr(),
        angles=None if positions is None else table.angles.data_ptr(),
        pairs=table.pairs.data_ptr(),
        positions=pointer(positions),
        out=out.data_ptr(),
        rope_scaling=table.rope_scaling,
        heads=heads,
        head_dim=size,
        words=table.words,
        first_block=blocks.start,
        token=int(table.token),
        channel_normalized=int(table.channel_normalized),
        storage_bfloat=int(table.storage_bfloat),
        paths=int(table.paths),
        type=TYPES[dtype],
    )
    grid = (len(blocks), heads, batch)
    shared = 4 * BLOCK_TOKENS * size
    kernel = launcher.kernel("dequantize.cu", (), "dequantize_blocks", DequantizeParams)
    kernel(grid, _THREADS, shared, params)
    return out
