"""Divergence against bits as a picture."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from pathlib import Path
from typing import Any

from kvq_calib.errors import ConfigError
from kvq_calib.evaluate.compare import ComparedResult, Comparison, frontier
from kvq_calib.files import check_writable, write_atomically

__all__ = ["check_chart", "write_chart"]

_FORMATS = (".svg", ".png")
_OURS, _THEIRS = "#1f5fa8", "#b5541c"


def check_chart(file: str) -> None:
    """Refuse before measuring what could not be drawn after it.

    Raises:
        ConfigError: another suffix than .svg and .png, or no matplotlib.
        WriteError: the folder cannot be written to.
    """
    if Path(file).suffix.lower() not in _FORMATS:
        raise ConfigError(f"cannot draw {file}: name a file that ends in {' or '.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a chart needs matplotlib: pip install 'kvq-calib[report]'")
    check_writable(file)


def write_chart(file: str, comparison: Comparison, title: str) -> None:
    """Draw mean KL divergence (logarithmic) against bits per element, with the frontier.

    Artifacts are filled dots, rivals open squares; names on the frontier are bold, and the line under the title says
    which rivals are among them. An SVG has no time stamp: the same figures give the same bytes.

    Args:
        file: ends in .svg or .png; see :func:`check_chart`.
        comparison: what to draw.
        title: one line.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no global state, no window

    style = {"svg.fonttype": "none", "svg.hashsalt": "kvq-calib", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 6), layout="constrained")
        renderer = FigureCanvasAgg(figure).get_renderer()
        axes = figure.subplots()
        everything = [*comparison.artifacts, *comparison.rivals]
        best = frontier([one.result for one in everything])
        bits = [result.bits_per_element for result in best]
        floor = min((one.result.kl_mean for one in everything if one.result.kl_mean > 0), default=1e-6)
        # A logarithm has no zero; what does not diverge at all stands at the lower edge.
        heights = [max(result.kl_mean, floor / 2) for result in best]
        axes.plot(bits, heights, drawstyle="steps-post", color="0.6", linewidth=1, zorder=1, label="frontier")
        for label, color, marker, fill, group in (
            ("artifacts", _OURS, "o", _OURS, comparison.artifacts),
            ("rivals", _THEIRS, "s", "white", comparison.rivals),
        ):
            points = [(one.result.bits_per_element, max(one.result.kl_mean, floor / 2)) for one in group]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=36, c=fill, edgecolors=color, marker=marker, zorder=2, label=label)
        axes.set_yscale("log")
        axes.margins(0.12)
        _name_points(axes, renderer, everything, floor / 2)
        axes.set_xlabel(f"bits per element at {comparison.context:,} tokens, everything counted")
        axes.set_ylabel("mean KL divergence from the unquantized model (nats per token)")
        axes.grid(True, which="major", color="0.9", linewidth=0.6)
        axes.legend(loc="upper right", frameon=False)
        winners = [one.result.name for one in comparison.rivals if one.on_frontier]
        note = f"rivals on the frontier: {', '.join(winners)}" if winners else "no rival is on the frontier"
        axes.set_title(f"{title}\n{textwrap.fill(note, 120)}", loc="left", fontsize=10)
        target = io.BytesIO()
        suffix = Path(file).suffix.lower().removeprefix(".")
        metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(target, format=suffix, dpi=110, metadata=metadata)
    write_atomically(file, target.getvalue())


def _name_points(axes: Any, renderer: Any, results: list[ComparedResult], floor: float) -> None:
    """Write names beside points; one that would cover a point or an earlier name moves away by lines."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    places = [(one.result.bits_per_element, max(one.result.kl_mean, floor)) for one in results]
    taken = [Bbox([(x - 6, y - 6), (x + 6, y + 6)]) for x, y in axes.transData.transform(places)]
    sides = [(side, shift) for shift in (8, -8, 20, -20, 32, -32, 44, -44) for side in (7, -7)]
    order = sorted(range(len(results)), key=lambda index: not results[index].on_frontier)
    for index in order:
        one = results[index]
        text = axes.annotate(
            one.result.name,
            places[index],
            xytext=sides[0],
            textcoords="offset points",
            va="center",
            weight="bold" if one.on_frontier else "normal",
            color=_OURS if one.origin == "artifact" else _THEIRS,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
        for side, shift in sides:
            text.set_position((side, shift))
            text.set_horizontalalignment("left" if side > 0 else "right")
            box = text.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
