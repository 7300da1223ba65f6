"""Attention over packed storage in torch: the numbers every kernel must match, and the path without a GPU.

Pages are decoded a few at a time into a work space, used, and forgotten; an online softmax joins them. Within
the work space a tensor is ``[B, H, D, S]``: tokens stand last, as in the pages, so nothing is transposed.

What can be applied to the query or to the output once is not applied to the cache: the scale of the scores,
the attention scaling of RoPE and the phases act on the query (all three commute with RoPE), value rotations
on the mixed output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.packing import (
    BLOCK_TOKENS,
    COORDINATE_BITS,
    PAGE_BLOCKS,
    PAGE_TOKENS,
    slice_bytes,
    unpack_units,
)
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.model.rope import RopeTable
from kvq_calib.runtime.storage import LayerStorage, Page, SlotTable

__all__ = ["AttentionRequest", "PageReader", "ReferenceOps", "Visibility"]

#: Decoded elements of one work space: small enough for the caches, large enough to hide the cost of calls.
WORK_ELEMENTS = 1 << 19
#: Work spaces for which outliers and scales of tokens are made ready at once.
SPANS_READY = 8
#: Attention scores computed at a time.
SCORE_ELEMENTS = 1 << 22
#: Cosines and sines that layers share during a pass; those of later pages are computed by each layer.
ANGLE_ELEMENTS = 1 << 20
#: Codebooks of one width up to which byte-wise tables (2 KiB each) are kept.
MAX_BYTE_TABLES = 4
#: Below every real score, and finite, so that differences of running maxima are never NaN.
_FLOOR = -1e30


@dataclass(frozen=True)
class Visibility:
    """Which slots each query may see.

    Attributes:
        mask: what the model prepared. ``[B, 1 or Hq, T, S]``, bool (true is visible) or additive, for the
            last ``S`` slots; ``[B, S]`` (nonzero is a real token), causal besides; or ``None``, causal.
        length: slots in use, the queries being the last ``tokens`` of them.
        tokens: ``T``.
        window: slots a query sees, itself included, or ``None`` for all. Only used where the mask is not
            four-dimensional: otherwise the mask says it.
    """

    mask: Tensor | None
    length: int
    tokens: int
    window: int | None

    @property
    def first_slot(self) -> int:
        """No query sees a slot before this one."""
        if self.mask is not None and self.mask.ndim == 4:
            first = self.length - self.mask.shape[-1]
        elif self.window is None:
            first = 0
        else:
            first = self.length - self.tokens - self.window + 1
        return max(first, 0)

    def real(self) -> Tensor | None:
        """Which of the new slots are tokens and not padding: bool ``[B or 1, T]``, ``None`` if all are."""
        if self.mask is None:
            return None
        if self.mask.ndim == 2:
            return self.mask[:, -self.tokens :] != 0
        own = self.mask[:, 0, :, -self.tokens :].diagonal(dim1=-2, dim2=-1)  # each query and itself
        return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2

    def sees_all(self, low: int, high: int) -> bool:
        """Whether every query sees slots ``low`` to ``high - 1`` for certain; reads no tensor."""
        return (
            self.mask is None
            and high <= self.length - self.tokens + 1
            and (self.window is None or low > self.length - 1 - self.window)
        )

    def additive(self, slots: Tensor) -> Tensor:
        """What to add to scores: float32, broadcastable to ``[B, Hq, T, S]``.

        Args:
            slots: int64 ``[S]`` or ``[B, S]``, -1 for "no such slot".
        """
        rows = slots if slots.ndim == 2 else slots[None]
        hidden = (rows < 0)[:, None, None]
        if self.mask is None or self.mask.ndim == 2:
            query = torch.arange(self.length - self.tokens, self.length, device=slots.device)[:, None]
            hidden = hidden | (rows[:, None, None] > query)
            if self.window is not None:
                hidden = hidden | (rows[:, None, None] <= query - self.window)
        if self.mask is None:
            return _additive(~hidden)
        columns = rows - (self.length - self.mask.shape[-1])
        hidden = hidden | (columns < 0)[:, None, None]
        columns = columns.clamp(min=0)
        if slots.ndim == 1:
            chosen = self.mask[..., columns[0]]
        else:
            shape = (*self.mask.shape[:-1], columns.shape[-1])
            index = columns.view(columns.shape[0], *[1] * (self.mask.ndim - 2), columns.shape[1])
            batch = max(self.mask.shape[0], len(columns))
            mask = self.mask.expand(batch, *self.mask.shape[1:])
            chosen = mask.gather(-1, index.expand(batch, *shape[1:]))
        if chosen.ndim == 2:
            chosen = (chosen != 0)[:, None, None]
        return _additive(chosen).masked_fill(hidden, -torch.inf)


def _additive(visible: Tensor) -> Tensor:
    if visible.dtype != torch.bool:
        return visible.float()
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)


@dataclass(frozen=True)
class AttentionRequest:
    """One call of the attention function.

    Attributes:
        query: ``[B, Hq, T, D]``, rotated, of the newest ``T`` slots.
        visibility: which slots they see.
        scaling: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; ``None`` for no cap.
        sinks: ``[Hq]``, a logit per head that takes part in the softmax without a value (gpt-oss); or
            ``None``.
    """

    query: Tensor
    visibility: Visibility
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class _Group:
    """Channels of one width.

    Attributes:
        width: bits.
        channels: int64 ``[n]``, or ``None`` for all channels in order.
        rows: int64 ``[n * width]`` of the page seen as ``[W, 8]`` words, or ``None`` for all in order.
        codebooks: int64, the rows of the codebook that the channels use.
        part: int64 ``[n]``, which of these each channel uses.
        count: levels of a channel; with a trellis twice as many as codes.
    """

    width: int
    channels: Tensor | None
    rows: Tensor | None
    codebooks: Tensor
    part: Tensor
    count: int

    @property
    def paired(self) -> bool:
        """Whether the levels of two codes are looked up at once."""
        return 0 < self.width <= 4 and len(self.codebooks) <= MAX_BYTE_TABLES


class PageReader:
    """Decodes pages of one layer's keys or values.

    Up to 4 bits, levels are looked up two at a time: a byte of a nibble slice selects a pair of float32, moved
    as one float64; with a trellis, the byte and the lowest bits of the two codes before it. Bytes are brought into the order of the channels first, being an eighth of what they
    become, so that one lookup serves all widths.

    Args:
        quantizer: of the tensor.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.layout = quantizer.layout
        params = quantizer.params
        self.device = params.bits.device
        #: Whether scale and zero point are numbers of a channel and act last, so that a weighted sum of
        #: normalized values can take them instead of every value.
        self.separable = not (self.layout.token_params or self.layout.outlier_cap)
        groups = list(self._widths())
        self._paired = [group for group in groups if group.paired]
        #: Float64 ``[rows]`` of level pairs, a table after the other, and int32 ``[C, 1]`` where each channel's table starts.
        table = quantizer.table
        self._pairs, self._pairs_start = self._pair_tables(table)
        #: Int64 ``[C]``: where each channel stands among the paired ones, or ``None`` for the same place.
        self._order = self._paired_order()
        #: The other channels, float32 ``[L * r]`` levels, and int32 ``[n, 1]`` where each channel's start.
        self._single = [(group, *self._level_table(group, table)) for group in groups if not group.paired]

    def _widths(self) -> Iterator[_Group]:
        index = self.quantizer.params.codebook_index.to(torch.int64)

        def group(width: int, channels: Tensor | None, rows: Tensor | None) -> _Group:
            used, part = torch.unique(index if channels is None else index[channels], return_inverse=True)
            return _Group(width, channels, rows, used, part, self.quantizer.level_count(width))

        widths = set(self.layout.widths)
        if len(widths) == 1 and 0 not in widths:
            yield group(widths.pop(), None, None)
            return
        for width, channels, rows in self.layout.groups(self.device):
            yield group(width, channels, rows.flatten())
        if 0 in widths:
            channels = (self.quantizer.params.bits == 0).nonzero().flatten()
            yield group(0, channels, channels[:0])

    def _pair_tables(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        start = torch.zeros(self.layout.channels, 1, dtype=torch.int32, device=self.device)
        tables: list[Tensor] = []
        first = 0
        for group in self._paired:
            rows = self._pair_rows(group.width)
            chosen = slice(None) if group.channels is None else group.channels
            start[chosen, 0] = (first + len(rows) * group.part).to(torch.int32)
            tables.append(table[group.codebooks][:, rows])
            first += len(rows) * len(group.codebooks)
        if not tables:
            return torch.empty(0, dtype=torch.float64, device=self.device), None
        pairs = torch.cat(tables).contiguous().view(torch.float64).flatten()
        return pairs, start if bool(start.any()) else None

    def _pair_rows(self, width: int) -> Tensor:
        """Level indices of the two tokens of a pair, int64 ``[256, 2]`` by byte; ``[1024, 2]`` with a trellis."""
        return self.quantizer.pair_index(width).to(self.device)

    def _paired_order(self) -> Tensor | None:
        order = torch.zeros(self.layout.channels, dtype=torch.int64, device=self.device)
        done = 0
        for group in self._paired:
            if group.channels is None:
                return None
            order[group.channels] = torch.arange(done, done + len(group.part), device=self.device)
            done += len(group.part)
        return order

    def _level_table(self, group: _Group, table: Tensor) -> tuple[Tensor, Tensor | None]:
        levels = table[group.codebooks, : group.count].flatten().clone()
        if len(group.codebooks) == 1:
            return levels, None
        return levels, (group.part * group.count).to(torch.int32)[:, None]

    def tensors(self) -> list[Tensor]:
        """Everything held beside the quantizer's parameters."""
        found = [self._pairs, self._pairs_start, self._order]
        for group in self._paired:
            found += [group.channels, group.rows, group.codebooks, group.part]
        for group, levels, start in self._single:
            found += [group.channels, group.rows, group.codebooks, group.part, levels, start]
        return [tensor for tensor in found if tensor is not None]

    def read(self, pages: Sequence[Page], normalized: bool = False) -> Tensor:
        """Decode whole pages: float32 ``[B, H, D, 256 * n]``, in the quantizer's (phase, rotation) space.

        Places that hold no token yet come out finite but meaningless.

        Args:
            pages: one or more.
            normalized: leave scale and zero point to :meth:`affine`; only where ``separable``.
        """
        return next(self.spans(pages, len(pages), normalized))

    def spans(self, pages: Sequence[Page], size: int, normalized: bool = False) -> Iterator[Tensor]:
        """Decode pages, ``size`` at a time, each time as :meth:`read` does.

        What is small is made ready for :data:`SPANS_READY` spans at once, for the calls cost more than the work.
        """
        whole = len(pages) - len(pages) % size
        for start in range(0, whole, SPANS_READY * size):
            yield from self._alike(pages[start : min(start + SPANS_READY * size, whole)], size, normalized)
        if whole < len(pages):
            yield from self._alike(pages[whole:], len(pages) - whole, normalized)

    def _alike(self, pages: Sequence[Page], size: int, normalized: bool) -> Iterator[Tensor]:
        """What :meth:`spans` does, for whole spans that are decoded while what is ready for them is kept."""
        batch, layout = pages[0].codes.shape[0], self.layout
        tokens = self._token_params(pages) if layout.token_params else None
        corrections = self._corrections(pages, size) if layout.outlier_cap else None
        for start in range(0, len(pages), size):
            codes = torch.stack([page.codes for page in pages[start : start + size]])
            y = self._levels(codes.view(size, batch, -1, PAGE_BLOCKS))
            if tokens is not None:
                scale, zero_point = tokens[..., start * PAGE_TOKENS : (start + size) * PAGE_TOKENS]
                torch.addcmul(zero_point, y, scale, out=y)
            elif not normalized:
                self._scale_channels(y)
            if corrections is not None:
                y.view(-1).index_add_(0, *next(corrections))
            if self.quantizer.spec.channel_normalized:
                self._scale_channels(y)
            yield y.view(batch, layout.heads, layout.head_dim, -1)

    def _scale_channels(self, y: Tensor) -> None:
        """Apply the channels' scales and zero points to ``y [B, C, S]`` in place."""
        y.mul_(self.quantizer.scale[:, None]).add_(self.quantizer.zero_point[:, None])

    @staticmethod
    def _token_params(pages: Sequence[Page]) -> Tensor:
        """Scales and zero points of the tokens, float32 ``[2, B, 1, 256 * n]``."""
        found = torch.cat([page.token_params for page in pages if page.token_params is not None], dim=1)
        out = torch.empty(2, len(found), 1, found.shape[1], device=found.device)
        return out.copy_(found.permute(2, 0, 1)[:, :, None])

    def _corrections(self, pages: Sequence[Page], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For every ``size`` pages, where in ``y [B, C, S]`` their outliers stand, int32, and their residuals, float32."""
        places = size * PAGE_TOKENS
        start = torch.stack([page.outlier_start for page in pages if page.outlier_start is not None])
        index = torch.cat([page.outlier_index for page in pages if page.outlier_index is not None])
        residual = torch.cat([page.outlier_residual for page in pages if page.outlier_residual is not None])
        # A list's entries begin where its block and head do.
        device, stop = start.device, len(pages[0].codes) * self.layout.channels * places
        page = torch.arange(len(pages), dtype=torch.int32, device=device).remainder_(size)
        block = torch.arange(0, PAGE_TOKENS, BLOCK_TOKENS, dtype=torch.int32, device=device)
        head = torch.arange(0, stop, self.layout.head_dim * places, dtype=torch.int32, device=device)
        begin = (page[:, None, None] * PAGE_TOKENS + block[:, None] + head).flatten()
        count = start.to(torch.int32).diff().flatten()
        target = begin.repeat_interleave(count, output_size=len(index))
        index = index.to(torch.int32)
        target.add_(index & ((1 << COORDINATE_BITS) - 1), alpha=places)
        # The sign bit is the token's highest.
        target.add_(index.bitwise_right_shift_(COORDINATE_BITS).bitwise_and_(BLOCK_TOKENS - 1))
        counts = [sum(page.entries for page in pages[at : at + size]) for at in range(0, len(pages), size)]
        return zip(target.split(counts), residual.float().split(counts), strict=True)

    def affine(self, mixed: Tensor, weight: Tensor) -> Tensor:
        """Weighted sums of values from those of normalized values.

        Args:
            mixed: ``[B, H, Q, D]``, sums of what ``read(..., normalized=True)`` returns.
            weight: ``[B, H, Q, 1]``, sums of the weights.
        """
        shape = (self.layout.heads, 1, self.layout.head_dim)
        return mixed * self.quantizer.scale.view(shape) + weight * self.quantizer.zero_point.view(shape)

    def _levels(self, words: Tensor) -> Tensor:
        """Levels of all channels, float32 ``[B, C, 256 * pages]``.

        Args:
            words: codes of the pages, int32 ``[pages, B, W, 8]``.
        """
        y = self._look_up(self._pair_places(words), self._pairs, self._pairs_start) if self._paired else None
        for group, levels, start in self._single:
            codes = unpack_units(self._units(group, words), group.width)
            part = self._look_up(self.quantizer.level_index(codes).flatten(3), levels, start)
            if group.channels is None:
                return part
            if y is None:
                y = torch.empty(part.shape[0], self.layout.channels, part.shape[-1], device=part.device)
            y.index_copy_(1, group.channels, part)
        assert y is not None
        return y

    def _pair_places(self, words: Tensor) -> Tensor:
        """What selects level pairs, integers ``[pages, B, C, 128]``; anything for channels without pairs."""
        parts = [slice_bytes(self._units(group, words), group.width).flatten(3) for group in self._paired]
        data = parts[0] if self._order is None else torch.cat(parts, dim=2).index_select(2, self._order)
        before = self.quantizer.before_pairs(data.unflatten(-1, (PAGE_BLOCKS, -1)))
        if before is None:
            return data
        return before.flatten(-2).to(torch.int16).bitwise_left_shift_(8).bitwise_or_(data)

    @staticmethod
    def _units(group: _Group, words: Tensor) -> Tensor:
        """Words of one width's channels, int32 ``[pages, B, n, 8, width]``."""
        if group.rows is not None:
            words = words.index_select(2, group.rows)
        return words.view(*words.shape[:2], len(group.part), PAGE_BLOCKS, group.width)

    @staticmethod
    def _look_up(data: Tensor, table: Tensor, start: Tensor | None) -> Tensor:
        """Entries of a table, float32 ``[B, n, S]``, by integers ``[pages, B, n, x]`` from each channel's start."""
        data = data.permute(1, 2, 0, 3)
        index = torch.empty(data.shape, dtype=torch.int32, device=data.device)
        if start is None:
            index.copy_(data)
        else:
            torch.add(data, start[..., None], out=index)
        found = table.index_select(0, index.flatten()).view(torch.float32)
        return found.view(*data.shape[:2], -1)


class _Softmax:
    """Online softmax over segments of slots.

    Args:
        request: the queries.
        heads: key-value heads ``H``; ``Hq / H`` queries share one.
    """

    def __init__(self, request: AttentionRequest, heads: int) -> None:
        query = request.query
        batch, query_heads, tokens, size = query.shape
        self.request = request
        self.shape = (batch, heads, query_heads // heads, tokens)
        rows = (batch, heads, query_heads // heads * tokens, 1)
        if request.sinks is None:
            self.highest = torch.full(rows, _FLOOR, device=query.device)
            self.total = torch.zeros(rows, device=query.device)
        else:
            sinks = request.sinks.float().view(1, heads, -1, 1).expand(self.shape)
            self.highest = sinks.reshape(rows).clamp(min=_FLOOR)
            self.total = torch.ones(rows, device=query.device)
        self.mixed = torch.zeros(*rows[:3], size, device=query.device)
        #: A second sum for values that are still to be turned by the value rotation.
        self.mixed_packed = self.mixed
        #: The weights of that sum.
        self.total_packed = self.total

    def split_packed(self) -> None:
        """Keep packed values apart from exact ones from now on."""
        self.mixed_packed = self.mixed.clone()
        self.total_packed = torch.zeros_like(self.total)

    def add(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, packed: bool) -> None:
        """Attend to a segment.

        Args:
            query: float32 ``[B, H, G * T, D]``.
            keys, values: float32 ``[B, H, D, S]``.
            mask: additive, broadcastable to ``[B, Hq, T, S]``; or ``None``.
            packed: which sum the values belong to.
        """
        scores = query @ keys
        if self.request.softcap is not None:
            scores.div_(self.request.softcap).tanh_().mul_(self.request.softcap)
        if mask is not None:
            by_group = scores.view(*self.shape, -1)
            if mask.shape[1] == 1:
                by_group += mask[:, :, None]
            else:
                by_group += mask.view(len(mask), *self.shape[1:3], *mask.shape[2:])
        highest = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(highest).exp_()
        shrink = (self.highest - highest).exp_()
        self.highest = highest
        weight = weights.sum(-1, keepdim=True)
        self.total.mul_(shrink).add_(weight)
        self.mixed.mul_(shrink)
        if self.mixed_packed is not self.mixed:
            self.mixed_packed.mul_(shrink)
            self.total_packed.mul_(shrink)
            if packed:
                self.total_packed.add_(weight)
        (self.mixed_packed if packed else self.mixed).add_(weights @ values.mT)

    def result(self, finish: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mixed values, ``[B, T, Hq, D]`` in the dtype of the query; zero where nothing was visible.

        Args:
            finish: what makes values of the packed sum and its weights, where it was kept apart.
        """
        mixed = self.mixed
        if self.mixed_packed is not mixed:
            mixed = mixed + finish(self.mixed_packed, self.total_packed)
        mixed = mixed / self.total.clamp(min=torch.finfo(torch.float32).tiny)
        return mixed.view(*self.shape, -1).flatten(1, 2).transpose(1, 2).to(self.request.query.dtype)


@dataclass(frozen=True)
class _Span:
    """Slots of a run of packed places.

    Attributes:
        low, high: the run is slots ``low`` to ``high - 1``.
        slots: int64 ``[S]``, the slot of every place, -1 for a hole; ``None`` where there are no holes.
    """

    low: int
    high: int
    slots: Tensor | None

    def positions(self, table: SlotTable) -> Tensor:
        """RoPE positions, int32 ``[B, S]``."""
        positions = table.positions(self.low, self.high)
        return positions if self.slots is None else positions[:, (self.slots - self.low).clamp(min=0)]


class ReferenceOps:
    """Packing and attention for one layer, in torch on any device.

    A faster implementation overrides :meth:`append` or :meth:`attend` and keeps the storage.

    Args:
        key, value: quantizers of the layer, on the device of the model.
    """

    #: Name of the path, as ``KVQCache.backend`` reports it.
    name = "reference"

    def __init__(self, key: Quantizer, value: Quantizer) -> None:
        self.key = key
        self.value = value
        self.geometry = key.geometry
        self.device = key.params.bits.device
        self.rope: RopeTable | None = None
        if key.rope is not None and key.spec.pre_rope:
            self.rope = RopeTable(key.rope, self.device)

    @cached_property
    def readers(self) -> tuple[PageReader, PageReader]:
        """Decoders of keys and values."""
        return PageReader(self.key), PageReader(self.value)

    def tables(self) -> list[Tensor]:
        """Tensors held besides the artifact's parameters, for the accounting of memory."""
        found = [tensor for reader in self.readers for tensor in reader.tensors()]
        for quantizer in (self.key, self.value):
            for _, channels, rows in quantizer.layout.groups(torch.device("cpu")):
                found += [channels, rows]
        return found + (self.rope.tensors() if self.rope is not None else [])

    def append(self, storage: LayerStorage, keys: Tensor, values: Tensor, table: SlotTable) -> None:
        """Store ``[B, H, T, D]`` keys (un-rotated where the spec says so) and values of the newest slots."""
        storage.append(keys, values, table)

    def attend(self, request: AttentionRequest, storage: LayerStorage, table: SlotTable) -> Tensor:
        """Attend to everything stored: ``[B, T, Hq, D]`` in the dtype of the query."""
        exact_query, packed_query = self._queries(request)
        softmax = _Softmax(request, self.geometry.num_kv_heads)
        if self.value.params.rotation is not None or self.readers[1].separable:
            softmax.split_packed()
        for span, keys, values in self._segments(request, storage, table):
            if self.rope is not None:
                self.rope.rotate_(keys, *self._angles(span, table))
            mask = self._packed_mask(request.visibility, span, table)
            softmax.add(packed_query, keys, values, mask, packed=True)
        keys, values, positions, mask = self._exact(request.visibility, storage, table)
        if keys.shape[-1]:
            if self.rope is not None:
                self.rope.rotate_(keys, *self.rope.cos_sin(positions))
            softmax.add(exact_query, keys, values, mask, packed=False)
        return softmax.result(self._finish)

    def _finish(self, mixed: Tensor, weight: Tensor) -> Tensor:
        """What is left to do with the sum of packed values ``[B, H, Q, D]``, given that of the weights."""
        reader, rotation = self.readers[1], self.value.params.rotation
        if reader.separable:
            mixed = reader.affine(mixed, weight)
        return mixed if rotation is None else mixed @ rotation.mT

    def _angles(self, span: _Span, table: SlotTable) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a run of packed places; layers with the same embedding share them."""
        assert self.rope is not None
        # Holes are the same for all layers, so the ends say which places are meant.
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
        query = query.reshape(query.shape[0], self.geometry.num_kv_heads, -1, query.shape[-1])
        if self.rope is None:
            return query, query
        query = self.rope.scale_(query.mT).mT
        phase = self.key.params.phase
        if phase is None:
            return query, query
        angle = phase.float()[..., None]
        turned = self.rope.rotate_(query.mT.clone(), angle.cos(), angle.sin())
        return query, turned.mT

    def _segments(
        self, request: AttentionRequest, storage: LayerStorage, table: SlotTable
    ) -> Iterator[tuple[_Span, Tensor, Tensor]]:
        """Visible pages, a few at a time, with keys and values ``[B, H, D, S]``."""
        key, value = storage.key, storage.value
        batch, query_heads, tokens, _ = request.query.shape
        group = min(
            WORK_ELEMENTS // (PAGE_TOKENS * batch * self.geometry.channels),
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
        """What hides slots of a packed segment: mask, holes, and sinks, which are attended exactly."""
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
            mask = _additive(~sink) if mask is None else mask.masked_fill(sink, -torch.inf)
        return mask

    def _exact(
        self, visibility: Visibility, storage: LayerStorage, table: SlotTable
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Sinks whose slots are packed, then the tail: keys, values ``[B, H, D, S]``, positions, mask."""
        start = table.packed_slots
        keys, values = storage.tail_key.mT.float(), storage.tail_value.mT.float()
        positions = table.positions(start, table.length)
        first, stop = table.sink_range
        if first >= min(stop, start):
            if visibility.sees_all(start, table.length):
                return keys, values, positions, None
            slots = torch.arange(start, table.length, device=self.device)
            return keys, values, positions, visibility.additive(slots)
        sinks = table.sink_slots.to(torch.int64)
        keys = torch.cat((storage.sink_key.mT.float(), keys), dim=-1)
        values = torch.cat((storage.sink_value.mT.float(), values), dim=-1)
        of_sinks = table.positions(first, stop).gather(1, (sinks - first).clamp(min=0))
        positions = torch.cat((of_sinks, positions), dim=1)
        if stop <= start and not table.missing_sinks and visibility.sees_all(first, table.length):
            return keys, values, positions, None
        sinks = sinks.masked_fill(sinks >= start, -1)  # those are in the tail
        tail = torch.arange(start, table.length, device=self.device)
        slots = torch.cat((sinks, tail.expand(len(sinks), -1)), dim=1)
        return keys, values, positions, visibility.additive(slots)
