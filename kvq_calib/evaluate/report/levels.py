"""The levels of an artifact, and the distributions they code, weighted as in calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.calibrate.statistics import LEVEL_BINS, LevelHistogram
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.evaluate.prefill import coded_after_rope, coded_tensor
from kvq_calib.model.capture import LayerKV
from kvq_calib.model.placement import input_device
from kvq_calib.progress import Progress
from kvq_calib.schema.spec import KINDS, Kind

__all__ = ["SHOWN_BINS", "LevelUse", "fit_weights", "level_uses"]

#: Number of bins in a chart; ``LEVEL_BINS`` bins are counted.
SHOWN_BINS = 64


@dataclass
class LevelUse:
    """Levels and the distribution of the values they code.

    Attributes:
        levels: sorted, in the normalised range ``[-1, 1]``.
        bits: width of the codes.
        channels, of: number of channels with these levels, and number of channels of the layer.
        counts: normalised values in each of ``SHOWN_BINS`` equal bins over ``[-1, 1]``.
        weights: the same with each value weighted; equal to ``counts`` if the fit has no weights.
        weighted: whether the fit has weights.
        compensated: whether the coded values include errors of other coordinates (error compensation).
    """

    levels: list[float]
    bits: int
    channels: int
    of: int
    weighted: bool
    compensated: bool
    counts: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class _Collector:
    """Collects the distribution of all channels if they share levels, or else of a typical channel."""

    def __init__(self, quantizer: Quantizer, weighted: bool) -> None:
        self.quantizer = quantizer
        widths, shared = quantizer.layout.widths, quantizer.shared_levels
        self.channels = torch.arange(len(widths)) if shared is not None else _typical_channel(quantizer)
        first = int(self.channels[0])
        levels = quantizer.levels[first, : quantizer.level_count(widths[first])]
        #: Normalises the channels to [-1, 1]; by their thresholds if they have any.
        self.centre, self.half = 0.0, 1.0
        held = quantizer.channel_range()
        if held is not None and not quantizer.has_channel_thresholds:
            self.centre, self.half = float(held[0][first]), float(held[1][first]) or 1.0
        self.use = LevelUse(
            levels=((levels - self.centre) / self.half).tolist(),
            bits=widths[first],
            channels=len(self.channels),
            of=len(widths),
            weighted=weighted,
            compensated=quantizer.compensates,
        )
        self.histogram = LevelHistogram(weighted)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add keys or values ``[B, H, T, D]``, and the gradients of the loss with respect to them."""
        values = self.quantizer.normalise(x)
        weights = None
        if self.use.weighted:
            # Weighted as in calibration: by the squared gradient with respect to the normalised value.
            weights = (self.quantizer.transform(gradient) * values.scale * self.half).square()
            if self.quantizer.channel_normalised:
                weights = weights * self.quantizer.scale.square()
            weights = weights[..., self.channels].flatten(0, 1)
        outliers = None if values.outliers is None else values.outliers[..., self.channels].flatten(0, 1)
        seen = (values.normalised[..., self.channels] - self.centre) / self.half
        self.histogram.update(seen.flatten(0, 1), outliers, weights)

    def finish(self) -> LevelUse:
        """The result, with the bins of a chart."""
        for name in ("counts", "weights"):
            bins: Tensor = getattr(self.histogram, name)
            setattr(self.use, name, bins.view(SHOWN_BINS, LEVEL_BINS // SHOWN_BINS).sum(1).tolist())
        return self.use


def _typical_channel(quantizer: Quantizer) -> Tensor:
    """The channel with the median range of levels, among those of the most frequent width: int64 ``[1]``."""
    widths = torch.tensor(quantizer.layout.widths)
    coded = widths[widths > 0] if bool((widths > 0).any()) else widths
    members = (widths == int(torch.bincount(coded).argmax())).nonzero()[:, 0]
    levels = quantizer.levels.cpu()[members]
    order = (levels[:, -1] - levels[:, 0]).argsort()
    return members[order[(len(order) - 1) // 2]][None]


def level_uses(
    model: Any, artifacts: Mapping[str, KVArtifact], ids: Tensor, progress: Progress | None = None
) -> dict[str, dict[Kind, list[LevelUse]]]:
    """Collect the distribution that the levels of each layer and kind code, weighted as in calibration.

    Args:
        model: a causal language model in eval mode.
        artifacts: artifacts by name; they must fit the model.
        ids: int64 ``[N, T]``.
        progress: called after every window.
    """
    collectors = {
        name: [
            {
                kind: _Collector(quantizer, fit_weights(artifact) == "fisher")
                for kind, quantizer in layer.items()
            }
            for layer in artifact.quantizers(input_device(model))
        ]
        for name, artifact in artifacts.items()
    }

    def observe(kv: LayerKV, grad_keys: Tensor, grad_values: Tensor) -> None:
        rotated = None
        for name, artifact in artifacts.items():
            sinks = artifact.spec.sink_tokens
            for kind, collector in collectors[name][kv.layer].items():
                gradient = grad_values
                if kind == "key":
                    gradient = grad_keys
                    if coded_after_rope(collector.quantizer, kind):
                        rotated = kv.rotation.rotate(grad_keys) if rotated is None else rotated
                        gradient = rotated
                x = coded_tensor(kv, kind, collector.quantizer)
                collector.add(x[:, :, sinks:], gradient[:, :, sinks:])

    for index in range(len(ids)):
        fisher_pass(model, ids[index : index + 1].to(input_device(model)), observe)
        if progress is not None:
            progress("distributions", index + 1, len(ids))
    return {
        name: {kind: [layer[kind].finish() for layer in layers] for kind in KINDS}
        for name, layers in collectors.items()
    }


def fit_weights(artifact: KVArtifact) -> str:
    """The weights of the fit: ``fisher``, ``uniform``, or ``unknown`` if the artifact does not record them."""
    settings = artifact.calibration.get("settings")
    fit = settings.get("fit") if isinstance(settings, Mapping) else None
    weights = fit.get("weights") if isinstance(fit, Mapping) else None
    return weights if isinstance(weights, str) else "unknown"
