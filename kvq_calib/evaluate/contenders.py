"""Artifacts as contenders of :func:`~kvq_calib.evaluate.text_pass.text_pass`, in prefill or decode mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.evaluate.decode import SHORT_CHUNK, AttachedHooks, logits_through
from kvq_calib.evaluate.prefill import PrefillHooks, PrefillQuantizer
from kvq_calib.evaluate.text_pass import Mode
from kvq_calib.runtime import KVQCache
from kvq_calib.schema.recipe import EvalConfig

__all__ = [
    "ArtifactContender",
    "DecodeContender",
    "PrefillContender",
    "artifact_contenders",
    "forced_to_decode",
    "mode_of",
]


def _remedy(artifact: KVArtifact) -> str:
    """What to try if predictions are not finite."""
    if artifact.spec.storage_dtype == "float16":
        return "where keys or values are larger than float16 holds, calibrate with --set cache.storage_dtype=bfloat16"
    return "try --dtype float32, or calibrate this model anew"


def mode_of(artifact: KVArtifact, config: EvalConfig) -> Mode:
    """The mode for an artifact: the requested one, but decode mode if the artifact keeps recent tokens exact.

    In prefill mode, every query would read recent tokens quantized, although the bits count them as exact.
    """
    return "decode" if artifact.spec.recent_tokens else config.mode


def forced_to_decode(artifacts: Mapping[str, KVArtifact], config: EvalConfig) -> list[str]:
    """One line for every artifact that is not measured in the requested mode."""
    return [
        f"{name}: measured in decode mode, {min(config.chunk, SHORT_CHUNK)} tokens per step: its newest "
        f"{artifact.spec.recent_tokens} tokens are exact, which prefill mode would quantize"
        for name, artifact in artifacts.items()
        if mode_of(artifact, config) != config.mode
    ]


class PrefillContender:
    """An artifact in prefill mode. It counts the outliers.

    Args:
        artifact: the artifact.
        hooks: the hooks on the model.
        quantizer: the quantizer of ``artifact``.
    """

    mode: Mode = "prefill"

    def __init__(self, artifact: KVArtifact, hooks: PrefillHooks, quantizer: PrefillQuantizer) -> None:
        self.artifact, self.hooks, self.quantizer = artifact, hooks, quantizer
        self.remedy = _remedy(artifact)

    def logits(self, ids: Tensor) -> Tensor:
        """As :class:`~kvq_calib.evaluate.text_pass.Contender` says."""
        return self.hooks.logits(self.quantizer, ids)

    def bits_per_element(self, context: int) -> float:
        """Bits per element, with the outliers counted so far."""
        return self.artifact.bits_per_element(context, outliers_per_token=self.quantizer.counts.per_token())


class DecodeContender:
    """An artifact in decode mode, through its packed cache.

    Args:
        artifact: the artifact.
        hooks: the hooks on the model.
        model: the model. An artifact that cannot be streamed is refused here, before anything is measured.
        chunk: tokens per step; an artifact with a window of recent exact tokens takes at most
            :data:`~kvq_calib.evaluate.decode.SHORT_CHUNK`.
    """

    mode: Mode = "decode"

    def __init__(self, artifact: KVArtifact, hooks: AttachedHooks, model: Any, chunk: int) -> None:
        self.artifact, self.hooks, self._model = artifact, hooks, model
        self.remedy = _remedy(artifact)
        self._chunk = min(chunk, SHORT_CHUNK) if artifact.spec.recent_tokens else chunk
        with hooks.in_place():
            self._cache = KVQCache(artifact, model)

    def logits(self, ids: Tensor) -> Tensor:
        """As :class:`~kvq_calib.evaluate.text_pass.Contender` says."""
        try:
            return logits_through(self._model, self._cache, ids, self._chunk)
        finally:
            self._cache.reset()

    def bits_per_element(self, context: int) -> float:
        """Bits per element, with the outliers measured at calibration."""
        return self.artifact.bits_per_element(context)


ArtifactContender = PrefillContender | DecodeContender


def artifact_contenders(
    model: Any, artifacts: Mapping[str, KVArtifact], config: EvalConfig
) -> dict[str, ArtifactContender]:
    """Make a contender for each artifact. Quantizers and caches are made here, once.

    Args:
        model: the unquantized causal language model.
        artifacts: artifacts by name. The caller checks that they fit the model.
        config: the requested mode, and the tokens per step of decode mode.

    Raises:
        RuntimeMismatchError: an artifact to be measured in decode mode cannot be streamed.
    """
    prefill, attached_model = PrefillHooks(model), AttachedHooks(model)

    def contender(artifact: KVArtifact) -> ArtifactContender:
        if mode_of(artifact, config) == "decode":
            return DecodeContender(artifact, attached_model, model, config.chunk)
        return PrefillContender(artifact, prefill, PrefillQuantizer.of(artifact, model))

    return {name: contender(artifact) for name, artifact in artifacts.items()}
