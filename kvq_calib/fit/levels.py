"""Tables of levels from weighted statistics: one function for each kind, and Q-Norm.

To add a kind: write a function here, and name it in :data:`kvq_calib.schema.spec.Levels` and in :func:`fit_levels`;
also in :data:`DATA_FREE` if its levels do not depend on the data.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import numpy as np

from kvq_calib.fit.kmeans import Floats, exact_kmeans, lloyd_kmeans
from kvq_calib.schema.spec import Levels

Solver = Literal["exact", "lloyd"]

#: Kinds of levels that do not depend on the data.
DATA_FREE: tuple[Levels, ...] = ("uniform", "normal_float")


def uniform_levels(bits: int) -> Floats:
    """``2 ** bits`` equidistant levels over ``[-1, 1]``; one level is 0."""
    return np.linspace(-1.0, 1.0, 1 << bits) if bits else np.zeros(1)


def normal_float_levels(bits: int) -> Floats:
    """NormalFloat (QLoRA, arXiv 2305.14314, section 3): quantiles of a normal distribution scaled to ``[-1, 1]``.

    One half has ``2 ** (bits - 1)`` quantiles and the other one fewer, with an exact 0 in between.
    """
    if bits <= 1:
        return uniform_levels(bits)
    half = 1 << (bits - 1)
    # Beyond the outermost quantile is half a level's probability, averaged over the two halves.
    tail = 1.0 - (1.0 / (2 * 2 * half) + 1.0 / (2 * (2 * half - 1))) / 2.0
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(tail, 0.5, half + 1)[:-1]]
    negative = [-quantile(p) for p in np.linspace(tail, 0.5, half)[:-1]]
    levels = np.sort(np.concatenate([negative, [0.0], positive]))
    return np.asarray(levels / np.abs(levels).max())


def q_norm(levels: Floats, points: Floats, counts: Floats, rounds: int = 8) -> Floats:
    """Shift and scale levels so that quantized values keep their mean and standard deviation (section 3.5).

    KVQuant transforms the levels after codes are assigned. Here a code is always the nearest level, so the transform is
    repeated until assignment and moments agree.

    Args:
        levels: ``[L]``, sorted.
        points: ``[n]``, sorted normalised values.
        counts: ``[n]``, how often each value occurs (not Fisher-weighted).
        rounds: number of repetitions.
    """
    if counts.sum() <= 0:
        return levels
    mean = np.average(points, weights=counts)
    deviation = np.sqrt(np.average((points - mean) ** 2, weights=counts))
    for _ in range(rounds):
        quantized = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, points)]
        quantized_mean = np.average(quantized, weights=counts)
        quantized_deviation = np.sqrt(np.average((quantized - quantized_mean) ** 2, weights=counts))
        if quantized_deviation <= 0:
            return levels
        levels = (levels - quantized_mean) * (deviation / quantized_deviation) + mean
    return levels


def fit_levels(
    kind: Levels,
    bits: int,
    points: Floats,
    weights: Floats,
    *,
    solver: Solver = "exact",
    seed: int = 0,
) -> Floats:
    """Levels of one codebook.

    Args:
        kind: ``uniform`` and ``normal_float`` ignore the statistics; the others are fitted by k-means.
        bits: width; there are ``2 ** bits`` levels.
        points, weights: ``[n]``, the distribution of normalised values. If nothing has weight (the layer does not
            influence the output), the levels are uniform.
        solver: ``exact``, or ``lloyd`` for scikit-learn's local optimum.
        seed: seed of ``lloyd``.

    Returns:
        float64 ``[2 ** bits]``, sorted, representable in float16.
    """
    if kind == "uniform":
        levels = uniform_levels(bits)
    elif kind == "normal_float":
        levels = normal_float_levels(bits)
    elif not weights.sum() > 0:
        levels = uniform_levels(bits)
    elif solver == "lloyd":
        levels = lloyd_kmeans(points, weights, 1 << bits, seed)
    else:
        levels = exact_kmeans(points, weights, 1 << bits)
    return storable(levels)


def storable(levels: Floats) -> Floats:
    """Round levels to float16, so that kernels with half-precision tables use the same values."""
    return np.sort(levels).astype(np.float16).astype(np.float64)
