"""Numbers of outliers of the tokens of a text, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.evaluate.prefill import coded_tensor
from kvq_calib.model.capture import LayerKV, capture
from kvq_calib.model.placement import input_device
from kvq_calib.schema.spec import KINDS, Kind

__all__ = ["TokenOutliers", "count_outliers"]


@dataclass(frozen=True)
class TokenOutliers:
    """Numbers of outliers of the tokens of a text.

    Attributes:
        found: number of outliers by kind, int64 ``[layers, N * T]``; 0 for sink tokens, which are exact.
        sink_tokens: number of exact tokens at the start of each window.
        windows: ``N``.
    """

    found: Mapping[Kind, Tensor]
    sink_tokens: int
    windows: int

    def packed(self, kind: Kind) -> Tensor:
        """The numbers without sink tokens, int64 ``[layers, N * (T - sinks)]``."""
        by_window: Tensor = self.found[kind].unflatten(1, (self.windows, -1))
        return by_window[:, :, self.sink_tokens :].flatten(1)


@torch.no_grad()
def count_outliers(model: Any, artifacts: Mapping[str, KVArtifact], ids: Tensor) -> dict[str, TokenOutliers]:
    """Count the outliers of every token in every layer, in the keys and values of the unquantized model.

    Args:
        model: a causal language model.
        artifacts: artifacts by name; they must fit the model.
        ids: int64 ``[N, T]``.
    """
    quantizers = {name: artifact.quantizers(input_device(model)) for name, artifact in artifacts.items()}
    found = {
        name: {kind: torch.zeros(len(artifact.layers), *ids.shape, dtype=torch.int64) for kind in KINDS}
        for name, artifact in artifacts.items()
    }

    def observe(row: int, kv: LayerKV) -> None:
        for name, artifact in artifacts.items():
            sinks = artifact.spec.sink_tokens
            for kind, quantizer in quantizers[name][kv.layer].items():
                if not quantizer.outlier_cap:
                    continue
                outliers = quantizer.normalise(coded_tensor(kv, kind, quantizer)[:, :, sinks:]).outliers
                assert outliers is not None
                found[name][kind][kv.layer, row, sinks:] = outliers[0].sum(-1).cpu()

    for row in range(len(ids)):
        with capture(model, partial(observe, row)):
            model.base_model(input_ids=ids[row : row + 1].to(input_device(model)), use_cache=False)
    return {
        name: TokenOutliers(
            {kind: counts.flatten(1) for kind, counts in found[name].items()},
            artifact.spec.sink_tokens,
            len(ids),
        )
        for name, artifact in artifacts.items()
    }
