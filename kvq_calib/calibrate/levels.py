"""Levels of channels from weighted distributions: the error at every width, and coefficients for given widths.

The error at a width is computed with unconstrained levels and nearest-level coding (:func:`errors_by_width`).
Coefficients are fitted to samples of the distribution (:func:`fit_levels`), by alternating two steps: the best paths
assign samples to levels, and weighted least squares moves the polynomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.computed_levels import (
    FIRST_OF_SHAPE,
    MOST_COEFFICIENTS,
    SHAPE_STEPS,
    StoredLevels,
    computed_levels,
    has_coefficient,
    level_counts,
    level_places,
    store_levels,
    stored_coefficients,
    within_scale,
)
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.fit.allocation import PlaceLevels, width_errors
from kvq_calib.fit.density import evenly_weighted, lloyd, spread_levels, spread_within_bins
from kvq_calib.fit.rising_polynomials import chord, evaluate, least_squares, nearest_polynomial, toward
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import TrellisSpec

__all__ = ["DRAFT", "FULL", "Effort", "errors_by_width", "fit_levels", "level_basis", "storable_levels"]


@dataclass(frozen=True)
class Effort:
    """The effort of a fit.

    Attributes:
        samples: number of samples of each channel.
        rounds: number of rounds of finding paths and moving levels.
    """

    samples: int
    rounds: int


FULL = Effort(samples=8192, rounds=10)
#: For measuring the cost of errors, a tenth of the work suffices.
DRAFT = Effort(samples=2048, rounds=3)


#: Error of the best path with fitted levels, divided by that of nearest-level coding at the start: 2.4 to 2.8 for
#: normal samples and 1.9 to 2.3 for Laplacian ones, at 1 to 4 bits. Here only the ratio to the error at 0 bits matters.
_PATH_OVER_NEAREST = 2.4
#: Powers of the density of levels that weight them in different starts.
_DENSITIES = (2.0, 1.0, 0.0)
#: Over-relaxation of the least-squares step in all rounds but the last, because runs of levels move slowly in one
#: direction.
_STEP = 1.5
#: Weight of a level's start, relative to the mean weight of a level. Levels that paths hardly use stay there.
_PRIOR = 0.02
#: Fractions, tried in order, by which levels that rounding put out of order are moved towards a straight line.
_STRAIGHTENED = (0.02, 0.1, 0.3, 1.0)


def level_placement(spec: TrellisSpec) -> PlaceLevels:
    """The function that places unconstrained levels, with the signature of :func:`kvq_calib.fit.density.lloyd`."""
    return spread_levels if spec.states > 1 else lloyd


def errors_by_width(points: Tensor, weights: Tensor, spec: TrellisSpec) -> Tensor:
    """Weighted squared error of every channel at every width from 0 to ``spec.max_bits``, float64 ``[C, widths]``.

    Args:
        points, weights: float64 ``[C, n]``, from
            :meth:`kvq_calib.calibrate.distribution.WeightedHistogram.distribution`.
        spec: with a trellis, there are twice as many levels, and the error is that of nearest-level coding times a
            factor.
    """
    counts = [spec.level_count(bits) for bits in range(spec.max_bits + 1)]
    coded_error = _PATH_OVER_NEAREST if spec.states > 1 else 1.0
    points, weights = spread_within_bins(points, weights)
    return width_errors(points, weights, level_placement(spec), counts, coded_error)


def level_basis(spec: TrellisSpec, bits: Tensor) -> Tensor:
    """Powers of ``u`` at every level, float64 ``[C, L, 6]``, zero for coefficients that a channel does not have."""
    places = level_places(spec, bits).double()
    powers = torch.stack([places**power for power in range(MOST_COEFFICIENTS)], dim=-1)
    return powers * has_coefficient(spec, bits)[:, None]


def fit_levels(
    points: Tensor, weights: Tensor, bits: Tensor, spec: TrellisSpec, effort: Effort = FULL
) -> TrellisParams:
    """Fit the coefficients. Returns widths and levels as stored.

    Args:
        points, weights: float64 ``[C, n]``, the distribution of each channel.
        bits: uint8 ``[C]``.
        spec: spec of the keys or values.
        effort: effort of the fit.
    """
    points, weights = spread_within_bins(points, weights)
    basis, samples = level_basis(spec, bits), _drawn(points, weights, effort.samples)
    current = _start(spec, bits, basis, _placed(points, weights, bits, spec), samples)
    first = evaluate(basis, current)
    few = _PRIOR * effort.samples / level_counts(spec, bits)[:, None].double() * _is_level(spec, bits)
    best, least = current, torch.full((len(bits),), torch.inf, dtype=torch.float64)
    for left in reversed(range(effort.rounds + 1)):
        path = _followed(spec, bits, current, samples)
        best = torch.where((path.error < least)[:, None], current, best)
        least = torch.minimum(path.error, least)
        if not left:
            break
        mass, moment = few + path.count, few * first + path.total
        wanted = least_squares(basis, mass, moment / mass.clamp(min=torch.finfo(mass.dtype).tiny))
        current = toward(basis, current, torch.lerp(current, wanted, _STEP if left > 1 else 1.0))
    return TrellisParams(bits.to(torch.uint8)).with_levels(storable_levels(spec, bits, best))


def _start(spec: TrellisSpec, bits: Tensor, basis: Tensor, levels: Tensor, samples: Tensor) -> Tensor:
    """For each channel, the best of several polynomials near the unconstrained levels: float64 ``[C, 6]``.

    If a few values are far out, a polynomial near the many others does not reach them, and cannot get there with its
    levels in order.
    """
    starts = [nearest_polynomial(basis, levels, density) for density in _DENSITIES]
    starts.append(chord(basis, levels[:, 0], levels[:, -1]))
    errors = torch.stack([_followed(spec, bits, start, samples).error for start in starts])
    best: Tensor = torch.stack(starts)[errors.argmin(0), torch.arange(len(bits))]
    return best


def _is_level(spec: TrellisSpec, bits: Tensor) -> Tensor:
    counts = level_counts(spec, bits)
    return torch.arange(int(counts.max())) < counts[:, None]


def _drawn(points: Tensor, weights: Tensor, count: int) -> Tensor:
    """Weighted samples of every channel, in random order: float64 ``[C, count]``, representable in float32."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    share = evenly_weighted(weights).cumsum(1)
    # A search for ascending numbers is several times faster, so the order is mixed afterwards.
    place = torch.searchsorted(share, (torch.arange(count) + 0.5) / count * share[:, -1:])
    return points.gather(1, place.clamp(max=points.shape[1] - 1)).float()[:, order].double()


def _placed(points: Tensor, weights: Tensor, bits: Tensor, spec: TrellisSpec) -> Tensor:
    """Unconstrained levels, float64 ``[C, L]``. A channel with fewer levels repeats its last one."""
    counts = level_counts(spec, bits)
    found = torch.zeros(len(bits), int(counts.max()), dtype=torch.float64)
    for count in counts.unique().tolist():
        mine = counts == count
        levels = level_placement(spec)(points[mine], weights[mine], count)
        found[mine] = torch.cat((levels, levels[:, -1:].expand(-1, found.shape[1] - count)), dim=1)
    return found


@dataclass(frozen=True)
class _Path:
    """What the best path of every channel does with its samples.

    Attributes:
        count, total: number and sum of the samples of each level, float64 ``[C, L]``.
        error: mean squared error, float64 ``[C]``.
    """

    count: Tensor
    total: Tensor
    error: Tensor


def _followed(spec: TrellisSpec, bits: Tensor, coefficients: Tensor, samples: Tensor) -> _Path:
    """The best paths of samples, float64 ``[C, n]``."""
    plain = TrellisSpec(max_bits=spec.max_bits, states=spec.states)
    params = TrellisParams(bits.to(torch.uint8), coefficients=coefficients.float())
    quantizer = TrellisQuantizer(plain, params, HeadShape(1, len(bits)))
    codes = quantizer.encode(samples.float().T[None].contiguous())[0].T.contiguous()
    index, levels = quantizer.level_index(codes).to(torch.int64), quantizer.levels.double()
    none = torch.zeros_like(levels)
    count = none.scatter_add(1, index, torch.ones_like(samples))
    total = none.scatter_add(1, index, samples)
    # The sum of (x - level)^2, from sums by level.
    error = samples.square().sum(1) + (levels * (levels * count - 2 * total)).sum(1)
    return _Path(count, total, error / samples.shape[1])


def storable_levels(spec: TrellisSpec, bits: Tensor, coefficients: Tensor) -> StoredLevels:
    """Levels as stored, near polynomials, rounded so that levels do not decrease.

    Args:
        spec: of the tensor.
        bits: integer ``[C]``.
        coefficients: float64 ``[C, 6]``, of increasing levels.
    """
    places, basis = level_places(spec, bits), level_basis(spec, bits)
    weight = _is_level(spec, bits).double()
    line = chord(basis, *evaluate(basis[:, [0, -1]], coefficients).T)
    for share in (*_STRAIGHTENED, 0.0):
        stored = store_levels(spec, bits, _with_whole_steps(basis, weight, coefficients))
        levels = computed_levels(stored_coefficients(spec, bits, stored), places)
        falls = (levels.diff(dim=1) < 0).any(1, keepdim=True)
        if not bool(falls.any()):
            break
        coefficients = torch.where(falls, torch.lerp(coefficients, line, share), coefficients)
    return stored


def _with_whole_steps(basis: Tensor, weight: Tensor, coefficients: Tensor) -> Tensor:
    """Polynomials ``[C, 6]`` whose shapes are whole steps, and whose levels are near those given.

    The highest coefficient is rounded first. Lower ones then make up for its error, and offset and scale for the rest.

    Args:
        basis: ``[C, L, 6]``.
        weight: weights of levels, ``[C, L]``.
        coefficients: ``[C, 6]``.
    """
    wanted = evaluate(basis, coefficients)
    scale = coefficients[:, 1:].abs().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    steps, free = torch.zeros_like(coefficients), coefficients
    for power in reversed(range(FIRST_OF_SHAPE, MOST_COEFFICIENTS)):
        steps[:, power] = (SHAPE_STEPS * free[:, power] / scale[:, 0]).round()
        lower = basis * (torch.arange(MOST_COEFFICIENTS) < power)
        free = least_squares(lower, weight, wanted - evaluate(basis, scale * steps / SHAPE_STEPS))
    steps[:, FIRST_OF_SHAPE:] = within_scale(steps[:, FIRST_OF_SHAPE:])
    steps[:, 1] = SHAPE_STEPS - steps.abs().sum(1)
    form = evaluate(basis, steps / SHAPE_STEPS)
    offset, factor = least_squares(torch.stack((basis[..., 0], form), dim=-1), weight, wanted).split(1, dim=1)
    return torch.cat((offset, factor.clamp(min=0) * steps[:, 1:] / SHAPE_STEPS), dim=1)
