"""Tables of a quantizer for the kernels, in the order in which they read them."""

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
from kvq_calib.schema.geometry import channel_pairs
from kvq_calib.schema.spec import Kind

__all__ = ["CODECS", "QuantizerTables"]

#: Codecs that the kernels support.
CODECS = (ScalarQuantizer.codec, TrellisQuantizer.codec)


class QuantizerTables:
    """The tables of one quantizer. They are made once.

    Args:
        quantizer: quantizer of the keys or values of a layer, on the device of the cache.
        kind: whether it quantizes keys or values.

    Attributes:
        heads, head_dim: shape of a token.
        words: number of code words of a sequence in a page.
        bits, word_offset: uint8 and int32 ``[C]``.
        levels, boundaries: float32 ``[L]`` and ``[L - 1]`` if all channels share their levels; or ``None``.
        coefficients: coefficients of computed levels, float32 ``[C, 6]``; or ``None``.
        scale, zero_point, reciprocal: float32 ``[C]``, or ``None``.
        compensation: weights of the errors of earlier coordinates, float32 ``[H, D, D]``; or ``None``.
        refinement: weights of the errors of all others, in ``refinements`` refinement passes; or ``None``.
        token_weight, weight_edges: float32 ``[H, 32]`` and ``[H, 31]``, or ``None``.
        feedback: factor of noise shaping, float32 ``[H]``; or ``None``.
        token: whether each token has thresholds, for which ``per_side`` elements at each end are trimmed.
        cap: largest number of outliers of a token.
    """

    def __init__(self, quantizer: Quantizer, kind: Kind) -> None:
        layout = quantizer.layout
        self.quantizer, self.kind = quantizer, kind
        self.device = quantizer.device
        self.heads, self.head_dim = layout.heads, layout.head_dim
        self.words = PAGE_BLOCKS * layout.words_per_block
        self.token = layout.token_params
        self.paths = quantizer.codes_in_blocks
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
        self.scale: Tensor | None = None
        self.zero_point: Tensor | None = None
        self.reciprocal: Tensor | None = None
        if quantizer.has_channel_thresholds:
            self.scale, self.zero_point = quantizer.scale.contiguous(), quantizer.zero_point.contiguous()
            self.reciprocal = reciprocal(self.scale)
        self.levels: Tensor | None = None
        self.boundaries: Tensor | None = None
        if quantizer.shared_levels is not None:
            self.levels = quantizer.shared_levels.float().contiguous()
            self.boundaries = nearest_boundaries(self.levels[None], self.bits[:1])[0].contiguous()
        self.coefficients: Tensor | None = None
        self.refinements = 0
        self.compensation: Tensor | None = None
        self.refinement: Tensor | None = None
        self.token_weight: Tensor | None = None
        self.weight_edges: Tensor | None = None
        self.feedback: Tensor | None = None
        if isinstance(quantizer, TrellisQuantizer):
            self._set_trellis(quantizer)

    def _set_trellis(self, quantizer: TrellisQuantizer) -> None:
        """Set the tables of the trellis codec."""
        made, params = quantizer.compensation, quantizer.params
        self.coefficients = quantizer.coefficients.contiguous()
        if made is not None:
            self.compensation, self.refinements = made.shares.contiguous(), made.refinement_passes
            self.refinement = None if made.refinement_shares is None else made.refinement_shares.contiguous()
        if params.token_weight is not None and params.token_size_unit is not None:
            self.token_weight = params.token_weight.float().contiguous()
            self.weight_edges = size_edges(params.token_size_unit).contiguous()
        if params.error_feedback is not None:
            self.feedback = params.error_feedback.float().contiguous()

    def _tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    @cached_property
    def rope_pairs(self) -> tuple[list[tuple[int, int]], list[float]]:
        """All coordinates of a head in pairs, and their radians per token. RoPE's pairs come first; others have 0."""
        pairs = channel_pairs(self.rope, self.head_dim)
        frequencies = [] if self.rope is None else list(self.rope.inv_freq)
        return pairs, frequencies + [0.0] * (len(pairs) - len(frequencies))

    @cached_property
    def pairs(self) -> Tensor:
        """int32 ``[D / 2]``: the coordinates of each pair, ``first | second << 16``."""
        return self._tensor([first | second << 16 for first, second in self.rope_pairs[0]])

    @cached_property
    def frequencies(self) -> Tensor:
        """int32 ``[D / 2]``: turns per token of each pair, in units of 2^-32."""
        return turns(self._tensor(self.rope_pairs[1], torch.float64))

    @property
    def rope_scaling(self) -> float:
        """The factor of pairs that are rotated by position."""
        return 1.0 if self.rope is None else self.rope.attention_scaling

    @cached_property
    def rotates(self) -> bool:
        """Whether any pair is rotated by position."""
        return any(self.rope_pairs[1])

    @cached_property
    def angles(self) -> Tensor:
        """int32 ``[H, D / 2, 2]``: turns per token, and the turn at position 0, which undoes pair rotation."""
        start = torch.zeros(self.heads, self.head_dim // 2, dtype=torch.float64, device=self.device)
        angle = self.quantizer.pair_angle
        if angle is not None:
            start[:, : angle.shape[1]] = -angle.double()
        return torch.stack((self.frequencies.expand(self.heads, -1), turns(start)), dim=-1).contiguous()

    @cached_property
    def pair_rotation(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Cosines and sines ``[H, P]``; then int32 ``[D + 1]``, the partner and pair of each coordinate, and ``P``."""
        angle = self.quantizer.pair_angle
        if angle is None:
            return None
        place = [-1] * self.head_dim
        for number, (first, second) in enumerate(self.rope_pairs[0][: angle.shape[1]]):
            place[first] = second | number << 16
            place[second] = first | number << 16 | 1 << 15
        return angle.cos().contiguous(), angle.sin().contiguous(), self._tensor([*place, angle.shape[1]])

    def tensors(self) -> list[Tensor]:
        """All tensors besides the quantizer's parameters."""
        held = [value for value in vars(self).values() if isinstance(value, Tensor)]
        own = {tensor.data_ptr() for tensor in self.quantizer.params.tensors().values()}
        return [tensor for tensor in held if tensor.data_ptr() not in own]


def turns(radians: Tensor) -> Tensor:
    """Convert angles, float64 in radians, to 32-bit fractions of a turn, int32 of the same shape."""
    units = torch.round(radians.double() / (2 * math.pi) * 2.0**32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(units >= 1 << 31, units - (1 << 32), units).to(torch.int32)
