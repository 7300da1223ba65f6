"""Quantization inside one forward pass: what the literature measures perplexity with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.quantizer import roundtrip_storage
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.placement import input_device
from kvq_calib.schema.spec import KINDS, Kind

Place = tuple[int, Kind]
"""Layer and kind."""


class OutlierCounts:
    """Outliers found while quantizing, per layer and kind."""

    def __init__(self, layers: int) -> None:
        self.found: dict[Kind, list[int]] = {kind: [0] * layers for kind in KINDS}
        self.tokens = [0] * layers

    def per_token(self) -> dict[Kind, list[float]]:
        """Mean outliers of a token, per kind and layer."""
        return {
            kind: [
                found / max(tokens, 1) for found, tokens in zip(self.found[kind], self.tokens, strict=True)
            ]
            for kind in KINDS
        }

    def plus(self, other: OutlierCounts) -> OutlierCounts:
        """The counts of both together."""
        total = OutlierCounts(len(self.tokens))
        total.found = {
            kind: [a + b for a, b in zip(self.found[kind], other.found[kind], strict=True)] for kind in KINDS
        }
        total.tokens = [a + b for a, b in zip(self.tokens, other.tokens, strict=True)]
        return total


@contextmanager
def quantized_prefill(
    model: Any, artifact: KVArtifact, only: Collection[Place] | None = None
) -> Iterator[OutlierCounts]:
    """Every key and value of every forward pass in this context goes through the artifact's quantizers.

    With ``only``, the keys and values of other places stay as the model computed them.

    Sink tokens stay exact (rounded to the storage dtype). A recent window has no meaning when all queries run at
    once, and is left out: figures hold for ``recent_tokens = 0``.

    Yields:
        Outliers as they are counted.
    """
    quantizers = artifact.quantizers(input_device(model))
    counts = OutlierCounts(len(quantizers))
    sinks = artifact.spec.sink_tokens

    def through(x: Tensor, kv: LayerKV, kind: Kind) -> Tensor:
        quantizer = quantizers[kv.layer][kind]
        first = 0 if quantizer.codes_in_blocks else sinks  # a block is coded as a whole, sinks included
        quantized = quantizer.quantize(x[:, :, first:])
        if quantized.outliers is not None:
            counts.found[kind][kv.layer] += int(quantized.outliers.sum())
        exact = roundtrip_storage(x[:, :, :sinks], artifact.spec).float()
        return torch.cat([exact, quantizer.dequantize(quantized)[:, :, sinks - first :]], dim=2)

    def transform(kv: LayerKV) -> tuple[Tensor, Tensor] | None:
        chosen = {kind: only is None or (kv.layer, kind) in only for kind in KINDS}
        if not any(chosen.values()):
            return None
        counts.tokens[kv.layer] += kv.values.shape[0] * max(kv.values.shape[2] - sinks, 0)
        if not chosen["key"]:
            keys = kv.keys
        elif quantizers[kv.layer]["key"].spec.pre_rope:
            keys = through(kv.keys, kv, "key")
        else:
            keys = kv.rotation.unrotate(through(kv.rotated_keys, kv, "key"))
        return keys, through(kv.values, kv, "value") if chosen["value"] else kv.values

    with intercept(model, transform):
        yield counts
