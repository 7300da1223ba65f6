"""Draw the figures of the README and the documentation from committed records and artifacts.

    python benchmarks/figures.py [NAME ...] [--output docs/figures]

Every figure is written twice, as ``NAME-light.svg`` and ``NAME-dark.svg``. Run it again when a record has changed.
``tests/test_figures.py`` checks that the committed figures agree with the records.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diagrams import draw_page, draw_pipeline
from method_figures import METHOD_FIGURES
from plots import THEMES, WIDTH, legend, name_axes, new_chart, record

from kvq_calib.evaluate.charts.axes import Labels, log_ticks, plain
from kvq_calib.evaluate.charts.chart import Chart, Palette
from kvq_calib.evaluate.charts.frontier import Point, frontier

FIGURES = Path(__file__).parent.parent / "docs" / "figures"

#: Name in the record, name in the figure, and colour.
_CACHES = [
    ("kvq4", "kvq4", "s0"), ("kvq3", "kvq3", "s0"), ("kvq2", "kvq2", "s0"),
    ("nuq4-1p", "KVQuant 4", "s1"), ("nuq3-1p", "KVQuant 3", "s1"), ("nuq2-1p", "KVQuant 2", "s1"),
    ("fp8-head", "FP8", "s5"), ("turboquant-4bit", "TurboQuant 4", "s5"), ("turboquant-3bit", "TurboQuant 3", "s5"),
    ("llamacpp-q8_0", "q8_0", "s2"), ("llamacpp-q5_0", "q5_0", "s2"), ("llamacpp-q4_0", "q4_0", "s2"),
    ("hqq-4bit", "hqq 4", "s4"), ("hqq-2bit", "hqq 2", "s4"),
    ("quanto-4bit", "quanto 4", "s4"), ("quanto-2bit", "quanto 2", "s4"),
    ("kivi-4bit", "KIVI 4", "other"), ("kivi-2bit", "KIVI 2", "other"), ("oscar-2bit", "OSCAR 2", "other"),
    ("kvarn-k4v2", "KVarN 4", "other"), ("kvarn-k2v2", "KVarN 2", "other"), ("turboquant-k8v4", "TurboQuant 8", "s5"),
]  # fmt: skip
_ORIGINS = (
    ("this project", "s0"),
    ("KVQuant", "s1"),
    ("vLLM", "s5"),
    ("llama.cpp", "s2"),
    ("transformers", "s4"),
    ("papers", "other"),
)

#: Files with the KL divergence of every window. Of files with the same recipe, the first counts.
_TEXTS = {
    "Wikitext-2": ("wikitext2", "nuq-wikitext2"),
    "C4": ("c4",),
    "Gemma 3 270M, Wikitext-2": ("kvq-gemma3-270m-wikitext2", "gemma3-270m-wikitext2"),
}
_RECIPES = {"kvq4": "s0", "kvq3": "s2", "kvq2": "s4", "nuq4-1p": "s1", "nuq3-1p": "other"}


def kl_by_bits(palette: Palette) -> Chart:
    """KL divergence against bits for our recipes, KVQuant and other projects, all on the same 2 windows.

    ``compare-llamacpp-wikitext2.json`` has the caches of llama.cpp and ``kvq*`` with computed levels, and
    ``compare-newer-wikitext2.json`` other rivals added later. The first record has the rest.
    """
    names = ("compare-wikitext2", "compare-llamacpp-wikitext2", "compare-newer-wikitext2")
    contents = [record(name) for name in names]
    assert len({content["config"]["data"]["sha256"] for content in contents}) == 1
    measured = {
        one["name"]: one for content in contents for one in (*content["artifacts"], *content["rivals"])
    }
    points = [
        Point(name, measured[key]["bits_per_element"], measured[key]["kl_mean"], colour=colour, own=colour in ("s0", "s1"))
        for key, name, colour in _CACHES
    ]  # fmt: skip
    labels = Labels(
        "KL divergence against bits per element",
        "bits per element at 2,048 tokens, everything counted",
        "KL divergence, nats per token",
    )
    chart = frontier(points, labels, palette=palette, width=WIDTH, height=620.0, top=44.0)
    legend(chart, _ORIGINS)
    return chart


def kl_by_recipe(palette: Palette) -> Chart:
    """Mean KL divergence by recipe and text. Bars reach from the smallest to the largest window."""
    chart = new_chart("KL divergence by recipe and text", palette, top=44.0)
    axes = chart.axes
    with chart.style():
        for group, files in enumerate(_TEXTS.values()):
            found: dict[str, Sequence[float]] = {}
            for file in files:
                for one in record(file)["artifacts"]:
                    found.setdefault(one["name"], one["kl_windows"])
            for place, (name, colour) in enumerate(_RECIPES.items()):
                windows = found[name]
                mean = sum(windows) / len(windows)
                at, fill = group - 0.36 + 0.18 * place, chart.colour(colour)
                axes.errorbar(
                    at,
                    mean,
                    [[mean - min(windows)], [max(windows) - mean]],
                    color=fill,
                    capsize=4,
                    linewidth=1.6,
                )
                axes.plot(at, mean, marker="o", markersize=9, linestyle="none", color=fill)
        axes.set_yscale("log")
        axes.set_ylim(0.0016, 0.12)
        ticks = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1]
        axes.set_yticks(ticks, [plain(tick) for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_xlim(-0.5, len(_TEXTS) - 0.5)
        axes.set_xticks(range(len(_TEXTS)), list(_TEXTS))
        name_axes(chart, "", "KL divergence, nats per token")
    legend(chart, _RECIPES.items())
    return chart


def _name_ends(chart: Chart, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write the names of lines beside their last points, moved apart. The axes have their limits."""
    axes = chart.axes
    spot = 2.0
    for name, end in sorted(ends.items(), key=lambda item: -item[1][1]):
        height = axes.transAxes.inverted().transform(axes.transData.transform(end))[1]
        spot = min(height, spot - 0.055)
        axes.annotate(
            name, (1, spot), (10, 0), "axes fraction", "offset points", va="center", annotation_clip=False,
            color=chart.colour("ink"),
        )  # fmt: skip


def _by_context(
    palette: Palette, title: str, y: str, value: Callable[[Any], float], ends: tuple[float, float]
) -> Chart:
    """One line per cache over the tokens of context, from ``decode_speed.json``."""
    chart = new_chart(title, palette, right=172.0)
    axes = chart.axes
    rows = [row for row in record("decode_speed")["rows"] if "cache" in row and row["threads"] == 1]
    names = list(dict.fromkeys(row["cache"] for row in rows))
    colours = {"DynamicCache": "other", **_RECIPES}
    with chart.style():
        lines = {
            name: [(row["context"], value(row)) for row in rows if row["cache"] == name] for name in names
        }
        for name, line in lines.items():
            colour = chart.colour(colours[name])
            axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=6, linewidth=2)
        axes.set_xlim(0, 16384)
        axes.set_xticks([1024, 4096, 8192, 16384], ["1K", "4K", "8K", "16K"])
        axes.set_ylim(*ends)
        lines["DynamicCache, float32"] = lines.pop("DynamicCache")
        _name_ends(chart, {name: line[-1] for name, line in lines.items()})
        name_axes(chart, "tokens in the cache", y)
    return chart


def decode_time(palette: Palette) -> Chart:
    """Time of a decoded token on a CPU, one thread, by context."""
    title = "Time per token against context, SmolLM2-135M on one CPU thread"
    return _by_context(palette, title, "milliseconds per token", lambda row: 1000 * row["cpu_mean"], (0, 300))


def memory(palette: Palette) -> Chart:
    """Memory of the cache by context."""
    title = "Memory of the cache against context, SmolLM2-135M"
    return _by_context(palette, title, "MiB held", lambda row: row["bytes"] / 2**20, (0, 760))


def kl_by_position(palette: Palette) -> Chart:
    """KL divergence along texts of 8,192 tokens, one line per cache."""
    chart = new_chart("KL divergence by position in the text", palette, right=84.0)
    axes = chart.axes
    lines = {
        one["name"]: [((first + last) / 2, kl) for first, last, kl in one["kl_positions"]]
        for one in record("long-wikitext2")["artifacts"]
    }
    with chart.style():
        for name, line in lines.items():
            axes.plot(*zip(*line, strict=True), color=chart.colour(_RECIPES[name]), linewidth=2)
        _log_scale(axes, [kl for line in lines.values() for _, kl in line])
        axes.set_xlim(0, 8192)
        axes.set_xticks([0, 2048, 4096, 6144, 8192], ["0", "2K", "4K", "6K", "8K"])
        _name_ends(chart, {name: line[-1] for name, line in lines.items()})
        name_axes(chart, "position in the text, tokens", "KL divergence, nats per token")
    return chart


def kl_by_budget(palette: Palette) -> Chart:
    """KL divergence of ``--bits`` recipes against their bits."""
    chart = new_chart("KL divergence against the budget", palette)
    axes = chart.axes
    points = [(one["bits_per_element"], one["kl_mean"]) for one in record("bits")["artifacts"]]
    with chart.style():
        axes.plot(*zip(*points, strict=True), color=chart.colour("s0"), marker="o", markersize=7, linewidth=2)
        _log_scale(axes, [kl for _, kl in points])
        for bits, kl in points:
            axes.annotate(
                f"{kl:.2g}", (bits, kl), (8, 6), textcoords="offset points", color=chart.colour("ink")
            )
        axes.set_xlim(1.2, 6.6)
        name_axes(chart, "bits per element, everything counted", "KL divergence, nats per token")
    return chart


def _log_scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic scale for KL divergence, with some room around ``values``."""
    low, high = 0.8 * min(values), 1.25 * max(values)
    ticks = log_ticks(low, high)
    axes.set_yscale("log")
    axes.set_yticks(ticks, [plain(tick) for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


DRAWN: dict[str, Callable[[Palette], Chart]] = {
    "kl-by-bits": kl_by_bits,
    "kl-by-recipe": kl_by_recipe,
    "decode-time": decode_time,
    "memory": memory,
    "kl-by-position": kl_by_position,
    "kl-by-budget": kl_by_budget,
    "pipeline": draw_pipeline,
    "page": draw_page,
    **METHOD_FIGURES,
}


def main() -> None:
    """Write the requested figures; all by default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"figures, all by default: {', '.join(DRAWN)}"
    )
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="FOLDER", help="where they go")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in DRAWN]:
        parser.error(f"no figure {unknown[0]!r}; there are {', '.join(DRAWN)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or DRAWN:
        for theme, palette in THEMES.items():
            DRAWN[name](palette).save(str(arguments.output / f"{name}-{theme}.svg"))
        print(name)


if __name__ == "__main__":
    main()
