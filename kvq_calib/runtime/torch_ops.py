"""Packing and attention in torch, on any device. It is always available, and the reference for kernels.

Pages are decoded a few at a time into a workspace. An online softmax joins the results.

Work on the query or on the output replaces work on the cache where possible. The scale of the scores, the attention
scaling of RoPE and pair rotation are applied to the query (all three commute with RoPE). Scales of value channels are
applied to the output, if nothing was added after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.model.rope import RopeTable, Rotation
from kvq_calib.runtime.exact_tokens import ExactTokens
from kvq_calib.runtime.online_softmax import OnlineSoftmax
from kvq_calib.runtime.page_reader import PageReader
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage, PackedTensor
from kvq_calib.runtime.visibility import AttentionRequest, Visibility, as_additive

__all__ = ["TorchOps", "append_blocks"]

#: Number of elements of a workspace: small enough for the processor's caches, large enough to hide the cost of calls.
WORK_ELEMENTS = 1 << 19
#: Number of attention scores computed at a time.
SCORE_ELEMENTS = 1 << 22
#: Number of cosines and sines that layers share during a pass. Each layer computes those of later pages.
ANGLE_ELEMENTS = 1 << 20


def append_blocks(packed: PackedTensor, quantizer: Quantizer, x: Tensor) -> None:
    """Quantize whole blocks and store them, page by page, so that the workspace does not grow with the prompt.

    Args:
        packed: gets the blocks.
        quantizer: quantizer of ``packed``.
        x: ``[B, H, 32 * n, D]`` in the storage dtype, in the form that the quantizer takes.
    """
    done, tokens = 0, x.shape[2]
    while done < tokens:
        count = min(packed.room * BLOCK_TOKENS, tokens - done)
        packed.append_codes(quantizer.quantize(x[:, :, done : done + count]))
        done += count


@dataclass(frozen=True)
class _Span:
    """The slots of a run of packed places.

    Attributes:
        low, high: the run is slots ``low`` to ``high - 1``.
        slots: int64 ``[S]``, the slot of every place, -1 for a hole; ``None`` without holes.
    """

    low: int
    high: int
    slots: Tensor | None

    def positions(self, table: SlotTable) -> Tensor:
        """RoPE positions, int32 ``[B, S]``."""
        positions = table.positions(self.low, self.high)
        return positions if self.slots is None else positions[:, (self.slots - self.low).clamp(min=0)]


class TorchOps:
    """Packing and attention of one layer; see :class:`kvq_calib.runtime.ops.Ops`.

    Args:
        key, value: quantizers of the layer, on the device of the model. Their heads may differ in size, not in number.
    """

    #: Of the backend.
    name = "torch"
    #: Every layer packs its own blocks.
    closer = None

    def __init__(self, key: Quantizer, value: Quantizer) -> None:
        self.key = key
        self.value = value
        self.heads = key.layout.heads
        self.device = key.device
        rope = key.read_rope
        self.rope = None if rope is None else RopeTable(rope, self.device)

    @cached_property
    def readers(self) -> tuple[PageReader, PageReader]:
        """Readers of packed keys and values."""
        return PageReader(self.key), PageReader(self.value)

    def forget(self) -> None:
        """Do nothing, because nothing depends on a text."""

    def tables(self) -> list[Tensor]:
        """Tensors held besides the artifact's parameters, for the accounting of memory."""
        found = [tensor for reader in self.readers for tensor in reader.tensors()]
        for quantizer in (self.key, self.value):
            found += quantizer.derived()
            for _, channels, rows in quantizer.layout.groups(torch.device("cpu")):
                found += [channels, rows]
        return found + (self.rope.tensors() if self.rope is not None else [])

    def join(self, storage: LayerStorage, keys: Tensor, values: Tensor, rotation: Rotation | None) -> None:
        """``None``, because torch does it."""

    def pack(self, storage: LayerStorage, keys: Tensor, values: Tensor) -> None:
        """Code whole blocks, ``[B, H, 32 * n, D]`` each, and store them."""
        append_blocks(storage.key, self.key, keys)
        append_blocks(storage.value, self.value, values)

    def attend(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Attend to all tokens: ``[B, T, Hq, D]``, with ``D`` of the values, in the dtype of the query."""
        exact_query, packed_query = self._queries(request)
        value_reader = self.readers[1]
        softmax = OnlineSoftmax(request, self.heads, self.value.layout.head_dim)
        if value_reader.separable:
            softmax.split_packed()
        for span, keys, values in self._segments(request, storage, table):
            if self.rope is not None:
                self.rope.rotate_(keys, *self._angles(span, table))
            mask = self._packed_mask(request.visibility, span, table)
            softmax.add(packed_query, keys, values, mask, packed=True)
        exact = ExactTokens(table)
        keys, values = _with_tokens_last(exact, storage)
        if keys.shape[-1]:
            if self.rope is not None:
                self.rope.rotate_(keys, *self.rope.cos_sin(exact.positions))
            softmax.add(exact_query, keys, values, exact.mask(request.visibility), packed=False)
        return softmax.result(value_reader.affine)

    def _angles(self, span: _Span, table: SlotTable) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a run of packed places. Layers with the same rotary embedding share them."""
        assert self.rope is not None
        # Holes are the same for all layers, so the ends identify the run.
        key = (self.key.rope, span.low, span.high)
        found = table.angles.get(key)
        if found is None:
            found = self.rope.cos_sin(span.positions(table))
            held = sum(cos.numel() + sin.numel() for cos, sin in table.angles.values())
            if held + 2 * found[0].numel() <= ANGLE_ELEMENTS:
                table.angles[key] = found
        return found

    def _queries(self, request: AttentionRequest) -> tuple[Tensor, Tensor]:
        """Scaled queries ``[B, H, G * T, D]`` for exact and for packed keys."""
        query = request.query.float() * request.scaling
        query = query.reshape(query.shape[0], self.heads, -1, query.shape[-1])
        if self.rope is None:
            return query, query
        query = self.rope.scale_(query.mT).mT
        turns = self.key.pair_angle
        if turns is None:
            return query, query
        angle = turns[..., None]
        turned = self.rope.rotate_(query.mT.clone(), angle.cos(), angle.sin())
        return query, turned.mT

    def _segments(
        self, request: AttentionRequest, storage: LayerStorage, table: SlotTable
    ) -> Iterator[tuple[_Span, Tensor, Tensor]]:
        """Visible pages, a few at a time, with keys and values ``[B, H, D, S]``."""
        key, value = storage.key, storage.value
        batch, query_heads, tokens, _ = request.query.shape
        group = min(
            WORK_ELEMENTS // (PAGE_TOKENS * batch * max(key.layout.channels, value.layout.channels)),
            SCORE_ELEMENTS // (PAGE_TOKENS * batch * query_heads * tokens),
        )
        group = max(group, 1)
        key_reader, value_reader = self.readers
        begin = key.pages_before(request.visibility.first_slot, table)
        all_keys = key_reader.spans(key.pages[begin:], group)
        all_values = value_reader.spans(value.pages[begin:], group, value_reader.separable)
        for start, keys, values in zip(
            range(begin, len(key.pages), group), all_keys, all_values, strict=True
        ):
            first = (key.dropped_pages + start) * PAGE_BLOCKS
            last = min(first + group * PAGE_BLOCKS, key.blocks)
            low, high = table.first[first], table.first[last - 1] + table.fill[last - 1]
            holes = table.ragged and high - low < (last - first) * BLOCK_TOKENS
            span = _Span(low, high, table.block_slots(first, last) if holes else None)
            places = (last - first) * BLOCK_TOKENS if holes else high - low
            yield span, keys[..., :places], values[..., :places]

    def _packed_mask(self, visibility: Visibility, span: _Span, table: SlotTable) -> Tensor | None:
        """The mask of a packed segment. It hides holes, and sinks, whose exact copies are attended."""
        first, stop = table.sink_range
        has_sinks = first < stop and span.low < stop and first < span.high
        visible = visibility.sees_all(span.low, span.high) and span.slots is None
        if visible and not has_sinks:
            return None
        slots = span.slots
        if slots is None:
            slots = torch.arange(span.low, span.high, device=self.device)
        mask = None if visible else visibility.additive(slots)
        if has_sinks:
            sink = slots == table.sink_slots[:, :1]
            for column in range(1, table.sink_slots.shape[1]):
                sink |= slots == table.sink_slots[:, column : column + 1]
            sink = sink[:, None, None]
            mask = as_additive(~sink) if mask is None else mask.masked_fill(sink, -torch.inf)
        return mask


def _with_tokens_last(exact: ExactTokens, storage: LayerStorage) -> tuple[Tensor, Tensor]:
    """Keys and values of exact tokens, float32 ``[B, H, D, S]``."""
    sinks, tail = exact.parts(storage)
    if not exact.sinks:
        return tail[0].mT.float(), tail[1].mT.float()
    keys, values = (
        torch.cat([x.mT.float() for x in sides], dim=-1) for sides in zip(sinks, tail, strict=True)
    )
    return keys, values
