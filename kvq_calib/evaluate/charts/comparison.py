"""The chart of ``kvq-eval compare``, as a file."""

from __future__ import annotations

import textwrap

from kvq_calib.evaluate.charts.axes import Labels
from kvq_calib.evaluate.charts.chart import PRINT
from kvq_calib.evaluate.charts.frontier import Point, frontier
from kvq_calib.evaluate.compare import Comparison

__all__ = ["FORMATS", "write_chart"]

FORMATS = (".svg", ".png")


def write_chart(file: str, comparison: Comparison, title: str) -> None:
    """Draw mean KL divergence against bits per element: artifacts as dots, rivals as rings, and the frontier.

    Args:
        file: ends in one of :data:`FORMATS`. An SVG has no time stamp: the same figures give the same bytes.
        comparison: what to draw.
        title: one line.
    """
    everything = [*comparison.artifacts, *comparison.rivals]
    # A logarithmic axis has no zero. A result with no divergence is put at the lower edge.
    floor = min((one.result.kl_mean for one in everything if one.result.kl_mean > 0), default=1e-6) / 2
    points = [
        Point(
            one.result.name,
            one.result.bits_per_element,
            max(one.result.kl_mean, floor),
            colour=f"s{number % 8}" if one.origin == "artifact" else "other",
            own=one.origin == "artifact",
        )
        for number, one in enumerate(everything)
    ]
    winners = [one.result.name for one in comparison.rivals if one.on_frontier]
    note = f"rivals on the frontier: {', '.join(winners)}" if winners else "no rival is on the frontier"
    text = f"{title}\nartifacts are filled; {textwrap.fill(note, 110, break_on_hyphens=False)}"
    labels = Labels(
        title,
        f"bits per element at {comparison.context:,} tokens, everything counted",
        "KL divergence, nats per token (logarithmic)",
    )
    chart = frontier(points, labels, palette=PRINT, height=560.0, top=30.0 + 16 * text.count("\n"))
    with chart.style():
        chart.axes.set_title(text, loc="left", color=chart.colour("ink"))
    chart.save(file)
