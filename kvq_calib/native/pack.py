"""Calls that pack codes and list outliers. Everything is checked before a pointer is passed."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.native.checks import are_numbers, check
from kvq_calib.native.layout import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.native.loader import Library

__all__ = ["list_outliers", "pack_codes"]


def pack_codes(library: Library, widths: Tensor, codes: Tensor, page: Tensor, first_block: int) -> None:
    """Pack whole blocks into a page, in place.

    Args:
        library: the library to call.
        widths: uint8 ``[C]``, width of each channel in bits.
        codes: uint8 ``[B, 32 * n, C]``.
        page: int32 ``[B, 8 * W]``, ``W`` the sum of the widths.
        first_block: block of the page for the first token.

    Raises:
        ValueError: a tensor has a wrong dtype, shape or device, or the blocks do not fit the page.
    """
    batch, tokens, channels = codes.shape
    check("widths", widths, torch.uint8, (channels,))
    check("codes", codes, torch.uint8, (batch, tokens, channels))
    check("page", page, torch.int32, (batch, PAGE_BLOCKS * int(widths.sum())))
    if tokens % BLOCK_TOKENS:
        raise ValueError(f"codes: {tokens} tokens are no whole blocks")
    status = library.functions.kvq_pack(
        *(widths.data_ptr(), channels, codes.data_ptr(), batch, tokens // BLOCK_TOKENS),
        *(first_block, page.data_ptr()),
    )
    if status:
        raise ValueError(f"codes: {tokens} tokens from block {first_block} on do not fit a page")


def list_outliers(
    library: Library, outliers: Tensor, residual: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the outliers of whole blocks, in order of block, sequence and head.

    Args:
        library: the library to call.
        outliers: bool ``[B, 32 * n, C]``.
        residual: 16-bit ``[B, 32 * n, C]``.
        heads: number of heads in ``C``.

    Returns:
        ``index`` int16 ``[E]``, ``residual`` ``[E]``, and ``counts`` int32 ``[n, B, heads]``.

    Raises:
        ValueError: a tensor has a wrong dtype, shape or device.
    """
    batch, tokens, channels = outliers.shape
    if tokens % BLOCK_TOKENS or channels % heads or residual.element_size() != 2:
        raise ValueError(f"outliers: {tokens} tokens of {channels} channels, {residual.dtype}")
    check("outliers", outliers, torch.bool, (batch, tokens, channels))
    check("residual", residual, residual.dtype, (batch, tokens, channels))
    blocks = tokens // BLOCK_TOKENS
    counts = torch.empty(blocks, batch, heads, dtype=torch.int32)
    call = library.functions.kvq_list_outliers
    entries = int(outliers.sum())
    index = torch.empty(entries, dtype=torch.int16)
    listed = torch.empty(entries, dtype=residual.dtype)
    status = call(
        *(outliers.data_ptr(), residual.data_ptr(), batch, blocks, heads, channels // heads),
        *(counts.data_ptr(), entries, index.data_ptr() if entries else None, listed.data_ptr()),
    )
    are_numbers(status)
    return index, listed, counts
