"""The trellis encoder, called: everything is checked before a pointer is passed."""

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

#: Beyond this a squared error could overflow for some levels of a channel and not for others.
_LARGEST_LEVEL = 2.0**39
_MOST_LEVELS = 256


@dataclass(frozen=True, eq=False)
class TrellisTables:
    """What the encoder reads of a quantizer; tensors on the CPU, ``C = H D`` channels.

    Attributes:
        heads, size: ``H`` and ``D``.
        states: of the trellis, 4 or 1.
        level_count: int32 ``[C]``, levels of each channel, a power of two: 1 for width 0.
        levels: float32 ``[C, L]``, of which the first ``level_count`` are used.
        shares, refinement_shares: float32 ``[H, D, D]``, of error compensation.
        refinement_passes: how often coordinates are coded again.
        size_edges: float32 ``[H, K - 1]``, ascending: between the classes of tokens' sizes.
        class_weight: float32 ``[H, K]``, the weight of a token by its class.
        feedback: float32 ``[H]``, what of a token's rounding error the next one takes up.
        pair: int32 ``[P, 2]``, the coordinates of each RoPE pair that is turned.
        cosine, sine: float32 ``[H, P]``, of the angles.
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
        """Refuse what no quantizer has.

        Raises:
            ValueError: a tensor of another dtype, shape or place, or counts that do not fit.
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
        """Whether the encoder's codes are torch's: levels sorted and of a size whose squares overflow together, weights
        that are numbers."""
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
        """Everything held but the matrices of error compensation, which others hold too."""
        some = (self.size_edges, self.class_weight, self.feedback, self.pair, self.cosine, self.sine)
        return [self.level_count, self.levels, *(tensor for tensor in some if tensor is not None)]

    def described(self, compensated: bool, by_size: bool, turns: bool) -> KvqTrellis:
        """The same in C: with error compensation or without, with weights by the size of a token or without, and with
        pairs that are still to be turned or without."""
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
    """What the encoder found.

    Attributes:
        codes: uint8 ``[B, T, C]``.
        coded: float32 ``[B, T, C]``, what was coded in the last pass; with error compensation.
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
    """Codes of keys or values, those that torch finds; on as many threads as torch uses.

    Args:
        library: that computes.
        tables: of the quantizer.
        x: float32 on the CPU, tokens in blocks of 32 from the first on: ``[B, H, T, D]`` as models have them, or
            ``[B, T, C]`` with pairs turned already.
        weight: of the tokens' errors, float32 ``[B, T, H]``, not negative; with ``None`` all count alike.
        compensated: with error compensation, where the quantizer has it.
        by_size: weights are those of the classes of the tokens' sizes, not ``weight``.

    Returns:
        ``None`` where torch must compute: gradients are wanted, levels are beyond what the encoder knows, or something
        met on the way is no number.

    Raises:
        ValueError: tensors of the wrong dtype, shape or device.
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
