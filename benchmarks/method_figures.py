"""Figures for the pages on the method, from records and committed artifacts. Two are sketches, and labelled as such."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from plots import ARTIFACTS, bars, legend, name_axes, new_chart, record

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.paths import Subsets, best_path
from kvq_calib.evaluate.charts.chart import Chart, Palette
from kvq_calib.evaluate.memory import layer_bits

CONTEXT = 4096
#: Rows of the ablation in the figure.
_SWITCHES = (
    "keys per token",
    "keys after RoPE",
    "uniform levels",
    "k-means without Fisher weights",
    "no outliers",
    "no exact sink token",
)
#: Name of each step in the figure.
_STEPS = [
    "3 bits, one table of levels a layer", "levels per channel", "width per channel", "one budget for the model",
    "rotation of pairs", "error compensation", "weights shrunk to the mean", "trellis codes", "budget corrected",
    "vocabulary samples", "self-generated text", "token weighting", "refinement pass", "keys without bits", "repeats",
]  # fmt: skip


def _artifact(recipe: str) -> KVArtifact:
    return KVArtifact.load(ARTIFACTS / f"{recipe}.kvq.safetensors")


def _steps_of(name: str) -> dict[str, float]:
    """KL divergence by step: ``step-0`` to ``step-13``, then ``kvq-3``."""
    found = {row["name"]: row["kl_mean"] for row in record(name)["rows"]}
    order = [*(f"step-{number}" for number in range(14)), "kvq-3"]
    return {step: found[row] for step, row in zip(_STEPS, order, strict=True) if row in found}


def ablation(palette: Palette) -> Chart:
    """KL divergence of KVQuant's 3-bit recipe with one change (``ablation.json``)."""
    rows = {row["text"]: row["kl_mean"] for row in record("ablation")["rows"]}
    base = next(value for text, value in rows.items() if text.endswith("(nuq3-1p)"))
    chart = new_chart("KVQuant's 3-bit recipe with one thing changed", palette, height=300.0, left=230.0)
    bars(chart, [("nuq3-1p", base, "other"), *((name, rows[name], "s1") for name in _SWITCHES)])
    with chart.style():
        chart.axes.set_xlabel("KL divergence, nats per token")
    return chart


def steps(palette: Palette) -> Chart:
    """KL divergence at 3 bits on Wikitext-2, step by step (``frontier.json``)."""
    chart = new_chart("KL divergence at 3 bits, step by step", palette, height=480.0, left=250.0)
    bars(chart, [(name, value, "s0") for name, value in _steps_of("frontier").items()])
    with chart.style():
        chart.axes.set_xlabel("KL divergence, nats per token")
    return chart


def steps_c4(palette: Palette) -> Chart:
    """The last steps on Wikitext-2 and on C4 (``frontier.json``, ``steps-c4.json``)."""
    chart = new_chart("The last steps on the text of the calibration and on other text", palette, top=44.0)
    axes = chart.axes
    other = _steps_of("steps-c4")
    same = {name: value for name, value in _steps_of("frontier").items() if name in other}
    with chart.style():
        for values, colour in ((same, "s4"), (other, "value")):
            axes.plot(
                list(values.values()), color=chart.colour(colour), marker="o", markersize=7, linewidth=2
            )
        axes.set_xticks(range(len(other)), [name.replace(" ", "\n", 1) for name in other])
        axes.set_xlim(-0.45, len(other) - 0.55)
        axes.set_ylim(0.019, 0.027)
        name_axes(chart, "", "KL divergence, nats per token")
    legend(chart, [("Wikitext-2, as calibrated", "s4"), ("C4", "value")])
    return chart


def learning(palette: Palette) -> Chart:
    """``kvq2`` with and without learning (``frontier.json``)."""
    rows = {row["name"]: row["kl_mean"] for row in record("frontier")["rows"]}
    chart = new_chart("kvq2 with and without learning", palette, height=170.0, left=230.0)
    named = {"kvq2 without learning": "kvq2-fit", "kvq2": "kvq2", "KVQuant, 3 bits (nuq3-1p)": "nuq3-1p"}
    colours = ("s4", "s0", "s1")
    bars(
        chart, [(name, rows[row], colour) for (name, row), colour in zip(named.items(), colours, strict=True)]
    )
    with chart.style():
        chart.axes.set_xlabel("KL divergence, nats per token")
    return chart


def instructions(palette: Palette) -> Chart:
    """Instructions of the decode kernel per element (``kernel_instructions.json``)."""
    rows = record("kernel_instructions")
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    chart = new_chart(
        "Instructions of the CUDA decode kernel for each element", palette, top=44.0, height=320.0
    )
    axes = chart.axes
    with chart.style():
        for offset, kind in ((-0.18, "key"), (0.18, "value")):
            found = {row["recipe"]: row["instructions"] for row in rows if row["kind"] == kind}
            for place, recipe in enumerate(recipes):
                axes.bar(place + offset, found[recipe], width=0.34, color=chart.colour(kind))
                axes.annotate(
                    f"{found[recipe]:.1f}", (place + offset, found[recipe]), (0, 8), textcoords="offset points",
                    ha="center", va="center", color=chart.colour("ink"),
                )  # fmt: skip
        axes.set_xticks(range(len(recipes)), recipes)
        axes.set_xlim(-0.5, len(recipes) - 0.5)
        axes.set_ylim(0, 1.15 * max(row["instructions"] for row in rows))
        name_axes(chart, "", "instructions for each element")
    legend(chart, [("keys", "key"), ("values", "value")])
    return chart


def widths(palette: Palette) -> Chart:
    """Bits per element of each layer's keys and values in the committed ``kvq3``."""
    bits = layer_bits(_artifact("kvq3"), CONTEXT)
    chart = new_chart("Bits of the keys and values of each layer of kvq3", palette, top=44.0)
    axes = chart.axes
    with chart.style():
        for offset, kind in ((-0.2, "key"), (0.2, "value")):
            places = np.arange(len(bits[kind])) + offset
            axes.bar(places, bits[kind], width=0.38, color=chart.colour(kind))
        axes.set_xlim(-0.6, len(bits["key"]) - 0.4)
        axes.set_ylim(0, 1.1 * max(*bits["key"], *bits["value"]))
        axes.set_xticks(range(0, len(bits["key"]), 3))
        name_axes(chart, "layer", "bits per element")
    legend(chart, [("keys", "key"), ("values", "value")])
    return chart


def budget(palette: Palette) -> Chart:
    """The parts of the bits of the committed artifacts, at 4,096 tokens."""
    chart = new_chart("What the bits of an artifact are spent on", palette, top=44.0, height=260.0, left=90.0)
    axes = chart.axes
    recipes = ("kvq2", "kvq3", "kvq4", "nuq3-1p", "nuq4-1p")
    kinds: dict[str, str] = {}
    colours = iter(("s0", "s4", "s2", "s5", "s1", "s3", "s6", "s7"))
    with chart.style():
        for place, recipe in enumerate(recipes):
            artifact = _artifact(recipe)
            at, rest = 0.0, 0.0
            for kind, size in sorted(artifact.storage(CONTEXT).items(), key=lambda item: -item[1]):
                bits = 8 * size / artifact.elements(CONTEXT)
                if bits < 0.012:  # too narrow to see
                    rest += bits
                    continue
                if kind not in kinds:
                    kinds[kind] = next(colours)
                axes.barh(place, bits, left=at, height=0.66, color=chart.colour(kinds[kind]))
                at += bits
            axes.barh(place, rest, left=at, height=0.66, color=chart.colour("other"))
            axes.annotate(
                f"{at + rest:.2f}", (at + rest, place), (6, 0), textcoords="offset points", va="center",
                color=chart.colour("ink"),
            )  # fmt: skip
        axes.set_ylim(len(recipes) - 0.4, -0.6)
        axes.set_xlim(0, 5)
        axes.set_yticks(range(len(recipes)), recipes)
        axes.grid(True, axis="x")
        axes.set_xlabel("bits per element at 4,096 tokens")
    legend(chart, [*((kind.replace("_", " "), colour) for kind, colour in kinds.items()), ("other", "other")])
    return chart


def levels(palette: Palette) -> Chart:
    """Levels of three key channels of the committed ``kvq3``, of three widths."""
    quantizer = _artifact("kvq3").quantizers()[15]["key"]
    found, bits = quantizer.levels, quantizer.params.bits
    chart = new_chart("Levels of channels of three widths", palette, top=44.0, right=40.0)
    axes = chart.axes
    names = []
    with chart.style():
        for width, colour in ((2, "s2"), (3, "s0"), (4, "s4")):
            channel = int(torch.nonzero(bits == width)[0])
            own = found[channel][: 2 ** (width + 1)].tolist()
            places = [(2 * number + 1) / len(own) - 1 for number in range(len(own))]
            axes.plot(places, own, marker="o", markersize=6, linewidth=1.5, color=chart.colour(colour))
            names.append(
                (f"{width} bits: {len(own)} levels, {'cubic' if len(own) <= 16 else 'quintic'}", colour)
            )
        axes.set_xlim(-1, 1)
        axes.margins(y=0.06)
        axes.autoscale(axis="y")
        name_axes(chart, "u, the place of a level", "level")
    legend(chart, names)
    return chart


def token_weight(palette: Palette) -> Chart:
    """Weight of a token by its size class, for values of three layers of the committed ``kvq3``."""
    artifact = _artifact("kvq3")
    chart = new_chart("Weight of a token by its size", palette, top=44.0)
    axes = chart.axes
    shown = ((3, "s2"), (15, "s0"), (27, "s4"))
    with chart.style():
        for layer, colour in shown:
            weight = artifact.layers[layer].value.token_weight.float().mean(0).tolist()
            sizes = [(number - 20) / 2 for number in range(len(weight))]
            axes.step(sizes, weight, where="mid", linewidth=2, color=chart.colour(colour))
        axes.set_yscale("log")
        axes.set_ylim(0.2, 100)
        axes.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
        axes.set_yticks([], minor=True)
        axes.set_xlim(-10, 5.5)
        axes.set_xticks([-10, -5, 0, 5])
        name_axes(chart, "octaves of the squared size of a token's values in a head", "weight of its error")
    legend(chart, [(f"layer {layer}", colour) for layer, colour in shown])
    return chart


def noise_shaping(palette: Palette) -> Chart:
    """Correlation of the gradients of neighbouring tokens, values of the committed ``kvq3``."""
    layers = _artifact("kvq3").layers
    means = [float(layer.value.error_feedback.float().mean()) for layer in layers]
    chart = new_chart("Correlation of gradients of neighbouring tokens", palette, top=44.0)
    with chart.style():
        chart.axes.bar(range(len(means)), means, width=0.7, color=chart.colour("s0"))
        chart.axes.set_xlim(-0.7, len(means) - 0.3)
        name_axes(chart, "layer", "of values, mean of the heads")
    return chart


def compensation(palette: Palette) -> Chart:
    """The matrix of error compensation of one head of the committed ``kvq3``."""
    params = _artifact("kvq3").layers[15].key
    size = params.error_weight.shape[1]
    matrix = np.full((size, size), np.nan)
    rows, columns = np.tril_indices(size, -1)
    matrix[rows, columns] = params.compensation_scale[0].item() * params.compensation[0].float().numpy()
    chart = new_chart(
        "How much of an error is made up for at a later coordinate",
        palette,
        height=420.0,
        left=160.0,
        right=220.0,
    )
    axes = chart.axes
    with chart.style():
        for row, column in zip(rows, columns, strict=True):
            value = matrix[row, column]
            if abs(value) < 0.04:
                continue
            colour = chart.colour("key" if value > 0 else "value")
            axes.plot(
                column,
                row,
                marker="s",
                markersize=4.6,
                alpha=min(1.0, 1.6 * abs(value)),
                color=colour,
                markeredgewidth=0,
            )
        axes.set_xlim(-1, size)
        axes.set_ylim(size, -1)
        axes.set_xlabel("coordinate j that has an error")
        axes.set_ylabel("coordinate i that is coded later")
        x = 1 + 14 / 340
        for line, (text, colour) in enumerate(
            (("■ added", "key"), ("■ taken away", "value"), ("paler: less", "soft"))
        ):
            axes.text(x, 0.95 - 0.07 * line, text, color=chart.colour(colour), transform=axes.transAxes)
    return chart


def rotation(palette: Palette) -> Chart:
    """A sketch: samples of a pair of coordinates, before and after the rotation that makes them uncorrelated."""
    draw = np.random.default_rng(1)
    turn = np.deg2rad(35)
    x = draw.normal(size=(260, 2)) * (1.0, 0.28)
    x = x @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    a, b, c = x[:, 0].var(), x[:, 1].var(), np.cov(x.T, bias=True)[0, 1]
    angle = -0.5 * np.arctan2(2 * c, a - b)
    turned = np.stack(
        [
            np.cos(angle) * x[:, 0] - np.sin(angle) * x[:, 1],
            np.sin(angle) * x[:, 0] + np.cos(angle) * x[:, 1],
        ],
        1,
    )
    chart = new_chart(
        "A pair of coordinates before and after its rotation", palette, left=20.0, height=330.0, top=44.0
    )
    axes = chart.axes
    with chart.style():
        for points, shift, colour in ((x, -3.2, "s1"), (turned, 3.2, "s0")):
            axes.plot(
                points[:, 0] + shift, points[:, 1], ".", markersize=4, color=chart.colour(colour), alpha=0.7
            )
            reach = 2.2 * points.std(0)
            for value in (-1, 1):
                axes.plot(
                    [shift - reach[0], shift + reach[0]],
                    [value * reach[1]] * 2,
                    color=chart.colour("soft"),
                    linewidth=1.2,
                )
                axes.plot(
                    [shift + value * reach[0]] * 2,
                    [-reach[1], reach[1]],
                    color=chart.colour("soft"),
                    linewidth=1.2,
                )
        axes.set_xlim(-6.6, 6.6)
        axes.set_ylim(-2.9, 2.9)
        axes.set_aspect("equal")
        axes.axis("off")
    legend(chart, [("as it is: both halves wide", "s1"), ("turned: one half is narrow", "s0")])
    return chart


def trellis(palette: Palette) -> Chart:
    """A sketch: a random channel of 2 bits, the allowed levels at each token, and the best path."""
    draw = np.random.default_rng(5)
    y = torch.tensor(draw.normal(size=32), dtype=torch.float32)
    table = torch.linspace(-2.1, 2.1, 8)[None]
    _, index = best_path(Subsets.of(table, torch.tensor([2], dtype=torch.uint8)), y[None, None])
    path = index[0, 0].tolist()
    shown = 16
    chart = new_chart("A path through a trellis", palette, top=44.0, height=340.0)
    axes = chart.axes
    with chart.style():
        for token in range(shown):
            low = path[token] & 1  # the code before decides: an even or an odd level
            for number, level in enumerate(table[0].tolist()):
                allowed = number & 1 == low
                axes.plot(token, level, marker="o", markersize=8, linestyle="none", markeredgewidth=1.4,
                          markerfacecolor=chart.colour("panel"), markeredgecolor=chart.colour("s4" if allowed else "line"))  # fmt: skip
        chosen = [table[0, number].item() for number in path[:shown]]
        axes.plot(range(shown), chosen, marker="o", markersize=8, linestyle="none", color=chart.colour("s0"))
        axes.plot(
            range(shown),
            y[:shown].tolist(),
            marker="x",
            markersize=7,
            linewidth=1.2,
            color=chart.colour("ink"),
        )
        axes.set_xlim(-0.6, shown - 0.4)
        axes.set_ylim(-2.6, 2.6)
        axes.set_xticks(range(0, shown, 5))
        name_axes(chart, "token of the block", "value and levels")
    legend(
        chart,
        [
            ("chosen", "s0"),
            ("allowed by earlier codes", "s4"),
            ("× value", None),
            ("pale: not allowed", None),
        ],
    )
    return chart


METHOD_FIGURES: dict[str, Callable[[Palette], Chart]] = {
    "ablation": ablation,
    "steps": steps,
    "steps-c4": steps_c4,
    "learning": learning,
    "instructions": instructions,
    "widths": widths,
    "budget": budget,
    "levels": levels,
    "token-weight": token_weight,
    "noise-shaping": noise_shaping,
    "compensation": compensation,
    "rotation": rotation,
    "trellis": trellis,
}
