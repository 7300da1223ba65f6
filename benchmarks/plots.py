"""Common parts of the documentation's figures: size, themes, legend, and access to records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvq_calib.evaluate.charts.axes import Labels, label_axes
from kvq_calib.evaluate.charts.chart import DARK, PRINT, Chart, Palette

RESULTS = Path(__file__).parent / "results"
ARTIFACTS = Path(__file__).parent / "artifacts" / "smollm2-135m-wikitext2"
WIDTH = 720.0
HEIGHT = 380.0
THEMES = {"light": PRINT, "dark": DARK}


def record(name: str) -> Any:
    """Read a committed record."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def new_chart(
    title: str,
    palette: Palette,
    *,
    height: float = HEIGHT,
    left: float = 76.0,
    right: float = 18.0,
    top: float = 18.0,
) -> Chart:
    """An empty chart with margins for axes."""
    return Chart(title, palette, WIDTH, height, (left, right, top, 46.0))


def name_axes(chart: Chart, x: str, y: str, grid: str = "y") -> None:
    """Write the titles of the axes, and draw the grid."""
    chart.axes.grid(True, axis=grid)
    label_axes(chart, Labels(chart.title, x, y))


def legend(chart: Chart, entries: Iterable[tuple[str, str | None]]) -> None:
    """Write names with their colours in a row above the plot. ``None`` stands for a note without a mark."""
    x, y = 12.0, 1 - 20 / chart.height
    with chart.style():
        for name, colour in entries:
            if colour is not None:
                chart.figure.text(x / chart.width, y, "●", color=chart.colour(colour), va="center", size=14)
                x += 16
            text = chart.figure.text(x / chart.width, y, name, color=chart.colour("ink"), va="center")
            x += text.get_window_extent(chart.renderer).width + 20


def bars(
    chart: Chart, rows: Iterable[tuple[str, float, str]], *, format: str = "{:.4f}", room: float = 1.16
) -> None:
    """Draw a horizontal bar for each (name, value, colour), from top to bottom, with the value at its end."""
    rows = list(rows)
    axes = chart.axes
    with chart.style():
        for place, (_, value, colour) in enumerate(rows):
            axes.barh(place, value, height=0.66, color=chart.colour(colour))
            axes.annotate(
                format.format(value), (value, place), (6, 0), textcoords="offset points", va="center",
                color=chart.colour("ink"),
            )  # fmt: skip
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, room * max(value for _, value, _ in rows))
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.grid(True, axis="x")
