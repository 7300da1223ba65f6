"""TurboQuant (arXiv 2504.19874) as in vLLM: rotated keys with a fixed codebook, and uniform values."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kvq_calib.evaluate.rivals.base import HALF, QuantizerRival, hadamard, uniform_roundtrip
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import Kind


@lru_cache
def lloyd_max(bits: int) -> Tensor:
    """Levels of the scalar quantizer with the least squared error for a unit Gaussian, sorted, float32 ``[2 ** bits]``.

    Lloyd's iteration on the exact density: a level is the mean of its cell, and a boundary is midway between two
    levels.
    """
    levels = torch.linspace(-2.0, 2.0, 1 << bits, dtype=torch.float64)
    for _ in range(2000):
        edges = torch.cat(
            [torch.tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([math.inf])]
        )
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        moved = -density.diff() / mass
        if float((moved - levels).abs().max()) < 1e-12:
            break
        levels = moved
    return levels.float()


class TurboQuant(QuantizerRival):
    """vLLM's presets ``turboquant_4bit_nc``, ``_3bit_nc``, ``_k3v4_nc`` and ``_k8v4``.

    A key is divided by its norm, rotated by a Hadamard matrix and rounded to a codebook for coordinates of variance ``1
    / D``. The rounded vector is scaled to unit norm (norm correction), rotated back, and multiplied by the norm. With 8
    bits, a key is rounded to e4m3 as it is. Values are uniform per token and head. The first and last two layers stay
    exact; ``kept_layers=0`` quantizes them too.
    """

    origin = "reference"
    source = "TurboQuant, arXiv 2504.19874, as in vLLM"

    def __init__(self, key_bits: int, value_bits: int, kept_layers: int = 2) -> None:
        self.bits: dict[Kind, int] = {"key": key_bits, "value": value_bits}
        self.kept_layers = kept_layers
        preset = f"{key_bits}bit" if key_bits == value_bits else f"k{key_bits}v{value_bits}"
        self.name = f"turboquant-{preset}" + ("" if kept_layers else "-all")
        keys = (
            f"Hadamard, {key_bits}-bit Lloyd-Max codebook, norm correction, float16 norm per token and head"
        )
        kept = f"first and last {kept_layers} layers exact" if kept_layers else "all layers quantized"
        self.settings = (
            f"keys: {'e4m3 without a scale' if key_bits == 8 else keys}; values: {value_bits} bits uniform, float16 scale "
            f"and zero point per token and head; {kept}"
        )

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """The Hadamard matrix must exist."""
        return needs_power_of_two(geometry) or super().obstacle(geometry, has_text)

    def keeps(self, index: int, layers: int) -> bool:
        """The first and last layers stay exact, but at most half of all layers."""
        kept = min(self.kept_layers, layers // 2)
        return index < kept or index >= layers - kept

    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """As :class:`QuantizerRival` says."""
        bits = self.bits[kind]
        if kind == "value":
            return uniform_roundtrip(x, bits, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
        if bits == 8:
            largest = torch.finfo(torch.float8_e4m3fn).max
            return x.clamp(-largest, largest).to(torch.float8_e4m3fn).float()
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rotation = hadamard(x.shape[-1]).to(x.device)
        direction = x / norm.clamp(min=1e-12) @ rotation
        levels = lloyd_max(bits).to(x.device) / math.sqrt(x.shape[-1])
        codes = torch.bucketize(direction.contiguous(), (levels[1:] + levels[:-1]) / 2)
        rounded: Tensor = levels[codes]
        restored: Tensor = rounded / rounded.norm(dim=-1, keepdim=True) @ rotation.T
        return restored * norm.half().float()

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """Codes, and a norm per key of less than 8 bits, or a scale and a zero point per value."""
        halves = 2 if kind == "value" else int(self.bits["key"] < 8)
        return layer.num_kv_heads * (layer.head_dim * self.bits[kind] + HALF * halves)


def needs_power_of_two(geometry: KVGeometry) -> str | None:
    """Why a Hadamard rotation cannot be used; ``None`` if it can."""
    odd = {layer.head_dim for layer in geometry.layers if layer.head_dim & (layer.head_dim - 1)}
    return f"a head of {odd.pop()} channels has no Hadamard matrix of its size" if odd else None
