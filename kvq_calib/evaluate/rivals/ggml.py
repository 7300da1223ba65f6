"""The cache types of llama.cpp: blocks of 32 channels of a token with a float16 scale."""

from __future__ import annotations

from torch import Tensor

from kvq_calib.evaluate.rivals.base import HALF, QuantizerRival, hadamard
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import Kind


class GGML(QuantizerRival):
    """The types of ``--cache-type-k`` and ``--cache-type-v``. Keys are after RoPE.

    ``q8_0``, ``q5_0`` and ``q4_0`` have a scale ``d`` per block. Codes of 8 bits are ``round(x / d)``, where ``d`` is
    the largest magnitude of the block divided by 127. With 4 and 5 bits, ``d`` is chosen so that the number with the
    largest magnitude gets the lowest code, and codes are rounded half up. ``q5_1`` and ``q4_1`` also store the smallest
    number of the block, and their codes span the numbers from the smallest to the largest.

    As in llama.cpp's later versions, keys and values of heads whose size is a multiple of 64 are rotated first: keys
    with the largest Hadamard matrix that divides the head, values with one of 64.
    """

    origin = "reference"
    source = "ggml's types, as in llama.cpp"
    block = 32

    def __init__(self, bits: int, offset: bool = False) -> None:
        self.bits, self.offset = bits, offset
        self.name = f"llamacpp-q{bits}_{int(offset)}"
        stored = "a float16 scale and minimum" if offset else "a float16 scale"
        self.settings = (
            f"{bits} bits, blocks of {self.block} channels of a token, {stored} per block, after a Hadamard rotation "
            "of heads whose size is a multiple of 64"
        )

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """The keys or values of a token must fill whole blocks."""
        for layer in geometry.layers:
            for heads in (layer.shape("key"), layer.shape("value")):
                if heads.channels % self.block:
                    return f"blocks of {self.block} channels do not divide the {heads.channels} of a layer"
        return super().obstacle(geometry, has_text)

    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """As :class:`QuantizerRival` says."""
        size = rotated_size(x.shape[-1], kind)
        rotation = hadamard(size).to(x.device)
        rows = (x.unflatten(-1, (-1, size)) @ rotation).flatten(-2).transpose(1, 2)
        blocks = rows.reshape(*rows.shape[:2], -1, self.block)
        read = self._with_offset(blocks) if self.offset else self._symmetric(blocks)
        back = read.reshape(rows.shape).transpose(1, 2)
        restored: Tensor = (back.unflatten(-1, (-1, size)) @ rotation).flatten(-2)
        return restored

    def _symmetric(self, blocks: Tensor) -> Tensor:
        top = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        half = 2 ** (self.bits - 1)
        step = top.abs() / (half - 1) if self.bits == 8 else top / -half
        scaled = blocks * _inverse(step)
        if self.bits == 8:
            codes = scaled.round()
        else:
            codes = (scaled + half + 0.5).floor().clamp(max=2 * half - 1) - half
        read: Tensor = codes * step.half().float()
        return read

    def _with_offset(self, blocks: Tensor) -> Tensor:
        low = blocks.amin(-1, keepdim=True)
        last = (1 << self.bits) - 1
        step = (blocks.amax(-1, keepdim=True) - low) / last
        codes = ((blocks - low) * _inverse(step) + 0.5).floor().clamp(max=last)
        return codes * step.half().float() + low.half().float()

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """As :class:`Rival` says."""
        return (self.bits + (1 + self.offset) * HALF / self.block) * layer.shape(kind).channels


def _inverse(step: Tensor) -> Tensor:
    """``1 / step``, or 0 for a block of equal numbers. In float32; only the stored scale is rounded."""
    return (1 / step).nan_to_num(posinf=0.0, neginf=0.0)


def rotated_size(head_dim: int, kind: Kind) -> int:
    """Size of the Hadamard matrix for a head; 1, which rotates nothing, if 64 does not divide the head."""
    if head_dim % 64:
        return 1
    return head_dim & -head_dim if kind == "key" else 64
