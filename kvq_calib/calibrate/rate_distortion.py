"""Fits widths and levels of all channels to weighted distributions, under one budget."""

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
from kvq_calib.codec.computed_levels import MOST_COEFFICIENTS, store_levels
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.fit.allocation import Choices, allocate, spend_the_rest, within_budget
from kvq_calib.fit.width_groups import WidthGroups, channel_groups, pair_groups
from kvq_calib.schema.cached import CachedTensor, cached_tensors
from kvq_calib.schema.geometry import KVGeometry, RopeSpec, channel_pairs
from kvq_calib.schema.recipe import AllocationConfig
from kvq_calib.schema.spec import ErrorCompensationSpec, KVCacheSpec, LayerSpec, QuantSpec, TrellisSpec

__all__ = ["Measure", "TensorStatistics", "correction", "fit_layers", "pair_angles", "spec_by_layer"]

Measure = Callable[[tuple[LayerParams, ...]], Mapping[CachedTensor, Tensor]]
"""Cost of a fit's errors by head, in any unit: :func:`kvq_calib.calibrate.sensitivity.ErrorSensitivity`."""

#: Share of the mean logarithmic reduction of a layer's weights by compensation that the allocation assumes. It is below
#: 1, because compensated errors widen the range that a coordinate has to code. Differences between the coordinates of a
#: layer count fully.
_TRUST = 0.5
#: Share of compensation's saving on the calibration text that remains on other text.
_OTHER_TEXT = 0.7
#: The whole matrix is stored if its size is at most this share of its saving.
_MATRIX_SHARE = 0.4
#: Numbers of columns to try for the factor.
_FACTOR_RANKS = (1, 2, 4, 8, 16, 32)
#: Bounds on a measured cost, as multiples of the estimate. Small measured costs of a single head are noisy, and can be
#: negative.
_MOST, _LEAST = 64.0, 1 / 8
#: How often channels are regrouped by the widths found. More lower the estimated error by under 0.4%.
_REGROUPINGS = 4


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one layer's keys or values.

    Attributes:
        moments: moments of its channels.
        weighted: weighted distribution of each channel.
        covariance: covariance of the gradients; with error compensation.
        token_costs: squared gradients by the size of tokens; with token weighting.
        neighbours: correlation of the gradients of neighbouring tokens; with noise shaping.
        vocabulary: distribution of each channel for vocabulary samples, in the bins of ``weighted``; or ``None``.
    """

    moments: ChannelMoments
    weighted: WeightedHistogram
    covariance: GradientCovariance | None = None
    token_costs: TokenCosts | None = None
    neighbours: NeighbourGradients | None = None
    vocabulary: WeightedHistogram | None = None


def pair_angles(moments: ChannelMoments, turned: bool, rope: RopeSpec | None) -> Tensor | None:
    """The angles of RoPE pairs of keys, float16 ``[H, P]``; ``None`` without pair rotation."""
    return moments.principal_angle() if turned and rope is not None else None


def spec_by_layer(
    cache: KVCacheSpec,
    settings: AllocationConfig,
    geometry: KVGeometry,
    covariances: Mapping[CachedTensor, GradientCovariance],
) -> KVCacheSpec:
    """The spec, with the best form of error compensation in each layer at ``settings.context`` tokens, or none.

    The size of the matrix grows with the square of the head size and does not depend on the context. So it costs most
    in layers with large heads and a sliding window. A factor with few columns saves less, but is far smaller. If the
    matrix takes too large a share of its saving, the factor with the largest net saving is used. If the spec gives a
    rank, that rank or none is used.

    Args:
        cache: the spec.
        settings: gives the context.
        geometry: geometry of the model.
        covariances: covariances of the gradients, for layers with error compensation.
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
    """The form of compensation with the largest net saving on so many numbers, or ``None``.

    Args:
        spec: the spec of the recipe.
        covariance: covariance of the gradients, float64 ``[H, D, D]``.
        numbers: number of elements of the keys or values in the cache.
    """
    stored, saved = {}, {}
    ranks = [rank for rank in _FACTOR_RANKS if 4 * rank <= covariance.shape[-1]]
    for rank in [spec.rank] if spec.rank else [0, *ranks]:
        found = compensation_factors(covariance, rank)
        stored[rank] = 8 * found.nbytes
        # Dividing the error by four is worth one bit per number.
        saved[rank] = -_TRUST * float(found.left.log2().mean()) / 2 * numbers
        if rank == 0 and stored[rank] <= _MATRIX_SHARE * saved[rank]:
            return spec
    rank = max(saved, key=lambda each: _OTHER_TEXT * saved[each] - stored[each])
    if _OTHER_TEXT * saved[rank] <= stored[rank]:
        return None
    return spec.model_copy(update={"rank": rank})


@dataclass(frozen=True)
class _Tensor:
    """Intermediate results for one layer's keys or values.

    Attributes:
        at: the layer, and whether it is keys or values.
        spec: how they are quantized.
        errors: error of every channel at every width, float64 ``[C, widths]``.
        points, weights: the distributions for fitting levels, float64 ``[C, n]``.
        constant: the parameters that do not depend on the widths, by name.
        groups: groups of channels that share a width.
        held: number of tokens in the cache.
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
    """Compute the errors by width, distributions and constant parameters of one layer's keys or values."""
    assert isinstance(spec, TrellisSpec)
    layer, moments = geometry.layers[at.layer], statistics.moments
    angle = pair_angles(moments, spec.pair_rotation, at.rope_in(geometry))
    constant = {} if angle is None else {"pair_angle": angle}
    # In the first layer, keys and values depend only on the token.
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
    """The groups of channels of one layer's keys or values that share a width."""
    shape = at.shape_in(geometry)
    least = settings.min_key_bits if at.kind == "key" else settings.min_value_bits
    floor = min(least, errors.shape[1] - 1)
    if at.kind == "value" or shape.head_dim % 2:
        return channel_groups(errors, shape.heads, floor)
    return pair_groups(errors, shape.heads, channel_pairs(at.rope_in(geometry), shape.head_dim), floor)


def _compensation_tensors(found: CompensationFactors, spec: ErrorCompensationSpec) -> dict[str, Tensor]:
    """The stored tensors of error compensation, by name."""
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
    """Fit the parameters of all layers.

    Args:
        cache: the spec; ``max_bits`` is the largest width, or the width of all channels if the scope is ``uniform``.
        settings: budget and smallest widths.
        geometry: geometry of the model.
        statistics: statistics of each layer's keys and values.
        measure: measures the cost of errors; called ``settings.corrections`` times.

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
        """Widths within the budget, uint8 ``[C]`` each, from errors by width, float64 ``[C, widths]`` each."""
        counted = [
            table if tensor.at.layer else table * self.settings.first_layer_weight
            for table, tensor in zip(errors, self.tensors, strict=True)
        ]
        groups = [tensor.groups for tensor in self.tensors]
        widths = self._widths_of(groups, counted)
        for _ in range(_REGROUPINGS):
            groups = [
                own.regrouped(chosen, table)
                for own, chosen, table in zip(groups, widths, errors, strict=True)
            ]
            widths = self._widths_of(groups, counted)
        return widths

    def _widths_of(self, groups: Sequence[WidthGroups], errors: Sequence[Tensor]) -> list[Tensor]:
        """Widths within the budget for these groups; otherwise as :meth:`widths`."""
        options = [
            own.options(table, tensor.held)
            for own, table, tensor in zip(groups, errors, self.tensors, strict=True)
        ]

        def widths_at(budget: float) -> list[Tensor]:
            if self.settings.scope == "model":
                chosen = _allocated(options, budget)
            else:
                chosen = [_allocated([own], budget)[0] for own in options]
            return [own.widths(each) for own, each in zip(groups, chosen, strict=True)]

        return within_budget(self.settings.bits_per_element, widths_at, self._stored_bits)

    def params(self, widths: Sequence[Tensor], effort: Effort = FULL) -> tuple[LayerParams, ...]:
        """The parameters of all layers for these widths."""
        return self._layers(
            fit_levels(t.points, t.weights, w, t.spec, effort)
            for t, w in zip(self.tensors, widths, strict=True)
        )

    def _stored_bits(self, widths: Sequence[Tensor]) -> float:
        """Bits per element for these widths, everything counted."""
        layers = self._layers(_shapes(w, t.spec) for t, w in zip(self.tensors, widths, strict=True))
        return KVArtifact(self.cache, self.geometry, layers).bits_per_element(self.settings.context)

    def _layers(self, params: Iterable[TrellisParams]) -> tuple[LayerParams, ...]:
        """The parameters by layer, with those that do not depend on the widths added."""
        return layer_params(
            {
                tensor.at: replace(own, **tensor.constant)
                for tensor, own in zip(self.tensors, params, strict=True)
            }
        )


def _allocated(options: Sequence[Choices], budget: float) -> list[Tensor]:
    """The choice of every row that uses as much of the budget as whole rows allow."""
    return spend_the_rest(options, allocate(options, budget), budget)


def _corrected(
    errors: Sequence[Tensor],
    widths: Sequence[Tensor],
    tensors: Sequence[_Tensor],
    cost: Mapping[CachedTensor, Tensor],
) -> list[Tensor]:
    """Estimated errors of every width, corrected by head towards the measured cost at the current widths."""
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
    """Factors on the estimated errors of heads, which move them halfway (in logarithms) to the measured ones.

    Only half, because the measurement holds for the current errors, which the new widths change, and because it uses
    only a few pieces of text.

    Args:
        measured, estimated: costs by head, ``[H]`` for each layer and kind.
    """
    tiny = torch.finfo(torch.float32).tiny
    heads = [len(each) for each in measured]
    ratio = torch.cat(list(measured)).double() / torch.cat(list(estimated)).double().clamp(min=tiny)
    ratio = ratio / ratio.median().clamp(min=tiny)
    return list(ratio.clamp(_LEAST, _MOST).sqrt().split(heads))


def _shapes(widths: Tensor, spec: TrellisSpec) -> TrellisParams:
    """Parameters of the right shapes with arbitrary content, to count their bytes."""
    return TrellisParams(widths).with_levels(
        store_levels(spec, widths, torch.zeros(len(widths), MOST_COEFFICIENTS))
    )
