"""Results as tables for the terminal, and as plain data for JSON."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.evaluate.perplexity import PerplexityResult
from kvq_calib.model.placement import input_device
from kvq_calib.schema.recipe import EvalConfig
from kvq_calib.schema.spec import KINDS

if TYPE_CHECKING:
    from kvq_calib.data import TokenWindows
    from kvq_calib.evaluate.compare import Comparison
    from kvq_calib.evaluate.generate import GenerateCell
    from kvq_calib.evaluate.intervals import Interval
    from kvq_calib.evaluate.memory import MemoryReport
    from kvq_calib.evaluate.recall import RecallCell
    from kvq_calib.model.load import LoadedModel


def print_table(table: Table) -> None:
    """Print a table on stdout. If stdout is not a terminal, it is wide enough for all columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def perplexity_table(results: Sequence[PerplexityResult], config: EvalConfig) -> Table:
    """One row per artifact, below the unquantized model. Modes are shown if they differ from the requested one."""
    tokens = f"{results[0].tokens:,} tokens in windows of {config.seqlen}" if results else ""
    mixed = any(result.mode != config.mode for result in results)
    mode = "" if mixed else f"{config.mode} mode, "
    table = Table(title=f"{config.dataset}, {mode}{tokens}, bits at {config.context} tokens")
    table.add_column("artifact")
    if mixed:
        table.add_column("mode")
    for heading in ("bits/element", "perplexity", "KL mean", "KL p99", "top-1"):
        table.add_column(heading, justify="right")
    if results:
        blank = [""] if mixed else []
        table.add_row("unquantized", *blank, "", f"{results[0].baseline_perplexity:.3f}", "", "", "")
    for result in results:
        table.add_row(
            result.name,
            *([result.mode] if mixed else []),
            f"{result.bits_per_element:.3f}",
            f"{result.perplexity:.3f}",
            f"{result.kl_mean:.5f}",
            f"{result.kl_p99:.4f}",
            f"{result.top1_agreement:.4f}",
        )
    return table


def compare_table(comparison: Comparison, config: EvalConfig) -> Table:
    """Artifacts and rivals by rising bits. A star marks the frontier."""
    results = sorted((*comparison.artifacts, *comparison.rivals), key=lambda one: one.result.bits_per_element)
    first = results[0].result
    table = Table(
        title=f"{config.dataset}, {first.tokens:,} tokens in windows of {config.seqlen}, bits at {config.context} "
        f"tokens; unquantized perplexity {first.baseline_perplexity:.3f}; * nothing here diverges less in as few bits"
    )
    table.add_column("cache")
    table.add_column("origin")
    table.add_column("mode")
    for heading in ("bits/element", "perplexity", "KL mean", "KL p99", "top-1", "frontier"):
        table.add_column(heading, justify="right")
    for one in results:
        result = one.result
        table.add_row(
            result.name,
            one.origin,
            result.mode,
            f"{result.bits_per_element:.3f}",
            f"{result.perplexity:.3f}",
            f"{result.kl_mean:.5f}",
            f"{result.kl_p99:.4f}",
            f"{result.top1_agreement:.4f}",
            "*" if one.on_frontier else "",
        )
    return table


def memory_table(
    reports: Mapping[str, Sequence[MemoryReport]],
    longest: Mapping[str, int],
    on_one: Mapping[str, Sequence[float]],
    gpus: int,
) -> Table:
    """One row per artifact or recipe and context. ``on_one`` has the bytes on the fullest of ``gpus`` GPUs."""
    table = Table(title="key-value cache, everything counted (1 GB = 2^30 bytes, 1 MB = 2^20, 1 kB = 2^10)")
    table.add_column("cache")
    for heading in ("context", "batch", "bits/element", "size", "in float16", "smaller", "largest parts"):
        table.add_column(heading, justify="left" if heading == "largest parts" else "right")
    if longest:
        if gpus > 1:
            table.add_column("per GPU", justify="right")
        table.add_column(f"longest on {gpus} x 80 GB", justify="right")
    for name, rows in reports.items():
        for number, report in enumerate(rows):
            parts = sorted(report.by_kind.items(), key=lambda part: -part[1])[:3]
            cells = [
                name,
                f"{report.context:,}",
                str(report.batch),
                f"{report.bits_per_element:.3f}",
                _size(report.total),
                _size(report.fp16),
                f"{report.fp16 / report.total:.2f}x",
                ", ".join(f"{kind.replace('_', ' ')} {size / report.total:.1%}" for kind, size in parts),
            ]
            if longest:
                if gpus > 1:
                    cells.append(_size(on_one[name][number]) if name in on_one else "")
                cells.append(f"{longest[name]:,}" if name in longest else "")
            table.add_row(*cells)
    states = {name: rows[0].state_bytes / rows[0].batch for name, rows in reports.items() if rows}
    if kept := [f"{name} {_size(size)}" for name, size in states.items() if size]:
        table.caption = (
            f"beside it, states of other layers for a sequence, never quantized: {', '.join(kept)}"
        )
    return table


def _size(size: float) -> str:
    """A size in the largest unit in which it is at least 1, or in kB."""
    unit, name = next(
        ((2**power, name) for power, name in ((30, "GB"), (20, "MB")) if size >= 2**power), (2**10, "kB")
    )
    return f"{size / unit:.3f} {name}"


def paper_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """LLaMA-7B beside the paper's figures."""
    table = Table(title="LLaMA-7B, cache in GB beside KVQuant's published figures (1 GB = 2^30 bytes)")
    for heading in (
        "recipe",
        "context",
        "bits/element",
        "ours",
        "paper",
        "with weights",
        "1 x 80 GB",
        "8 x 80 GB",
    ):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in rows:
        table.add_row(
            row["recipe"],
            f"{row['context']:,}",
            f"{row['bits_per_element']:.2f}",
            f"{row['gb']:.1f}",
            "" if row["paper_gb"] is None else f"{row['paper_gb']:.1f}",
            f"{row['gb_with_weights']:.1f}",
            "fits" if row["fits_1_gpu"] else "-",
            "fits" if row["fits_8_gpus"] else "-",
        )
    return table


def recall_table(cells: Sequence[RecallCell]) -> Table:
    """A row per length, kind of question and cache."""
    table = Table(
        title="recall: questions answered, with 95% intervals; lost and gained beside the unquantized cache, and the "
        "difference on the same questions"
    )
    for heading in ("length", "task", "cache"):
        table.add_column(heading, justify="right" if heading == "length" else "left")
    for heading in ("answered", "share", "lost", "gained", "difference"):
        table.add_column(heading, justify="right")

    def answers(found: Sequence[bool]) -> str:
        return f"{sum(found)} of {len(found)}"

    def share(value: float, ends: Interval) -> str:
        return f"{value:.0%} [{ends[0]:.0%}, {ends[1]:.0%}]"

    for cell in cells:
        first = (f"{cell.length:,}", cell.kind, "unquantized", answers(cell.baseline), share(*cell.share()))
        table.add_row(*first, "", "", "")
        for name, found in cell.found.items():
            lost, gained = cell.changes(name)
            value, (low, high) = cell.difference(name)
            difference = f"{value:+.0%} [{low:+.0%}, {high:+.0%}]"
            table.add_row(
                "", "", name, answers(found), share(*cell.share(name)), str(lost), str(gained), difference
            )
    return table


def generate_table(cells: Sequence[GenerateCell], bits: Mapping[str, float]) -> Table:
    """A row per task and artifact; ``bits`` per element of each artifact."""
    table = Table(
        title="greedy continuations beside the unquantized model's: means over texts and their standard errors"
    )
    for heading in ("task", "artifact"):
        table.add_column(heading)
    for heading in ("bits/element", "texts", "same tokens", "same until", "edit distance", "all the same"):
        table.add_column(heading, justify="right")

    def mean(cell: GenerateCell, figure: str, form: str) -> str:
        value, error = cell.mean(figure)
        return form.format(value) + ("" if error is None else " ± " + form.format(error))

    before = ""
    for cell in cells:
        same = sum(one.same for one in cell.deviations)
        table.add_row(
            "" if cell.task == before else cell.task,
            cell.name,
            f"{bits[cell.name]:.3f}",
            str(len(cell.deviations)),
            mean(cell, "agreement", "{:.1%}"),
            mean(cell, "first_difference", "{:.0f}"),
            mean(cell, "edit_distance", "{:.3f}"),
            f"{same} of {len(cell.deviations)}",
        )
        before = cell.task
    return table


def run_facts(
    loaded: LoadedModel, files: Mapping[str, str], text: TokenWindows | None = None
) -> dict[str, Any]:
    """What is needed to repeat a measurement; ``text`` where it was on windows of a text."""
    return {
        "model": loaded.name,
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(input_device(loaded.model)),
        **({} if text is None else {"data": dict(text.source)}),
        "artifact_sha256": {
            name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items()
        },
        "versions": {
            "kvq-calib": _version("kvq-calib"),
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "python": platform.python_version(),
        },
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def artifact_facts(artifact: KVArtifact, contexts: Sequence[int]) -> dict[str, Any]:
    """The content of an artifact, as plain data."""
    return {
        "spec": artifact.spec.model_dump(mode="json"),
        "model": dict(artifact.model),
        "calibration": dict(artifact.calibration),
        "layers": [
            {
                kind: {
                    "bits": _width_counts(quantizer),
                    "levels": _levels(quantizer),
                    "outliers_per_token": artifact.outliers_per_token[kind][index],
                }
                for kind, quantizer in quantizers.items()
            }
            for index, quantizers in enumerate(artifact.quantizers())
        ],
        "bits_per_element": {str(context): artifact.bits_per_element(context) for context in contexts},
        "bytes": {str(context): artifact.storage(context) for context in contexts},
    }


def _levels(quantizer: Quantizer) -> list[float] | list[list[float]]:
    """Number of levels, of all channels or of each channel."""
    shared = quantizer.shared_levels
    if shared is not None:
        return list(shared.tolist())
    counts = [quantizer.level_count(width) for width in quantizer.widths]
    return [row[:count] for row, count in zip(quantizer.levels.tolist(), counts, strict=True)]


def _width_counts(quantizer: Quantizer) -> dict[str, int]:
    counts = Counter(quantizer.layout.widths)
    return {str(width): counts[width] for width in sorted(counts)}


def artifact_tables(artifact: KVArtifact, contexts: Sequence[int], *, per_layer: bool) -> list[Table]:
    """Tables of facts, of storage at several context lengths, and on request of the layers."""
    facts = Table(title="artifact", show_header=False)
    facts.add_column(style="bold")
    facts.add_column()
    data = artifact.calibration.get("data", {})
    geometry = artifact.geometry
    shapes = Counter((layer.num_kv_heads, layer.head_dim) for layer in geometry.layers)
    facts.add_row("model", str(artifact.model.get("id", "")))
    facts.add_row("recipe", str(artifact.calibration.get("recipe", "")))
    facts.add_row(
        "calibrated on",
        ", ".join(f"{name} {value}" for name, value in sorted(data.items()) if name != "sha256"),
    )
    facts.add_row(
        "layers", ", ".join(f"{n} of {heads} key-value heads x {dim}" for (heads, dim), n in shapes.items())
    )
    if geometry.attends_to or geometry.held_state(1):
        without = sum(index is None for index in geometry.attends_to)
        facts.add_row(
            "not packed",
            f"{without} of {geometry.model_layers} layers cache no keys and values; states of "
            f"{geometry.state_bytes:,} bytes a sequence and {geometry.state_bytes_per_token:,} a token",
        )
    for kind in KINDS:
        facts.add_row(kind + "s", describe(artifact, kind))
    facts.add_row("exact tokens", f"first {artifact.spec.sink_tokens}, last {artifact.spec.recent_tokens}")
    versions = artifact.calibration.get("versions", {})
    facts.add_row("made with", ", ".join(f"{name} {value}" for name, value in sorted(versions.items())))

    storage = Table(title="bytes of one sequence")
    storage.add_column("stored", style="bold")
    columns = {context: artifact.storage(context) for context in contexts}
    for context in contexts:
        storage.add_column(f"{context:,} tokens", justify="right")
    for name in next(iter(columns.values())):
        storage.add_row(name.replace("_", " "), *(f"{column[name]:,.0f}" for column in columns.values()))
    storage.add_section()
    storage.add_row("total", *(f"{sum(column.values()):,.0f}" for column in columns.values()))
    storage.add_row("float16 cache", *(f"{2 * artifact.elements(context):,}" for context in contexts))
    storage.add_row("bits/element", *(f"{artifact.bits_per_element(context):.3f}" for context in contexts))
    if not per_layer:
        return [facts, storage]

    layers = Table(title="layers")
    for heading in ("layer", "kind", "channels by width", "outliers/token", "levels"):
        layers.add_column(heading)
    for index, quantizers in enumerate(artifact.quantizers()):
        for kind in KINDS:
            widths = _width_counts(quantizers[kind])
            shared = quantizers[kind].shared_levels
            levels = [] if shared is None else shared.tolist()
            shown = " ".join(f"{level:+.2f}" for level in levels[:16]) or "each channel its own"
            layers.add_row(
                str(index),
                kind,
                ", ".join(f"{count} x {width} bit" for width, count in widths.items()),
                f"{artifact.outliers_per_token[kind][index]:.2f}",
                shown + (" ..." if len(levels) > 16 else ""),
            )
    return [facts, storage, layers]


def describe(artifact: KVArtifact, kind: Any) -> str:
    """How keys or values are quantized, in words. If layers differ, it describes the most common."""
    specs = Counter(layer.of(kind) for layer in artifact.spec.resolved(len(artifact.layers)))
    ((spec, count),) = specs.most_common(1)
    parts = [spec.width_words]
    if kind == "key":
        parts.append("before RoPE" if spec.pre_rope else "after RoPE")
    parts += spec.features()
    if others := specs.total() - count:
        parts.append(f"{others} of {specs.total()} layers differ")
    return ", ".join(parts)
