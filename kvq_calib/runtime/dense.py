"""Attention for many queries at once: packed blocks are dequantized to ordinary tensors for torch's attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.model.rope import RopeTable
from kvq_calib.runtime.exact_tokens import ExactTokens
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.visibility import AttentionRequest

__all__ = ["Decode", "attend_dense"]

#: Largest number of queries in one call of torch's attention, which bounds the mask.
_QUERY_ROWS = 256

#: Dequantizes ``count`` blocks from ``first`` on, counted from the first page in memory: ``[B, H, 32 * count, D]`` each
#: in the dtype of the query. Keys are rotated to the positions, int32 ``[B, 32 * count]``, if these are given.
Decode = Callable[[int, int, Tensor | None], tuple[Tensor, Tensor]]


def attend_dense(
    request: AttentionRequest,
    storage: LayerStorage,
    table: SlotTable,
    rope: RopeTable | None,
    decode: Decode,
) -> Tensor:
    """Attend to all tokens of a layer.

    Args:
        request: the call, without softcap and sink logits, which torch's attention does not support.
        storage, table: storage of the layer, and slot table.
        rope: rotary embedding to apply on every read, or ``None``.
        decode: dequantizes packed blocks.

    Returns:
        ``[B, T, Hq, D]``, ``D`` of the values, contiguous, in the dtype of the query.
    """
    visibility, dtype = request.visibility, request.query.dtype
    first_page = storage.key.dropped_pages + storage.key.pages_before(visibility.first_slot, table)
    first = first_page * PAGE_BLOCKS
    blocks = max(table.blocks - first, 0)
    slots = table.block_slots(first, first + blocks)
    positions = None
    if blocks and rope is not None:
        low, high = table.first[first], table.packed_slots
        positions = table.positions(low, high)[:, (slots - low).clamp(min=0)].contiguous()
    keys, values = decode(first - storage.key.dropped_pages * PAGE_BLOCKS, blocks, positions)
    exact = ExactTokens(table)
    exact_keys, exact_values = _exact(exact, storage, rope)
    keys = torch.cat((keys, exact_keys.to(dtype)), dim=2)
    values = torch.cat((values, exact_values.to(dtype)), dim=2)
    if visibility.tokens == visibility.length and visibility.mask is None and visibility.window is None:
        out = _attend_prompt(request, (keys, values), exact)
    else:
        out = _attend_masked(request, (keys, values), slots, exact)
    return out.transpose(1, 2).contiguous()


def _exact(exact: ExactTokens, storage: LayerStorage, rope: RopeTable | None) -> tuple[Tensor, Tensor]:
    """Keys and values of sinks and tail as attention uses them: ``[B, H, S, D]`` each."""
    sinks, tail = exact.parts(storage)
    keys, values = (torch.cat(sides, dim=2) for sides in zip(sinks, tail, strict=True))
    if rope is not None:
        keys = rope.scale_(rope.rotate_(keys.mT.float(), *rope.cos_sin(exact.positions))).mT
    return keys, values


def _attend_masked(
    request: AttentionRequest, sides: tuple[Tensor, Tensor], packed: Tensor, exact: ExactTokens
) -> Tensor:
    """Attend to packed places, then exact columns, with masks for some queries at a time."""
    query = request.query
    packed, columns = (slots.expand(query.shape[0], -1) for slots in (packed[None], exact.slots))
    sinks = columns[:, : exact.sinks]
    if exact.sinks and packed.shape[1]:  # the exact copies are attended instead
        packed = packed.masked_fill((packed[..., None] == sinks[:, None]).any(-1), -1)
    slots = torch.cat((packed, columns), dim=1)
    out = []
    for start in range(0, query.shape[2], _QUERY_ROWS):
        rows = slice(start, start + _QUERY_ROWS)
        mask = request.visibility.of_queries(slots, rows)
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
        part = nn.functional.scaled_dot_product_attention(
            query[:, :, rows], *sides, mask, scale=request.scaling, enable_gqa=True
        )
        out.append(part)
    return torch.cat(out, dim=2).nan_to_num()


def _attend_prompt(request: AttentionRequest, sides: tuple[Tensor, Tensor], exact: ExactTokens) -> Tensor:
    """Attend to a whole prompt without padding. Sinks take their packed places, so that columns equal slots."""
    packed = sides[0].shape[2] - exact.slots.shape[1]
    row, number = (exact.slots[:, : exact.sinks] >= 0).nonzero(as_tuple=True)
    place = exact.slots[row, number]

    def in_order(x: Tensor) -> Tensor:
        if not exact.sinks:
            return x
        x[row, :, place] = x[row, :, packed + number]
        return torch.cat((x[:, :, :packed], x[:, :, packed + exact.sinks :]), dim=2)

    keys, values = in_order(sides[0]), in_order(sides[1])
    return nn.functional.scaled_dot_product_attention(
        request.query, keys, values, is_causal=True, scale=request.scaling, enable_gqa=True
    )
