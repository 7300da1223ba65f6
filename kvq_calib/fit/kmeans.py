"""Weighted one-dimensional k-means: exact by dynamic programming, or scikit-learn's Lloyd iteration.

In one dimension an optimal clustering of sorted points is a sequence of intervals. So the best ``k`` centres follow
from ``dp[c][i] = min over j of dp[c - 1][j] + cost(j, i)``. Here ``cost(j, i)`` is the weighted squared error of points
``j .. i - 1`` about their mean, an O(1) expression in prefix sums. The minimising ``j`` does not decrease with ``i``
(the cost is concave Monge), so divide and conquer takes O(n log n) for a row. Each of its log n levels is one
vectorised step. KVQuant section 3.3 states the problem (Fisher-weighted levels per layer).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def _row(
    previous: Floats, sums: tuple[Floats, Floats, Floats], first: int
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """One row of the dynamic program: best cost and split for every number of points ``i >= first``.

    Entries below ``first`` are infinite: fewer points than clusters.
    """
    weight, moment, square = sums
    n = len(previous) - 1
    best = np.full(n + 1, np.inf)
    split = np.zeros(n + 1, dtype=np.int64)
    # Bounds of the search for each i, which solved neighbours tighten.
    low = np.full(n + 2, first - 1, dtype=np.int64)
    high = np.full(n + 2, n, dtype=np.int64)
    step = 1 << max(int(n).bit_length(), 1)
    solved = np.zeros(n + 2, dtype=bool)
    while step >= 1:
        ends = np.arange(step, n + 1, step)
        ends = ends[(ends >= first) & ~solved[ends]]
        if len(ends):
            below, above = np.maximum(ends - step, 0), np.minimum(ends + step, n + 1)
            start = np.maximum(np.where(solved[below], low[below], first - 1), first - 1)
            stop = np.minimum(np.where(solved[above], high[above], n), ends - 1)
            lengths = stop - start + 1
            offsets = np.concatenate(([0], np.cumsum(lengths)[:-1]))
            end = np.repeat(ends, lengths)
            begin = np.arange(lengths.sum()) - np.repeat(offsets - start, lengths)
            mass = weight[end] - weight[begin]
            shift = moment[end] - moment[begin]
            with np.errstate(divide="ignore", invalid="ignore"):
                cost = square[end] - square[begin] - np.where(mass > 0, shift * shift / mass, 0.0)
            total = previous[begin] + np.maximum(cost, 0.0)
            best[ends] = np.minimum.reduceat(total, offsets)
            # The first minimum of each run. Ties go to the lower split, so the result is deterministic.
            hit = np.flatnonzero(total == np.repeat(best[ends], lengths))
            run = np.searchsorted(offsets, hit, side="right") - 1
            _, where = np.unique(run, return_index=True)
            split[ends] = begin[hit[where]]
            low[ends] = high[ends] = split[ends]
            solved[ends] = True
        step >>= 1
    return best, split


def exact_kmeans(points: Floats, weights: Floats, k: int) -> Floats:
    """Levels with the least weighted squared error, exactly.

    Args:
        points: ``[n]``, sorted.
        weights: ``[n]``, not negative, of positive sum.
        k: number of levels.

    Returns:
        ``[k]``, sorted. If fewer than ``k`` points have weight, the largest level is repeated.
    """
    _check(points, weights, k)
    used = weights > 0
    x, w = points[used], weights[used]
    if len(x) <= k:
        return np.concatenate([x, np.full(k - len(x), x[-1])])
    centre = float(np.average(x, weights=w))
    x = x - centre  # avoids cancellation in the prefix sums
    sums = tuple(np.concatenate(([0.0], np.cumsum(part))) for part in (w, w * x, w * x * x))
    weight, moment, square = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.maximum(square - np.where(weight > 0, moment * moment / weight, 0.0), 0.0)
    splits = []
    for clusters in range(2, k + 1):
        cost, split = _row(cost, (weight, moment, square), clusters)
        splits.append(split)
    bounds = [len(x)]
    for split in reversed(splits):
        bounds.append(int(split[bounds[-1]]))
    edges = np.array([0, *reversed(bounds)])
    levels = np.diff(moment[edges]) / np.diff(weight[edges])
    return np.sort(levels + centre)


def lloyd_kmeans(points: Floats, weights: Floats, k: int, seed: int = 0) -> Floats:
    """Levels by scikit-learn's ``KMeans`` with ``sample_weight``, as in KVQuant's code.

    Arguments and result are as for :func:`exact_kmeans`, but the result is a local optimum that depends on ``seed``.
    """
    from sklearn.cluster import KMeans  # the import takes a second, and the exact fit does not need it

    _check(points, weights, k)
    used = weights > 0
    x, w = points[used], weights[used]
    if len(np.unique(x)) <= k:
        return exact_kmeans(points, weights, k)
    model = KMeans(n_clusters=k, n_init="auto", max_iter=50, random_state=seed)
    model.fit(x[:, None], sample_weight=w)
    return np.sort(model.cluster_centers_[:, 0].astype(np.float64))


def distortion(points: Floats, weights: Floats, levels: Floats) -> float:
    """Weighted mean squared error of ``points`` coded by the nearest of the sorted ``levels``."""
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, points)]
    return float(np.average((points - nearest) ** 2, weights=weights))


def _check(points: Floats, weights: Floats, k: int) -> None:
    if k < 1:
        raise ValueError(f"k-means needs at least one level, not {k}")
    if points.ndim != 1 or points.shape != weights.shape:
        raise ValueError(
            f"points {points.shape} and weights {weights.shape} must be two vectors of one length"
        )
    if not (np.isfinite(points).all() and np.isfinite(weights).all()) or (weights < 0).any():
        raise ValueError("points must be finite, and weights finite and not negative")
    if not weights.sum() > 0:
        raise ValueError("k-means needs a point with positive weight")
    if (np.diff(points) < 0).any():
        raise ValueError("points must be sorted")
