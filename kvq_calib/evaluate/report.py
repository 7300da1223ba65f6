"""One self-contained HTML page about some artifacts of one model: what they cost, where, why, and how to repeat it.

What is measured here is measured per layer, on a little text (:mod:`kvq_calib.evaluate.layers`); divergence and bits
of whole artifacts come from the JSON files of ``kvq-eval perplexity`` and its like. The page loads nothing: style and
charts stand in it. Everything that comes from outside goes through the escaping of Jinja and markupsafe.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import TokenWindows, load_windows
from kvq_calib.errors import DataError, KVQError
from kvq_calib.evaluate import svg
from kvq_calib.evaluate.layers import (
    CodebookUse,
    Progress,
    Sensitivity,
    TokenOutliers,
    codebook_uses,
    count_outliers,
    fit_weights,
    layer_bits,
    measure_sensitivity,
)
from kvq_calib.evaluate.memory import artifact_report
from kvq_calib.evaluate.tables import describe, run_facts
from kvq_calib.schema.problem import first_problem
from kvq_calib.schema.recipe import calibration_config, recipe_names
from kvq_calib.schema.spec import KINDS, Kind

if TYPE_CHECKING:
    from kvq_calib.model.load import LoadedModel

__all__ = ["Measured", "ReportError", "Results", "Subject", "measure", "read_results", "render", "subjects"]

#: Contexts of the memory chart, in tokens.
CONTEXTS = tuple(1 << power for power in range(10, 21))
#: Tokens of the calibration text that distributions are collected on, in whole windows.
FIT_TOKENS = 8192
#: Most calibration tokens that are cut again to compare hashes: what an artifact says of itself may be anything.
_MOST_TOKENS = 1 << 26
#: Classes of colours for artifacts.
_COLOURS = 8
#: Numbers of outliers that have a bar of their own.
_MOST_BARS = 32


class ReportError(KVQError):
    """A report whose data is missing or unreadable; the message says what to run first."""


# --------------------------------------------------------------------------------------------- results


class Result(BaseModel):
    """What one evaluation says of one artifact or rival.

    Attributes:
        name, bits_per_element, kl_mean: needed for a point of the frontier.
        perplexity, baseline_perplexity, kl_p99, top1_agreement, tokens: shown where they are there.
        origin, source, settings, mode: what a rival is, and how it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)

    name: str
    bits_per_element: float = Field(gt=0)
    kl_mean: float = Field(ge=0)
    perplexity: float | None = None
    baseline_perplexity: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    tokens: int | None = None
    origin: str | None = None
    source: str | None = None
    settings: str | None = None
    mode: str | None = None


class Results(BaseModel):
    """A JSON file of ``kvq-eval perplexity`` or ``kvq-eval compare``.

    Attributes:
        file: where it was read.
        artifacts: what was measured, side by side on one text.
        rivals: other ways to quantize a cache, measured in the same run; ``None`` where the file has no such list.
        config: settings, and what else is needed to repeat it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    file: str
    artifacts: list[Result] = Field(min_length=1)
    rivals: list[Result] | None = None
    config: dict[str, Any] = {}

    def fact(self, *path: str) -> Any:
        """A value of the settings, ``None`` where there is none."""
        return _fact(self.config, *path)

    @property
    def conditions(self) -> tuple[str, ...]:
        """What must be equal for two results to stand in one chart."""
        text = self.fact("data", "sha256") or [self.fact(n) for n in ("dataset", "seqlen", "windows", "seed")]
        facts = (self.fact("model"), text, self.fact("mode"), self.fact("context"))
        return tuple(json.dumps(fact, sort_keys=True) for fact in facts)


def read_results(files: Sequence[str]) -> list[Results]:
    """Read result files.

    Raises:
        ReportError: a file cannot be read, or is not the JSON of an evaluation.
    """
    found = []
    for file in files:
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ReportError(
                f"cannot read results {file}: {error.strerror or error}; write them with kvq-eval perplexity "
                f"MODEL --artifact ARTIFACT --json {file}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ReportError(
                f"{file} is not JSON; name a file that kvq-eval perplexity --json wrote"
            ) from error
        try:
            found.append(
                Results.model_validate({**content, "file": file} if isinstance(content, dict) else {})
            )
        except ValidationError as error:
            raise ReportError(
                f"{file} holds no results of an evaluation ({first_problem(error)}); name a file that "
                "kvq-eval perplexity --json wrote"
            ) from error
    return found


@dataclass(frozen=True, eq=False)
class Subject:
    """An artifact of the report.

    Attributes:
        name: short.
        file: as the user named it.
        artifact: its content.
        sha256, size: of the file.
        colour: class of its marks.
        results: what was measured, and the file that says so.
    """

    name: str
    file: str
    artifact: KVArtifact
    sha256: str
    size: int
    colour: str
    results: tuple[tuple[Results, Result], ...]


def subjects(
    model: str, artifacts: Mapping[str, KVArtifact], files: Mapping[str, str], results: Sequence[Results]
) -> list[Subject]:
    """Find the results of each artifact: by the file's hash, or by name where results have no hash.

    Args:
        model: as the user named it; for the message.
        artifacts, files: by the artifacts' short names.
        results: what :func:`read_results` gave.

    Raises:
        ReportError: an artifact has none; says what to run.
    """
    found = []
    for number, (name, artifact) in enumerate(artifacts.items()):
        content = Path(files[name]).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        own = tuple(
            (each, result)
            for each in results
            for result in each.artifacts
            if each.fact("artifact_sha256", result.name) == digest
            or (result.name == name and each.fact("artifact_sha256", name) is None)
        )
        if not own:
            where = " in " + ", ".join(each.file for each in results) if results else ""
            command = shlex.join(_command("perplexity", model, [files[name]], "--json", "results.json"))
            raise ReportError(
                f"no results for {name}{where}; measure it first: {command}, then add --results results.json"
            )
        found.append(Subject(name, files[name], artifact, digest, len(content), f"s{number % _COLOURS}", own))
    return found


def _command(name: str, model: str, files: Sequence[str], *options: str) -> list[str]:
    named = [part for file in files for part in ("--artifact", file)]
    return ["kvq-eval", name, model, *named, *options]


def _fact(content: Any, *path: str) -> Any:
    """A value deep in untyped JSON, ``None`` where there is none."""
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


# ------------------------------------------------------------------------------------------ measurement


@dataclass(frozen=True)
class Measured:
    """What was measured for the report, by the artifacts' names.

    Attributes:
        text: the windows of the sensitivity and of the outliers.
        fit_text: those of the distributions.
        calibrated_on: artifacts whose own calibration windows ``fit_text`` begins with.
        sensitivity, outliers, codebooks: see :mod:`kvq_calib.evaluate.layers`.
    """

    text: TokenWindows
    fit_text: Mapping[str, TokenWindows]
    calibrated_on: frozenset[str]
    sensitivity: Mapping[str, Sensitivity]
    outliers: Mapping[str, TokenOutliers]
    codebooks: Mapping[str, Mapping[Kind, Sequence[CodebookUse]]]


def measure(
    loaded: LoadedModel,
    artifacts: Mapping[str, KVArtifact],
    *,
    dataset: str,
    calibration_dataset: str,
    windows: int,
    seqlen: int,
    seed: int,
    progress: Progress | None = None,
) -> Measured:
    """Run the model for everything that the report shows per layer.

    Args:
        loaded: the model that the artifacts are for.
        artifacts: by name.
        dataset: text of the sensitivity and of the outliers.
        calibration_dataset: text of the distributions. Where it yields the windows that an artifact was
            calibrated on, the first of those are used, else those of ``dataset``.
        windows, seqlen, seed: of the text.
        progress: told after every step.
    """
    model = loaded.model
    text = load_windows(
        dataset, loaded.tokenizer, samples=windows, seqlen=seqlen, seed=seed, split="evaluation"
    )
    fit_text: dict[str, TokenWindows] = {}
    calibrated_on = set()
    known: dict[str, TokenWindows | None] = {}
    for name, artifact in artifacts.items():
        record = json.dumps(artifact.calibration.get("data"), sort_keys=True)
        if record not in known:
            known[record] = _calibration_windows(loaded, artifact, calibration_dataset)
        found = known[record]
        fit_text[name] = text if found is None else found
        if found is not None:
            calibrated_on.add(name)
    codebooks: dict[str, dict[Kind, list[CodebookUse]]] = {}
    for shared in {id(each): each for each in fit_text.values()}.values():
        same = {name: artifacts[name] for name, each in fit_text.items() if each is shared}
        codebooks |= codebook_uses(model, same, shared.ids, progress)
    return Measured(
        text,
        fit_text,
        frozenset(calibrated_on),
        measure_sensitivity(model, artifacts, text.ids, progress),
        count_outliers(model, artifacts, text.ids),
        codebooks,
    )


def _calibration_windows(loaded: LoadedModel, artifact: KVArtifact, dataset: str) -> TokenWindows | None:
    """The first windows that an artifact was calibrated on, if ``dataset`` yields them."""
    data = artifact.calibration.get("data")
    samples, seqlen, digest = (_fact(data, key) for key in ("requested", "seqlen", "sha256"))
    seed = _fact(artifact.calibration, "settings", "seed")
    if not all(isinstance(n, int) and 0 <= n < 1 << 20 for n in (samples, seqlen, seed)):
        return None
    if samples * seqlen > _MOST_TOKENS:
        return None
    try:
        found = load_windows(
            dataset, loaded.tokenizer, samples=samples, seqlen=seqlen, seed=seed, split="calibration"
        )
    except DataError:
        return None
    if found.source["sha256"] != digest:
        return None
    return TokenWindows(found.ids[: max(1, FIT_TOKENS // seqlen)], found.source)


# ---------------------------------------------------------------------------------------------- content


def _frontiers(chosen: Sequence[Subject], results: Sequence[Results]) -> list[dict[str, Any]]:
    """One chart for each set of results that may be compared."""
    own = {id(result): subject for subject in chosen for _, result in subject.results}
    groups: dict[tuple[str, ...], list[Results]] = {}
    for each in results:
        groups.setdefault(each.conditions, []).append(each)
    found = []
    for group in groups.values():
        unique = {
            (result.name, result.bits_per_element, result.kl_mean): result
            for each in group
            for result in (*each.artifacts, *(each.rivals or ()))
        }
        rows = sorted(unique.values(), key=lambda result: result.bits_per_element)
        points = []
        for result in rows:
            subject = own.get(id(result))
            points.append(
                svg.Point(
                    result.name,
                    result.bits_per_element,
                    max(result.kl_mean, 1e-9),  # a logarithmic axis has no zero
                    _tip(result),
                    subject.colour if subject else "other",
                    subject is not None,
                )
            )
        best = {id(point) for point in svg.on_frontier(points)}
        beaten = [
            subject.name
            for point, result in zip(points, rows, strict=True)
            if (subject := own.get(id(result))) and id(point) not in best
        ]
        found.append(
            {
                "caption": _conditions(group[0]),
                "chart": svg.frontier(
                    points,
                    "KL divergence against bits per element",
                    "bits per element, everything stored counted",
                    "KL divergence, nats per token (logarithmic)",
                ),
                "rows": [
                    {
                        "result": result,
                        "colour": point.class_,
                        "own": point.own,
                        "best": id(point) in best,
                    }
                    for result, point in zip(rows, points, strict=True)
                ],
                "baseline": next((r.baseline_perplexity for r in rows if r.baseline_perplexity), None),
                "beaten": beaten,
                "origins": any(result.origin for result in rows),
            }
        )
    return found


def _tip(result: Result) -> str:
    what = "; ".join(part for part in (result.origin, result.source, result.settings) if part)
    figures = f"{result.name}: {result.bits_per_element:.3f} bits, KL {result.kl_mean:.5f}"
    return f"{figures} ({what})" if what else figures


def _conditions(results: Results) -> str:
    tokens = results.artifacts[0].tokens
    windows, seqlen = results.fact("data", "windows"), results.fact("data", "seqlen")
    context = results.fact("context")
    parts = [
        results.fact("data", "dataset") or results.fact("dataset") or "a text that is not recorded",
        f"{windows} window{'' if windows == 1 else 's'} of {seqlen} tokens" if windows and seqlen else "",
        f"{tokens:,} predicted tokens" if tokens else "",
        f"{results.fact('mode')} mode" if results.fact("mode") else "",
        f"bits at {context:,} tokens of context" if isinstance(context, int) else "",
    ]
    return ", ".join(str(part) for part in parts if part)


def _plural(kind: Kind) -> str:
    return f"{kind}s"


def _sensitivity(subject: Subject, measured: Measured, context: int) -> dict[str, Any]:
    found = measured.sensitivity[subject.name]
    bits = layer_bits(subject.artifact, context)
    names = [str(index) for index in range(len(subject.artifact.layers))]
    places = sorted(
        ((value, kind, index) for kind in KINDS for index, value in enumerate(found.layers[kind])),
        reverse=True,
    )
    total = sum(value for value, _, _ in places)
    return {
        "chart": svg.grouped_bars(
            f"KL divergence with one layer of {subject.name} quantized",
            names,
            [(_plural(kind), kind, found.layers[kind]) for kind in KINDS],
            "layer",
            "KL, nats per token",
            tip=lambda layer, name, value: f"layer {layer}, {name}: KL {value:.6f}",
        ),
        "bits_chart": svg.grouped_bars(
            f"Bits per element of each layer of {subject.name}",
            names,
            [(_plural(kind), kind, bits[kind]) for kind in KINDS],
            "layer",
            "bits",
            tip=lambda layer, name, value: f"layer {layer}, {name}: {value:.3f} bits per element",
            height=170.0,
        ),
        "top": [
            {"layer": index, "kind": _plural(kind), "kl": value, "share": value / total if total else 0.0}
            for value, kind, index in places[:3]
        ],
        "sum": total,
        "whole": found.whole,
        "tokens": found.tokens,
        "rows": [
            {
                "layer": index,
                "kl": [found.layers[kind][index] for kind in KINDS],
                "bits": [bits[kind][index] for kind in KINDS],
            }
            for index in range(len(names))
        ],
    }


def _codebooks(subject: Subject, measured: Measured) -> dict[str, Any]:
    uses = measured.codebooks[subject.name]
    count = len(subject.artifact.layers)

    def panel(layer: int, kind: Kind, large: bool) -> dict[str, Any]:
        use = uses[kind][layer]
        share = "" if use.channels == use.of else f", {use.channels} of {use.of} channels"
        return {
            "label": f"layer {layer}, {_plural(kind)}",
            "note": f"{use.bits} bits: {len(use.levels)} levels{share}",
            "chart": svg.density(
                f"Levels of {subject.name}, layer {layer}, {_plural(kind)}, over the distribution they code",
                use.levels,
                use.weights,
                use.counts,
                kind,
                height=150.0 if large else 90.0,
                axis=large,
            ),
        }

    featured = sorted({0, count // 2, count - 1})
    return {
        "columns": ("one", "two", "three")[len(featured) - 1],
        "featured": [panel(layer, kind, True) for kind in KINDS for layer in featured],
        "all": [panel(layer, kind, False) for layer in range(count) for kind in KINDS],
        "shared": any(use.channels < use.of for kind in KINDS for use in uses[kind]),
        "calibrated_on": subject.name in measured.calibrated_on,
        "weights": fit_weights(subject.artifact),
        "datatypes": sorted(
            {layer.of(kind).datatype for layer in subject.artifact.spec.resolved(count) for kind in KINDS}
        ),
        "text": measured.fit_text[subject.name].source,
        "windows": len(measured.fit_text[subject.name].ids),
        "feedback": any(
            layer.of(kind).feedback for layer in subject.artifact.spec.resolved(count) for kind in KINDS
        ),
    }


def _same_outliers(chosen: Sequence[Subject], measured: Measured) -> list[list[Subject]]:
    """Artifacts that mark the same outliers, together: recipes that differ in their bits alone share thresholds."""
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


def _outliers(subject: Subject, measured: Measured, tokenizer: Any) -> dict[str, Any] | None:
    """Outliers per layer and per token; ``None`` for an artifact that keeps none."""
    counts = measured.outliers[subject.name]
    specs = subject.artifact.spec.resolved(len(subject.artifact.layers))
    kinds = [kind for kind in KINDS if any(layer.of(kind).outliers.fraction for layer in specs)]
    if not kinds:
        return None
    means: dict[Kind, list[float]] = {kind: counts.packed(kind).double().mean(1).tolist() for kind in kinds}
    geometry = subject.artifact.geometry.layers
    caps = {
        kind: max(
            layer.of(kind).outliers.cap(layer.of(kind).granularity, shape.channels)
            for layer, shape in zip(specs, geometry, strict=True)
        )
        for kind in kinds
    }
    most = min(max(int(counts.packed(kind).max()) for kind in kinds), _MOST_BARS)
    shares = {
        kind: [
            float(share) for share in
            counts.packed(kind).clamp(max=most).flatten().bincount(minlength=most + 1).double()
            / counts.packed(kind).numel() * 100
        ]
        for kind in kinds
    }  # fmt: skip
    bars = [str(number) for number in range(most + 1)]
    if any(int(counts.packed(kind).max()) > most for kind in kinds):
        bars[-1] += "+"
    length = measured.text.ids.shape[1]
    window = sum(counts.found[kind][:, :length].sum(0) for kind in kinds)
    assert not isinstance(window, int)
    totals = window.tolist()
    ranked = sorted(range(length), key=lambda at: (-totals[at], at))[:8]
    ids = measured.text.ids[0].tolist()
    return {
        "layer_chart": svg.grouped_bars(
            f"Outliers of a token by layer, {subject.name}",
            [str(index) for index in range(len(geometry))],
            [(_plural(kind), kind, means[kind]) for kind in kinds],
            "layer",
            "outliers per token",
            tip=lambda layer, name, value: f"layer {layer}, {name}: {value:.2f} outliers per token",
            height=200.0,
        ),
        "spread_chart": svg.grouped_bars(
            f"How many outliers tokens have, {subject.name}",
            bars,
            [(_plural(kind), kind, shares[kind]) for kind in kinds],
            "outliers of one token in one layer",
            "% of tokens",
            tip=lambda number, name, value: f"{value:.2f}% of tokens have {number} outliers among {name}",
            height=200.0,
        ),
        "token_chart": svg.lines(
            f"Outliers of each token of the text, all layers together, {subject.name}",
            svg.Axis(0.0, float(max(length - 1, 1)), "position in the text"),
            svg.Axis.from_zero([float(total) for total in totals], "outliers in all layers"),
            [("", subject.colour, [(float(at), float(total)) for at, total in enumerate(totals)])],
            height=200.0,
        ),
        "tokens": [
            {"position": at, "token": repr(tokenizer.decode([ids[at]])), "outliers": totals[at]}
            for at in ranked
        ],
        "caps": [
            f"{caps[kind]} of {max(shape.channels for shape in geometry)} {_plural(kind)}" for kind in kinds
        ],
        "means": [{"kind": _plural(kind), "mean": sum(means[kind]) / len(means[kind])} for kind in kinds],
        "rows": [
            {"layer": index, "means": [means[kind][index] for kind in kinds]}
            for index in range(len(geometry))
        ],
        "kinds": [_plural(kind) for kind in kinds],
        "sinks": counts.sink_tokens,
    }


def _tokens(value: float) -> str:
    """128K for 131,072 tokens."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 2**40), ("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _memory(chosen: Sequence[Subject], limit: int | None, context: int) -> dict[str, Any]:
    reports = {
        subject.name: [artifact_report(subject.artifact, tokens) for tokens in CONTEXTS] for subject in chosen
    }
    sixteen = [report.fp16 for report in reports[chosen[0].name]]
    series = [("16 bits", "other", list(zip(map(float, CONTEXTS), map(float, sixteen), strict=True)))]
    for subject in chosen:
        sizes = [(float(report.context), report.total) for report in reports[subject.name]]
        series.append((subject.name, subject.colour, sizes))
    every = [size for _, _, points in series for _, size in points]
    bounds = [float(1 << power) for power in range(10, 50, 2)]
    y = svg.Axis(
        min(every) / 1.5, max(every) * 1.5, "bytes of the cache (logarithmic)", log=True, format=_bytes,
        ticks=tuple(bounds),
    )  # fmt: skip
    x = svg.Axis(
        float(CONTEXTS[0]), float(CONTEXTS[-1]), "tokens of context (logarithmic)", log=True, format=_tokens,
        ticks=tuple(map(float, CONTEXTS)),
    )  # fmt: skip
    marks = [(float(limit), f"the model's {limit:,} positions")] if limit else []
    at = {subject.name: artifact_report(subject.artifact, context) for subject in chosen}
    parts = sorted(
        {part for report in at.values() for part in report.by_kind},
        key=lambda part: -max(report.by_kind.get(part, 0.0) for report in at.values()),
    )
    return {
        "chart": svg.lines("Memory of the cache against context", x, y, series, marks=marks, height=360.0),
        "rows": [
            {
                "context": tokens,
                "sixteen": _bytes(sixteen[number]),
                "sizes": [
                    {
                        "bytes": _bytes(reports[subject.name][number].total),
                        "smaller": sixteen[number] / reports[subject.name][number].total,
                    }
                    for subject in chosen
                ],
            }
            for number, tokens in enumerate(CONTEXTS)
            if tokens in (4096, 32768, 131072, 1048576)
        ],
        "parts": [
            {
                "name": part.replace("_", " "),
                "shares": [
                    {
                        "bytes": _bytes(at[subject.name].by_kind.get(part, 0.0)),
                        "share": at[subject.name].by_kind.get(part, 0.0) / at[subject.name].total,
                    }
                    for subject in chosen
                ],
            }
            for part in parts
        ],
        "context": context,
    }


def _cards(chosen: Sequence[Subject]) -> list[dict[str, Any]]:
    return [
        {
            "name": subject.name,
            "colour": subject.colour,
            "result": subject.results[0][1],
            "smaller": 16 / subject.results[0][1].bits_per_element,
        }
        for subject in chosen
    ]


def _provenance(subject: Subject) -> list[tuple[str, str]]:
    artifact = subject.artifact
    record = artifact.calibration
    settings, data = _fact(record, "settings"), _fact(record, "data")
    learning = _fact(record, "learning")
    rows: list[tuple[str, Any]] = [
        ("file", f"{subject.file} ({_bytes(subject.size)})"),
        ("sha256 of the file", subject.sha256),
        ("model", artifact.model.get("id")),
        ("sha256 of the model's configuration", _fact(artifact.model, "config", "sha256")),
        ("recipe", record.get("recipe")),
        ("what the recipe is", _fact(settings, "description")),
        *((_plural(kind), describe(artifact, kind)) for kind in KINDS),
        (
            "tokens kept exact",
            f"first {artifact.spec.sink_tokens}, last {artifact.spec.recent_tokens}, in {artifact.spec.storage_dtype}",
        ),
        (
            "calibration text",
            f"{_fact(data, 'dataset')}, {_fact(data, 'windows')} windows of {_fact(data, 'seqlen')} tokens "
            f"({_fact(data, 'split')}, {_fact(data, 'convention')})"
            if data
            else None,
        ),
        ("sha256 of the text's tokens", _fact(data, "sha256")),
        ("seed", _fact(settings, "seed")),
        ("weights and solver of the fit", _join(_fact(settings, "fit"))),
        ("budget", _join(_fact(settings, "allocation"))),
        ("learning", _join(_fact(settings, "learn"))),
        (
            "KL before and after learning",
            f"{_figure(_fact(learning, 'kl_before'))} and {_figure(_fact(learning, 'kl_after'))}"
            if learning
            else None,
        ),
        ("made with", _join(_fact(record, "versions"))),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _figure(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, int | float) else str(value)


def _join(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return None if content is None else str(content)
    return ", ".join(f"{key} {value}" for key, value in content.items())


# --------------------------------------------------------------------------------------------- commands


def _calibration_command(model: str, subject: Subject) -> dict[str, str] | None:
    """The command that makes an artifact again, and the recipe's file where it is not one that ships.

    ``None`` for an artifact that does not say how it was made.
    """
    record = subject.artifact.calibration
    settings = _fact(record, "settings")
    if not isinstance(settings, Mapping):
        return None
    wanted = {**settings, "cache": subject.artifact.spec.model_dump(mode="json")}
    run = {name: wanted.pop(name, None) for name in ("dataset", "samples", "seqlen", "seed")}
    recipe = str(record.get("recipe"))
    command = ["kvq-calibrate", model, "-o", subject.file]
    content = file = ""
    if recipe in recipe_names():
        shipped = calibration_config(recipe).model_dump(mode="json")
        command += ["--config", recipe]
        for assignment in _assignments({name: shipped.get(name) for name in wanted}, wanted):
            command += ["--set", assignment]
    else:
        file = f"{Path(recipe).name}.yaml"
        content = yaml.safe_dump(wanted, sort_keys=False)
        command += ["--config", file]
    for name, value in run.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    return {"command": _lines(command), "recipe": content, "file": file}


def _lines(words: Sequence[str]) -> str:
    """A command for a shell, each option on a line of its own."""
    text = shlex.quote(words[0])
    for word in words[1:]:
        text += (" \\\n  " if word.startswith("-") else " ") + shlex.quote(word)
    return text


def _assignments(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What ``--set`` must change in ``old`` to make it ``new``."""
    found = []
    for key, value in new.items():
        was = old.get(key)
        if value == was:
            continue
        if isinstance(value, Mapping) and isinstance(was, Mapping) and value.keys() == was.keys():
            found += _assignments(was, value, f"{path}{key}.")
        else:
            found.append(f"{path}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return found


def _evaluation_command(model: str, chosen: Sequence[Subject], results: Results) -> str:
    """The command behind a file of results, from the settings that the file records."""
    files = {id(result): subject.file for subject in chosen for _, result in subject.results}
    named = [files.get(id(result), f"{result.name}.kvq.safetensors") for result in results.artifacts]
    options: list[str] = []
    for name in ("dataset", "seqlen", "windows", "seed", "mode", "context"):
        value = results.fact(name)
        if name == "windows":  # of a run that was stopped, those that it measured
            value = results.fact("windows_measured") or value
        if value is not None:
            options += [f"--{name}", str(value)]
    if results.rivals is None:
        if results.fact("mode") == "decode" and results.fact("chunk") is not None:
            options += ["--chunk", str(results.fact("chunk"))]
        return _lines(_command("perplexity", model, named, *options, "--json", results.file))
    for rival in results.rivals:
        options += ["--rival", rival.name]
    if results.fact("calibration_data", "dataset") is not None:
        options += ["--calibration", str(results.fact("calibration_data", "dataset"))]
        options += ["--calibration-samples", str(results.fact("calibration_data", "requested"))]
    return _lines(_command("compare", model, named, *options, "--json", results.file))


# ----------------------------------------------------------------------------------------------- page


def render(
    loaded: LoadedModel,
    model: str,
    chosen: Sequence[Subject],
    results: Sequence[Results],
    measured: Measured,
    *,
    context: int,
    command: Sequence[str],
) -> str:
    """The page.

    Args:
        loaded: the model.
        model: as the user named it.
        chosen: the artifacts.
        results: all results, rivals' among them.
        measured: see :func:`measure`.
        context: tokens at which bits and parts of the memory are stated.
        command: words of the command that makes this report.
    """
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    facts = run_facts(loaded, measured.text, {subject.name: subject.file for subject in chosen})
    geometry = chosen[0].artifact.geometry
    # Several artifacts of one run have one command each, which makes the same bytes.
    made = {subject.name: _calibration_command(model, subject) for subject in chosen}
    environment = Environment(
        loader=PackageLoader("kvq_calib", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, _, _ = environment.loader.get_source(environment, "report.css")  # type: ignore[union-attr]
    return environment.get_template("report.html.jinja").render(
        style=Markup(style),
        model=loaded.name,
        facts=facts,
        layers=len(geometry.layers),
        heads=geometry.layers[0].num_kv_heads,
        head_dim=geometry.layers[0].head_dim,
        context=context,
        cards=_cards(chosen),
        frontiers=_frontiers(chosen, results),
        subjects=[
            {
                "name": subject.name,
                "colour": subject.colour,
                "sensitivity": _sensitivity(subject, measured, context),
                "codebooks": _codebooks(subject, measured),
                "provenance": _provenance(subject),
                "made": made[subject.name],
            }
            for subject in chosen
        ],
        outliers=[
            {"subjects": same, "found": _outliers(same[0], measured, loaded.tokenizer)}
            for same in _same_outliers(chosen, measured)
        ],
        memory=_memory(chosen, limit if isinstance(limit, int) else None, context),
        evaluations=list(dict.fromkeys(_evaluation_command(model, chosen, each) for each in results)),
        command=_lines(command),
        text=measured.text.source,
        windows=len(measured.text.ids),
    )
