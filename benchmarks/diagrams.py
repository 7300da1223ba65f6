"""Drawings for the documentation that need no record: the pipeline, and the layout of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.patches import FancyBboxPatch, Rectangle
from plots import WIDTH

from kvq_calib.evaluate.charts.chart import Chart, Palette


def _canvas(title: str, palette: Palette, height: float) -> Chart:
    """A chart used as a canvas, with y pointing downwards."""
    chart = Chart(title, palette, WIDTH, height, (0.0, 0.0, 0.0, 0.0))
    chart.axes.set_xlim(0, WIDTH)
    chart.axes.set_ylim(height, 0)
    chart.axes.axis("off")
    return chart


def _box(
    chart: Chart, x: float, y: float, w: float, h: float, lines: Sequence[str], colour: str = "soft"
) -> None:
    """A box with a name, and smaller lines below it."""
    axes = chart.axes
    axes.add_patch(
        FancyBboxPatch(
            (x, y), w, h, boxstyle="round,pad=0,rounding_size=8", facecolor=chart.colour("panel"),
            edgecolor=chart.colour(colour), linewidth=1.6,
        )
    )  # fmt: skip
    first, *rest = lines
    middle, step = x + w / 2, 16.0
    top = y + h / 2 - step * len(rest) / 2
    axes.text(middle, top, first, ha="center", va="center", weight="bold", color=chart.colour("ink"), size=13)
    for number, line in enumerate(rest, 1):
        axes.text(
            middle,
            top + step * number + 2,
            line,
            ha="center",
            va="center",
            color=chart.colour("soft"),
            size=11,
        )


def _arrow(chart: Chart, start: tuple[float, float], end: tuple[float, float], colour: str = "soft") -> None:
    style: dict[str, Any] = {
        "arrowstyle": "-|>",
        "color": chart.colour(colour),
        "linewidth": 1.6,
        "mutation_scale": 14,
    }
    chart.axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def draw_pipeline(palette: Palette) -> Chart:
    """Draw the way from model and text to an artifact and its uses."""
    chart = _canvas("From a model and a text to an artifact, and what uses it", palette, 330.0)
    with chart.style():
        _box(chart, 16, 40, 150, 60, ("model", "hub id, folder, .gguf"))
        _box(chart, 16, 150, 150, 60, ("text", "16 windows of 2,048"))
        _box(
            chart,
            206,
            40,
            150,
            170,
            (
                "calibrate",
                "",
                "watch keys, values",
                "and gradients;",
                "fit widths, levels,",
                "error compensation",
            ),
            "s0",
        )
        _box(chart, 396, 80, 124, 90, ("artifact", "", "one safetensors", "file"), "s1")
        right = 560
        _box(chart, right, 16, 144, 66, ("evaluate", "perplexity, KL,", "bits, report"))
        _box(chart, right, 98, 144, 66, ("generate", "packed cache:", "native, CUDA, torch"))
        _box(chart, right, 180, 144, 66, ("integrations", "lm-eval, FP8 scales,", "pages for engines"))
        _box(chart, right, 262, 144, 52, ("share", "hub, model card"))
        _arrow(chart, (166, 70), (206, 70))
        _arrow(chart, (166, 180), (206, 180))
        _arrow(chart, (356, 125), (396, 125))
        for y in (49, 131, 213, 288):
            _arrow(chart, (520, 125), (right, y))
        chart.axes.text(16, 270, "once per model, minutes", color=chart.colour("soft"), size=12)
        chart.axes.text(16, 290, "no GPU needed, nothing pickled", color=chart.colour("soft"), size=12)
    return chart


def draw_page(palette: Palette) -> Chart:
    """Draw where the tokens of one layer's cache are: sinks, pages of blocks, the exact tail."""
    chart = _canvas("Where the tokens of a cache are kept", palette, 300.0)
    axes = chart.axes

    def cells(
        x: float, y: float, count: int, width: float, height: float, colour: str, alpha: float = 1.0
    ) -> None:
        for number in range(count):
            axes.add_patch(
                Rectangle(
                    (x + number * width, y), width, height, facecolor=chart.colour(colour), alpha=alpha,
                    edgecolor=chart.colour("panel"), linewidth=1.5,
                )
            )  # fmt: skip

    def note(
        x: float, y: float, text: str, colour: str = "soft", side: str = "left", bold: bool = False
    ) -> None:
        axes.text(
            x,
            y,
            text,
            color=chart.colour(colour),
            ha=side,
            va="center",
            size=12,
            weight="bold" if bold else "normal",
        )

    with chart.style():
        note(16, 20, "one sequence, oldest token first", "ink", bold=True)
        cells(16, 40, 1, 14, 44, "s5")
        for page in range(2):
            cells(40 + page * 256, 40, 8, 30, 44, "s0")
        cells(552, 40, 3, 30, 44, "s0")
        cells(654, 40, 5, 9, 44, "s4")
        note(16, 100, "sink")
        note(160, 100, "page of 256 tokens = 8 blocks of 32", side="center")
        note(416, 100, "page", side="center")
        note(597, 100, "open page", side="center")
        note(676, 100, "tail", side="center")
        note(16, 140, "one block of keys", "ink", bold=True)
        widths = (3, 3, 2, 0, 4, 3, 1, 5)
        for channel, bits in enumerate(widths):
            y = 160 + channel * 15
            cells(150, y, 1, 200 * max(bits, 0.04) / 5, 13, "s0" if bits else "line")
            note(140, y + 7, f"channel {channel}", side="right")
            note(358, y + 7, f"{bits} bits × 32 tokens" if bits else "no bits: the level is the same for all")
        note(590, 166, "■ always exact", "s5")
        note(590, 186, "■ codes", "s0")
        note(590, 206, "■ exact until", "s4")
        note(590, 222, "    32 are there", "s4")
    return chart
