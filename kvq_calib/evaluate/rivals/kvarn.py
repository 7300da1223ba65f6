"""KVarN (arXiv 2606.03458): a Hadamard rotation, and scales for channels and for tokens of a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.evaluate.rivals.base import HALF, QuantizerRival, hadamard, uniform_roundtrip
from kvq_calib.evaluate.rivals.turboquant import needs_power_of_two
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import Kind

#: Limits of standard deviations, and of logarithms of scales, as published.
_DEVIATIONS = (1e-3, 1e3)
_LOGARITHMS = (-0.3, 10.0)


class KVarN(QuantizerRival):
    """Tiles of 128 tokens and a head are rotated, divided by scales per token and per channel, and rounded.

    The scales are found by :func:`balanced`. Keys are uniform per channel and values per token. Scales and zero points
    are float16. The newest tokens stay exact until they fill a tile.
    """

    origin = "reference"
    source = "KVarN, arXiv 2606.03458"
    recent = 128  # tokens of a tile

    def __init__(self, key_bits: int, value_bits: int) -> None:
        self.bits: dict[Kind, int] = {"key": key_bits, "value": value_bits}
        self.name = f"kvarn-k{key_bits}v{value_bits}"
        self.settings = (
            f"keys {key_bits} bits per channel, values {value_bits} bits per token, in tiles of {self.recent} tokens and "
            "a head, after a Hadamard rotation and 16 rounds of normalization; per tile float16 scales of tokens and "
            "channels, and zero points; tokens of an incomplete tile exact"
        )

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """The Hadamard matrix must exist."""
        return needs_power_of_two(geometry) or super().obstacle(geometry, has_text)

    def history(self, kind: Kind, stored: int) -> int:
        """Whole tiles."""
        return stored - stored % self.recent

    def exact_tokens(self, kind: Kind, context: int) -> float:
        """The mean of 0 to 127 tokens."""
        return min((self.recent - 1) / 2, float(context))

    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """As :class:`QuantizerRival` says. Tokens come in whole tiles."""
        rotation = hadamard(x.shape[-1]).to(x.device)
        tiles = (x @ rotation).unflatten(2, (-1, self.recent))  # [B, H, tiles, tokens, D]
        tokens, channels = balanced(tiles)
        # The range of a channel of keys (a token of values) absorbs its own scale. So only the other axis is scaled.
        other, along = (tokens, -2) if kind == "key" else (channels, -1)
        other = other.half().float()
        even = tiles / other
        low, high = even.amin(along, keepdim=True), even.amax(along, keepdim=True)
        rounded = uniform_roundtrip(even, self.bits[kind], low, high) * other
        return rounded.flatten(2, 3) @ rotation

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """Codes; per tile, two numbers for each channel of keys or token of values, and one for each of the others."""
        tile, width = self.recent, layer.head_dim
        scales = 2 * width + tile if kind == "key" else 2 * tile + width
        return layer.num_kv_heads * (self.bits[kind] * width + HALF * scales / tile)


def balanced(tiles: Tensor, rounds: int = 16) -> tuple[Tensor, Tensor]:
    """Scales per token and per channel after which standard deviations along both are as equal as possible.

    Both are divided out in turn. The scales that are kept have the smallest sum of two ratios: of the largest to the
    smallest standard deviation of tokens, and of channels.

    Args:
        tiles: float32 ``[..., T, D]``.
        rounds: number of rounds.

    Returns:
        Scales ``[..., T, 1]`` and ``[..., 1, D]``.
    """

    tokens, channels = torch.zeros_like(tiles[..., :1]), torch.zeros_like(tiles[..., :1, :])  # logarithms
    even, kept, best = tiles, (tokens, channels), _unevenness(tiles)
    for _ in range(rounds):
        tokens = (tokens + even.std(-1, keepdim=True).clamp(*_DEVIATIONS).log()).clamp(*_LOGARITHMS)
        even = tiles / (tokens + channels).exp()
        channels = (channels + even.std(-2, keepdim=True).clamp(*_DEVIATIONS).log()).clamp(*_LOGARITHMS)
        even = tiles / (tokens + channels).exp()
        now = _unevenness(even)
        better = now <= best
        kept = torch.where(better, tokens, kept[0]), torch.where(better, channels, kept[1])
        best = torch.minimum(now, best)
    return kept[0].exp(), kept[1].exp()


def _unevenness(tiles: Tensor) -> Tensor:
    """The sum of ratios of largest to smallest standard deviation, over tokens and over channels: ``[..., 1, 1]``."""
    of_tokens, of_channels = tiles.std(-1), tiles.std(-2)
    ratio_of_tokens = of_tokens.amax(-1) / of_tokens.amin(-1).clamp(min=1e-8)
    ratio_of_channels = of_channels.amax(-1) / of_channels.amin(-1).clamp(min=1e-8)
    return (ratio_of_tokens + ratio_of_channels)[..., None, None]
