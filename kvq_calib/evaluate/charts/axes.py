"""Axes: round ticks, margins for labels, and axis titles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import FuncFormatter, MaxNLocator

from kvq_calib.evaluate.charts.chart import FONT, Chart

__all__ = ["WIDTH", "Labels", "from_zero", "label_axes", "log_ticks", "plain", "room_for", "span", "width_of"]

#: Width of a chart that fills the page.
WIDTH = 860.0
#: Mean width of a character, relative to its height.
_CHARACTER = 0.56


@dataclass(frozen=True)
class Labels:
    """The texts of a chart.

    Attributes:
        title: description for screen readers.
        x, y: what the axes show, with units.
    """

    title: str
    x: str
    y: str


def plain(value: float, _: object = None) -> str:
    """A number in plain notation, without a power of ten."""
    return f"{value:.9f}".rstrip("0").rstrip(".") or "0"


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Ticks between two numbers at 1, 2 and 5 times powers of ten, or only at the powers if those are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1,)):
        found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= most:
            break
    return found


def span(values: Sequence[float], *, log: bool, pad: float) -> tuple[float, float]:
    """Ends of an axis, with a margin around all values. A single value is in the middle."""
    points = [math.log(value) for value in values] if log else list(values)
    low, high = min(points), max(points)
    air = pad * (high - low) or (0.7 if log else 0.5)
    ends = low - air, high + air
    return (math.exp(ends[0]), math.exp(ends[1])) if log else ends


def label_axes(chart: Chart, labels: Labels) -> None:
    """Write the titles of the axes. That of the vertical axis is at the left edge."""
    left, right, _, _ = chart.margins
    chart.axes.set_xlabel(labels.x)
    chart.axes.set_ylabel(labels.y)
    chart.axes.yaxis.set_label_coords((14 - left) / (chart.width - left - right), 0.5)


def width_of(text: str, size: float = FONT) -> float:
    """Approximate width of a text."""
    return _CHARACTER * size * len(text)


def room_for(ticks: Iterable[str]) -> float:
    """Left margin of a chart, for the labels of its vertical axis."""
    return 36 + max([width_of("0000"), *map(width_of, ticks)])


def from_zero(chart: Chart, values: Iterable[float]) -> None:
    """Set up a vertical axis that begins at 0, for bars."""
    high = max(values, default=0.0)
    chart.axes.set_ylim(0.0, 1.08 * high if high > 0 else 1.0)
    chart.axes.yaxis.set_major_locator(
        MaxNLocator(6 if chart.height > 150 else 3, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    chart.axes.yaxis.set_major_formatter(FuncFormatter(plain))
    chart.axes.grid(True, axis="y")
