"""What each layer costs, stores and sees: the measurements behind the report's charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.calibrate.statistics import LEVEL_BINS, LevelHistogram
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.size import packed_tokens, storage_bytes
from kvq_calib.errors import KVQError
from kvq_calib.evaluate.perplexity import Comparison
from kvq_calib.evaluate.prefill import Place, quantized_prefill
from kvq_calib.model.capture import LayerKV, capture
from kvq_calib.schema.spec import KINDS, Kind

__all__ = [
    "CodebookUse",
    "Sensitivity",
    "TokenOutliers",
    "codebook_uses",
    "count_outliers",
    "fit_weights",
    "layer_bits",
    "measure_sensitivity",
]

Progress = Callable[[str, int, int], None]

#: Bins that a chart shows of the ``LEVEL_BINS`` that are counted.
SHOWN_BINS = 64


def layer_bits(artifact: KVArtifact, context: int) -> dict[Kind, list[float]]:
    """Bits per element of the keys and of the values of each layer, everything counted but what layers share.

    Args:
        artifact: its outliers count as measured at calibration.
        context: tokens of one sequence.
    """
    bits: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    recent, sinks = artifact.spec.recent_tokens, artifact.spec.sink_tokens
    for index, quantizers in enumerate(artifact.quantizers()):
        geometry = artifact.geometry.layers[index]
        first, stop = packed_tokens(context, recent, geometry.sliding_window)
        for kind, quantizer in quantizers.items():
            rates = artifact.outliers_per_token.get(kind)
            sizes = storage_bytes(
                quantizer.layout,
                context=context,
                sink_tokens=sinks,
                recent_tokens=recent,
                sliding_window=geometry.sliding_window,
                outliers=(rates[index] if rates else 0.0) * (stop - first),
            )
            held = sum(sizes.values()) + quantizer.params.held_bytes
            bits[kind].append(8 * held / (geometry.channels * geometry.held_tokens(context)))
    return bits


@dataclass(frozen=True)
class Sensitivity:
    """KL divergence from the unquantized model, nats per predicted token.

    Attributes:
        layers: by kind, when only this layer's keys or values are quantized.
        whole: when everything is.
        tokens: predicted tokens it was measured on.
    """

    layers: Mapping[Kind, Sequence[float]]
    whole: float
    tokens: int


@torch.no_grad()
def measure_sensitivity(
    model: Any, artifacts: Mapping[str, KVArtifact], ids: Tensor, progress: Progress | None = None
) -> dict[str, Sensitivity]:
    """Quantize one layer's keys or values at a time and compare the model's predictions.

    Takes two forward passes per layer, artifact and window, and a few more.

    Args:
        model: the unquantized causal language model.
        artifacts: by name; they must fit the model.
        ids: int64 ``[N, T]``.
        progress: told after every forward pass.

    Raises:
        KVQError: the model's predictions are not finite.
    """
    places: dict[str, list[Place | None]] = {
        name: [None, *((layer, kind) for layer in range(len(artifact.layers)) for kind in KINDS)]
        for name, artifact in artifacts.items()
    }
    comparisons = {(name, place): Comparison() for name, own in places.items() for place in own}
    total, done = len(ids) * len(comparisons), 0
    for row in ids.to(model.device):
        baseline = model(input_ids=row[None], use_cache=False).logits[0]
        if not bool(torch.isfinite(baseline.sum())):
            raise KVQError("the unquantized model's predictions are not finite; try --dtype float32")
        for (name, place), comparison in comparisons.items():
            with quantized_prefill(model, artifacts[name], None if place is None else {place}):
                comparison.add(baseline, model(input_ids=row[None], use_cache=False).logits[0], row)
            done += 1
            if progress is not None:
                progress("layer by layer", done, total)

    def divergence(name: str, place: Place | None) -> float:
        return comparisons[name, place].result(name, 0.0).kl_mean

    return {
        name: Sensitivity(
            {kind: [divergence(name, (n, kind)) for n in range(len(artifact.layers))] for kind in KINDS},
            divergence(name, None),
            comparisons[name, None].tokens,
        )
        for name, artifact in artifacts.items()
    }


def _subject(kv: LayerKV, kind: Kind, quantizer: Quantizer) -> Tensor:
    """The tensor that is quantized, ``[B, H, T, D]``."""
    if kind == "value":
        return kv.values
    return kv.keys if quantizer.spec.pre_rope else kv.rotated_keys


@dataclass(frozen=True)
class TokenOutliers:
    """How many outliers the tokens of a text have.

    Attributes:
        found: by kind, int64 ``[layers, N * T]``; 0 where a token is kept exact as a sink.
        sink_tokens: tokens at the start of each window that are kept exact.
        windows: ``N``.
    """

    found: Mapping[Kind, Tensor]
    sink_tokens: int
    windows: int

    def packed(self, kind: Kind) -> Tensor:
        """Without the sinks, int64 ``[layers, N * (T - sinks)]``."""
        by_window: Tensor = self.found[kind].unflatten(1, (self.windows, -1))
        return by_window[:, :, self.sink_tokens :].flatten(1)


@torch.no_grad()
def count_outliers(model: Any, artifacts: Mapping[str, KVArtifact], ids: Tensor) -> dict[str, TokenOutliers]:
    """Count the outliers of every token in every layer, as the unquantized model computes it.

    Args:
        model: a causal language model.
        artifacts: by name; they must fit the model.
        ids: int64 ``[N, T]``.
    """
    quantizers = {name: artifact.quantizers(model.device) for name, artifact in artifacts.items()}
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
                outliers = quantizer.normalise(_subject(kv, kind, quantizer)[:, :, sinks:]).outliers
                assert outliers is not None
                found[name][kind][kv.layer, row, sinks:] = outliers[0].sum(-1).cpu()

    for row in range(len(ids)):
        with capture(model, partial(observe, row)):
            model.base_model(input_ids=ids[row : row + 1].to(model.device), use_cache=False)
    return {
        name: TokenOutliers(
            {kind: counts.flatten(1) for kind, counts in found[name].items()},
            artifact.spec.sink_tokens,
            len(ids),
        )
        for name, artifact in artifacts.items()
    }


@dataclass
class CodebookUse:
    """A codebook and the distribution of what it codes.

    Attributes:
        levels: sorted, in the normalised range ``[-1, 1]``.
        bits: width of its codes.
        channels, of: channels that use it, of all channels of the layer.
        counts: normalised values in each of ``SHOWN_BINS`` equal bins over ``[-1, 1]``.
        weights: the same, each value weighted; equal to ``counts`` where the fit has no weights.
        weighted: whether it has.
    """

    levels: list[float]
    bits: int
    channels: int
    of: int
    weighted: bool
    counts: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class _Collector:
    """Collects the distribution over the codebook that most channels of a layer's keys or values share."""

    def __init__(self, quantizer: Quantizer, weighted: bool) -> None:
        self.quantizer = quantizer
        index = quantizer.params.codebook_index.to(torch.int64)
        coded = quantizer.params.bits > 0
        rows = index[coded] if bool(coded.any()) else index
        row = int(torch.bincount(rows).argmax())
        self.channels = (index == row).nonzero()[:, 0]
        bits = int(quantizer.params.bits[self.channels[0]])
        self.use = CodebookUse(
            levels=quantizer.table[row, : quantizer.spec.level_count(bits)].tolist(),
            bits=bits,
            channels=len(self.channels),
            of=len(index),
            weighted=weighted,
        )
        self.histogram = LevelHistogram(weighted)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add keys or values ``[B, H, T, D]`` and the gradients of the loss with respect to them."""
        values = self.quantizer.normalise(x)
        weights = None
        if self.use.weighted:
            # As calibration weighs: the gradient on the codebook's scale, squared.
            weights = (self.quantizer.transform(gradient) * values.scale).square()
            if self.quantizer.spec.channel_normalized:
                weights = weights * self.quantizer.scale.square()
            weights = weights[..., self.channels].flatten(0, 1)
        outliers = None if values.outliers is None else values.outliers[..., self.channels].flatten(0, 1)
        self.histogram.update(values.normalised[..., self.channels].flatten(0, 1), outliers, weights)

    def finish(self) -> CodebookUse:
        """With the bins that a chart shows."""
        for name in ("counts", "weights"):
            bins: Tensor = getattr(self.histogram, name)
            setattr(self.use, name, bins.view(SHOWN_BINS, LEVEL_BINS // SHOWN_BINS).sum(1).tolist())
        return self.use


def codebook_uses(
    model: Any, artifacts: Mapping[str, KVArtifact], ids: Tensor, progress: Progress | None = None
) -> dict[str, dict[Kind, list[CodebookUse]]]:
    """Collect the distribution under the most used codebook of each layer and kind, as calibration weighs it.

    Args:
        model: a causal language model in eval mode.
        artifacts: by name; they must fit the model.
        ids: int64 ``[N, T]``.
        progress: told after every window.
    """
    collectors = {
        name: [
            {
                kind: _Collector(quantizer, fit_weights(artifact) == "fisher")
                for kind, quantizer in layer.items()
            }
            for layer in artifact.quantizers(model.device)
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
                    if not collector.quantizer.spec.pre_rope:
                        rotated = kv.rotation.rotate(grad_keys) if rotated is None else rotated
                        gradient = rotated
                x = _subject(kv, kind, collector.quantizer)
                collector.add(x[:, :, sinks:], gradient[:, :, sinks:])

    for index in range(len(ids)):
        fisher_pass(model, ids[index : index + 1].to(model.device), observe)
        if progress is not None:
            progress("distributions", index + 1, len(ids))
    return {
        name: {kind: [layer[kind].finish() for layer in layers] for kind in KINDS}
        for name, layers in collectors.items()
    }


def fit_weights(artifact: KVArtifact) -> str:
    """How the artifact's levels were weighed in the fit: ``fisher``, ``uniform``, or ``unknown`` where it does not say."""
    settings = artifact.calibration.get("settings")
    fit = settings.get("fit") if isinstance(settings, Mapping) else None
    weights = fit.get("weights") if isinstance(fit, Mapping) else None
    return weights if isinstance(weights, str) else "unknown"
