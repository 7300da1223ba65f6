"""A chart of KL divergence against bits, with the frontier: the results that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.transforms import Bbox

from kvq_calib.evaluate import pareto
from kvq_calib.evaluate.charts.axes import WIDTH, Labels, label_axes, log_ticks, plain, room_for, span
from kvq_calib.evaluate.charts.chart import PAGE, Chart, Palette

__all__ = ["Point", "frontier", "on_frontier"]


@dataclass(frozen=True)
class Point:
    """A measured point of the frontier chart.

    Attributes:
        name: name of what was measured.
        bits: bits per element.
        kl: KL divergence, nats per token, positive.
        tip: text shown on hovering.
        colour: colour of the point, a name of the palette.
        own: whether it is an artifact, not a rival.
    """

    name: str
    bits: float
    kl: float
    tip: str = ""
    colour: str = "other"
    own: bool = False


def on_frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in bits and KL divergence, by rising bits."""
    return pareto.frontier(points, lambda point: (point.bits, point.kl))


def frontier(
    points: Sequence[Point],
    labels: Labels,
    *,
    palette: Palette = PAGE,
    width: float = WIDTH,
    height: float = 440.0,
    top: float = 14.0,
) -> Chart:
    """Draw KL divergence (logarithmic) against bits, with the frontier. Down and left is better.

    Args:
        points: artifacts are drawn as dots, others as rings.
        labels: titles of the axes.
        palette: see :class:`~kvq_calib.evaluate.charts.chart.Chart`.
        width, height: size of the chart.
        top: margin above the plot.
    """
    low, high = span([point.kl for point in points], log=True, pad=0.14)
    ticks = log_ticks(low, high)
    chart = Chart(labels.title, palette, width, height, (room_for(map(plain, ticks)), 18.0, top, 46.0))
    axes = chart.axes
    with chart.style():
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.set_xlim(*span([point.bits for point in points], log=False, pad=0.12))
        axes.set_yticks(ticks, [plain(tick) for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.grid(True, axis="y")
        label_axes(chart, labels)
        best = on_frontier(points)
        # Steps, because nothing was measured between two points.
        edge = [(best[0].bits, best[0].kl)]
        for point in best[1:]:
            edge += [(point.bits, edge[-1][1]), (point.bits, point.kl)]
        axes.plot(
            *zip(*edge, strict=True), color=chart.colour("soft"), linewidth=1.6, dashes=(3, 3), zorder=2
        )
        for point in sorted(points, key=lambda each: each.own):  # artifacts are drawn on top
            colour, ground = chart.colour(point.colour), chart.colour("panel")
            (mark,) = axes.plot(
                point.bits,
                point.kl,
                marker="o",
                markersize=13 if point.own else 9,
                markerfacecolor=colour if point.own else ground,
                markeredgecolor=ground if point.own else colour,
                markeredgewidth=1.5 if point.own else 2,
                linestyle="none",
                zorder=4 if point.own else 3,
            )
            chart.mark(mark, "own" if point.own else "beside", point.tip)
        _name_points(chart, points, edge)
    return chart


def _name_points(chart: Chart, points: Sequence[Point], edge: Sequence[tuple[float, float]]) -> None:
    """Write names beside points, where they cover nothing if possible. A distant name gets a line to its point."""
    axes = chart.axes
    renderer = chart.renderer
    hint = axes.annotate(
        "↙ fewer bits, closer to the unquantized model", (0, 0), (10, 10), "axes fraction", "offset points"
    )
    chart.figure.draw_without_rendering()
    spots = [tuple(axes.transData.transform((point.bits, point.kl))) for point in points]
    taken = [Bbox([(x - 8, y - 8), (x + 8, y + 8)]) for x, y in spots]
    taken.append(hint.get_window_extent(renderer))
    corners = [tuple(corner) for corner in axes.transData.transform(edge)]
    drawn = [Bbox([a, b]) for a, b in pairwise(corners)]
    for index in sorted(range(len(points)), key=lambda number: not points[number].own):
        point = points[index]
        text = axes.annotate(
            point.name,
            (point.bits, point.kl),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            color=chart.colour("ink" if point.own else "soft"),
            weight="bold" if point.own else "normal",
            zorder=5,
            bbox={"facecolor": chart.colour("panel"), "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
        for covered in ([*taken, *drawn], taken):
            spot = next((spot for spot in _SPOTS if _fits(text, spot, covered, axes, renderer)), None)
            if spot is not None:
                break
        else:
            spot = _SPOTS[-1]
        _move(text, spot)
        taken.append(text.get_window_extent(renderer))
        if spot.far:
            middle = (spot.x + {"left": 4, "right": -4, "center": 0}[spot.side], spot.y * 0.7)
            line = {"arrowstyle": "-", "color": chart.colour("soft"), "linewidth": 0.8}
            axes.annotate(
                "", (point.bits, point.kl), middle, "data", "offset points", arrowprops=line, zorder=2.5
            )


@dataclass(frozen=True)
class _Spot:
    """A place for a name relative to its point: offset, the side of the text it refers to, and whether it is far."""

    x: float
    y: float
    side: str
    far: bool


_SPOTS = [
    *(_Spot(x, 0.0, side, False) for x, side in ((12.0, "left"), (-12.0, "right"))),
    *(_Spot(x, y, side, False) for y in (12.0, -12.0) for x, side in ((8.0, "left"), (-8.0, "right"))),
    *(_Spot(0.0, y, "center", False) for y in (16.0, -16.0)),
    *(
        _Spot(x, y, side, True)
        for y in (28.0, -28.0, 44.0, -44.0, 60.0, -60.0)
        for x, side in ((14.0, "left"), (-14.0, "right"), (0.0, "center"))
    ),
    *(_Spot(x, y, side, True) for x, side in ((36.0, "left"), (-36.0, "right")) for y in (0.0, 20.0, -20.0)),
]


def _move(text: Any, spot: _Spot) -> None:
    text.set_position((spot.x, spot.y))
    text.set_horizontalalignment(spot.side)


def _fits(text: Any, spot: _Spot, taken: Sequence[Bbox], axes: Any, renderer: Any) -> bool:
    """Whether a name at that place is inside the plot and covers nothing."""
    _move(text, spot)
    box, plot = text.get_window_extent(renderer), axes.bbox
    inside = plot.x0 < box.x0 and box.x1 < plot.x1 + 16 and plot.y0 < box.y0 and box.y1 < plot.y1 + 12
    return inside and not any(box.overlaps(other) for other in taken)
