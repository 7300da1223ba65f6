"""Pack blocks into pages whose addresses only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.append import launch_append, side_params
from kvq_calib.runtime.cuda.launcher import Launcher
from kvq_calib.runtime.cuda.structs import AppendParams, check
from kvq_calib.runtime.cuda.tables import QuantizerTables

__all__ = ["append_to_rows"]


def append_to_rows(
    launcher: Launcher,
    tables: tuple[QuantizerTables, QuantizerTables],
    rows: tuple[Tensor, Tensor],
    place: int,
    tokens: tuple[Tensor, Tensor],
) -> None:
    """Quantize and pack whole blocks of one sequence into existing pages. The host reads nothing.

    Args:
        launcher: runs the kernel.
        tables: tables of the layer's keys and values, without outliers, for heads of the same size.
        rows: addresses of the blocks' pages, for keys and for values: int64 ``[n, 6]`` on the device, as from
            :func:`~kvq_calib.runtime.cuda.pages.page_rows`.
        place: place of the first block in the first page.
        tokens: storage dtype ``[1, H, 32 * m, D]`` each, contiguous.

    Raises:
        RuntimeMismatchError: a shape, dtype, stride or device is wrong, or there are outliers.
    """
    blocks = tokens[0].shape[2] // BLOCK_TOKENS
    pages = -(-(place + blocks) // PAGE_BLOCKS)
    for table, own, x in zip(tables, rows, tokens, strict=True):
        if table.cap:
            raise RuntimeMismatchError("existing pages have no room for outliers")
        shape = 1, table.heads, BLOCK_TOKENS * blocks, table.head_dim
        check(f"new {table.kind}s", x, shape, table.storage, table.device)
        check("rows of pages", own, (pages, 6), torch.int64, table.device)
    params = AppendParams(batch=1, heads=tables[0].heads, head_dim=tables[0].head_dim, first_block=place)
    params.side[:] = [
        side_params(table, x, own, None) for table, x, own in zip(tables, tokens, rows, strict=True)
    ]
    launch_append(launcher, tables, params, blocks)
