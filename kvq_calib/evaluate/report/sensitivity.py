"""Sensitivity of layers: the KL divergence when only one layer's keys or values are quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.evaluate.contenders import PrefillContender
from kvq_calib.evaluate.prefill import PrefillHooks, PrefillQuantizer
from kvq_calib.evaluate.text_pass import text_pass
from kvq_calib.model.placement import input_device
from kvq_calib.progress import Progress
from kvq_calib.schema.cached import CachedTensor, cached_tensors
from kvq_calib.schema.spec import KINDS, Kind

__all__ = ["Sensitivity", "measure_sensitivity"]


@dataclass(frozen=True)
class Sensitivity:
    """KL divergence from the unquantized model, nats per predicted token.

    Attributes:
        layers: by kind, one number per layer: when only this layer's keys or values are quantized.
        whole: when everything is quantized.
        tokens: number of predicted tokens.
    """

    layers: Mapping[Kind, Sequence[float]]
    whole: float
    tokens: int


@dataclass(frozen=True)
class _Part:
    """An artifact of which only the keys or values of one layer are quantized, or everything."""

    artifact: str
    part: CachedTensor | None

    def __str__(self) -> str:
        if self.part is None:
            return self.artifact
        return f"{self.artifact} (layer {self.part.layer}, {self.part.kind}s)"


def measure_sensitivity(
    model: Any, artifacts: Mapping[str, KVArtifact], ids: Tensor, progress: Progress | None = None
) -> dict[str, Sensitivity]:
    """Quantize one layer's keys or values at a time, and compare the model's predictions.

    This takes two forward passes per layer, artifact and window, and a few more. All are in prefill mode, so a window
    of recent exact tokens is quantized too.

    Args:
        model: the unquantized causal language model.
        artifacts: artifacts by name; they must fit the model.
        ids: int64 ``[N, T]``.
        progress: called after every forward pass.

    Raises:
        NotFiniteError: predictions are not finite.
    """
    hooks = PrefillHooks(model)
    contenders = {}
    for name, artifact in artifacts.items():
        quantizers = artifact.quantizers(input_device(model))
        parts: list[CachedTensor | None] = [None, *cached_tensors(len(artifact.layers))]
        for part in parts:
            only = None if part is None else {part}
            quantizer = PrefillQuantizer(quantizers, artifact.spec, only)
            contenders[_Part(name, part)] = PrefillContender(artifact, hooks, quantizer)
    scores = text_pass(model, contenders, ids, progress=progress, label="layer by layer")
    return {
        name: Sensitivity(
            {
                kind: [
                    scores[_Part(name, CachedTensor(layer, kind))].kl_mean
                    for layer in range(len(artifact.layers))
                ]
                for kind in KINDS
            },
            scores[_Part(name, None)].kl_mean,
            scores[_Part(name, None)].tokens,
        )
        for name, artifact in artifacts.items()
    }
