"""The cache types of llama.cpp: blocks of 32 channels of a token with one float16 scale."""

from __future__ import annotations

from torch import Tensor

from kvq_calib.evaluate.rivals.base import HALF, QuantizerRival
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import Kind


class GGML(QuantizerRival):
    """The types ``q8_0``, ``q5_0`` and ``q4_0`` of ``--cache-type-k`` and ``--cache-type-v``. Keys are after RoPE.

    Codes of 8 bits are ``round(x / d)``, where ``d`` is the largest magnitude of the block divided by 127. With 4 and 5
    bits, ``d`` is chosen so that the number with the largest magnitude gets the lowest code, and codes are rounded half
    up. The optional rotation of keys and values in later versions is left out.
    """

    origin = "reference"
    source = "ggml's q8_0, q5_0 and q4_0, as in llama.cpp"
    block = 32

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"llamacpp-q{bits}_0"
        self.settings = f"{bits} bits, blocks of {self.block} channels of a token, a float16 scale per block"

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """The keys or values of a token must fill whole blocks."""
        for layer in geometry.layers:
            for heads in (layer.shape("key"), layer.shape("value")):
                if heads.channels % self.block:
                    return f"blocks of {self.block} channels do not divide the {heads.channels} of a layer"
        return super().obstacle(geometry, has_text)

    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """As :class:`QuantizerRival` says."""
        rows = x.transpose(1, 2)
        blocks = rows.reshape(*rows.shape[:2], -1, self.block)
        top = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        half = 2 ** (self.bits - 1)
        step = top.abs() / (half - 1) if self.bits == 8 else top / -half
        inverse = (1 / step).nan_to_num(posinf=0.0, neginf=0.0)  # in float32; the stored scale is rounded
        scaled = blocks * inverse
        codes = (
            scaled.round() if self.bits == 8 else (scaled + half + 0.5).floor().clamp(max=2 * half - 1) - half
        )
        read: Tensor = codes * step.half().float()
        return read.reshape(rows.shape).transpose(1, 2)

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """As :class:`Rival` says."""
        return (self.bits + HALF / self.block) * layer.shape(kind).channels
