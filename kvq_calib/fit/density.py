"""Levels with least squared error for weighted distributions, for many of them at once.

A distribution is a row of sorted points with weights. :func:`lloyd` places levels for nearest-level coding.
:func:`spread_levels` follows the point density that is optimal for many levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Lloyd iterations. Few suffice, because the start is near the optimum.
_LLOYD_ROUNDS = 30
#: Number of runs of points that a start is made of, and the longest cell relative to the mean cell.
_RUNS_PER_LEVEL = 4
_FEWEST_RUNS = 32
_LONGEST_CELL = 4
#: Number of points that a bin is spread over.
_PARTS = 4


def nearest(levels: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest level of each point, from ``[C, L]`` and ``[C, n]``: int64 ``[C, n]``."""
    return torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, points)


def weighted_error(levels: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error of nearest-level coding, ``[C]``."""
    return (weights * (points - levels.gather(1, nearest(levels, points))).square()).sum(1)


def evenly_weighted(weights: Tensor) -> Tensor:
    """The weights, with equal weights in rows that have none."""
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)


def spread_within_bins(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution with every bin's weight spread over four points around its mean, half way to the next bins.

    With 128 levels, the distance between levels is two or three bins. Then the error of one point per bin is not that
    of the values in it, and levels follow the bins. A bin without neighbours that have weight stays one point, because
    it may be a single value.

    Args:
        points, weights: float64 ``[C, n]``, ``points`` sorted.

    Returns:
        Points, sorted, and weights: float64 ``[C, 4 n]``.
    """
    gap, filled = points.diff(dim=1), weights > 0
    reach = torch.zeros_like(points)
    inside = torch.minimum(gap[:, 1:], gap[:, :-1]) / 2
    reach[:, 1:-1] = inside * (filled[:, 2:] & filled[:, :-2])
    parts = (torch.arange(_PARTS, dtype=points.dtype) + 0.5) * 2 / _PARTS - 1
    spread = points[..., None] + reach[..., None] * parts
    whole = (parts == parts[0]).to(weights)  # the share of each part in a bin that stays one point
    share = torch.where(reach[..., None] > 0, 1 / _PARTS, whole)
    return spread.flatten(1), (weights[..., None] * share).flatten(1)


def lloyd(points: Tensor, weights: Tensor, k: int) -> Tensor:
    """Levels of every row by Lloyd's iteration, from a nearly optimal cut of the row.

    The start matters, because the iteration ends in a local optimum. For 32 levels of a channel's distribution, the
    error is on average 1% above the optimum from this start, and 13% above it from the point density that is optimal
    for many levels.

    Args:
        points, weights: float64 ``[C, n]``, ``points`` sorted. A row without weight gets equal weights.
        k: number of levels.

    Returns:
        float64 ``[C, k]``, sorted.
    """
    weights = evenly_weighted(weights)
    zero = torch.zeros_like(weights[:, :1])
    mass = torch.cat([zero, weights.cumsum(1)], 1)
    moment = torch.cat([zero, (weights * points).cumsum(1)], 1)
    levels = _centres_of_best_cut(points, weights, k)
    for _ in range(_LLOYD_ROUNDS):
        inner = torch.searchsorted(points, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous())
        first = inner.new_zeros(len(points), 1)
        edges = torch.cat([first, inner, torch.full_like(first, points.shape[1])], 1)
        cell = mass.gather(1, edges).diff(dim=1)
        centre = moment.gather(1, edges).diff(dim=1) / cell.clamp(min=torch.finfo(cell.dtype).tiny)
        moved = torch.where(cell > 1e-12 * mass[:, -1:], centre, levels).sort(1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def spread_levels(points: Tensor, weights: Tensor, k: int) -> Tensor:
    """Levels of every row that follow the point density that is optimal for many levels.

    They suit a trellis, in which a token cannot use every level. Levels with the least nearest-level error include some
    at isolated values of large weight, and the trellis often cannot use such a level when the value occurs. A single
    level is the mean. Arguments and result are as for :func:`lloyd`.
    """
    if k == 1:
        return lloyd(points, weights, 1)
    shares = (torch.arange(k, device=points.device, dtype=points.dtype) + 0.5) / k
    return points.gather(1, _index_at_share(points, evenly_weighted(weights), shares))


def _index_at_share(points: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """Indices of the points at which the cumulative optimal density reaches the given shares, int64 ``[C, shares]``.

    The density for many levels is proportional to the cube root of the weighted density (Panter and Dite, 1951). Points
    and weights are as for :func:`lloyd`; every row has weight.
    """
    # Cube root of density, times the width of a bin, which follows from its neighbours.
    width = torch.nn.functional.pad(points.diff(dim=1).clamp(min=0), (0, 1))
    reached = (weights * (width + width.roll(1, 1)).square()).pow(1 / 3).cumsum(1)
    reached = reached / reached[:, -1:].clamp(min=torch.finfo(points.dtype).tiny)
    place = torch.searchsorted(reached, shares.expand(len(points), -1).contiguous())
    return place.clamp(max=points.shape[1] - 1)


def _run_ends(points: Tensor, weights: Tensor, count: int) -> Tensor:
    """Ends of ``count`` runs with equal shares of the density in every row: int64 ``[C, count + 1]``."""
    rows, size = points.shape
    if count == size:  # each point is a run
        return torch.arange(size + 1, device=points.device).expand(rows, -1)
    shares = torch.arange(1, count, device=points.device, dtype=points.dtype) / count
    inner = torch.nn.functional.pad(_index_at_share(points, weights, shares) + 1, (1, 0))
    return torch.nn.functional.pad(inner, (0, 1), value=size)


def _centres_of_best_cut(points: Tensor, weights: Tensor, k: int) -> Tensor:
    """Weighted means of the cells when every row is cut into ``k`` cells with least error.

    A cell is a sequence of whole runs of points. Runs have equal shares of the density of :func:`_index_at_share`, so a
    few per level suffice, and no cell is much longer than the mean. It is dynamic programming over the runs, for all
    rows at once. Arguments and result are as for :func:`lloyd`; every row has weight.
    """
    rows, size = points.shape
    tiny = torch.finfo(points.dtype).tiny
    count = min(max(_RUNS_PER_LEVEL * k, _FEWEST_RUNS), size)
    longest = min(_LONGEST_CELL * count // k + 1, count)
    ends = _run_ends(points, weights, count)
    mean = (weights * points).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    x = points - mean  # avoids cancellation in the sums
    sums = [
        torch.nn.functional.pad(part.cumsum(1), (1, 0)).gather(1, ends)
        for part in (weights, weights * x, weights * x * x)
    ]

    def before(of_ends: Tensor, value: float = 0.0) -> Tensor:
        """For each end of a cell, the entries of its possible starts: ``[C, E, longest + 1]``."""
        padded: Tensor = torch.nn.functional.pad(of_ends, (longest, 0), value=value)
        return padded.unfold(1, longest + 1, 1)

    cell, first, second = (part[..., None] - before(part) for part in sums)
    cost = (second - first.square() / cell.clamp(min=tiny)).clamp(min=0)
    best = torch.full_like(sums[0], torch.inf)
    best[:, 0] = 0.0
    starts = []
    for _ in range(k):
        best, start = (before(best, torch.inf) + cost).min(2)
        starts.append(start)
    edge = torch.full((rows, 1), count, device=points.device)
    edges = [edge]
    for start in reversed(starts):
        edge = edge - longest + start.gather(1, edge)
        edges.append(edge)
    cut = torch.cat(edges[::-1], 1)
    cell, first = (part.gather(1, cut).diff(dim=1) for part in sums[:2])
    return (first / cell.clamp(min=tiny) + mean).sort(1).values
