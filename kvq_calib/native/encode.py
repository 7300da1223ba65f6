"""Calls of the trellis encoder. Everything is checked before a pointer is passed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvq_calib.native.checks import are_numbers, check, pointer
from kvq_calib.native.loader import KvqTrellis, Library

__all__ = ["Encoded", "TrellisTables", "encode_trellis"]

#: Largest level. Beyond it, a squared error could overflow for only some levels of a channel.
_LARGEST_LEVEL = 2.0**39
_MOST_LEVELS = 256


@dataclass(frozen=True, eq=False)
class TrellisTables:
    """What the encoder needs of a quantizer: tensors on the CPU, with ``C = H D`` channels.

    Attributes:
        heads, size: ``H`` and ``D``.
        states: number of states of the trellis, 4 or 1.
        level_count: int32 ``[C]``, number of levels of each channel, a power of two; 1 for width 0.
        levels: float32 ``[C, L]``; the first ``level_count`` are used.
        shares, refinement_shares: matrices of error compensation, float32 ``[H, D, D]``.
        refinement_passes: number of refinement passes.
        size_edges: edges between size classes of tokens, float32 ``[H, K - 1]``, ascending.
        class_weight: weight of a token by its size class, float32 ``[H, K]``.
        feedback: share of a token's rounding error that the next one adds, float32 ``[H]``.
        pair: int32 ``[P, 2]``, the coordinates of each rotated RoPE pair.
        cosine, sine: cosines and sines of the pairs' angles, float32 ``[H, P]``.
    """

    heads: int
    size: int
    states: int
    level_count: Tensor
    levels: Tensor
    shares: Tensor | None = None
    refinement_shares: Tensor | None = None
    refinement_passes: int = 0
    size_edges: Tensor | None = None
    class_weight: Tensor | None = None
    feedback: Tensor | None = None
    pair: Tensor | None = None
    cosine: Tensor | None = None
    sine: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a tensor has a wrong dtype, shape or device, or counts do not fit.
        """
        heads, size, channels = self.heads, self.size, self.heads * self.size
        check("level_count", self.level_count, torch.int32, (channels,))
        if self.levels.ndim != 2:
            raise ValueError(f"levels: has {self.levels.ndim} dimensions")
        check("levels", self.levels, torch.float32, (channels, self.levels.shape[1]))
        for name in ("shares", "refinement_shares"):
            if (matrix := getattr(self, name)) is not None:
                check(name, matrix, torch.float32, (heads, size, size))
        classes = 0 if self.class_weight is None else self.class_weight.shape[-1]
        if self.class_weight is not None and self.size_edges is not None:
            check("class_weight", self.class_weight, torch.float32, (heads, classes))
            check("size_edges", self.size_edges, torch.float32, (heads, classes - 1))
        elif self.class_weight is not None or self.size_edges is not None:
            raise ValueError("size_edges: needed with class_weight, and only then")
        if self.feedback is not None:
            check("feedback", self.feedback, torch.float32, (heads,))
            if self.states == 1 or self.shares is not None:
                raise ValueError("feedback: needs four states, and no error compensation")
        if self.pair is not None and self.cosine is not None and self.sine is not None:
            check("pair", self.pair, torch.int32, (len(self.pair), 2))
            if sorted(set(places := self.pair.flatten().tolist())) != sorted(places) or (
                places and not 0 <= min(places) <= max(places) < size
            ):
                raise ValueError(f"pair: names coordinates that a head of {size} does not have, or one twice")
            for name in ("cosine", "sine"):
                check(name, getattr(self, name), torch.float32, (heads, len(self.pair)))
        elif not self.pair is self.cosine is self.sine is None:
            raise ValueError("pair: needed with cosine and sine, and only then")
        if self.refinement_passes and (self.shares is None or self.refinement_shares is None):
            raise ValueError("refinement_shares: needed for refinement passes")
        if self.states not in (1, 4):
            raise ValueError(f"states: {self.states}")
        counts = set(self.level_count.unique().tolist())
        allowed = {1} | {1 << width for width in range(1 if self.states == 1 else 2, 9)}
        if not counts <= allowed or max(counts) > min(self.levels.shape[1], _MOST_LEVELS):
            raise ValueError(f"level_count: {sorted(counts)} for {self.levels.shape[1]} levels")

    @cached_property
    def is_exact(self) -> bool:
        """Whether the encoder finds the same codes as torch: levels sorted and not too large, weights finite."""
        place = torch.arange(self.levels.shape[1])
        last = self.level_count[:, None].to(torch.int64) - 1
        levels = self.levels.gather(1, torch.minimum(place, last))
        sound = bool((levels.abs() < _LARGEST_LEVEL).all()) and bool((levels.diff(dim=1) >= 0).all())
        if self.class_weight is not None and self.size_edges is not None:
            weight = self.class_weight
            sound &= bool((weight >= 0).all()) and bool(torch.isfinite(weight).all())
            sound &= bool((self.size_edges.diff(dim=1) >= 0).all())
        if self.feedback is not None:
            sound &= bool((self.feedback.abs() < 1).all())
        return sound

    def tensors(self) -> list[Tensor]:
        """All tensors except the matrices of error compensation, which are shared."""
        some = (self.size_edges, self.class_weight, self.feedback, self.pair, self.cosine, self.sine)
        return [self.level_count, self.levels, *(tensor for tensor in some if tensor is not None)]

    def described(self, compensated: bool, by_size: bool, turns: bool) -> KvqTrellis:
        """The C structure, each with or without: error compensation, token weighting, pairs yet to be rotated."""
        numbers = {
            "heads": self.heads,
            "head_dim": self.size,
            "states": self.states,
            "level_stride": self.levels.shape[1],
        }
        read = {"level_count": self.level_count, "levels": self.levels}
        if self.feedback is not None:
            read["feedback"] = self.feedback
        if compensated:
            numbers["refinement_passes"] = self.refinement_passes
            if self.shares is not None:
                read["shares"] = self.shares
            if self.refinement_shares is not None:
                read["refinement_shares"] = self.refinement_shares
        if by_size and self.class_weight is not None and self.size_edges is not None:
            read |= {"class_weight": self.class_weight, "size_edges": self.size_edges}
            numbers["size_classes"] = self.class_weight.shape[1]
        if turns and self.pair is not None and self.cosine is not None and self.sine is not None:
            read |= {"pair": self.pair, "cosine": self.cosine, "sine": self.sine}
            numbers["pairs"] = len(self.pair)
        return KvqTrellis(**numbers, **{name: tensor.data_ptr() for name, tensor in read.items()})


class Encoded(NamedTuple):
    """Result of the encoder.

    Attributes:
        codes: uint8 ``[B, T, C]``.
        coded: float32 ``[B, T, C]``, the numbers that the last pass coded; with error compensation.
    """

    codes: Tensor
    coded: Tensor | None


def encode_trellis(
    library: Library,
    tables: TrellisTables,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    compensated: bool = True,
    by_size: bool = False,
) -> Encoded | None:
    """Code keys or values, with the same result as torch, on as many threads as torch uses.

    Args:
        library: the library to call.
        tables: tables of the quantizer.
        x: float32 on the CPU, in blocks of 32 tokens starting with the first: ``[B, H, T, D]`` as models have them, or
            ``[B, T, C]`` with pairs already rotated.
        weight: weights of the tokens' errors, float32 ``[B, T, H]``, not negative; ``None`` for equal weights.
        compensated: whether to use the quantizer's error compensation, if it has any.
        by_size: whether to use the weights of the tokens' size classes, instead of ``weight``.

    Returns:
        ``None`` if torch must compute: gradients are needed, levels are too large, or some number is not finite.

    Raises:
        ValueError: a tensor has a wrong dtype, shape or device.
    """
    if not tables.is_exact or _wants_gradient(x, weight):
        return None
    by_head = x.ndim == 4
    if x.ndim != 3 and not by_head:
        raise ValueError(f"x: has {x.ndim} dimensions")
    if x.stride(-1) != 1 or not by_head:
        x = x.contiguous()
    batch, tokens = x.shape[0], x.shape[-2]
    rest = (tables.heads, tokens, tables.size) if by_head else (tokens, tables.heads * tables.size)
    check("x", x, torch.float32, (batch, *rest), contiguous=False)
    if weight is not None:
        weight = weight.contiguous()
        check("weight", weight, torch.float32, (batch, tokens, tables.heads))
    if by_size and (weight is not None or tables.class_weight is None):
        raise ValueError("by_size: needs classes of sizes, and no weights")
    codes = torch.empty((batch, tokens, tables.heads * tables.size), dtype=torch.uint8)
    coded = torch.empty(codes.shape) if tables.shares is not None and compensated else None
    strides = (x.stride(0), x.stride(2), x.stride(1)) if by_head else (x.stride(0), x.stride(1), tables.size)
    status = library.functions.kvq_encode_trellis(
        ctypes.byref(tables.described(compensated, by_size, by_head)),
        *(x.data_ptr(), (ctypes.c_int64 * 3)(*strides), pointer(weight)),
        *(batch, tokens, torch.get_num_threads()),
        *(codes.data_ptr(), pointer(coded)),
    )
    return Encoded(codes, coded) if are_numbers(status) else None


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
