"""Charts of series: grouped bars, named lines, and one line along a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from kvq_calib.evaluate.charts.axes import WIDTH, Labels, from_zero, label_axes, room_for, width_of
from kvq_calib.evaluate.charts.chart import FONT, PAGE, Chart

__all__ = ["Scale", "Series", "grouped_bars", "lines", "trace"]


@dataclass(frozen=True)
class Series:
    """Values of one name and colour.

    Attributes:
        name: name of the series.
        colour: a name of the palette.
        values: a number per group, or points (x, y).
    """

    name: str
    colour: str
    values: Sequence[Any]


def grouped_bars(
    groups: Sequence[str],
    series: Sequence[Series],
    labels: Labels,
    *,
    tip: Callable[[str, str, float], str],
    height: float = 240.0,
) -> Chart:
    """Draw one bar per group and series, from 0.

    Args:
        groups: names under the groups; some are left out if there is no room.
        series: each with one value per group.
        labels: titles of the axes.
        tip: text shown on hovering, from (group, series, value).
        height: height of the chart.
    """
    # All charts have the same left margin, so that their groups are aligned.
    chart = Chart(labels.title, PAGE, WIDTH, height, (80.0, 18.0, 14.0, 46.0))
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(groups) / step <= 24)
    thick = 0.8 / len(series)
    with chart.style():
        for place, one in enumerate(series):
            middles = [index - 0.4 + (place + 0.46) * thick for index in range(len(groups))]
            bars = chart.axes.bar(middles, one.values, width=0.92 * thick, color=chart.colour(one.colour))
            for group, value, bar in zip(groups, one.values, bars, strict=True):
                bar.set_clip_on(False)
                chart.mark(bar, "bar", tip(group, one.name, value))
        chart.axes.set_xlim(-0.5, len(groups) - 0.5)
        chart.axes.set_xticks(range(0, len(groups), every), groups[::every])
        from_zero(chart, [value for one in series for value in one.values])
        label_axes(chart, labels)
    return chart


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        ticks: positions in order.
        format: formats the labels of the ticks.
        ends: ends of the axis.
        log: whether the axis is logarithmic.
    """

    ticks: Sequence[float]
    format: Callable[[float], str]
    ends: tuple[float, float]
    log: bool = True


def lines(
    series: Sequence[Series],
    labels: Labels,
    x: Scale,
    y: Scale,
    *,
    marks: Sequence[tuple[float, str]] = (),
    height: float = 360.0,
) -> Chart:
    """Draw named lines on two axes. Names are at the ends of the lines, moved apart where they would
    overlap.

    Args:
        series: points (x, y) of each line; lines of colour ``other`` are dashed.
        labels: titles of the axes.
        x, y: the axes.
        marks: vertical lines: value of ``x`` and name.
        height: height of the chart.
    """
    y_ticks = [tick for tick in y.ticks if y.ends[0] <= tick <= y.ends[1]]
    right = 20 + max(width_of(one.name, FONT + 2) for one in series)
    margins = (room_for(map(y.format, y_ticks)), right, 14.0, 46.0)
    chart = Chart(labels.title, PAGE, WIDTH, height, margins)
    axes = chart.axes
    with chart.style():
        axes.set_xscale("log" if x.log else "linear")
        axes.set_yscale("log" if y.log else "linear")
        axes.set_xlim(*x.ends)
        axes.set_ylim(*y.ends)
        for axis, scale, ticks in ((axes.xaxis, x, x.ticks), (axes.yaxis, y, y_ticks)):
            axis.set_ticks(ticks, [scale.format(tick) for tick in ticks])
            axis.set_ticks([], minor=True)
        axes.grid(True, axis="y")
        label_axes(chart, labels)
        for at, name in marks:
            if x.ends[0] <= at <= x.ends[1]:
                axes.axvline(at, color=chart.colour("soft"), linewidth=1, dashes=(4, 4))
                first_half = at < (math.sqrt(x.ends[0] * x.ends[1]) if x.log else sum(x.ends) / 2)
                axes.annotate(
                    name, (at, 1), (6 if first_half else -6, -10), axes.get_xaxis_transform(), "offset points",
                    ha="left" if first_half else "right",
                )  # fmt: skip
        for one in series:
            axes.plot(
                *zip(*one.values, strict=True),
                color=chart.colour(one.colour),
                linewidth=2.2,
                dashes=(3, 2) if one.colour == "other" else (None, None),
            )
        _name_ends(chart, series)
    return chart


def _name_ends(chart: Chart, series: Sequence[Series]) -> None:
    """Write the name of each line after its last point, from top to bottom."""
    axes = chart.axes
    chart.figure.draw_without_rendering()
    lowest = math.inf
    ends = sorted(
        ((axes.transData.transform(one.values[-1]), one) for one in series), key=lambda end: -end[0][1]
    )
    for (_, at), one in ends:
        lowest = min(at, lowest - 15)
        axes.annotate(
            one.name, one.values[-1], (8, lowest - at), "data", "offset points", va="center",
            color=chart.colour(one.colour), weight="bold", annotation_clip=False,
        )  # fmt: skip


def trace(values: Sequence[float], colour: str, labels: Labels, *, height: float = 200.0) -> Chart:
    """Draw one line over positions 0, 1, 2, ..., from 0."""
    chart = Chart(labels.title, PAGE, WIDTH, height, (80.0, 18.0, 14.0, 46.0))
    with chart.style():
        chart.axes.plot(range(len(values)), values, color=chart.colour(colour), linewidth=2, clip_on=False)
        chart.axes.set_xlim(0, max(len(values) - 1, 1))
        chart.axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True))
        from_zero(chart, values)
        label_axes(chart, labels)
    return chart
