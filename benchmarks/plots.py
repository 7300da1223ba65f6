"""What figures of the documentation share: their size, their themes, a legend."""

from __future__ import annotations

from collections.abc import Iterable

from kvq_calib.evaluate.charts.axes import Labels, label_axes
from kvq_calib.evaluate.charts.chart import DARK, PRINT, Chart, Palette

WIDTH = 720.0
HEIGHT = 380.0
THEMES = {"light": PRINT, "dark": DARK}


def new_chart(
    title: str, palette: Palette, *, height: float = HEIGHT, top: float = 18.0, right: float = 18.0
) -> Chart:
    """An empty chart with room for axes."""
    return Chart(title, palette, WIDTH, height, (76.0, right, top, 46.0))


def bare_axes(chart: Chart, x: str, y: str) -> None:
    """Name the axes and draw the grid."""
    chart.axes.grid(True, axis="y")
    label_axes(chart, Labels(chart.title, x, y))


def legend(chart: Chart, entries: Iterable[tuple[str, str | None]]) -> None:
    """Names with their colours in a row above the plot; ``None`` is a note without a mark."""
    at = 12.0
    with chart.style():
        for name, colour in entries:
            if colour is not None:
                chart.figure.text(
                    at / chart.width,
                    1 - 20 / chart.height,
                    "●",
                    color=chart.colour(colour),
                    va="center",
                    size=14,
                )
                at += 16
            text = chart.figure.text(
                at / chart.width, 1 - 20 / chart.height, name, color=chart.colour("ink"), va="center"
            )
            at += text.get_window_extent(chart.renderer).width + 20
