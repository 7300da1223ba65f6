"""Prefill mode: keys and values are quantized inside one forward pass, as the literature measures perplexity.

Sink tokens stay exact (rounded to the storage dtype). A window of recent exact tokens has no meaning if all queries run
at once, so artifacts with one are measured in decode mode (:mod:`kvq_calib.evaluate.contenders`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.quantizer import Quantizer, roundtrip_storage
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.placement import input_device
from kvq_calib.schema.cached import CachedTensor
from kvq_calib.schema.spec import KINDS, Kind, KVCacheSpec

__all__ = ["OutlierCounts", "PrefillHooks", "PrefillQuantizer", "coded_after_rope", "coded_tensor"]


class OutlierCounts:
    """Number of outliers found while quantizing.

    Attributes:
        found: number of outliers, by kind and layer.
        tokens: number of quantized tokens, by layer.
    """

    def __init__(self, layers: int) -> None:
        self.found: dict[Kind, list[int]] = {kind: [0] * layers for kind in KINDS}
        self.tokens = [0] * layers

    def per_token(self) -> dict[Kind, list[float]]:
        """Mean number of outliers of a token, per kind and layer."""
        return {
            kind: [
                found / max(tokens, 1) for found, tokens in zip(self.found[kind], self.tokens, strict=True)
            ]
            for kind in KINDS
        }


def coded_after_rope(quantizer: Quantizer, kind: Kind) -> bool:
    """Whether the quantizer codes keys after RoPE."""
    return kind == "key" and not quantizer.spec.pre_rope


def coded_tensor(kv: LayerKV, kind: Kind, quantizer: Quantizer) -> Tensor:
    """The tensor that ``quantizer`` codes, ``[B, H, T, D]``."""
    if kind == "value":
        return kv.values
    return kv.rotated_keys if coded_after_rope(quantizer, kind) else kv.keys


class PrefillQuantizer:
    """A transform for ``intercept``: replaces a layer's keys and values by what a packed cache would give back.

    Args:
        quantizers: quantizers by layer and kind, on the model's device.
        spec: spec of the cache.
        only: keys and values to quantize; all by default. The others stay as the model computed them.

    Attributes:
        counts: outliers found so far.
    """

    def __init__(
        self,
        quantizers: Sequence[dict[Kind, Quantizer]],
        spec: KVCacheSpec,
        only: Collection[CachedTensor] | None = None,
    ) -> None:
        self.quantizers, self.spec, self.only = quantizers, spec, only
        self.counts = OutlierCounts(len(quantizers))

    @classmethod
    def of(cls, artifact: KVArtifact, model: Any) -> PrefillQuantizer:
        """A quantizer for the whole artifact, on the input device of ``model``."""
        return cls(artifact.quantizers(input_device(model)), artifact.spec)

    def __call__(self, kv: LayerKV) -> tuple[Tensor, Tensor] | None:
        """Pre-RoPE keys and values after quantization; ``None`` if the layer is not quantized."""
        chosen = {kind: self.only is None or CachedTensor(kv.layer, kind) in self.only for kind in KINDS}
        if not any(chosen.values()):
            return None
        sinks = self.spec.sink_tokens
        self.counts.tokens[kv.layer] += kv.values.shape[0] * max(kv.values.shape[2] - sinks, 0)
        keys = kv.keys
        if chosen["key"]:
            keys = self._through(kv, "key")
            if coded_after_rope(self.quantizers[kv.layer]["key"], "key"):
                keys = kv.rotation.unrotate(keys)
        return keys, self._through(kv, "value") if chosen["value"] else kv.values

    def _through(self, kv: LayerKV, kind: Kind) -> Tensor:
        quantizer, sinks = self.quantizers[kv.layer][kind], self.spec.sink_tokens
        x = coded_tensor(kv, kind, quantizer)
        first = 0 if quantizer.codes_in_blocks else sinks  # a block is coded as a whole, sinks included
        quantized = quantizer.quantize(x[:, :, first:])
        if quantized.outliers is not None:
            self.counts.found[kind][kv.layer] += int(quantized.outliers.sum())
        exact = roundtrip_storage(x[:, :, :sinks], self.spec.storage_dtype).float()
        return torch.cat([exact, quantizer.dequantize(quantized)[:, :, sinks - first :]], dim=2)


class PrefillHooks:
    """One interception of a model for many quantizers. A pass goes through the chosen one, or through none."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._chosen: Callable[[LayerKV], tuple[Tensor, Tensor] | None] | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Intercept the model's passes. They are unchanged until a quantizer is chosen."""
        with intercept(self._model, lambda kv: None if self._chosen is None else self._chosen(kv)):
            yield

    def logits(self, quantizer: PrefillQuantizer, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids`` (int64 ``[B, T]``) through ``quantizer``; only while in place."""
        self._chosen = quantizer
        try:
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._chosen = None
        return logits
