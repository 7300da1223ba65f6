"""From the weighted distributions of all channels to widths and levels, under one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.distribution import ChannelMoments, WeightedHistogram
from kvq_calib.calibrate.error_compensation import (
    CompensationFactors,
    GradientCovariance,
    compensation_factors,
)
from kvq_calib.calibrate.fitter import layer_params
from kvq_calib.calibrate.levels import DRAFT, FULL, Effort, errors_by_width, fit_levels
from kvq_calib.calibrate.noise_shaping import NeighbourGradients
from kvq_calib.calibrate.token_weighting import TokenCosts
from kvq_calib.codec.computed_levels import coefficient_counts
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.fit.allocation import allocate, within_budget
from kvq_calib.fit.width_groups import WidthGroups, channel_groups, pair_groups
from kvq_calib.schema.cached import CachedTensor, cached_tensors
from kvq_calib.schema.geometry import KVGeometry, RopeSpec, channel_pairs
from kvq_calib.schema.recipe import AllocationConfig
from kvq_calib.schema.spec import ErrorCompensationSpec, KVCacheSpec, LayerSpec, QuantSpec, TrellisSpec

__all__ = ["Measure", "TensorStatistics", "correction", "fit_layers", "pair_angles", "spec_by_layer"]

Measure = Callable[[tuple[LayerParams, ...]], Mapping[CachedTensor, Tensor]]
"""What the errors of a fit cost by head, in any unit: :func:`kvq_calib.calibrate.sensitivity.error_sensitivity`."""

#: How much of what compensation takes from the weights of a layer (in logarithms, on average) the allocation counts
#: on: errors that are handed on widen what a coordinate has to code. Between the coordinates of the layer it counts
#: on all of it.
_TRUST = 0.5
#: Share of what compensation saves on the calibration text that is left on other text.
_OTHER_TEXT = 0.7
#: The whole matrix of compensation is stored where it takes at most this share of what it saves.
_MATRIX_SHARE = 0.4
#: Columns of the factors of compensation that are tried.
_FACTOR_RANKS = (1, 2, 4, 8, 16, 32)
#: A measured error counts as at most and as at least this many times the estimated one. Measured of a single head,
#: small ones are noise, and can be negative.
_MOST, _LEAST = 64.0, 1 / 8


@dataclass(frozen=True)
class TensorStatistics:
    """What was collected of one layer's keys or values.

    Attributes:
        moments: of its channels.
        weighted: distribution of each channel.
        covariance: of the gradients, where errors are compensated.
        token_costs: squared gradients by the size of tokens, where paths weigh their tokens.
        neighbours: gradients of neighbouring tokens, where noise is shaped.
        vocabulary: distribution of values for tokens drawn from the vocabulary, in the bins of ``weighted``; without it
            that of the text stands alone.
    """

    moments: ChannelMoments
    weighted: WeightedHistogram
    covariance: GradientCovariance | None = None
    token_costs: TokenCosts | None = None
    neighbours: NeighbourGradients | None = None
    vocabulary: WeightedHistogram | None = None


def pair_angles(moments: ChannelMoments, turned: bool, rope: RopeSpec | None) -> Tensor | None:
    """The angles by which RoPE pairs of keys are rotated, float16 ``[H, P]``; ``None`` where they are not."""
    return moments.principal_angle() if turned and rope is not None else None


def spec_by_layer(
    cache: KVCacheSpec,
    settings: AllocationConfig,
    geometry: KVGeometry,
    covariances: Mapping[CachedTensor, GradientCovariance],
) -> KVCacheSpec:
    """The spec with error compensation as it pays in each layer at ``settings.context`` tokens, or left out.

    A matrix grows with the square of the head's size and is stored once, so that it weighs most in layers with large
    heads and a sliding window; factors of few columns save less and take far less. Where the matrix takes too large a
    share of what it saves, the factor that saves most beyond what it takes is stored. A rank that the spec gives is
    taken or left out.

    Args:
        cache: spec.
        settings: the context.
        geometry: of the model.
        covariances: of the gradients, where errors are compensated.
    """
    layers = list(cache.resolved(len(geometry.layers)))
    for at, covariance in covariances.items():
        layer, spec = geometry.layers[at.layer], layers[at.layer].of(at.kind)
        assert isinstance(spec, TrellisSpec) and spec.error_compensation is not None
        numbers = at.shape_in(geometry).channels * layer.held_tokens(settings.context)
        pays = _compensation_that_pays(spec.error_compensation, covariance.sums, numbers)
        changed = spec.model_copy(update={"error_compensation": pays})
        layers[at.layer] = layers[at.layer].model_copy(update={at.kind: changed})
    if layers == list(cache.resolved(len(layers))):
        return cache
    usual = LayerSpec(key=cache.key, value=cache.value)
    return cache.model_copy(update={"layers": {n: spec for n, spec in enumerate(layers) if spec != usual}})


def _compensation_that_pays(
    spec: ErrorCompensationSpec, covariance: Tensor, numbers: int
) -> ErrorCompensationSpec | None:
    """The compensation that pays on so many numbers, or ``None``.

    Args:
        spec: what the recipe asks for.
        covariance: of the gradients, float64 ``[H, D, D]``.
        numbers: that are held of the tensor.
    """
    stored, saved = {}, {}
    ranks = [rank for rank in _FACTOR_RANKS if 4 * rank <= covariance.shape[-1]]
    for rank in [spec.rank] if spec.rank else [0, *ranks]:
        found = compensation_factors(covariance, rank)
        stored[rank] = 8 * found.nbytes
        # An error a quarter as large is worth a bit of each number.
        saved[rank] = -_TRUST * float(found.left.log2().mean()) / 2 * numbers
        if rank == 0 and stored[rank] <= _MATRIX_SHARE * saved[rank]:
            return spec
    rank = max(saved, key=lambda each: _OTHER_TEXT * saved[each] - stored[each])
    if _OTHER_TEXT * saved[rank] <= stored[rank]:
        return None
    return spec.model_copy(update={"rank": rank})


@dataclass(frozen=True)
class _Tensor:
    """One layer's keys or values on the way to their parameters.

    Attributes:
        at: which.
        spec: how they are quantized.
        errors: what every width costs every channel, float64 ``[C, widths]``.
        points, weights: the distributions that levels are fitted to, float64 ``[C, n]``.
        constant: the parameters that do not depend on the widths, by name.
        groups: channels that share a width.
        held: tokens that a cache holds of them.
    """

    at: CachedTensor
    spec: TrellisSpec
    errors: Tensor
    points: Tensor
    weights: Tensor
    constant: Mapping[str, Tensor]
    groups: WidthGroups
    held: int


def _prepared(
    at: CachedTensor,
    spec: QuantSpec,
    statistics: TensorStatistics,
    settings: AllocationConfig,
    geometry: KVGeometry,
) -> _Tensor:
    """Errors by width, distributions and constant parameters of one layer's keys or values."""
    assert isinstance(spec, TrellisSpec)
    layer, moments = geometry.layers[at.layer], statistics.moments
    angle = pair_angles(moments, spec.pair_rotation, at.rope_in(geometry))
    constant = {} if angle is None else {"pair_angle": angle}
    # In the first layer keys and values depend on the token alone.
    share = settings.vocabulary_samples if at.layer else 1.0
    points, weights = statistics.weighted.distribution(
        *moments.turned(angle), settings.shrinkage, statistics.vocabulary, share
    )
    if statistics.token_costs is not None:
        constant["token_weight"] = statistics.token_costs.weights(settings.shrinkage)
        constant["token_size_unit"] = moments.squared_size(layer.num_kv_heads)
    if statistics.neighbours is not None:
        constant["error_feedback"] = statistics.neighbours.feedback()
    if spec.error_compensation is not None and statistics.covariance is not None:
        found = compensation_factors(statistics.covariance.sums, spec.error_compensation.rank)
        constant |= _compensation_tensors(found, spec.error_compensation)
        left = found.left * (found.left.log().mean() * (_TRUST - 1)).exp()
        weights = weights * left.flatten()[:, None]
    errors = errors_by_width(points, weights, spec)
    groups = _groups(at, errors, settings, geometry)
    return _Tensor(at, spec, errors, points, weights, constant, groups, layer.held_tokens(settings.context))


def _groups(
    at: CachedTensor, errors: Tensor, settings: AllocationConfig, geometry: KVGeometry
) -> WidthGroups:
    """Channels of one layer's keys or values that share a width."""
    shape = at.shape_in(geometry)
    least = settings.min_key_bits if at.kind == "key" else settings.min_value_bits
    floor = min(least, errors.shape[1] - 1)
    if at.kind == "value" or shape.head_dim % 2:
        return channel_groups(errors, shape.heads, floor)
    return pair_groups(errors, shape.heads, channel_pairs(at.rope_in(geometry), shape.head_dim), floor)


def _compensation_tensors(found: CompensationFactors, spec: ErrorCompensationSpec) -> dict[str, Tensor]:
    """What is stored of the factors, by name."""
    tensors = {"compensation": found.entries, "compensation_scale": found.scale}
    if spec.needs_error_weight:
        tensors["error_weight"] = found.weight
    return tensors


def fit_layers(
    cache: KVCacheSpec,
    settings: AllocationConfig,
    geometry: KVGeometry,
    statistics: Mapping[CachedTensor, TensorStatistics],
    measure: Measure,
) -> tuple[LayerParams, ...]:
    """Fit everything a layer stores, for all layers.

    Args:
        cache: spec; ``max_bits`` is the largest width, or the width of all channels where the scope is ``uniform``.
        settings: budget and floors.
        geometry: of the model.
        statistics: of each layer's keys and values.
        measure: what errors cost; called ``settings.corrections`` times.

    Raises:
        ConfigError: the budget is too small.
    """
    specs = cache.resolved(len(geometry.layers))
    tensors = [
        _prepared(at, specs[at.layer].of(at.kind), statistics[at], settings, geometry)
        for at in cached_tensors(len(specs))
    ]
    fit = _BudgetedFit(cache, settings, geometry, tensors)
    if settings.scope == "uniform":
        return fit.params([torch.full((len(t.points),), t.spec.max_bits, dtype=torch.uint8) for t in tensors])
    errors = [tensor.errors for tensor in tensors]
    widths = fit.widths(errors)
    for _ in range(settings.corrections):
        errors = _corrected(errors, widths, tensors, measure(fit.params(widths, DRAFT)))
        widths = fit.widths(errors)
    return fit.params(widths)


@dataclass(frozen=True)
class _BudgetedFit:
    """All keys and values under one budget."""

    cache: KVCacheSpec
    settings: AllocationConfig
    geometry: KVGeometry
    tensors: Sequence[_Tensor]

    def widths(self, errors: Sequence[Tensor]) -> list[Tensor]:
        """Widths within the budget, uint8 ``[C]`` each, for errors by width, float64 ``[C, widths]`` each."""
        counted = [
            table if tensor.at.layer else table * self.settings.first_layer_weight
            for table, tensor in zip(errors, self.tensors, strict=True)
        ]
        options = [t.groups.options(table, t.held) for t, table in zip(self.tensors, counted, strict=True)]

        def widths_at(budget: float) -> list[Tensor]:
            if self.settings.scope == "model":
                chosen = allocate(options, budget)
            else:
                chosen = [allocate([own], budget)[0] for own in options]
            return [t.groups.widths(own) for t, own in zip(self.tensors, chosen, strict=True)]

        return within_budget(self.settings.bits_per_element, widths_at, self._stored_bits)

    def params(self, widths: Sequence[Tensor], effort: Effort = FULL) -> tuple[LayerParams, ...]:
        """What is stored of all layers with channels of these widths."""
        return self._layers(
            fit_levels(t.points, t.weights, w, t.spec, effort)
            for t, w in zip(self.tensors, widths, strict=True)
        )

    def _stored_bits(self, widths: Sequence[Tensor]) -> float:
        """Bits per element, everything counted, with channels of these widths."""
        layers = self._layers(_shapes(w, t.spec) for t, w in zip(self.tensors, widths, strict=True))
        return KVArtifact(self.cache, self.geometry, layers).bits_per_element(self.settings.context)

    def _layers(self, params: Iterable[TrellisParams]) -> tuple[LayerParams, ...]:
        """By layer, with what does not depend on the widths."""
        return layer_params(
            {
                tensor.at: replace(own, **tensor.constant)
                for tensor, own in zip(self.tensors, params, strict=True)
            }
        )


def _corrected(
    errors: Sequence[Tensor],
    widths: Sequence[Tensor],
    tensors: Sequence[_Tensor],
    cost: Mapping[CachedTensor, Tensor],
) -> list[Tensor]:
    """Estimated errors of every width, moved towards what those of the present widths were measured to cost by head."""
    measured = [cost[tensor.at] for tensor in tensors]
    estimated = [
        table.gather(1, chosen.to(torch.int64)[:, None]).view(len(own), -1).sum(1)
        for table, chosen, own in zip(errors, widths, measured, strict=True)
    ]
    return [
        table * factor.repeat_interleave(len(table) // len(factor))[:, None]
        for table, factor in zip(errors, correction(measured, estimated), strict=True)
    ]


def correction(measured: Sequence[Tensor], estimated: Sequence[Tensor]) -> list[Tensor]:
    """Factors on the estimated errors of heads that bring them half of the way (in logarithms) to the measured ones.

    Half, because a measurement holds for the errors as they are and the widths that follow change them, and because it
    is one of a few pieces of text.

    Args:
        measured, estimated: ``[H]`` of each layer and kind.
    """
    tiny = torch.finfo(torch.float32).tiny
    heads = [len(each) for each in measured]
    ratio = torch.cat(list(measured)).double() / torch.cat(list(estimated)).double().clamp(min=tiny)
    ratio = ratio / ratio.median().clamp(min=tiny)
    return list(ratio.clamp(_LEAST, _MOST).sqrt().split(heads))


def _shapes(widths: Tensor, spec: TrellisSpec) -> TrellisParams:
    """Parameters of the right shapes and arbitrary content, to count what they take."""
    numbers = int(coefficient_counts(spec, widths).sum())
    return TrellisParams(widths, torch.zeros(numbers, dtype=torch.float16))
