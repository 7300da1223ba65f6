"""A chart of levels over the distribution of the values they code."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvq_calib.evaluate.charts.axes import plain
from kvq_calib.evaluate.charts.chart import PAGE, Chart

__all__ = ["density"]


def density(
    title: str,
    levels: Sequence[float],
    weights: Sequence[float],
    counts: Sequence[float],
    colour: str,
    *,
    large: bool,
) -> Chart:
    """Draw levels over the distribution of the values they code, on the normalised range.

    The area is the weighted distribution and the thin line the unweighted one, scaled to the same height. Peaks at the
    ends of the range are cut off.

    Args:
        title: description for screen readers.
        levels: levels in ``[-1, 1]``.
        weights, counts: sum of weights and number of values in equal bins over ``[-1, 1]``.
        colour: colour of the area.
        large: whether to draw an axis.
    """
    chart = Chart(title, PAGE, 280.0, 150.0 if large else 90.0, (4.0, 4.0, 4.0, 22.0 if large else 6.0))
    axes, bins = chart.axes, len(weights)
    middles = [(2 * n + 1) / bins - 1 for n in range(bins)]
    many = len(levels) > 16
    with chart.style():
        area = [0.0, *_outline(weights), 0.0]
        ends = [middles[0], *middles, middles[-1]]
        axes.fill(ends, area, color=chart.colour(colour), alpha=0.32, linewidth=0)
        axes.plot(middles, _outline(counts), color=chart.colour("soft"), linewidth=1)
        for name, tall, width, alpha in (
            ("level", 1.0, 0.8 if many else 1.2, 0.3 if many else 0.65),
            ("foot", 0.12, 1.8, 1.0),
        ):
            # One path for all levels, with NaN for the gaps.
            x = [at for level in levels for at in (level, level, math.nan)]
            y = [at for _ in levels for at in (0.0, tall, math.nan)]
            (drawn,) = axes.plot(
                x, y, color=chart.colour("ink"), linewidth=width, alpha=alpha, solid_capstyle="butt"
            )
            chart.mark(drawn, name)
        axes.set_xlim(-1.04, 1.04)
        axes.set_ylim(0.0, 1.06)
        axes.set_yticks([])
        ticks = (-1.0, -0.5, 0.0, 0.5, 1.0) if large else ()
        axes.set_xticks(ticks, [plain(tick) for tick in ticks], fontsize=11)
    return chart


def _outline(values: Sequence[float]) -> list[float]:
    """The outline of a histogram, cut off a little above 1."""
    # With thresholds per token, every token has a number at one end. Those peaks would flatten the rest.
    tallest = max(values[2:-2]) or 1.0
    return [min(value / tallest, 1.06) for value in values]
