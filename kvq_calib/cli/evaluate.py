"""``kvq-eval``: what an artifact costs and saves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kvq_calib.cli.compare import compare_command
from kvq_calib.cli.memory import memory_command
from kvq_calib.cli.options import (
    SETTINGS,
    FilePath,
    ModelOptions,
    TextOptions,
    artifact_options,
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
from kvq_calib.cli.passkey import passkey_command

if TYPE_CHECKING:
    from kvq_calib.evaluate.perplexity import PerplexityResult

__all__ = ["eval_group"]


@click.group("kvq-eval", context_settings=SETTINGS)
@debug_option
def eval_group() -> None:
    """Measure what an artifact costs and saves."""


# ------------------------------------------------------------------------------------------ perplexity


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


# ---------------------------------------------------------------------------------------------- report


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
        text.dataset,
        calibration_dataset or text.dataset,
        text.windows or 1,
        text.seqlen,
        text.seed,
        text.text_field,
    )
    with ProgressReporter() as progress:
        measured = measure(loaded, loaded_artifacts, measured_on, progress)
    command = ["kvq-eval", *(word for word in sys.argv[1:] if word != "--debug")]
    page = render(loaded, model.model, chosen, results, measured, context=context, command=command)
    write_atomically(output, page.encode())
    click.echo(output)


eval_group.add_command(compare_command)
eval_group.add_command(memory_command)
eval_group.add_command(passkey_command)
