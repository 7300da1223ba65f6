"""``kvq-eval``: what an artifact costs and saves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq_calib.cli.options import (
    SETTINGS,
    FilePath,
    ModelOptions,
    TextOptions,
    artifact_options,
    collected,
    context_option,
    debug_option,
    json_option,
    load_artifacts,
    mode_type,
    model_options,
    require_extra,
    text_options,
    write_json,
)
from kvq_calib.errors import ConfigError

if TYPE_CHECKING:
    from kvq_calib.evaluate.perplexity import PerplexityResult

__all__ = ["eval_group"]


@click.group("kvq-eval", context_settings=SETTINGS)
@debug_option
def eval_group() -> None:
    """Measure what an artifact costs and saves."""


# ------------------------------------------------------------------------------------------- perplexity


@eval_group.command("perplexity")
@model_options
@artifact_options()
@text_options()
@click.option(
    "--mode",
    type=mode_type,
    default="prefill",
    show_default=True,
    help="Artifacts with a window of recent exact tokens are always measured in decode mode.",
)
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Tokens per step of decode mode; at most 32 where recent tokens are exact.",
)
@context_option
@json_option
@debug_option
def perplexity_command(
    model: ModelOptions,
    artifacts: tuple[str, ...],
    text: TextOptions,
    mode: Any,
    chunk: int,
    context: int,
    json_file: str | None,
) -> None:
    """Perplexity, KL divergence and bits of artifacts on MODEL, beside the unquantized model."""
    from kvq_calib.files import check_writable
    from kvq_calib.schema.recipe import EvalConfig

    config = EvalConfig(**asdict(text), mode=mode, context=context, chunk=chunk)
    loaded_artifacts = load_artifacts(artifacts)
    if json_file is not None:
        check_writable(json_file)
    text.check()

    from kvq_calib.evaluate.contenders import forced_to_decode
    from kvq_calib.evaluate.perplexity import measure_perplexity
    from kvq_calib.evaluate.tables import perplexity_table, print_table, run_facts
    from kvq_calib.progress import ProgressReporter

    loaded = model.load_for(loaded_artifacts)
    windows = text.load(loaded)
    files = dict(zip(loaded_artifacts, artifacts, strict=True))
    facts = {**config.record(), **run_facts(loaded, windows, files)}
    measured = 0

    def keep(results: Sequence[PerplexityResult]) -> None:
        nonlocal measured
        measured += 1
        write_json(
            json_file,
            {
                "artifacts": [result.to_json() for result in results],
                "config": {**facts, "windows_measured": measured},
            },
        )

    try:
        with ProgressReporter() as progress:
            for line in forced_to_decode(loaded_artifacts, config):
                progress.say(line)
            results = measure_perplexity(loaded.model, loaded_artifacts, windows, config, progress, keep)
    except KeyboardInterrupt as stop:
        if json_file is not None and measured:
            stop.add_note(f"{json_file} has the results of {measured} windows of {len(windows.ids)}")
        raise
    print_table(perplexity_table(results, config))


# ---------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class RivalOptions:
    """Which rivals run, and the text of those that are calibrated.

    Attributes:
        rivals: names, all where there are none.
        calibration: name or path of that text.
        calibration_samples: windows of it.
    """

    rivals: tuple[str, ...]
    calibration: str | None
    calibration_samples: int


_rival_options = collected(
    RivalOptions,
    "beside",
    click.option(
        "--rival",
        "rivals",
        multiple=True,
        metavar="NAME",
        help="May be given several times; all by default, a wrong name lists them.",
    ),
    click.option("--calibration", metavar="NAME|PATH", help="Text of rivals that are calibrated."),
    click.option(
        "--calibration-samples",
        type=click.IntRange(1),
        default=16,
        show_default=True,
        help="Windows of that text.",
    ),
)


@dataclass(frozen=True)
class CompareFiles:
    """Where a comparison goes beside the screen."""

    json_file: str | None
    chart_file: str | None

    def check(self) -> None:
        """Refuse before measuring what could not be written after it.

        Raises:
            ConfigError: a chart of another kind than .svg and .png, or no matplotlib.
            WriteError: a folder cannot be written to.
        """
        from kvq_calib.files import check_writable

        if self.json_file is not None:
            check_writable(self.json_file)
        if self.chart_file is not None:
            if Path(self.chart_file).suffix.lower() not in (".svg", ".png"):
                raise ConfigError(f"cannot draw {self.chart_file}: name a file that ends in .svg or .png")
            require_extra("a chart", "report", "matplotlib")
            check_writable(self.chart_file)


_compare_files = collected(
    CompareFiles,
    "files",
    json_option,
    click.option(
        "--chart",
        "chart_file",
        type=FilePath(),
        metavar="FILE",
        help="Draw divergence against bits, .svg or .png.",
    ),
)


@eval_group.command("compare")
@model_options
@artifact_options()
@_rival_options
@text_options()
@click.option(
    "--mode",
    type=mode_type,
    default="prefill",
    show_default=True,
    help="How artifacts are measured; rivals, and artifacts with recent exact tokens, as their windows ask for.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Context at which bits are stated; by default the windows' length, which is what was measured.",
)
@_compare_files
@debug_option
def compare_command(
    model: ModelOptions,
    artifacts: tuple[str, ...],
    beside: RivalOptions,
    text: TextOptions,
    mode: Any,
    context: int | None,
    files: CompareFiles,
) -> None:
    """Artifacts beside other ways to quantize a cache: same model, text and windows, every bit counted."""
    from kvq_calib.evaluate.rivals import make_rivals
    from kvq_calib.schema.recipe import EvalConfig

    config = EvalConfig(**asdict(text), mode=mode, context=context or text.seqlen)
    chosen = make_rivals(beside.rivals)
    loaded_artifacts = load_artifacts(artifacts)
    files.check()
    text.check()

    from kvq_calib.data import load_windows
    from kvq_calib.evaluate.compare import compare, runnable
    from kvq_calib.evaluate.contenders import forced_to_decode
    from kvq_calib.evaluate.tables import compare_table, print_table, run_facts
    from kvq_calib.progress import ProgressReporter

    loaded = model.load_for(loaded_artifacts)
    windows = text.load(loaded)
    calibration = None
    if beside.calibration is not None:
        calibration = load_windows(
            beside.calibration,
            loaded.tokenizer,
            samples=beside.calibration_samples,
            seqlen=text.seqlen,
            seed=text.seed,
            split="calibration",
        )
    with ProgressReporter() as progress:
        running, skipped = runnable(chosen, loaded.model, calibration is not None)
        for line in forced_to_decode(loaded_artifacts, config):
            progress.say(line)
        for name, reason in skipped:
            progress.say(f"{name}: skipped, {reason}")
        result = compare(loaded.model, loaded_artifacts, running, windows, config, calibration, progress)
    print_table(compare_table(result, config))
    for line in result.verdicts():
        click.echo(line)
    write_json(
        files.json_file,
        {
            "artifacts": [one.to_json() for one in result.artifacts],
            "rivals": [one.to_json() for one in result.rivals],
            "skipped": dict(skipped),
            "config": {
                **config.record(),
                **run_facts(loaded, windows, dict(zip(loaded_artifacts, artifacts, strict=True))),
                "calibration_data": None if calibration is None else dict(calibration.source),
            },
        },
    )
    if files.chart_file is not None:
        from kvq_calib.evaluate.charts.comparison import write_chart

        write_chart(files.chart_file, result, f"{loaded.name}, {windows.source['dataset']}")


# ----------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class ShapeOptions:
    """Sizes that need no artifact.

    Attributes:
        shape: name of a published model.
        recipes: for it.
        gpus: of 80 GB that share heads and layers.
        paper: whether LLaMA-7B stands beside the paper's figures.
    """

    shape: str | None
    recipes: tuple[str, ...]
    gpus: int
    paper: bool


_shape_options = collected(
    ShapeOptions,
    "alone",
    click.option(
        "--shape",
        metavar="NAME",
        help="A model's shape alone (llama-7b, llama-3-8b, mistral-7b, ...), with --config.",
    ),
    click.option(
        "--config",
        "recipes",
        type=FilePath(),
        multiple=True,
        default=("nuq4-1p", "nuq3-1p", "nuq2-1p"),
        metavar="NAME|FILE",
        help="Recipes for --shape, default the paper's three.",
    ),
    click.option(
        "--gpus",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="GPUs of 80 GB that share heads and layers of --shape.",
    ),
    click.option(
        "--paper", is_flag=True, help="LLaMA-7B from 128K to 10M tokens beside the paper's figures."
    ),
)


@eval_group.command("memory")
@artifact_options(required=False)
@_shape_options
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(1),
    multiple=True,
    default=(4096, 32768, 131072),
    show_default=True,
    help="Tokens of context; may be given several times.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@json_option
@debug_option
def memory_command(
    artifacts: tuple[str, ...],
    alone: ShapeOptions,
    contexts: tuple[int, ...],
    batch: int,
    json_file: str | None,
) -> None:
    """Bytes of the packed cache by kind, at any context, for artifacts or for a model's shape alone."""
    if not (artifacts or alone.shape or alone.paper):
        raise click.UsageError("name an --artifact, a --shape, or --paper")
    from kvq_calib.evaluate import memory
    from kvq_calib.evaluate.shapes import model_shape
    from kvq_calib.evaluate.tables import memory_table, paper_table, print_table
    from kvq_calib.files import check_writable
    from kvq_calib.schema.recipe import calibration_config

    if json_file is not None:
        check_writable(json_file)
    content: dict[str, Any] = {}
    reports = {
        name: [memory.artifact_report(loaded, context, batch) for context in contexts]
        for name, loaded in load_artifacts(artifacts).items()
    }
    longest: dict[str, int] = {}
    on_one: dict[str, list[float]] = {}
    if alone.shape is not None:
        shape, gpus = model_shape(alone.shape), alone.gpus
        for recipe in alone.recipes:
            spec = calibration_config(recipe).cache
            name = f"{shape.name} {recipe}"
            reports[name] = [memory.shape_report(shape, spec, context, batch) for context in contexts]
            longest[name] = memory.longest_context(shape, spec, gpus)
            on_one[name] = [
                memory.per_gpu_report(shape, spec, context, batch, gpus).total for context in contexts
            ]
    if reports:
        print_table(memory_table(reports, longest, on_one, alone.gpus))
        content["reports"] = {name: [report.as_dict() for report in rows] for name, rows in reports.items()}
        content["longest_context"] = longest
        content["bytes_on_fullest_gpu"] = {"gpus": alone.gpus, **on_one}
    if alone.paper:
        names = dict.fromkeys((*alone.recipes, "nuq2"))
        rows = memory.paper_comparison({recipe: calibration_config(recipe).cache for recipe in names})
        print_table(paper_table(rows))
        content["paper"] = rows
    write_json(json_file, content)


# ---------------------------------------------------------------------------------------------- passkey


@dataclass(frozen=True)
class PasskeyOptions:
    """Texts with a hidden number: the fields of :class:`kvq_calib.evaluate.passkey.PasskeyConfig`."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    chunk: int


_passkey_options = collected(
    PasskeyOptions,
    "texts",
    click.option(
        "--length",
        "lengths",
        type=click.IntRange(64),
        multiple=True,
        default=(512, 1024, 2048),
        show_default=True,
        help="Tokens of the text; may be given several times.",
    ),
    click.option(
        "--depth",
        "depths",
        type=click.FloatRange(0, 1),
        multiple=True,
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        show_default=True,
        help="Where the number is hidden, 0 beginning to 1 end.",
    ),
    click.option(
        "--trials", type=click.IntRange(1), default=5, show_default=True, help="Texts per length and depth."
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--chunk", type=click.IntRange(1), default=256, show_default=True, help="Tokens per call."),
)


@eval_group.command("passkey")
@model_options
@artifact_options()
@_passkey_options
@json_option
@debug_option
def passkey_command(
    model: ModelOptions, artifacts: tuple[str, ...], texts: PasskeyOptions, json_file: str | None
) -> None:
    """Retrieval of a hidden number through the packed cache, where the unquantized model can do it."""
    from kvq_calib.files import check_writable

    loaded_artifacts = load_artifacts(artifacts)
    if json_file is not None:
        check_writable(json_file)

    from kvq_calib.evaluate.passkey import PasskeyConfig, measure_passkey
    from kvq_calib.evaluate.tables import passkey_table, print_table
    from kvq_calib.progress import ProgressReporter

    loaded = model.load_for(loaded_artifacts)
    with ProgressReporter() as progress:
        cells = measure_passkey(
            loaded.model,
            loaded.tokenizer,
            loaded_artifacts,
            PasskeyConfig(**asdict(texts)),
            lambda _, done, total: progress("texts", done, total),
        )
    print_table(passkey_table(cells))
    config = {"model": loaded.name, "trials": texts.trials, "seed": texts.seed, "chunk": texts.chunk}
    write_json(json_file, {"cells": [cell.as_dict() for cell in cells], "config": config})


# ----------------------------------------------------------------------------------------------- report


@eval_group.command("report")
@model_options
@artifact_options()
@click.option(
    "--results",
    "result_files",
    type=FilePath(),
    multiple=True,
    metavar="FILE",
    help="JSON of kvq-eval perplexity (or compare) on these artifacts; may be given several times.",
)
@click.option(
    "-o", "--output", type=FilePath(), required=True, metavar="FILE", help="The HTML file to write."
)
@text_options(seqlen=512, windows=1, help="Text of the charts by layer and by token.")
@click.option(
    "--calibration-dataset",
    metavar="NAME|PATH",
    help="Text the artifacts were calibrated on, for the distributions under their codebooks; --dataset by default.",
)
@context_option
@debug_option
def report_command(
    model: ModelOptions,
    artifacts: tuple[str, ...],
    result_files: tuple[str, ...],
    output: str,
    text: TextOptions,
    calibration_dataset: str | None,
    context: int,
) -> None:
    """One HTML page about artifacts of MODEL: accuracy against size, layer by layer, and how to repeat it."""
    from kvq_calib.files import check_writable, write_atomically

    require_extra("a report", "report", "jinja2", "matplotlib")
    loaded_artifacts = load_artifacts(artifacts)
    check_writable(output)
    text.check()

    from kvq_calib.evaluate.report.measure import ReportText, measure
    from kvq_calib.evaluate.report.page import render
    from kvq_calib.evaluate.report.results import read_results
    from kvq_calib.evaluate.report.subjects import subjects
    from kvq_calib.model.load import check_length
    from kvq_calib.progress import ProgressReporter

    results = read_results(result_files)
    files = dict(zip(loaded_artifacts, artifacts, strict=True))
    chosen = subjects(model.model, loaded_artifacts, files, results)
    loaded = model.load_for(loaded_artifacts)
    check_length(loaded.model, text.seqlen)
    measured_on = ReportText(
        text.dataset, calibration_dataset or text.dataset, text.windows or 1, text.seqlen, text.seed
    )
    with ProgressReporter() as progress:
        measured = measure(loaded, loaded_artifacts, measured_on, progress)
    command = ["kvq-eval", *(word for word in sys.argv[1:] if word != "--debug")]
    page = render(loaded, model.model, chosen, results, measured, context=context, command=command)
    write_atomically(output, page.encode())
    click.echo(output)
