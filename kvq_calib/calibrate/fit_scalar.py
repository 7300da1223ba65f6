"""Fits recipes with one table of levels for each layer's keys or values: KVQuant's, and the baselines.

Thresholds of channels are quantiles of each channel's histogram. Levels are fitted to the distribution of normalised
values, weighted by squared gradients of the loss if the recipe says so (KVQuant section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvq_calib.calibrate.fitter import Fitted, Materials, Recipe, layer_params, register
from kvq_calib.calibrate.plan import Captured, ChannelView, ObservedKey, Stage, Table, View, not_finite
from kvq_calib.calibrate.statistics import ChannelHistogram, LevelHistogram
from kvq_calib.calibrate.texts import Source, Text, text_of
from kvq_calib.codec.scalar import ScalarParams, ScalarQuantizer
from kvq_calib.fit.kmeans import Floats
from kvq_calib.fit.levels import DATA_FREE, fit_levels, q_norm, storable
from kvq_calib.schema.cached import CachedTensor
from kvq_calib.schema.geometry import KVGeometry
from kvq_calib.schema.recipe import CalibrationConfig
from kvq_calib.schema.spec import QuantSpec, ScalarSpec, StorageDtype

__all__ = ["LevelsKey", "NormalisedValues", "NormalisedView", "ScalarFitter", "SketchKey"]

#: Smallest scale; a constant channel needs a positive one, too.
_SMALLEST_SCALE = 1e-8

Thresholds = tuple[Tensor | None, Tensor | None]
"""Calibrated scale and zero point per channel, float32 ``[C]`` each, or ``None``."""


@dataclass(frozen=True)
class SketchKey(ObservedKey[ChannelHistogram, Tensor]):
    """Key of the distribution of every channel."""

    def empty(self, geometry: KVGeometry) -> ChannelHistogram:
        """See :class:`kvq_calib.calibrate.plan.Key`."""
        return ChannelHistogram(self.view.tensor.shape_in(geometry).channels)

    def add(self, statistics: ChannelHistogram, seen: Tensor) -> None:
        """See :class:`kvq_calib.calibrate.plan.ObservedKey`."""
        statistics.update(seen)


@dataclass(frozen=True)
class NormalisedValues:
    """Keys or values on the scale of their levels.

    Attributes:
        normalised: float32 ``[N, C]``.
        outliers: bool ``[N, C]``, or ``None`` where there are none.
        weights: float ``[N, C]``, squared gradients of the loss with respect to ``normalised``; or ``None``.
    """

    normalised: Tensor
    outliers: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True)
class NormalisedView(View[NormalisedValues]):
    """Keys or values on the scale of their levels.

    Attributes:
        spec: how they are normalised; see :func:`_normalisation`.
        storage: dtype of thresholds per token.
        sinks: number of first tokens of each window to leave out.
        sketch: key of the distribution from which calibrated thresholds come.
        weighted: whether values are weighted by squared gradients.
    """

    spec: ScalarSpec
    storage: StorageDtype
    sinks: int
    sketch: SketchKey | None
    weighted: bool

    @property
    def needs_gradients(self) -> bool:
        """Whether values are weighted."""
        return self.weighted

    def reader(self, geometry: KVGeometry, totals: Table) -> Callable[[Captured], NormalisedValues]:
        """See :class:`kvq_calib.calibrate.plan.View`."""
        spec, levels = self.spec, torch.zeros(1, 1 << self.spec.bits)  # the levels are not used
        params = ScalarParams(levels, *thresholds(spec, self.sketch, totals))
        whole = ScalarQuantizer(spec, params, self.tensor.shape_in(geometry), storage_dtype=self.storage)

        def read(captured: Captured) -> NormalisedValues:
            x = captured.values_of(self.tensor.kind, spec.pre_rope)[:, :, self.sinks :]
            gradient = captured.gradient_of(self.tensor.kind, spec.pre_rope)
            quantizer = whole.to(x.device)
            values = quantizer.normalise(x)
            if not bool(torch.isfinite(values.normalised.sum())):
                raise not_finite(self.tensor)
            weights = None
            if gradient is not None:
                # The gradient with respect to y, times the scale, is that with respect to the normalised value.
                weights = (quantizer.transform(gradient[:, :, self.sinks :]) * values.scale).square()
                if quantizer.channel_normalised:
                    weights = weights * quantizer.scale.square()
                weights = weights.flatten(0, 1)
            outliers = None if values.outliers is None else values.outliers.flatten(0, 1)
            return NormalisedValues(values.normalised.flatten(0, 1), outliers, weights)

        return read


@dataclass(frozen=True)
class LevelsKey(ObservedKey[LevelHistogram, NormalisedValues]):
    """Key of the distribution to which a table of levels is fitted."""

    def empty(self, geometry: KVGeometry) -> LevelHistogram:
        """See :class:`kvq_calib.calibrate.plan.Key`."""
        return LevelHistogram(weighted=self.view.needs_gradients)

    def add(self, statistics: LevelHistogram, seen: NormalisedValues) -> None:
        """See :class:`kvq_calib.calibrate.plan.ObservedKey`."""
        statistics.update(seen.normalised, seen.outliers, seen.weights)


def thresholds(spec: ScalarSpec, sketch: SketchKey | None, totals: Table) -> Thresholds:
    """Calibrated thresholds of every channel from its quantiles; ``None`` without a sketch."""
    if sketch is None:
        return None, None
    found, tail = totals.get(sketch), spec.outliers.fraction / 2
    low, high = found.quantile(tail), found.quantile(1 - tail)
    return ((high - low) / 2).clamp(min=_SMALLEST_SCALE), (high + low) / 2


def _normalisation(spec: ScalarSpec) -> ScalarSpec:
    """The part of a spec that defines normalisation. Recipes that agree in it share a distribution."""
    return spec.model_copy(update={"bits": 1, "levels": "uniform", "q_norm": False})


@dataclass(frozen=True)
class _Tensor:
    """One layer's keys or values under the recipe.

    Attributes:
        spec: how they are quantized.
        sketch: key of the channels' distributions, if thresholds are calibrated.
        distribution: key of the distribution of normalised values, if needed.
    """

    spec: ScalarSpec
    sketch: SketchKey | None
    distribution: LevelsKey | None


@register("scalar")
class ScalarFitter:
    """Fits one table of levels for each layer's keys or values.

    Args:
        recipe: the recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        text = text_of({Source.CALIBRATION: recipe.windows})
        self._tensors = {
            tensor: _asked(tensor, spec, recipe.config, text) for tensor, spec in recipe.tensors.items()
        }

    def keys(self, stage: Stage) -> Iterable[ObservedKey[Any, Any]]:
        """See :class:`kvq_calib.calibrate.fitter.Fitter`."""
        for tensor in self._tensors.values():
            if stage is Stage.THRESHOLDS and tensor.sketch is not None:
                yield tensor.sketch
            if stage is Stage.CODEBOOKS and tensor.distribution is not None:
                yield tensor.distribution

    def fit(self, materials: Materials) -> Fitted:
        """See :class:`kvq_calib.calibrate.fitter.Fitter`."""
        totals = materials.totals
        params = {at: self._params(tensor, totals) for at, tensor in self._tensors.items()}
        outliers = {
            at: totals.get(tensor.distribution).outliers_per_token
            for at, tensor in self._tensors.items()
            if tensor.distribution is not None and tensor.spec.outliers.fraction > 0
        }
        return Fitted(self._recipe.config.cache, layer_params(params), outliers_per_token=outliers)

    def _params(self, tensor: _Tensor, totals: Table) -> ScalarParams:
        levels = torch.tensor(self._levels(tensor, totals)[None], dtype=torch.float32)
        return ScalarParams(levels, *thresholds(tensor.spec, tensor.sketch, totals))

    def _levels(self, tensor: _Tensor, totals: Table) -> Floats:
        spec, config = tensor.spec, self._recipe.config
        if tensor.distribution is None:
            return fit_levels(spec.levels, spec.bits, np.zeros(1), np.zeros(1))
        histogram = totals.get(tensor.distribution)
        points = histogram.points.numpy()
        levels = fit_levels(
            spec.levels,
            spec.bits,
            points,
            histogram.weights.numpy(),
            solver=config.fit.solver,
            seed=config.seed,
        )
        if spec.q_norm:
            levels = storable(q_norm(levels, points, histogram.counts.numpy()))
        return levels


def _asked(tensor: CachedTensor, spec: QuantSpec, config: CalibrationConfig, text: Text) -> _Tensor:
    """The statistics that a recipe needs for one layer's keys or values."""
    assert isinstance(spec, ScalarSpec)
    sinks = config.cache.sink_tokens
    sketch = None
    if spec.calibrated_thresholds:
        pre_rope = spec.pre_rope or tensor.kind == "value"
        sketch = SketchKey(ChannelView(tensor, text, sinks, pre_rope))
    fitted = spec.levels not in DATA_FREE
    if not fitted and spec.outliers.fraction == 0:
        return _Tensor(spec, sketch, None)
    weighted = fitted and config.fit.weights == "fisher"
    view = NormalisedView(
        tensor, text, _normalisation(spec), config.cache.storage_dtype, sinks, sketch, weighted
    )
    return _Tensor(spec, sketch, LevelsKey(view))
