"""KIVI (arXiv 2402.02750): keys per channel and values per token, in small groups, with recent exact tokens."""

from __future__ import annotations

from torch import Tensor

from kvq_calib.evaluate.rivals.base import HALF, QuantizerRival, uniform_roundtrip
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import Kind


class KIVI(QuantizerRival):
    """KIVI with the paper's settings: groups of 32 and a window of 128.

    Keys (after RoPE) fill an exact residual, which is quantized as a whole when it holds 128 tokens. The newest 128
    values are always exact.
    """

    origin = "reference"
    source = "KIVI, arXiv 2402.02750"
    group = 32
    recent = 128

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"kivi-{bits}bit"
        self.settings = (
            f"{bits} bits asymmetric, keys per channel in groups of 32 tokens, values per token in groups of 32 "
            "channels, float16 scale and zero point per group, residual of 128 exact tokens"
        )

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """Values must fill whole groups."""
        odd = {
            layer.head_dim for layer in geometry.layers if layer.head_dim % min(self.group, layer.head_dim)
        }
        if odd:
            return f"groups of {self.group} channels do not divide a head of {odd.pop()}"
        return super().obstacle(geometry, has_text)

    def history(self, kind: Kind, stored: int) -> int:
        """Keys are quantized 128 tokens at a time, values one token at a time."""
        return stored - stored % self.recent if kind == "key" else max(0, stored - self.recent)

    def exact_tokens(self, kind: Kind, context: int) -> float:
        """For keys, the mean of 0 to 127 tokens in the residual."""
        return min((self.recent - 1) / 2 if kind == "key" else self.recent, float(context))

    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """As :class:`QuantizerRival` says. Keys come in whole groups of tokens."""
        batch, heads, tokens, width = x.shape
        if kind == "key":
            groups = x.view(batch, heads, tokens // self.group, self.group, width)
            low, high = groups.amin(3, keepdim=True), groups.amax(3, keepdim=True)
        else:
            groups = x.view(batch, heads, tokens, -1, min(self.group, width))
            low, high = groups.amin(4, keepdim=True), groups.amax(4, keepdim=True)
        return uniform_roundtrip(groups, self.bits, low, high).reshape(x.shape)

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """Codes, and a scale and a zero point per group."""
        group = self.group if kind == "key" else min(self.group, layer.head_dim)
        return layer.shape(kind).channels * (self.bits + 2 * HALF / group)
