"""What of a quantizer the kernels read, in the order in which they read it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.scalar import ScalarQuantizer
from kvq_calib.codec.thresholds import reciprocal
from kvq_calib.codec.token_weighting import size_edges
from kvq_calib.codec.trellis import TrellisQuantizer, nearest_boundaries
from kvq_calib.schema.spec import Kind

__all__ = ["CODECS", "MAX_HEAD_DIM", "KernelTables", "unsupported"]

MAX_HEAD_DIM = 256
#: Codecs that the kernels know.
CODECS = (ScalarQuantizer.codec, TrellisQuantizer.codec)


class KernelTables:
    """One quantizer's numbers as the kernels read them; made once.

    Args:
        quantizer: keys or values of a layer, on the device of the cache.
        kind: which.

    Attributes:
        heads, head_dim: shape of a token; ``words`` code words of a sequence in a page.
        bits, word_offset: uint8 and int32 ``[C]``.
        levels, boundaries: float32 ``[C or 1, L]`` and ``[C or 1, L - 1]``, with a trellis ``[C or 1, L - 4]``: between
            neighbours in a subset. ``level_stride`` is 0 where all channels share the row.
        scale, zero_point, reciprocal: float32 ``[C]`` or ``None``.
        compensation: float32 ``[H, D, D]``, shares of the errors of the coordinates before; or ``None``.
        refinement: the same of all others, for ``refinements`` further passes; or ``None``.
        token_weight, weight_edges: float32 ``[H, 32]`` and ``[H, 31]``, or ``None``.
        token: thresholds are a token's, leaving out ``per_side`` elements at each end.
        cap: most outliers of a token.
    """

    def __init__(self, quantizer: Quantizer, kind: Kind) -> None:
        layout = quantizer.layout
        self.quantizer, self.kind = quantizer, kind
        self.device = quantizer.device
        self.heads, self.head_dim = layout.heads, layout.head_dim
        self.words = PAGE_BLOCKS * layout.words_per_block
        self.token = layout.token_params
        self.trellis = quantizer.codes_in_blocks
        self.channel_normalized = quantizer.channel_normalised
        self.cap = quantizer.outlier_cap
        self.per_side = 0
        if isinstance(quantizer, ScalarQuantizer):
            self.per_side = quantizer.spec.outliers.per_side(layout.channels)
        self.storage = quantizer.storage
        self.storage_bfloat = quantizer.storage == torch.bfloat16
        self.rope = quantizer.read_rope if kind == "key" else None
        self.bits = self._tensor(layout.widths, torch.uint8)
        self.word_offset = torch.tensor(layout.word_offsets, dtype=torch.int32, device=self.device)
        shared = quantizer.shared_levels is not None
        rows = slice(0, 1) if shared else slice(None)
        self.levels = quantizer.levels[rows].contiguous()
        if self.trellis:
            self.boundaries = ((self.levels[:, :-4] + self.levels[:, 4:]) * 0.5).contiguous()
        else:
            self.boundaries = nearest_boundaries(self.levels, self.bits[rows]).contiguous()
        self.level_stride = 0 if shared else 1
        self.scale: Tensor | None = None
        self.zero_point: Tensor | None = None
        self.reciprocal: Tensor | None = None
        if quantizer.has_channel_thresholds:
            self.scale, self.zero_point = quantizer.scale.contiguous(), quantizer.zero_point.contiguous()
            self.reciprocal = reciprocal(self.scale)
        elif not self.token:  # levels that stand for themselves
            self.scale = self.reciprocal = torch.ones(layout.channels, device=self.device)
            self.zero_point = torch.zeros(layout.channels, device=self.device)
        self.refinements = 0
        self.compensation: Tensor | None = None
        self.refinement: Tensor | None = None
        self.token_weight: Tensor | None = None
        self.weight_edges: Tensor | None = None
        if isinstance(quantizer, TrellisQuantizer):
            self._set_encoder(quantizer)

    def _set_encoder(self, quantizer: TrellisQuantizer) -> None:
        """What only the encoder of the trellis codec reads."""
        made, params = quantizer.compensation, quantizer.params
        if made is not None:
            self.compensation, self.refinements = made.shares.contiguous(), made.refinement_passes
            self.refinement = None if made.refinement_shares is None else made.refinement_shares.contiguous()
        if params.token_weight is not None and params.token_size_unit is not None:
            self.token_weight = params.token_weight.float().contiguous()
            self.weight_edges = size_edges(params.token_size_unit).contiguous()

    def _tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    @cached_property
    def rope_pairs(self) -> tuple[list[tuple[int, int]], list[float]]:
        """All coordinates of a head in pairs, with radians per token: RoPE's pairs, then the others at 0."""
        rope = self.rope
        pairs = [] if rope is None else [(int(a), int(b)) for a, b in rope.pairs]
        frequencies = [] if rope is None else list(rope.inv_freq)
        taken = {coordinate for pair in pairs for coordinate in pair}
        rest = [coordinate for coordinate in range(self.head_dim) if coordinate not in taken]
        pairs += [(rest[i], rest[i + 1]) for i in range(0, len(rest) - 1, 2)]
        return pairs, frequencies + [0.0] * (len(pairs) - len(frequencies))

    @cached_property
    def pairs(self) -> Tensor:
        """int32 ``[D / 2]``: the coordinates of each pair, ``first | second << 16``."""
        return self._tensor([first | second << 16 for first, second in self.rope_pairs[0]])

    @cached_property
    def frequencies(self) -> Tensor:
        """int32 ``[D / 2]``: turns per token of each pair, in 2^-32."""
        return _turns(self._tensor(self.rope_pairs[1], torch.float64))

    @property
    def rope_scaling(self) -> float:
        """The factor on pairs that turn with the position."""
        return 1.0 if self.rope is None else self.rope.attention_scaling

    @cached_property
    def turns(self) -> bool:
        """Whether any pair turns with the position."""
        return any(self.rope_pairs[1])

    @cached_property
    def angles(self) -> Tensor:
        """int32 ``[H, D / 2, 2]``: turns per token, and at position 0, which undo the rotation of the pair."""
        start = torch.zeros(self.heads, self.head_dim // 2, dtype=torch.float64, device=self.device)
        angle = self.quantizer.pair_angle
        if angle is not None:
            start[:, : angle.shape[1]] = -angle.double()
        return torch.stack((self.frequencies.expand(self.heads, -1), _turns(start)), dim=-1).contiguous()

    @cached_property
    def pair_rotation(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Cosines and sines ``[H, P]``, and per coordinate its partner and pair; then ``P``."""
        angle = self.quantizer.pair_angle
        if angle is None:
            return None
        place = [-1] * self.head_dim
        for number, (first, second) in enumerate(self.rope_pairs[0][: angle.shape[1]]):
            place[first] = second | number << 16
            place[second] = first | number << 16 | 1 << 15
        return angle.cos().contiguous(), angle.sin().contiguous(), self._tensor([*place, angle.shape[1]])

    # Tables of the decode kernel.

    @cached_property
    def uniform_bits(self) -> int:
        """The width of every channel, or 0: each has its own, or all need a wide table."""
        widths = set(self.quantizer.layout.widths)
        return widths.pop() if len(widths) == 1 and max(widths) <= 4 and min(widths) > 0 else 0

    @cached_property
    def entries(self) -> int:
        """Levels in a row of the decode kernel's table: what byte permutes serve, or all."""
        return max(8, self.quantizer.level_count(max(self.quantizer.layout.widths)))

    @cached_property
    def order(self) -> Tensor:
        """int64 ``[H, D]``: coordinates as the decode kernel takes them.

        Keys by RoPE pairs, first and second. Channels of like widths stand side by side.
        """
        widths = self.bits.view(self.heads, self.head_dim).tolist()
        orders = []
        for head in range(self.heads):
            if self.kind == "key":
                numbers = sorted(
                    range(self.head_dim // 2),
                    key=lambda pair: tuple(
                        widths[head][coordinate] for coordinate in self.rope_pairs[0][pair]
                    ),
                )
                orders.append([coordinate for pair in numbers for coordinate in self.rope_pairs[0][pair]])
            else:
                orders.append(sorted(range(self.head_dim), key=lambda coordinate: widths[head][coordinate]))
        return self._tensor(orders, torch.int64)

    @cached_property
    def _pair_order(self) -> Tensor:
        """int64 ``[H, D / 2]``: pairs in the order of :attr:`order`."""
        number = torch.empty(self.head_dim, dtype=torch.int64, device=self.device)
        for index, pair in enumerate(self.rope_pairs[0]):
            number[list(pair)] = index
        return number[self.order[:, ::2]]

    @cached_property
    def channels(self) -> Tensor:
        """int32 ``[H, D, 2]``: word offset, and ``coordinate | bits << 16``, in :attr:`order`."""
        channel = self.order + self.head_dim * torch.arange(self.heads, device=self.device)[:, None]
        packed = self.order | self.bits[channel].to(torch.int64) << 16
        return torch.stack((self.word_offset[channel], packed.to(torch.int32)), dim=-1).contiguous()

    @cached_property
    def ordered_angles(self) -> Tensor:
        """:attr:`angles` in :attr:`order`."""
        return self.angles.gather(1, self._pair_order[..., None].expand(-1, -1, 2)).contiguous()

    @cached_property
    def _ordered_levels(self) -> Tensor:
        """What a code stands for before token scales, float32 ``[H, D, L]`` in :attr:`order`."""
        channels = self.heads * self.head_dim
        values = self.levels.expand(channels, -1)
        if not self.token:
            assert self.scale is not None
            assert self.zero_point is not None
            values = self.zero_point[:, None] + self.scale[:, None] * values
        by_head = values.reshape(self.heads, self.head_dim, -1)
        return by_head.gather(1, self.order[..., None].expand(-1, -1, by_head.shape[-1]))

    @cached_property
    def largest_level(self) -> float:
        """Of :attr:`_ordered_levels`, in magnitude; reads the device once."""
        return float(self._ordered_levels.abs().max())

    @cached_property
    def _pair_norm(self) -> Tensor:
        """float32 ``[H, D / 2]``: the largest level of a pair, which leaves its table in [-1, 1]."""
        norm = self._ordered_levels.abs().amax(-1).unflatten(-1, (-1, 2)).amax(-1)
        return torch.where(norm > 0, norm, 1.0)

    @cached_property
    def pair_scale(self) -> Tensor:
        """float32 ``[H, D / 2, 2]``: what a query is multiplied by for a pair; its levels' reciprocal factor."""
        turned = self.ordered_angles[..., 0] != 0
        factor = self._pair_norm * torch.where(turned, self.rope_scaling, 1.0)
        return torch.stack((factor, 1.0 / self._pair_norm), dim=-1).contiguous()

    @cached_property
    def level_table(self) -> Tensor:
        """The decode kernel's levels, uint8 ``[H, D, 2 * entries]``; keys divided by their pair's norm."""
        levels = self._ordered_levels
        if self.kind == "key":
            levels = levels / self._pair_norm.repeat_interleave(2, dim=-1)[..., None]
        return _planes(levels.to(torch.float16), self.entries)

    @cached_property
    def affine(self) -> Tensor:
        """float32 ``[H, D, 2]``: factor and offset of the mixed output's channels."""
        channels = self.heads * self.head_dim
        pair = torch.stack((torch.ones(channels), torch.zeros(channels)), dim=-1).to(self.device)
        if self.channel_normalized:
            assert self.scale is not None
            assert self.zero_point is not None
            pair = torch.stack((self.scale, self.zero_point), dim=-1)
        return pair.view(self.heads, self.head_dim, 2).contiguous()

    def tensors(self) -> list[Tensor]:
        """Everything held beside the quantizer's parameters."""
        held = [value for value in vars(self).values() if isinstance(value, Tensor)]
        own = {tensor.data_ptr() for tensor in self.quantizer.params.tensors().values()}
        return [tensor for tensor in held if tensor.data_ptr() not in own]


def unsupported(key: KernelTables, value: KernelTables) -> str:
    """Why there is no decode kernel for a layer, or an empty string."""
    if key.head_dim % 16 or key.head_dim > MAX_HEAD_DIM:
        return f"heads of {key.head_dim} channels have no kernel; multiples of 16 up to {MAX_HEAD_DIM} do"
    if key.token:
        return "keys with a scale per token have no kernel"
    if value.largest_level > torch.finfo(torch.float16).max:
        return "value thresholds beyond float16 have no kernel"
    return ""


def _turns(radians: Tensor) -> Tensor:
    """Angles as 32-bit fractions of a turn: float64 radians to int32 of the same shape."""
    units = torch.round(radians.double() / (2 * math.pi) * 2.0**32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(units >= 1 << 31, units - (1 << 32), units).to(torch.int32)


def _planes(levels: Tensor, entries: int) -> Tensor:
    """Halves ``[..., L]`` as the table the kernel reads, bytes ``[..., 2 * entries]``.

    Up to 32 entries the low bytes of all, then the high bytes; more stand as they are.
    """
    padded = torch.zeros(*levels.shape[:-1], entries, dtype=torch.float16, device=levels.device)
    width = min(entries, levels.shape[-1])
    padded[..., :width] = levels[..., :width]
    pairs: Tensor = padded.view(torch.uint8).unflatten(-1, (entries, 2))
    return (pairs.mT if entries <= 32 else pairs).flatten(-2).contiguous()
