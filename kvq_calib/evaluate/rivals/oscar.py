"""In the style of OSCAR (arXiv 2605.17757): 2 bits per token after a rotation calibrated for attention."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from kvq_calib.data import TokenWindows
from kvq_calib.evaluate.rivals.base import HALF, QuantizerRival, hadamard, uniform_roundtrip
from kvq_calib.evaluate.rivals.turboquant import needs_power_of_two
from kvq_calib.model.intercept import AttentionCall, intercept_calls
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.spec import KINDS, Kind

#: Quantiles to which a token is clipped, as published.
_CLIP: dict[Kind, float] = {"key": 0.96, "value": 0.92}


#: Rotations from the last text, by model. Rivals that differ only in exact tokens share them.
_FITTED: weakref.WeakKeyDictionary[nn.Module, tuple[TokenWindows, list[dict[Kind, Tensor]]]] = (
    weakref.WeakKeyDictionary()
)


class OscarStyle(QuantizerRival):
    """One rotation per layer for keys, from the second moment of queries, and one for values, weighted by attention.

    A rotation consists of the moment's eigenvectors, a Hadamard matrix, and a permutation by bit-reversed rank. A
    rotated token is clipped to quantiles of its coordinates and rounded to 4 levels. Not reproduced: rotations per
    head, the Lloyd-Max variant, group sizes other than the head, and the schedule of the window in the serving code.
    """

    origin = "in the style of"
    source = "OSCAR, arXiv 2605.17757"
    calibrated = True
    bits = 2

    def __init__(self, sinks: int = 64, recent: int = 256) -> None:
        self.sinks, self.recent = sinks, recent
        published = (sinks, recent) == (64, 256)
        self.name = "oscar-2bit" if published else "oscar-2bit-4-sinks"
        self.settings = (
            "2 bits asymmetric per token and head after a rotation per layer, keys clipped to quantiles 0.96 and "
            f"values to 0.92, float16 scale and zero point, {sinks} sink and {recent} recent exact tokens"
            + ("" if published else " (fewer exact tokens than published)")
        )
        self._rotations: list[dict[Kind, Tensor]] = []

    def obstacle(self, geometry: KVGeometry, has_text: bool) -> str | None:
        """The Hadamard matrix must exist."""
        return needs_power_of_two(geometry) or super().obstacle(geometry, has_text)

    def prepare(self, model: Any, text: TokenWindows | None) -> None:
        """Fit the rotations on windows int64 ``[N, T]``, with one pass of the model per window."""
        assert text is not None
        self._rotations = _fit(model, text)

    def roundtrip(self, x: Tensor, kind: Kind, layer: int) -> Tensor:
        """As :class:`QuantizerRival` says."""
        rotation = self._rotations[layer][kind].to(x.device)
        rotated = x @ rotation
        width = x.shape[-1]
        ordered = rotated.sort(-1).values
        low = ordered[..., max(0, int((1 - _CLIP[kind]) * width) - 1), None]
        high = ordered[..., min(width - 1, int(_CLIP[kind] * width)), None]
        return uniform_roundtrip(rotated, self.bits, low, high) @ rotation.T

    def token_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """Codes, and a scale and a zero point per head."""
        return layer.num_kv_heads * (layer.head_dim * self.bits + 2 * HALF)

    def constant_bits(self, layer: LayerGeometry, kind: Kind) -> float:
        """The rotation of keys. That of values can be merged into the weights."""
        return HALF * layer.head_dim**2 if kind == "key" else 0.0


def _fit(model: Any, text: TokenWindows) -> list[dict[Kind, Tensor]]:
    """Fit the rotations of every layer on the windows of ``text``."""
    known = _FITTED.get(model)
    if known is not None and known[0] is text:
        return known[1]
    moments: dict[int, dict[Kind, Tensor]] = {}

    def collect(call: AttentionCall) -> None:
        found = attention_moments(call.query, call.key, call.value)
        earlier = moments.get(call.layer)
        moments[call.layer] = (
            found if earlier is None else {kind: earlier[kind] + found[kind] for kind in KINDS}
        )

    with intercept_calls(model, collect), torch.no_grad():
        for window in text.ids:
            model(input_ids=window[None].to(model.device), use_cache=False, logits_to_keep=1)
    rotations = [
        {kind: calibrated_rotation(moments[layer][kind]) for kind in KINDS} for layer in sorted(moments)
    ]
    _FITTED[model] = text, rotations
    return rotations


def attention_moments(query: Tensor, key: Tensor, value: Tensor) -> dict[Kind, Tensor]:
    """Second moments that weight errors of keys and of values in attention: two float64 matrices ``[D, D]``.

    Args:
        query: rotated queries, ``[B, Hq, T, D]``.
        key, value: rotated keys, and values, ``[B, H, T, D]``.

    Returns:
        For keys the mean of ``q qᵀ``. For values the mean of ``w v vᵀ``, where ``w = kᵀ E[q qᵀ] k`` of the head, scaled
        to a mean of 1. Both are averaged over key-value heads.
    """
    heads, width = key.shape[1], key.shape[-1]
    q = query.double().unflatten(1, (heads, -1)).permute(1, 0, 2, 3, 4).reshape(heads, -1, width)
    k, v = (x.double().transpose(0, 1).reshape(heads, -1, width) for x in (key, value))
    second = q.mT @ q / q.shape[1]
    weights = ((k @ second) * k).sum(-1, keepdim=True)
    weights = weights / weights.mean(1, keepdim=True).clamp(min=1e-12)
    return {"key": second.mean(0), "value": ((v * weights).mT @ v / v.shape[1]).mean(0)}


def calibrated_rotation(moment: Tensor) -> Tensor:
    """Orthogonal float32 ``[D, D]``: eigenvectors of ``moment``, a Hadamard matrix, bit-reversed order of eigenvalues.

    The Hadamard matrix spreads every eigenvector over all coordinates. The order only matters for groups smaller than
    the head; it is kept to follow the paper.
    """
    size = len(moment)
    values, vectors = torch.linalg.eigh(moment.cpu())
    digits = size.bit_length() - 1
    ranks = torch.tensor([int(f"{i:0{digits}b}"[::-1] or "0", 2) if digits else 0 for i in range(size)])
    order = torch.empty(size, dtype=torch.long)
    order[ranks] = values.argsort(descending=True)
    rotation: Tensor = vectors @ hadamard(size).double()
    return rotation[:, order].float()
