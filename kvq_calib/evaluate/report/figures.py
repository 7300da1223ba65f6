"""The charts and tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvq_calib.evaluate.charts.axes import Labels, log_ticks, plain, span
from kvq_calib.evaluate.charts.density import density
from kvq_calib.evaluate.charts.frontier import Point, frontier, on_frontier
from kvq_calib.evaluate.charts.series import Scale, Series, grouped_bars, lines, trace
from kvq_calib.evaluate.memory import artifact_report, layer_bits
from kvq_calib.evaluate.report.levels import fit_weights
from kvq_calib.evaluate.report.measure import Measured
from kvq_calib.evaluate.report.subjects import Subject
from kvq_calib.schema.results import Result, Results
from kvq_calib.schema.spec import KINDS, Kind

__all__ = [
    "file_size",
    "frontier_figures",
    "level_figures",
    "memory_figures",
    "outlier_figures",
    "plural",
    "same_outliers",
    "sensitivity_figures",
]

#: Contexts of the memory chart, in tokens.
CONTEXTS = tuple(1 << power for power in range(10, 21))
#: Largest number of outliers that has a separate bar.
_MOST_BARS = 32


def plural(kind: Kind) -> str:
    """``keys`` or ``values``."""
    return f"{kind}s"


# --------------------------------------------------------------------------------------------- frontier


def frontier_figures(chosen: Sequence[Subject], results: Sequence[Results]) -> list[dict[str, Any]]:
    """One chart for each set of comparable results."""
    own = {id(result): subject for subject in chosen for _, result in subject.results}
    groups: dict[tuple[str, ...], list[Results]] = {}
    for each in results:
        groups.setdefault(each.conditions, []).append(each)
    return [_frontier(group, own) for group in groups.values()]


def _frontier(group: Sequence[Results], own: dict[int, Subject]) -> dict[str, Any]:
    """The chart of results with one text and setting. ``own`` has the report's artifacts by ``id`` of a result."""
    unique = {
        (result.name, result.bits_per_element, result.kl_mean): result
        for each in group
        for result in (*each.artifacts, *(each.rivals or ()))
    }
    rows = sorted(unique.values(), key=lambda result: result.bits_per_element)
    points = [_point(result, own.get(id(result))) for result in rows]
    best = {id(point) for point in on_frontier(points)}
    labels = Labels(
        "KL divergence against bits per element",
        "bits per element, all stored bits counted",
        "KL divergence, nats per token (logarithmic)",
    )
    asked = group[0].fact("mode")
    return {
        "caption": _conditions(group[0]),
        "chart": frontier(points, labels).inline(),
        "along": _along_windows(rows, points),
        "rows": [
            {
                "result": result,
                "what": ", ".join(part for part in (result.origin, result.mode or asked) if part),
                "colour": point.colour,
                "own": point.own,
                "best": id(point) in best,
            }
            for result, point in zip(rows, points, strict=True)
        ],
        "baseline": next((row.baseline_perplexity for row in rows if row.baseline_perplexity), None),
        "beaten": [
            subject.name
            for point, result in zip(points, rows, strict=True)
            if (subject := own.get(id(result))) and id(point) not in best
        ],
        "origins": any(row.origin or row.mode not in (None, asked) for row in rows),
    }


def _point(result: Result, subject: Subject | None) -> Point:
    what = "; ".join(part for part in (result.origin, result.source, result.settings) if part)
    figures = f"{result.name}: {result.bits_per_element:.3f} bits, KL {result.kl_mean:.5f}"
    return Point(
        result.name,
        result.bits_per_element,
        max(result.kl_mean, 1e-9),  # a logarithmic axis has no zero
        f"{figures} ({what})" if what else figures,
        subject.colour if subject else "other",
        subject is not None,
    )


def _along_windows(rows: Sequence[Result], points: Sequence[Point]) -> str | None:
    """The chart of KL divergence by position in a window, for results that have it; ``None`` if none has."""
    series = [
        Series(
            result.name,
            point.colour,
            [((first + last) / 2, max(kl, 1e-9)) for first, last, kl in result.kl_positions],
        )
        for result, point in zip(rows, points, strict=True)
        if result.kl_positions and len(result.kl_positions) > 1
    ]
    if not series:
        return None
    found = [kl for one in series for _, kl in one.values]
    end = max(at for one in series for at, _ in one.values)
    low, high = span(found, log=True, pad=0.05)
    step = next(power for power in (1 << n for n in range(40)) if end / power <= 8)
    labels = Labels(
        "KL divergence by position in the text",
        "tokens before the predicted one",
        "KL, nats per token (logarithmic)",
    )
    x = Scale([float(at) for at in range(0, int(end) + 1, step)], _tokens, (0.0, end), log=False)
    return lines(series, labels, x, Scale(log_ticks(low, high), plain, (low, high)), height=260.0).inline()


def _conditions(results: Results) -> str:
    tokens = results.artifacts[0].tokens
    windows, seqlen = results.fact("data", "windows"), results.fact("data", "seqlen")
    context = results.fact("context")
    parts = [
        results.fact("data", "dataset") or results.fact("dataset") or "an unrecorded text",
        f"{windows} window{'' if windows == 1 else 's'} of {seqlen} tokens" if windows and seqlen else "",
        f"{tokens:,} predicted tokens" if tokens else "",
        f"{results.fact('mode')} mode" if results.fact("mode") else "",
        f"bits at {context:,} tokens of context" if isinstance(context, int) else "",
    ]
    return ", ".join(str(part) for part in parts if part)


# ------------------------------------------------------------------------------------------ sensitivity


def sensitivity_figures(subject: Subject, measured: Measured, context: int) -> dict[str, Any]:
    """Charts of the KL divergence with one layer's keys or values quantized, and of the bits of each layer."""
    found = measured.sensitivity[subject.name]
    bits = layer_bits(subject.artifact, context)
    layers = range(len(subject.artifact.layers))
    names = [str(index) for index in layers]
    places = sorted(
        ((found.layers[kind][index], kind, index) for kind in KINDS for index in layers), reverse=True
    )
    total = sum(value for value, _, _ in places)
    divergence = grouped_bars(
        names,
        [Series(plural(kind), kind, found.layers[kind]) for kind in KINDS],
        Labels(f"KL divergence with one layer of {subject.name} quantized", "layer", "KL, nats per token"),
        tip=lambda layer, name, value: f"layer {layer}, {name}: KL {value:.6f}",
    )
    width = grouped_bars(
        names,
        [Series(plural(kind), kind, bits[kind]) for kind in KINDS],
        Labels(f"Bits per element of each layer of {subject.name}", "layer", "bits"),
        tip=lambda layer, name, value: f"layer {layer}, {name}: {value:.3f} bits per element",
        height=170.0,
    )
    return {
        "chart": divergence.inline(),
        "bits_chart": width.inline(),
        "top": [
            {"layer": index, "kind": plural(kind), "kl": value, "share": value / total if total else 0.0}
            for value, kind, index in places[:3]
        ],
        "sum": total,
        "whole": found.whole,
        "tokens": found.tokens,
        "recent": subject.artifact.spec.recent_tokens,
        "rows": [
            {
                "layer": index,
                "kl": [found.layers[kind][index] for kind in KINDS],
                "bits": [bits[kind][index] for kind in KINDS],
            }
            for index in layers
        ],
    }


# ----------------------------------------------------------------------------------------------- levels


def level_figures(subject: Subject, measured: Measured) -> dict[str, Any]:
    """Charts of levels over the distributions they code: some layers large, all layers small."""
    uses = measured.levels[subject.name]
    count = len(subject.artifact.layers)

    def panel(layer: int, kind: Kind, large: bool) -> dict[str, Any]:
        use = uses[kind][layer]
        share = "" if use.channels == use.of else f", {use.channels} of {use.of} channels"
        title = f"Levels of {subject.name}, layer {layer}, {plural(kind)}, over the distribution they code"
        return {
            "label": f"layer {layer}, {plural(kind)}",
            "note": f"{use.bits} bits: {len(use.levels)} levels{share}",
            "chart": density(title, use.levels, use.weights, use.counts, kind, large=large).inline("small"),
        }

    featured = sorted({0, count // 2, count - 1})
    every = [use for kind in KINDS for use in uses[kind]]
    return {
        "columns": ("one", "two", "three")[len(featured) - 1],
        "featured": [panel(layer, kind, True) for kind in KINDS for layer in featured],
        "all": [panel(layer, kind, False) for layer in range(count) for kind in KINDS],
        "shared": any(use.channels < use.of for use in every),
        "compensated": any(use.compensated for use in every),
        "calibrated_on": subject.name in measured.calibrated_on,
        "weights": fit_weights(subject.artifact),
        "text": measured.fit_text[subject.name].source,
        "windows": len(measured.fit_text[subject.name].ids),
    }


# --------------------------------------------------------------------------------------------- outliers


def same_outliers(chosen: Sequence[Subject], measured: Measured) -> list[list[Subject]]:
    """Groups of artifacts with the same outliers. Recipes that differ only in bits have the same thresholds."""
    groups: list[list[Subject]] = []
    for subject in chosen:
        for group in groups:
            a, b = (measured.outliers[each.name] for each in (subject, group[0]))
            if a.sink_tokens == b.sink_tokens and all(torch.equal(a.found[k], b.found[k]) for k in KINDS):
                group.append(subject)
                break
        else:
            groups.append([subject])
    return groups


def outlier_figures(subject: Subject, measured: Measured, tokenizer: Any) -> dict[str, Any] | None:
    """Charts of outliers per layer and per token; ``None`` for an artifact without outliers."""
    counts = measured.outliers[subject.name]
    quantizers = subject.artifact.quantizers()
    caps: dict[Kind, int] = {kind: max(layer[kind].outlier_cap for layer in quantizers) for kind in KINDS}
    kinds = [kind for kind in KINDS if caps[kind]]
    if not kinds:
        return None
    means: dict[Kind, list[float]] = {kind: counts.packed(kind).double().mean(1).tolist() for kind in kinds}
    layers = range(len(quantizers))
    channels = max(q.layout.channels for layer in quantizers for q in layer.values())
    by_layer = grouped_bars(
        [str(index) for index in layers],
        [Series(plural(kind), kind, means[kind]) for kind in kinds],
        Labels(f"Outliers of a token by layer, {subject.name}", "layer", "outliers per token"),
        tip=lambda layer, name, value: f"layer {layer}, {name}: {value:.2f} outliers per token",
        height=200.0,
    )
    return {
        "layer_chart": by_layer.inline(),
        "spread_chart": _spread(subject, measured, kinds),
        **_along_the_text(subject, measured, kinds, tokenizer),
        "caps": [f"{caps[kind]} of {channels} {kind} elements" for kind in kinds],
        "means": [{"kind": plural(kind), "mean": sum(means[kind]) / len(means[kind])} for kind in kinds],
        "rows": [{"layer": index, "means": [means[kind][index] for kind in kinds]} for index in layers],
        "kinds": [plural(kind) for kind in kinds],
        "sinks": counts.sink_tokens,
    }


def _spread(subject: Subject, measured: Measured, kinds: Sequence[Kind]) -> str:
    """A histogram of tokens by their number of outliers."""
    packed = {kind: measured.outliers[subject.name].packed(kind) for kind in kinds}
    largest = max(int(found.max()) for found in packed.values())
    most = min(largest, _MOST_BARS)
    names = [str(number) for number in range(most + 1)]
    if largest > most:
        names[-1] += "+"

    def shares(kind: Kind) -> list[float]:
        numbers = packed[kind].clamp(max=most).flatten().bincount(minlength=most + 1).double()
        percent: list[float] = (100 * numbers / packed[kind].numel()).tolist()
        return percent

    return grouped_bars(
        names,
        [Series(plural(kind), kind, shares(kind)) for kind in kinds],
        Labels(
            f"Number of outliers per token, {subject.name}",
            "outliers of one token in one layer",
            "% of tokens",
        ),
        tip=lambda number, name, value: f"{value:.2f}% of tokens have {number} outliers among {name}",
        height=200.0,
    ).inline()


def _along_the_text(
    subject: Subject, measured: Measured, kinds: Sequence[Kind], tokenizer: Any
) -> dict[str, Any]:
    """A chart of the outliers of each token of the first window, summed over layers, and the tokens with most."""
    found, ids = measured.outliers[subject.name].found, measured.text.ids[0]
    totals = torch.stack([found[kind][:, : len(ids)].sum(0) for kind in kinds]).sum(0).tolist()
    ranked = sorted(range(len(ids)), key=lambda at: (-totals[at], at))[:8]
    title = f"Outliers of each token of the text, all layers together, {subject.name}"
    labels = Labels(title, "position in the text", "outliers in all layers")
    return {
        "token_chart": trace(totals, subject.colour, labels).inline(),
        "tokens": [
            {"position": at, "token": repr(tokenizer.decode([int(ids[at])])), "outliers": totals[at]}
            for at in ranked
        ],
    }


# ----------------------------------------------------------------------------------------------- memory


def _tokens(value: float) -> str:
    """A number of tokens in short form: 128K for 131,072."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def file_size(value: float) -> str:
    """A size in a suitable unit, by powers of 1024."""
    for unit, size in (("TB", 2**40), ("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def memory_figures(chosen: Sequence[Subject], limit: int | None, context: int) -> dict[str, Any]:
    """Charts of the cache's bytes against context, and of its parts at one context.

    Args:
        chosen: the artifacts.
        limit: longest context of the model, if known.
        context: tokens of context for the parts.
    """
    reports = {
        subject.name: [artifact_report(subject.artifact, tokens) for tokens in CONTEXTS] for subject in chosen
    }
    sixteen = [report.fp16 for report in reports[chosen[0].name]]
    series = [Series("16 bits", "other", list(zip(CONTEXTS, sixteen, strict=True)))]
    for subject in chosen:
        sizes = [(report.context, report.total) for report in reports[subject.name]]
        series.append(Series(subject.name, subject.colour, sizes))
    every = [size for one in series for _, size in one.values]
    title = "Memory of the cache against context"
    chart = lines(
        series,
        Labels(title, "tokens of context (logarithmic)", "bytes of the cache (logarithmic)"),
        Scale(CONTEXTS, _tokens, (CONTEXTS[0], CONTEXTS[-1])),
        Scale(
            [float(1 << power) for power in range(10, 50, 2)], file_size, (min(every) / 1.5, max(every) * 1.5)
        ),
        marks=[(limit, f"the model's {limit:,} positions")] if limit else [],
    )
    return {
        "chart": chart.inline(),
        "rows": [
            {
                "context": tokens,
                "sixteen": file_size(sixteen[number]),
                "sizes": [
                    {
                        "bytes": file_size(reports[subject.name][number].total),
                        "smaller": sixteen[number] / reports[subject.name][number].total,
                    }
                    for subject in chosen
                ],
            }
            for number, tokens in enumerate(CONTEXTS)
            if tokens in (4096, 32768, 131072, 1048576)
        ],
        "parts": _memory_parts(chosen, context),
        "context": context,
    }


def _memory_parts(chosen: Sequence[Subject], context: int) -> list[dict[str, Any]]:
    """The parts of the memory at ``context`` tokens, largest first."""
    reports = [artifact_report(subject.artifact, context) for subject in chosen]
    names = sorted(
        {name for report in reports for name in report.by_kind},
        key=lambda name: -max(report.by_kind.get(name, 0.0) for report in reports),
    )
    return [
        {
            "name": name.replace("_", " "),
            "shares": [
                {"bytes": file_size(size), "share": size / report.total}
                for report in reports
                for size in [report.by_kind.get(name, 0.0)]
            ],
        }
        for name in names
    ]
