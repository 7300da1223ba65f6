"""Rate and distortion of every channel: how many bits each gets, and the levels it gets for them.

KVQuant gives all channels the same width and the same levels. Here the weighted error of every channel is
computed for every width (:func:`fit_curves`), one budget is spent where a bit removes most of it
(:func:`allocate`, reverse water-filling on measured curves), and channels of one width share a few codebooks
(:func:`share_codebooks`), since a table per channel would cost bits that buy more elsewhere. Everything is
computed from the weighted distributions of channels, so it needs no activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS
from kvq_calib.codec.paths import Subsets, best_path
from kvq_calib.codec.quantizer import QuantParams
from kvq_calib.codec.trellis import pack_codebooks, storable_thresholds
from kvq_calib.errors import ConfigError
from kvq_calib.schema.spec import QuantSpec

#: Lloyd iterations of one channel's levels; the start is near the optimum.
_LLOYD_ROUNDS = 30
#: Runs of points that a start is cut from, and the longest cell in mean ones.
_RUNS_PER_LEVEL = 4
_FEWEST_RUNS = 32
_LONGEST_CELL = 4
#: Rounds of assigning channels to codebooks and refitting both; in the first ones levels are fitted from nothing.
_SHARE_ROUNDS = 10
_FRESH_ROUNDS = 2
#: Two allocations whose Lagrange multipliers differ by less than this factor are the same.
_MULTIPLIER_STEPS = 100
_SMALLEST_SCALE = 1e-8
#: Error of the best path, its levels moved, over that of the nearest level at the start: 2.4 to 2.8 for normal samples and 1.9
#: to 2.3 for Laplacian ones, 1 to 4 bits. Only its size against the error without any bits matters here.
_PATH_OVER_NEAREST = 2.4
#: Rounds of finding paths and moving levels; how far beyond the mean of its samples a level moves in all but the last, since
#: whole runs of levels creep in one direction; and the blocks of samples of one codebook.
_PATH_ROUNDS = 16
_PATH_STEP = 1.9
_SAMPLE_BLOCKS = 1024


@dataclass(frozen=True)
class Curves:
    """What every width costs every channel of one layer's keys or values.

    Attributes:
        points, weights: float64 ``[C, n]``, the weighted distribution of each channel, ``points`` sorted.
        levels: by width ``b``, float64 ``[C, 2 ** b]``: levels of least weighted squared error; with a trellis
            ``[C, 2 ** (b + 1)]``, see :func:`spread_levels`.
        distortion: float64 ``[C, widths]``, the weighted squared error of what they are used for, for one token.
    """

    points: Tensor
    weights: Tensor
    levels: tuple[Tensor, ...]
    distortion: Tensor


def nearest(levels: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest level of each point: ``[C, L]``, ``[C, n]`` to int64 ``[C, n]``."""
    return torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, points)


def weighted_error(levels: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error of the nearest level, ``[C]``."""
    return (weights * (points - levels.gather(1, nearest(levels, points))).square()).sum(1)


def lloyd(points: Tensor, weights: Tensor, k: int) -> Tensor:
    """Levels of every row by Lloyd's iteration from a cut of the row that is nearly optimal.

    Iterating from other starts ends in local optima that may be far off: for 32 levels of a channel's distribution 13% above
    the optimum on average from the point density that is optimal for many levels, 1% from here.

    Args:
        points, weights: float64 ``[C, n]``, ``points`` sorted. A row without weight counts as evenly
        weighted. k: number of levels.

    Returns:
        float64 ``[C, k]``, sorted.
    """
    weights = _weighted(weights)
    zero = torch.zeros_like(weights[:, :1])
    mass = torch.cat([zero, weights.cumsum(1)], 1)
    moment = torch.cat([zero, (weights * points).cumsum(1)], 1)
    levels = _centres_of_best_cut(points, weights, k)
    for _ in range(_LLOYD_ROUNDS):
        inner = torch.searchsorted(points, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous())
        edges = (
            torch.cat(
                [torch.zeros_like(inner[:, :1]), inner, torch.full_like(inner[:, :1], points.shape[1])], 1
            )
            if k > 1
            else torch.tensor([[0, points.shape[1]]], device=points.device).expand(len(points), 2)
        )
        cell = mass.gather(1, edges).diff(dim=1)
        centre = moment.gather(1, edges).diff(dim=1) / cell.clamp(min=torch.finfo(cell.dtype).tiny)
        moved = torch.where(cell > 1e-12 * mass[:, -1:], centre, levels).sort(1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels


def _at_share(points: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """Where the optimal point density of many levels reaches these shares, int64 ``[C, shares]``, indices of ``points``.

    The density is proportional to the cube root of the weighted density (Panter and Dite, 1951). Points and weights as
    for :func:`lloyd`; every row has weight.
    """
    # Cube root of density times width, with a bin's width from its neighbours.
    width = torch.nn.functional.pad(points.diff(dim=1).clamp(min=0), (0, 1))
    reached = (weights * (width + width.roll(1, 1)).square()).pow(1 / 3).cumsum(1)
    reached = reached / reached[:, -1:].clamp(min=torch.finfo(points.dtype).tiny)
    place = torch.searchsorted(reached, shares.expand(len(points), -1).contiguous())
    return place.clamp(max=points.shape[1] - 1)


def spread_levels(points: Tensor, weights: Tensor, k: int) -> Tensor:
    """Levels of every row that follow the optimal point density of many levels.

    For a trellis, whose levels are not all there for each token: one at an isolated value of much weight, as those of
    least nearest-level error have, can often not be taken when that value comes. A single level is the mean. Arguments and
    result as for :func:`lloyd`.
    """
    if k == 1:
        return lloyd(points, weights, 1)
    shares = (torch.arange(k, device=points.device, dtype=points.dtype) + 0.5) / k
    return points.gather(1, _at_share(points, _weighted(weights), shares))


def _weighted(weights: Tensor) -> Tensor:
    """The weights, a row without any evenly weighted."""
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)


def _centres_of_best_cut(points: Tensor, weights: Tensor, k: int) -> Tensor:
    """Weighted means of the cells of the best cut of every row into ``k`` cells, each a sequence of whole runs of points.

    Runs have equal shares of the density of :func:`_at_share`, so a few for each level suffice, and a cell is never much
    longer than the mean. Dynamic programming over the runs, all rows at once. Arguments and result as for :func:`lloyd`; every row
    has weight.
    """
    rows, size = points.shape
    tiny = torch.finfo(points.dtype).tiny
    count = min(max(_RUNS_PER_LEVEL * k, _FEWEST_RUNS), size)
    longest = min(_LONGEST_CELL * count // k + 1, count)
    if count < size:
        shares = torch.arange(1, count, device=points.device, dtype=points.dtype) / count
        inner = torch.nn.functional.pad(_at_share(points, weights, shares) + 1, (1, 0))
        ends = torch.nn.functional.pad(inner, (0, 1), value=size)
    else:  # each point is a run
        ends = torch.arange(size + 1, device=points.device).expand(rows, -1)
    mean = (weights * points).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    x = points - mean  # keeps the sums from cancelling
    sums = [
        torch.nn.functional.pad(part.cumsum(1), (1, 0)).gather(1, ends)
        for part in (weights, weights * x, weights * x * x)
    ]

    def before(of_ends: Tensor, value: float = 0.0) -> Tensor:
        """Of what each end has, that of the cells' starts that it allows: ``[C, E, longest + 1]``."""
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


def level_fit(spec: QuantSpec) -> Callable[[Tensor, Tensor, int], Tensor]:
    """What places the levels of a tensor, called as :func:`lloyd` is."""
    return spread_levels if spec.trellis else lloyd


def fit_curves(points: Tensor, weights: Tensor, spec: QuantSpec) -> Curves:
    """Levels and weighted error of every channel at every width from 0 to ``spec.bits``.

    Args:
        points, weights: float64 ``[C, n]``, from
            :meth:`kvq_calib.calibrate.distribution.WeightedHistogram.distribution`.
        spec: with a trellis, levels are twice as many and their error is that of the nearest times a factor.
    """
    fit = level_fit(spec)
    levels = tuple(fit(points, weights, spec.level_count(bits)) for bits in range(spec.bits + 1))
    distortion = torch.stack([weighted_error(row, points, weights) for row in levels], dim=1)
    if spec.trellis:
        distortion[:, 1:] *= _PATH_OVER_NEAREST
    # Levels are no global optimum: a wider code is never worse, since it could leave levels unused.
    return Curves(points, weights, levels, distortion.cummin(1).values)


def allocate(
    distortion: Sequence[Tensor], floors: Sequence[int], tokens: Sequence[int], budget: float
) -> list[Tensor]:
    """Widths that minimise the summed distortion at a mean width of at most ``budget``.

    Each channel takes the width of least ``distortion + multiplier * bits stored``; the multiplier, found by
    bisection, is the same for all, so that the last stored bit of every channel is worth the same (reverse
    water-filling). A bit of width is stored for every token that is held: where a sliding window leaves few, it costs little.

    Args:
        distortion: one float64 ``[C, widths]`` for each layer and kind.
        floors: least width of the channels of each.
        tokens: that are held of each, in any unit.
        budget: bits per number held, on average over all.

    Returns:
        uint8 ``[C]`` for each.

    Raises:
        ConfigError: the budget is below the floors.
    """
    curves = [
        table.masked_fill(torch.arange(table.shape[1]) < floor, torch.inf)
        for table, floor in zip(distortion, floors, strict=True)
    ]
    held = sum(len(table) * count for table, count in zip(curves, tokens, strict=True))
    # In units of the mean, which is exact where all are equal.
    price = [count * sum(map(len, curves)) / held for count in tokens]
    least = sum(len(t) * count * floor for t, count, floor in zip(curves, tokens, floors, strict=True)) / held
    if budget < least:
        raise ConfigError(
            f"{budget:.3f} bits are left for codes, but the least widths take {least:.3f}; raise "
            "allocation.bits_per_element or lower allocation.min_key_bits and min_value_bits"
        )

    def widths(multiplier: float) -> list[Tensor]:
        return [
            (table + multiplier * each * torch.arange(table.shape[1], dtype=table.dtype)).argmin(1)
            for table, each in zip(curves, price, strict=True)
        ]

    def mean(chosen: list[Tensor]) -> float:
        return sum(int(table.sum()) * count for table, count in zip(chosen, tokens, strict=True)) / held

    finite = torch.cat([table[torch.isfinite(table)] for table in curves])
    high = max(float(finite.max()), 1e-300) * 2 / min(price)  # more than any bit can save
    low = high * 1e-30
    if mean(widths(low)) <= budget:
        high = low
    for _ in range(_MULTIPLIER_STEPS):
        if high == low:
            break
        middle = math.sqrt(low * high)
        if mean(widths(middle)) > budget:
            low = middle
        else:
            high = middle
    return [table.to(torch.uint8) for table in widths(high)]


def codebook_levels(widths: Tensor, most: int, spec: QuantSpec) -> int:
    """Levels in all codebooks of one layer's keys or values; what :func:`share_codebooks` will build, or more where it
    finds a codebook that serves no channel best."""
    counts = torch.bincount(widths.to(torch.int64), minlength=2).tolist()
    # Two levels or one need no shapes: scale and zero point reach every pair of levels.
    return sum(
        levels * (min(most, count) if levels > 2 else 1)
        for count, levels in ((count, spec.level_count(width)) for width, count in enumerate(counts) if count)
    )


def share_codebooks(curves: Curves, widths: Tensor, most: int, spec: QuantSpec) -> QuantParams:
    """Scale and zero point per channel, and at most ``most`` codebooks for the channels of one width.

    Alternates between three steps: each channel takes the codebook that serves it best; scale and zero point follow by
    weighted least squares given the codes; each level becomes the weighted mean of what it codes. None of them can increase
    the weighted error of the nearest level. In the first rounds levels are placed anew for all that a codebook codes
    (:func:`level_fit`) instead, since what they start from is a mean of other levels. With a trellis the levels then follow
    what paths use them for (:func:`follow_paths`).

    Args:
        curves: the layer's, with widths up to the largest in ``widths``.
        widths: uint8 ``[C]``.
        most: codebooks of one width.
        spec: of the layer's keys or values.

    Returns:
        Parameters as they are stored, without phases.
    """
    channels = len(widths)
    scale = torch.ones(channels, dtype=torch.float64)
    zero_point = torch.zeros(channels, dtype=torch.float64)
    index = torch.zeros(channels, dtype=torch.int64)
    rows: list[Tensor] = []
    for width in sorted(set(widths.tolist())):
        members = (widths == width).nonzero().flatten()
        levels = curves.levels[width][members]
        middle, half = (levels[:, 0] + levels[:, -1]) / 2, (levels[:, -1] - levels[:, 0]) / 2
        fit = _Shared(
            curves.points[members],
            curves.weights[members],
            middle,
            half.clamp(min=_SMALLEST_SCALE),
            level_fit(spec),
        )
        if levels.shape[1] <= 2:
            books, chosen = (
                torch.linspace(-1, 1, 2, dtype=torch.float64)[None] * bool(width),
                fit.nothing_to_choose(),
            )
            books = books[:, : levels.shape[1]]
        else:
            books, chosen = fit.run(
                (levels - fit.zero_point[:, None]) / fit.scale[:, None], min(most, len(members))
            )
            if spec.trellis:
                books = follow_paths(books, width, fit.samples(chosen, len(books)))
        scale[members], zero_point[members] = fit.scale, fit.zero_point
        index[members] = chosen + len(rows)
        rows.extend(books)
    size = max(len(row) for row in rows)
    table = torch.stack([torch.cat([row, row[-1:].expand(size - len(row))]) for row in rows])
    codebook, packed = pack_codebooks(spec, widths, storable_levels(table.float()), index)
    stored_scale, stored_zero_point = storable_thresholds(spec, scale.clamp(min=_SMALLEST_SCALE), zero_point)
    return QuantParams(
        bits=widths.to(torch.uint8),
        codebook=codebook,
        codebook_index=packed,
        scale=stored_scale,
        zero_point=stored_zero_point,
    )


def follow_paths(books: Tensor, width: int, samples: Tensor) -> Tensor:
    """Levels for a trellis: each moves to the mean of the samples that the best paths code with it, repeatedly, and, but for the
    last time, as far again nearly (over-relaxation).

    Args:
        books: float64 ``[G, L]``, the start: levels for the nearest-level rule.
        width: of the codes.
        samples: float64 ``[G, blocks, 32]``, drawn from what each codebook will code.

    Returns:
        float64 ``[G, L]``, sorted.
    """
    bits = torch.full((len(books),), width)
    for left in reversed(range(_PATH_ROUNDS)):
        _, index = best_path(Subsets.of(books.float(), bits), samples.float().flatten(1)[:, None])
        index = index.flatten(1)
        count = torch.zeros_like(books).scatter_add_(1, index, torch.ones_like(samples).flatten(1))
        total = torch.zeros_like(books).scatter_add_(1, index, samples.flatten(1))
        move = torch.where(count > 0, total / count.clamp(min=1) - books, 0.0)
        books = (books + (_PATH_STEP if left else 1.0) * move).sort(1).values
    return books


def storable_levels(table: Tensor) -> Tensor:
    """Sort levels ``[G, L]`` and round them to float16, so that look-ups in half precision lose nothing."""
    return table.sort(1).values.half().float()


class _Shared:
    """Channels of one width on their way to shared codebooks."""

    def __init__(
        self,
        points: Tensor,
        weights: Tensor,
        zero_point: Tensor,
        scale: Tensor,
        fit: Callable[[Tensor, Tensor, int], Tensor],
    ) -> None:
        self.fit = fit
        self.points = points
        self.weights = _weighted(weights)
        self.zero_point, self.scale = zero_point, scale

    def nothing_to_choose(self) -> Tensor:
        return torch.zeros(len(self.points), dtype=torch.int64)

    def run(self, shapes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Codebooks ``[count, L]`` and the codebook of each channel, from each channel's own ``shapes [n,
        L]``."""
        # Start: channels in order of how far out their inner levels lie, in runs of equal length.
        spread = shapes.abs().mean(1)
        order = spread.argsort(stable=True)
        books = torch.stack([shapes[part].mean(0) for part in order.tensor_split(count)])
        chosen = self.nothing_to_choose()
        for number_of_round in range(_SHARE_ROUNDS):
            candidates = [self._follow(book) for book in books]
            errors = torch.stack([error for _, _, _, error in candidates])
            chosen = errors.argmin(0)
            pick = chosen[None]
            self.scale = torch.stack([scale for scale, _, _, _ in candidates]).gather(0, pick)[0]
            self.zero_point = torch.stack([zero for _, zero, _, _ in candidates]).gather(0, pick)[0]
            for number in range(count):
                mine = chosen == number
                if bool(mine.any()):
                    if number_of_round < _FRESH_ROUNDS:
                        books[number] = self._fresh(books.shape[1], mine)
                    else:
                        books[number] = self._centres(books[number], candidates[number][2][mine], mine)
        return books, chosen

    def samples(self, chosen: Tensor, count: int) -> Tensor:
        """Normalised values as the channels of each codebook have them, in random order, by weight.

        Returns:
            float64 ``[count, blocks, 32]``.
        """
        size = _SAMPLE_BLOCKS * BLOCK_TOKENS
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        wanted = (order + 0.5) / size
        drawn = []
        for number in range(count):
            mine = (
                chosen == number
                if bool((chosen == number).any())
                else torch.ones_like(chosen, dtype=torch.bool)
            )
            value, weight = self._sorted(mine)
            share = weight.cumsum(0)
            place = torch.searchsorted(share, wanted * share[-1]).clamp(max=len(value) - 1)
            drawn.append(value[place].view(_SAMPLE_BLOCKS, BLOCK_TOKENS))
        return torch.stack(drawn)

    def _follow(self, book: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, zero point, codes and error of every channel if it used ``book``, from where it stands."""
        scale, zero_point = self.scale, self.zero_point
        total = self.weights.sum(1)
        mean = (self.weights * self.points).sum(1) / total
        for _ in range(2):
            coded = book[nearest(zero_point[:, None] + scale[:, None] * book, self.points)]
            level = (self.weights * coded).sum(1) / total
            away = coded - level[:, None]
            variance = (self.weights * away.square()).sum(1)
            covariance = (self.weights * away * (self.points - mean[:, None])).sum(1)
            usable = (variance > 0) & (covariance > 0)
            slope = covariance / variance.clamp(min=torch.finfo(variance.dtype).tiny)
            scale = torch.where(usable, slope, scale).clamp(min=_SMALLEST_SCALE)
            zero_point = torch.where(usable, mean - scale * level, zero_point)
        levels = zero_point[:, None] + scale[:, None] * book
        codes = nearest(levels, self.points)
        error = (self.weights * (self.points - levels.gather(1, codes)).square()).sum(1)
        return scale, zero_point, codes, error

    def _normalised(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """All values of these channels on the codebook's scale, with their weights."""
        scale, zero_point = self.scale[mine, None], self.zero_point[mine, None]
        value = (self.points[mine] - zero_point) / scale
        return value.flatten(), (self.weights[mine] * scale.square()).flatten()

    def _sorted(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """The same in order of the values."""
        value, weight = self._normalised(mine)
        value, order = value.sort()
        return value, weight[order]

    def _fresh(self, count: int, mine: Tensor) -> Tensor:
        """Levels for the normalised values of these channels, whatever they had before."""
        value, weight = self._sorted(mine)
        return self.fit(value[None], weight[None], count)[0]

    def _centres(self, book: Tensor, codes: Tensor, mine: Tensor) -> Tensor:
        """Weighted mean of the normalised values behind each level of ``book``."""
        value, weight = self._normalised(mine)
        mass = torch.zeros_like(book).index_add_(0, codes.flatten(), weight)
        moment = torch.zeros_like(book).index_add_(0, codes.flatten(), weight * value)
        return (
            torch.where(mass > 0, moment / mass.clamp(min=torch.finfo(mass.dtype).tiny), book).sort().values
        )


def spend(
    target: float,
    chosen_at: Callable[[float], list[Tensor]],
    stored_bits: Callable[[list[Tensor]], float],
    rounds: int = 8,
) -> list[Tensor]:
    """Widths whose artifact takes at most ``target`` bits per element, everything counted.

    What is stored beside the codes (scales, codebooks, sinks) depends on the widths in turn, so the budget
    for codes is corrected until the whole fits.

    Args:
        target: bits per element.
        chosen_at: widths for a budget of code bits, :func:`allocate`.
        stored_bits: bits per element of an artifact with these widths.
        rounds: corrections to try.
    """
    budget, best = target, None
    for _ in range(rounds):
        widths = chosen_at(budget)
        excess = stored_bits(widths) - target
        if excess <= 0:
            best = widths
            if excess > -1e-3:
                break
        budget -= excess if excess <= 0 else excess + 1e-4
    if best is None:
        raise ConfigError(
            f"no allocation fits into {target} bits per element; raise allocation.bits_per_element"
        )
    return best
