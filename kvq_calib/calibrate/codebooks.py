"""Codebooks that channels of one width share, with a scale and a zero point for every channel.

A table of levels for every channel would cost bits that buy more elsewhere, so channels of one width share a few
(:func:`share_codebooks`). How levels are placed depends on the codec (:func:`level_curves`): for codes of the nearest
level by Lloyd's iteration; for a trellis by the optimal density first, and then where the best paths use them
(:func:`follow_paths`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS
from kvq_calib.codec.paths import Subsets, best_path
from kvq_calib.codec.trellis_params import TrellisParams, pack_codebooks, storable_levels, storable_thresholds
from kvq_calib.fit.allocation import Curves, PlaceLevels, fit_curves
from kvq_calib.fit.density import evenly_weighted, lloyd, nearest, spread_levels
from kvq_calib.schema.spec import TrellisSpec

#: Rounds of assigning channels to codebooks and refitting both; in the first ones levels are fitted from nothing.
_SHARE_ROUNDS = 10
_FRESH_ROUNDS = 2
#: A channel that never moves still needs a positive scale.
SMALLEST_SCALE = 1e-8
#: Error of the best path, its levels moved, over that of the nearest level at the start: 2.4 to 2.8 for normal
#: samples and 1.9 to 2.3 for Laplacian ones, 1 to 4 bits. Only its size against the error without any bits matters
#: here.
_PATH_OVER_NEAREST = 2.4
#: Rounds of finding paths and moving levels; how far beyond the mean of its samples a level moves in all but the
#: last, since whole runs of levels creep in one direction; and the blocks of samples of one codebook.
_PATH_ROUNDS = 16
_PATH_STEP = 1.9
_SAMPLE_BLOCKS = 1024


def level_placement(spec: TrellisSpec) -> PlaceLevels:
    """What places the levels of a tensor, called as :func:`kvq_calib.fit.density.lloyd` is."""
    return spread_levels if spec.states > 1 else lloyd


def level_curves(points: Tensor, weights: Tensor, spec: TrellisSpec) -> Curves:
    """Levels and weighted error of every channel at every width from 0 to ``spec.max_bits``.

    Args:
        points, weights: float64 ``[C, n]``, from
            :meth:`kvq_calib.calibrate.distribution.WeightedHistogram.distribution`.
        spec: with a trellis, levels are twice as many and their error is that of the nearest times a factor.
    """
    counts = [spec.level_count(bits) for bits in range(spec.max_bits + 1)]
    coded_error = _PATH_OVER_NEAREST if spec.states > 1 else 1.0
    return fit_curves(points, weights, level_placement(spec), counts, coded_error)


def codebook_levels(widths: Tensor, most: int, spec: TrellisSpec) -> int:
    """Levels in all codebooks of one layer's keys or values; what :func:`share_codebooks` will build, or more where it
    finds a codebook that serves no channel best."""
    counts = torch.bincount(widths.to(torch.int64), minlength=2).tolist()
    # Two levels or one need no shapes: scale and zero point reach every pair of levels.
    return sum(
        levels * (min(most, count) if levels > 2 else 1)
        for count, levels in ((count, spec.level_count(width)) for width, count in enumerate(counts) if count)
    )


def share_codebooks(curves: Curves, widths: Tensor, most: int, spec: TrellisSpec) -> TrellisParams:
    """Scale and zero point per channel, and at most ``most`` codebooks for the channels of one width.

    Alternates between three steps: each channel takes the codebook that serves it best; scale and zero point follow by
    weighted least squares given the codes; each level becomes the weighted mean of what it codes. None of them can
    increase the weighted error of the nearest level. In the first rounds levels are placed anew for all that a
    codebook codes (:func:`level_placement`) instead, since what they start from is a mean of other levels. With a
    trellis the levels then follow what paths use them for (:func:`follow_paths`).

    Args:
        curves: the layer's, with widths up to the largest in ``widths``.
        widths: uint8 ``[C]``.
        most: codebooks of one width.
        spec: of the layer's keys or values.

    Returns:
        Parameters as they are stored, without the rotation of pairs.
    """
    channels = len(widths)
    scale = torch.ones(channels, dtype=torch.float64)
    zero_point = torch.zeros(channels, dtype=torch.float64)
    index = torch.zeros(channels, dtype=torch.int64)
    rows: list[Tensor] = []
    for width in sorted(set(widths.tolist())):
        members = (widths == width).nonzero().flatten()
        group = _SharedCodebooks(curves, members, width, spec)
        books, chosen = group.fit(most)
        scale[members], zero_point[members] = group.scale, group.zero_point
        index[members] = chosen + len(rows)
        rows.extend(books)
    size = max(len(row) for row in rows)
    table = torch.stack([torch.cat([row, row[-1:].expand(size - len(row))]) for row in rows])
    codebook, packed = pack_codebooks(spec, widths, storable_levels(table.float()), index)
    stored_scale, stored_zero_point = storable_thresholds(scale.clamp(min=SMALLEST_SCALE), zero_point)
    return TrellisParams(
        bits=widths.to(torch.uint8),
        codebook=codebook,
        codebook_index=packed,
        scale=stored_scale,
        zero_point=stored_zero_point,
    )


def follow_paths(books: Tensor, width: int, samples: Tensor) -> Tensor:
    """Levels for a trellis: each moves to the mean of the samples that the best paths code with it, repeatedly, and,
    but for the last time, as far again nearly (over-relaxation).

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


class _SharedCodebooks:
    """Channels of one width on their way to shared codebooks.

    Args:
        curves: of all channels of the layer's keys or values.
        members: int64 ``[n]``, the channels of this width.
        width: of their codes.
        spec: of the tensor.

    Attributes:
        scale, zero_point: float64 ``[n]``, as they stand.
    """

    def __init__(self, curves: Curves, members: Tensor, width: int, spec: TrellisSpec) -> None:
        self._points = curves.points[members]
        self._weights = evenly_weighted(curves.weights[members])
        self._levels = curves.levels[width][members]
        self._width, self._spec, self._place = width, spec, level_placement(spec)
        first, last = self._levels[:, 0], self._levels[:, -1]
        self.zero_point = (first + last) / 2
        self.scale = ((last - first) / 2).clamp(min=SMALLEST_SCALE)

    def fit(self, most: int) -> tuple[Tensor, Tensor]:
        """At most ``most`` codebooks, float64 ``[G, L]``, and the codebook of each channel, int64 ``[n]``."""
        count = self._levels.shape[1]
        if count <= 2:
            books = torch.linspace(-1, 1, 2, dtype=torch.float64)[None] * bool(self._width)
            return books[:, :count], torch.zeros(len(self._points), dtype=torch.int64)
        shapes = (self._levels - self.zero_point[:, None]) / self.scale[:, None]
        books, chosen = self._alternate(shapes, min(most, len(shapes)))
        if self._spec.states > 1:
            books = follow_paths(books, self._width, self._samples(chosen, len(books)))
        return books, chosen

    def _alternate(self, shapes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Codebooks ``[count, L]`` and the codebook of each channel, from each channel's own ``shapes [n, L]``."""
        # Start: channels in order of how far out their inner levels lie, in runs of equal length.
        spread = shapes.abs().mean(1)
        order = spread.argsort(stable=True)
        books = torch.stack([shapes[part].mean(0) for part in order.tensor_split(count)])
        chosen = torch.zeros_like(order)
        for round_ in range(_SHARE_ROUNDS):
            candidates = [self._follow(book) for book in books]
            errors = torch.stack([error for _, _, _, error in candidates])
            chosen = errors.argmin(0)
            pick = chosen[None]
            self.scale = torch.stack([scale for scale, _, _, _ in candidates]).gather(0, pick)[0]
            self.zero_point = torch.stack([zero for _, zero, _, _ in candidates]).gather(0, pick)[0]
            for number in range(count):
                mine = chosen == number
                if not bool(mine.any()):
                    continue
                if round_ < _FRESH_ROUNDS:
                    books[number] = self._fresh(books.shape[1], mine)
                else:
                    books[number] = self._centres(books[number], candidates[number][2][mine], mine)
        return books, chosen

    def _samples(self, chosen: Tensor, count: int) -> Tensor:
        """Normalised values as the channels of each codebook have them, in random order, by weight.

        Returns:
            float64 ``[count, blocks, 32]``.
        """
        size = _SAMPLE_BLOCKS * BLOCK_TOKENS
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        wanted = (order + 0.5) / size
        drawn = []
        for number in range(count):
            mine = chosen == number
            if not bool(mine.any()):
                mine = torch.ones_like(mine)
            value, weight = self._sorted(mine)
            share = weight.cumsum(0)
            place = torch.searchsorted(share, wanted * share[-1]).clamp(max=len(value) - 1)
            drawn.append(value[place].view(_SAMPLE_BLOCKS, BLOCK_TOKENS))
        return torch.stack(drawn)

    def _follow(self, book: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scale, zero point, codes and error of every channel if it used ``book``, from where it stands."""
        scale, zero_point = self.scale, self.zero_point
        total = self._weights.sum(1)
        mean = (self._weights * self._points).sum(1) / total
        for _ in range(2):
            coded = book[nearest(zero_point[:, None] + scale[:, None] * book, self._points)]
            level = (self._weights * coded).sum(1) / total
            away = coded - level[:, None]
            variance = (self._weights * away.square()).sum(1)
            covariance = (self._weights * away * (self._points - mean[:, None])).sum(1)
            usable = (variance > 0) & (covariance > 0)
            slope = covariance / variance.clamp(min=torch.finfo(variance.dtype).tiny)
            scale = torch.where(usable, slope, scale).clamp(min=SMALLEST_SCALE)
            zero_point = torch.where(usable, mean - scale * level, zero_point)
        levels = zero_point[:, None] + scale[:, None] * book
        codes = nearest(levels, self._points)
        error = (self._weights * (self._points - levels.gather(1, codes)).square()).sum(1)
        return scale, zero_point, codes, error

    def _normalised(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """All values of these channels on the codebook's scale, with their weights."""
        scale, zero_point = self.scale[mine, None], self.zero_point[mine, None]
        value = (self._points[mine] - zero_point) / scale
        return value.flatten(), (self._weights[mine] * scale.square()).flatten()

    def _sorted(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """The same in order of the values."""
        value, weight = self._normalised(mine)
        value, order = value.sort()
        return value, weight[order]

    def _fresh(self, count: int, mine: Tensor) -> Tensor:
        """Levels for the normalised values of these channels, whatever they had before."""
        value, weight = self._sorted(mine)
        return self._place(value[None], weight[None], count)[0]

    def _centres(self, book: Tensor, codes: Tensor, mine: Tensor) -> Tensor:
        """Weighted mean of the normalised values behind each level of ``book``."""
        value, weight = self._normalised(mine)
        mass = torch.zeros_like(book).index_add_(0, codes.flatten(), weight)
        moment = torch.zeros_like(book).index_add_(0, codes.flatten(), weight * value)
        return (
            torch.where(mass > 0, moment / mass.clamp(min=torch.finfo(mass.dtype).tiny), book).sort().values
        )
