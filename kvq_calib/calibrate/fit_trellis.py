"""Fits recipes that give every channel a width under one budget (kvq*).

The moments of channels give the rotation of key pairs. Weighted distributions of the rotated channels give the error of
each channel at each width, and with a budget the widths and levels (:mod:`kvq_calib.calibrate.rate_distortion`). Then
the cost of errors is measured on the model's output, and the allocation corrected. If the recipe says so, the
parameters are finally trained by gradient descent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.distribution import ChannelMoments, WeightedHistogram, pair_channels
from kvq_calib.calibrate.error_compensation import GradientCovariance
from kvq_calib.calibrate.finetune import learn
from kvq_calib.calibrate.fitter import Fitted, Materials, Recipe, register
from kvq_calib.calibrate.noise_shaping import NeighbourGradients
from kvq_calib.calibrate.plan import Captured, ChannelView, ObservedKey, Stage, Table, View, not_finite
from kvq_calib.calibrate.rate_distortion import TensorStatistics, fit_layers, pair_angles, spec_by_layer
from kvq_calib.calibrate.sensitivity import ErrorSensitivity
from kvq_calib.calibrate.texts import Source, Text, TextLibrary, first_quarter, text_of
from kvq_calib.calibrate.token_weighting import TokenCosts
from kvq_calib.calibrate.vocabulary_samples import sampled_positions
from kvq_calib.codec.pair_rotation import turn_pairs
from kvq_calib.codec.params import LayerParams
from kvq_calib.schema.cached import CachedTensor
from kvq_calib.schema.geometry import KVGeometry
from kvq_calib.schema.recipe import AllocationConfig
from kvq_calib.schema.spec import QuantSpec, TrellisSpec

__all__ = [
    "CovarianceKey",
    "DistributionKey",
    "MomentsKey",
    "NeighbourGradientsKey",
    "PrincipalValues",
    "PrincipalView",
    "TokenCostsKey",
    "TrellisFitter",
]

#: Text for measuring the cost of errors: number of windows, and tokens of each.
_SENSITIVITY_PIECES = 4
_SENSITIVITY_TOKENS = 768


@dataclass(frozen=True)
class MomentsKey(ObservedKey[ChannelMoments, Tensor]):
    """Key of the moments of every channel, and of RoPE pairs if keys are rotated."""

    def empty(self, geometry: KVGeometry) -> ChannelMoments:
        """See :class:`kvq_calib.calibrate.plan.Key`."""
        shape = self.view.tensor.shape_in(geometry)
        return ChannelMoments(shape.channels, *pair_channels(self.view.tensor.rope_in(geometry), *shape))

    def add(self, statistics: ChannelMoments, seen: Tensor) -> None:
        """See :class:`kvq_calib.calibrate.plan.ObservedKey`."""
        statistics.update(seen)


@dataclass(frozen=True)
class PrincipalValues:
    """Keys before RoPE with pairs rotated to principal axes, or values, and gradients.

    Attributes:
        y: float32 ``[N, C]`` on the CPU.
        gradient: gradient of the loss with respect to ``y``, or ``None``.
        mean, deviation: mean and standard deviation of each channel, float64 ``[C]``, the same for all windows.
        unit: mean over tokens of the sum of squares of each head, float32 ``[H]``, the same for all windows.
    """

    y: Tensor
    gradient: Tensor | None
    mean: Tensor
    deviation: Tensor
    unit: Tensor

    @property
    def weights(self) -> Tensor | None:
        """Squared gradients, float64 ``[N, C]``; ``None`` without gradients."""
        return None if self.gradient is None else self.gradient.double().square()


@dataclass(frozen=True)
class PrincipalView(View[PrincipalValues]):
    """Keys before RoPE, or values, in the form in which they are quantized.

    Attributes:
        turned: whether pairs are rotated to their principal axes.
        sinks: number of first tokens of each window to leave out.
        moments: key of the moments, which give the angles.
        weighted: whether gradients are needed.
        samples_only: whether to use only vocabulary samples.
    """

    turned: bool
    sinks: int
    moments: MomentsKey
    weighted: bool
    samples_only: bool = False

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients are needed."""
        return self.weighted

    def reader(self, geometry: KVGeometry, totals: Table) -> Callable[[Captured], PrincipalValues]:
        """See :class:`kvq_calib.calibrate.plan.View`."""
        moments, rope = totals.get(self.moments), self.tensor.rope_in(geometry)
        angle = pair_angles(moments, self.turned, rope)
        mean, deviation = moments.turned(angle)
        unit = moments.squared_size(self.tensor.shape_in(geometry).heads)
        tokens = sampled_positions(self.sinks) if self.samples_only else slice(self.sinks, None)

        def channels(x: Tensor) -> Tensor:
            x = x[:, :, tokens].cpu().float()
            if angle is not None and rope is not None:
                x = turn_pairs(x, angle, rope)
            return x.transpose(1, 2).flatten(2).flatten(0, 1)

        def read(captured: Captured) -> PrincipalValues:
            y = channels(captured.values_of(self.tensor.kind))
            if not bool(torch.isfinite(y.sum())):
                raise not_finite(self.tensor)
            gradient = captured.gradient_of(self.tensor.kind)
            rotated = None if gradient is None else channels(gradient)
            return PrincipalValues(y, rotated, mean, deviation, unit)

        return read


@dataclass(frozen=True)
class DistributionKey(ObservedKey[WeightedHistogram, PrincipalValues]):
    """Key of the distribution of every channel, weighted by squared gradients if the view has them."""

    def empty(self, geometry: KVGeometry) -> WeightedHistogram:
        """See :class:`kvq_calib.calibrate.plan.Key`."""
        return WeightedHistogram(self.view.tensor.shape_in(geometry).channels)

    def add(self, statistics: WeightedHistogram, seen: PrincipalValues) -> None:
        """See :class:`kvq_calib.calibrate.plan.ObservedKey`."""
        statistics.update(seen.y, seen.weights, seen.mean, seen.deviation)


@dataclass(frozen=True)
class CovarianceKey(ObservedKey[GradientCovariance, PrincipalValues]):
    """Key of the covariance of the gradients of each head. The view has gradients."""

    def empty(self, geometry: KVGeometry) -> GradientCovariance:
        """See :class:`kvq_calib.calibrate.plan.Key`."""
        return GradientCovariance(*self.view.tensor.shape_in(geometry))

    def add(self, statistics: GradientCovariance, seen: PrincipalValues) -> None:
        """See :class:`kvq_calib.calibrate.plan.ObservedKey`."""
        assert seen.gradient is not None
        statistics.update(seen.gradient)


@dataclass(frozen=True)
class TokenCostsKey(ObservedKey[TokenCosts, PrincipalValues]):
    """Key of the squared gradients of tokens by the size of their vectors. The view has gradients."""

    def empty(self, geometry: KVGeometry) -> TokenCosts:
        """See :class:`kvq_calib.calibrate.plan.Key`."""
        return TokenCosts(self.view.tensor.shape_in(geometry).heads)

    def add(self, statistics: TokenCosts, seen: PrincipalValues) -> None:
        """See :class:`kvq_calib.calibrate.plan.ObservedKey`."""
        assert seen.gradient is not None
        statistics.update(seen.y, seen.gradient, seen.unit)


@dataclass(frozen=True)
class NeighbourGradientsKey(ObservedKey[NeighbourGradients, PrincipalValues]):
    """Key of the correlation of gradients of neighbouring tokens. The view has gradients."""

    def empty(self, geometry: KVGeometry) -> NeighbourGradients:
        """See :class:`kvq_calib.calibrate.plan.Key`."""
        return NeighbourGradients(self.view.tensor.shape_in(geometry).heads)

    def add(self, statistics: NeighbourGradients, seen: PrincipalValues) -> None:
        """See :class:`kvq_calib.calibrate.plan.ObservedKey`."""
        assert seen.gradient is not None
        statistics.update(seen.gradient)


@dataclass(frozen=True)
class _Tensor:
    """The statistics that the recipe needs for one layer's keys or values; see :class:`TensorStatistics`."""

    moments: MomentsKey
    weighted: DistributionKey
    covariance: CovarianceKey | None
    token_costs: TokenCostsKey | None
    neighbours: NeighbourGradientsKey | None
    vocabulary: DistributionKey | None

    def keys(self, stage: Stage) -> list[ObservedKey[Any, Any]]:
        """The keys of a stage."""
        asked: dict[Stage, tuple[ObservedKey[Any, Any] | None, ...]] = {
            Stage.THRESHOLDS: (self.moments,),
            Stage.VOCABULARY: (self.vocabulary,),
            Stage.CODEBOOKS: (self.weighted, self.covariance, self.token_costs, self.neighbours),
        }
        return [key for key in asked[stage] if key is not None]

    def statistics(self, totals: Table) -> TensorStatistics:
        """The collected statistics."""
        return TensorStatistics(
            moments=totals.get(self.moments),
            weighted=totals.get(self.weighted),
            covariance=None if self.covariance is None else totals.get(self.covariance),
            token_costs=None if self.token_costs is None else totals.get(self.token_costs),
            neighbours=None if self.neighbours is None else totals.get(self.neighbours),
            vocabulary=None if self.vocabulary is None else totals.get(self.vocabulary),
        )


@register("trellis")
class TrellisFitter:
    """Fits widths and levels for every channel.

    Args:
        recipe: the recipe, with an allocation.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.config.allocation is not None
        self._recipe, self._settings = recipe, recipe.config.allocation
        self._generated = _generated_text(self._settings, recipe.windows)
        self._tensors = {tensor: self._asked(tensor, spec) for tensor, spec in recipe.tensors.items()}

    @property
    def _text(self) -> Text:
        """The calibration text, then the recipe's share of self-generated text."""
        return Text(((Source.CALIBRATION, self._recipe.windows), *self._generated.parts))

    def _asked(self, tensor: CachedTensor, spec: QuantSpec) -> _Tensor:
        assert isinstance(spec, TrellisSpec)
        sinks = self._recipe.config.cache.sink_tokens
        # Moments give the angles and the bins, and need no precision.
        moments = MomentsKey(ChannelView(tensor, first_quarter(self._text), sinks, pre_rope=True))
        rotated = spec.pair_rotation
        weighted = self._recipe.config.fit.weights == "fisher"
        view = PrincipalView(tensor, self._text, rotated, sinks, moments, weighted)
        vocabulary = None
        if self._settings.vocabulary_samples > 0 and self._settings.shrinkage > 0:
            text = text_of({Source.VOCABULARY_SAMPLES: self._recipe.windows})
            vocabulary = DistributionKey(
                PrincipalView(tensor, text, rotated, sinks, moments, weighted=False, samples_only=True)
            )
        return _Tensor(
            moments,
            DistributionKey(view),
            CovarianceKey(view) if spec.error_compensation is not None else None,
            TokenCostsKey(view) if spec.token_weighting else None,
            NeighbourGradientsKey(view) if spec.noise_shaping else None,
            vocabulary,
        )

    def keys(self, stage: Stage) -> Iterable[ObservedKey[Any, Any]]:
        """See :class:`kvq_calib.calibrate.fitter.Fitter`."""
        for tensor in self._tensors.values():
            yield from tensor.keys(stage)

    def fit(self, materials: Materials) -> Fitted:
        """See :class:`kvq_calib.calibrate.fitter.Fitter`."""
        geometry = self._recipe.geometry
        found = {at: tensor.statistics(materials.totals) for at, tensor in self._tensors.items()}
        covariances = {at: own.covariance for at, own in found.items() if own.covariance is not None}
        cache = spec_by_layer(self._recipe.config.cache, self._settings, geometry, covariances)

        pieces = self._sensitivity_pieces(materials.library)
        sensitivity = ErrorSensitivity(materials.model, pieces, recompute=self._recipe.config.recompute)

        def measure(layers: tuple[LayerParams, ...]) -> dict[CachedTensor, Tensor]:
            return sensitivity.measure(KVArtifact(cache, geometry, layers))

        layers = fit_layers(cache, self._settings, geometry, found, measure)
        if self._recipe.config.learn is None:
            return Fitted(cache, layers)
        return self._learned(KVArtifact(cache, geometry, layers), materials)

    def _sensitivity_pieces(self, library: TextLibrary) -> Tensor:
        """The beginnings of windows of the calibration text. If there is self-generated text, half are from that."""
        own = library.rows(self._generated)[: _SENSITIVITY_PIECES // 2]
        rows = torch.cat((library.calibration[: _SENSITIVITY_PIECES - len(own)], own))
        return rows[:, :_SENSITIVITY_TOKENS]

    def _learned(self, draft: KVArtifact, materials: Materials) -> Fitted:
        """Train the fitted parameters, and record the KL divergence on held-out windows before and after."""
        config = self._recipe.config
        assert config.learn is not None
        started = time.monotonic()

        def progress(what: str, done: int, total: int) -> None:  # each recipe is a separate part
            materials.progress(f"{what} {self._recipe.name}", done, total)

        text = materials.library.rows(self._text)
        # The last windows are held out: one of each kind of text.
        last = sorted({self._recipe.windows - 1, len(text) - 1})
        rest = [row for row in range(len(text)) if row not in last]
        learned = learn(
            materials.model,
            text[rest + last],
            draft,
            config.learn,
            seed=config.seed,
            held_out=len(last),
            recompute=config.recompute,
            progress=progress,
        )
        materials.clock.finished("learning", started)
        facts = {"kl_before": learned.before, "kl_after": learned.after, "fraction": learned.fraction}
        return Fitted(draft.spec, learned.layers, {"learning": facts})


def _generated_text(settings: AllocationConfig, windows: int) -> Text:
    """A recipe's share of self-generated text, for so many windows of calibration text."""
    source = Source.SELF_GENERATED_REPEATING if settings.repeats else Source.SELF_GENERATED
    return text_of({source: round(settings.self_generated * windows)})
