"""From the weighted distributions of all channels to widths, scales, zero points and codebooks, under one
budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.allocation import (
    Curves,
    allocate,
    codebook_levels,
    fit_curves,
    share_codebooks,
    spend,
)
from kvq_calib.calibrate.distribution import ChannelMoments, WeightedHistogram
from kvq_calib.calibrate.error_compensation import GradientCovariance, error_feedback
from kvq_calib.calibrate.token_weighting import TokenImportance
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.quantizer import QuantParams
from kvq_calib.codec.trellis import storable_thresholds
from kvq_calib.schema.geometry import KVGeometry, RopeSpec
from kvq_calib.schema.recipe import AllocationConfig
from kvq_calib.schema.spec import KINDS, Kind, KVCacheSpec, LayerSpec, QuantSpec

Place = tuple[int, Kind]
"""Layer and kind."""

#: How much of what feedback takes from the weights of a layer (in logarithms, on average) the allocation counts on: errors
#: that are fed in widen what a coordinate has to code. Between the coordinates of the layer it counts on all of it.
_TRUST = 0.5
#: Share of what feedback saves on the calibration text that is left on other text.
_OTHER_TEXT = 0.7
#: The whole matrix of feedback is stored where it takes at most this share of what it saves.
_MATRIX_SHARE = 0.4
#: Columns of the factors of feedback that are tried.
_FACTOR_RANKS = (1, 2, 4, 8, 16, 32)
#: A measured error counts as at most and as at least this many times the estimated one. Measured of a single head, small ones are
#: noise, and can be negative.
_MOST, _LEAST = 64.0, 1 / 8


def phase_of(moments: ChannelMoments, spec: QuantSpec, rope: RopeSpec | None) -> Tensor | None:
    """The phases that keys are turned by, float16 ``[H, P]``; ``None`` where the spec or the layer has
    none."""
    return moments.principal_phase() if spec.phase and rope is not None else None


def spec_by_layer(
    cache: KVCacheSpec,
    settings: AllocationConfig,
    geometry: KVGeometry,
    covariances: Mapping[Place, GradientCovariance],
) -> KVCacheSpec:
    """The spec with error feedback as it pays in each layer at ``settings.context`` tokens, or left out.

    A matrix grows with the square of the head's size and is stored once, so that it weighs most in layers with large heads and a
    sliding window; factors of few columns save less and take far less. Where the matrix takes too large a share of what it
    saves, the factor that saves most beyond what it takes is stored. A ``feedback_rank`` that the spec gives is taken or left out.

    Args:
        cache: spec.
        settings: the context.
        geometry: of the model.
        covariances: of the gradients, where errors are fed back.
    """
    layers = list(cache.resolved(len(geometry.layers)))
    for (number, kind), covariance in covariances.items():
        shape, spec = geometry.layers[number], layers[number].of(kind)
        numbers = shape.channels * shape.held_tokens(settings.context)
        changes = _feedback(spec, covariance.sums.cpu(), numbers)
        layers[number] = layers[number].model_copy(update={kind: spec.model_copy(update=changes)})
    if layers == list(cache.resolved(len(layers))):
        return cache
    usual = LayerSpec(key=cache.key, value=cache.value)
    return cache.model_copy(update={"layers": {n: spec for n, spec in enumerate(layers) if spec != usual}})


def _feedback(spec: QuantSpec, covariance: Tensor, numbers: int) -> dict[str, int | bool]:
    """What of a spec to change so that feedback pays on so many numbers; ``covariance`` of the gradients ``[H, D, D]``."""
    stored, saved = {}, {}
    ranks = [rank for rank in _FACTOR_RANKS if 4 * rank <= covariance.shape[-1]]
    for rank in [spec.feedback_rank] if spec.feedback_rank else [0, *ranks]:
        found = error_feedback(covariance, rank)
        stored[rank] = 8 * found.nbytes
        # An error a quarter as large is worth a bit of each number.
        saved[rank] = -_TRUST * float(found.left.log2().mean()) / 2 * numbers
        if rank == 0 and stored[rank] <= _MATRIX_SHARE * saved[rank]:
            return {}
    rank = max(saved, key=lambda each: _OTHER_TEXT * saved[each] - stored[each])
    if _OTHER_TEXT * saved[rank] <= stored[rank]:
        return {"feedback": False, "feedback_rank": 0, "sweeps": 0}
    return {"feedback_rank": rank}


def fit_layers(
    cache: KVCacheSpec,
    settings: AllocationConfig,
    geometry: KVGeometry,
    moments: Mapping[Place, ChannelMoments],
    histograms: Mapping[Place, WeightedHistogram],
    covariances: Mapping[Place, GradientCovariance],
    importances: Mapping[Place, TokenImportance],
    foreign: Mapping[Place, WeightedHistogram] | None = None,
    measure: Callable[[tuple[LayerParams, ...]], Mapping[Place, Tensor]] | None = None,
) -> tuple[LayerParams, ...]:
    """Fit everything a layer stores, for all layers.

    Args:
        cache: spec; ``bits`` is the largest width, or the width of all channels where the scope is
            ``uniform``.
        settings: budget and floors.
        geometry: of the model.
        moments, histograms: statistics of each layer and kind.
        covariances: of the gradients, where errors are fed back.
        importances: of tokens, where paths weigh them.
        foreign: values for tokens drawn from the vocabulary, in the bins of ``histograms``; without them those of the
            text stand alone.
        measure: what the errors of a fit cost by head, in any unit: :func:`kvq_calib.calibrate.sensitivity.error_sensitivity`.
            Needed for ``settings.corrections``.

    Raises:
        ConfigError: the budget is too small.
    """
    specs = cache.resolved(len(geometry.layers))
    places: list[Place] = [(layer, kind) for layer in range(len(specs)) for kind in KINDS]
    phases = {
        (layer, kind): phase_of(moments[layer, kind], specs[layer].of(kind), geometry.rope_of(layer))
        for layer, kind in places
    }
    curves: dict[Place, Curves] = {}
    apart: dict[Place, dict[str, Tensor]] = {}  # what does not depend on the widths
    for layer, kind in places:
        mean, deviation = moments[layer, kind].turned(phases[layer, kind])
        points, weights = histograms[layer, kind].distribution(
            mean,
            deviation,
            settings.shrinkage,
            (foreign or {}).get((layer, kind)),
            settings.foreign if layer else 1.0,
        )
        phase = phases[layer, kind]
        apart[layer, kind] = {} if phase is None else {"phase": phase}
        if specs[layer].of(kind).importance:
            apart[layer, kind] |= {
                "importance": importances[layer, kind].weights(settings.shrinkage),
                "importance_unit": moments[layer, kind].squared_size(geometry.layers[layer].num_kv_heads),
            }
        if specs[layer].of(kind).feedback:
            rank = specs[layer].of(kind).feedback_rank
            found = error_feedback(covariances[layer, kind].sums.cpu(), rank)
            apart[layer, kind] |= {"feedback": found.feedback, "feedback_scale": found.feedback_scale}
            if specs[layer].of(kind).sweeps or rank:
                apart[layer, kind]["feedback_weight"] = found.feedback_weight
            left = found.left * (found.left.log().mean() * (_TRUST - 1)).exp()
            weights = weights * left.flatten()[:, None]
        curves[layer, kind] = fit_curves(points, weights, specs[layer].of(kind))

    floors = {"key": settings.min_key_bits, "value": settings.min_value_bits}
    floor = [min(floors[kind], specs[layer].of(kind).bits) for layer, kind in places]
    held = [geometry.layers[layer].held_tokens(settings.context) for layer, _ in places]
    tables = [curves[place].distortion for place in places]

    def chosen_at(budget: float) -> list[Tensor]:
        counted = [
            table if layer else table * settings.first_layer
            for table, (layer, _) in zip(tables, places, strict=True)
        ]
        if settings.scope == "model":
            return allocate(counted, floor, held, budget)
        single = [
            allocate([table], [least], [1], budget) for table, least in zip(counted, floor, strict=True)
        ]
        return [widths for (widths,) in single]

    def stored_bits(widths: list[Tensor]) -> float:
        shapes = {
            place: replace(_shapes(w, settings.codebooks, specs[place[0]].of(place[1])), **apart[place])
            for place, w in zip(places, widths, strict=True)
        }
        layers = tuple(LayerParams(shapes[n, "key"], shapes[n, "value"]) for n in range(len(specs)))
        return KVArtifact(cache, geometry, layers).bits_per_element(settings.context)

    def fitted(chosen: list[Tensor]) -> tuple[LayerParams, ...]:
        params = {
            place: replace(
                share_codebooks(curves[place], widths, settings.codebooks, specs[place[0]].of(place[1])),
                **apart[place],
            )
            for place, widths in zip(places, chosen, strict=True)
        }
        return tuple(LayerParams(params[n, "key"], params[n, "value"]) for n in range(len(specs)))

    if settings.scope == "uniform":
        return fitted(
            [
                torch.full((geometry.layers[layer].channels,), specs[layer].of(kind).bits, dtype=torch.uint8)
                for layer, kind in places
            ]
        )
    chosen = spend(settings.bits_per_element, chosen_at, stored_bits)
    for _ in range(settings.corrections):
        if measure is None:
            break
        cost = measure(fitted(chosen))
        estimated = [
            table.gather(1, widths.to(torch.int64)[:, None]).view(len(cost[place]), -1).sum(1)
            for place, table, widths in zip(places, tables, chosen, strict=True)
        ]
        factors = correction([cost[place] for place in places], estimated)
        tables = [
            table * factor.repeat_interleave(len(table) // len(factor))[:, None]
            for table, factor in zip(tables, factors, strict=True)
        ]
        chosen = spend(settings.bits_per_element, chosen_at, stored_bits)
    return fitted(chosen)


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


def _shapes(widths: Tensor, codebooks: int, spec: QuantSpec) -> QuantParams:
    """Parameters of the right shapes and arbitrary content, to count what they take."""
    channels = len(widths)
    scale, zero_point = storable_thresholds(spec, torch.ones(channels), torch.zeros(channels))
    return QuantParams(
        bits=widths,
        codebook=torch.zeros(codebook_levels(widths, codebooks, spec), dtype=torch.float16),
        codebook_index=torch.zeros(channels, dtype=torch.uint8),
        scale=scale,
        zero_point=zero_point,
    )
