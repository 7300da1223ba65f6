"""A rotary embedding as tensors, for keys that are stored un-rotated and turned on every read."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.schema.geometry import RopeSpec

__all__ = ["RopeTable", "pair_rotation", "rope_of"]


def rope_of(key: Quantizer) -> RopeSpec | None:
    """The rotary embedding that readers apply to keys; ``None`` where keys are stored as attention uses them."""
    return key.rope if key.spec.pre_rope else None


def pair_rotation(quantizer: Quantizer) -> Tensor | None:
    """Radians by which each RoPE pair is turned before it is coded, float32 ``[H, P]``; ``None`` where none is."""
    angles = quantizer.params.phase
    return None if angles is None else angles.float()


class RopeTable:
    """A rotary embedding as tensors.

    Angles are the float32 product of position and frequency, which is what models compute: far into a text
    its rounding is larger than that of any other step here.

    Args:
        rope: the rotary embedding.
        device: of the tensors.
    """

    def __init__(self, rope: RopeSpec, device: torch.device) -> None:
        self.inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
        self.scaling = rope.attention_scaling
        self._first = _as_slice([pair[0] for pair in rope.pairs], device)
        self._second = _as_slice([pair[1] for pair in rope.pairs], device)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of int32 ``[B, S]`` positions, each float32 ``[B, 1, P, S]``, without scaling."""
        angle = positions[:, None, None].float() * self.inv_freq[:, None]
        return angle.cos(), angle.sin()

    def rotate_(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn ``x [..., D, S]`` in place by angles given as broadcastable ``[..., P, S]``; no scaling."""
        a, b = x[..., self._first, :], x[..., self._second, :]
        a_sin = a * sin
        a.mul_(cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).add_(a_sin)
        if isinstance(self._first, Tensor):
            x[..., self._first, :] = a
        if isinstance(self._second, Tensor):
            x[..., self._second, :] = b
        return x

    def scale_(self, x: Tensor) -> Tensor:
        """Multiply the rotated channels of ``x [..., D, S]`` by the attention scaling, in place."""
        if self.scaling != 1.0:
            for channels in (self._first, self._second):
                x[..., channels, :] *= self.scaling
        return x

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        return [t for t in (self.inv_freq, self._first, self._second) if isinstance(t, Tensor)]


def _as_slice(channels: list[int], device: torch.device) -> slice | Tensor:
    """Channel numbers as a slice where they are evenly spaced: slices are views."""
    step = channels[1] - channels[0] if len(channels) > 1 else 1
    if channels and step > 0 and channels == list(range(channels[0], channels[-1] + 1, step)):
        return slice(channels[0], channels[-1] + 1, step)
    return torch.tensor(channels, dtype=torch.int64, device=device)
