"""``kvq-eval report``: one HTML page about artifacts."""

from __future__ import annotations

import sys

import click

from kvq_calib.cli.help import Command, section
from kvq_calib.cli.options import (
    FilePath,
    ModelOptions,
    TextOptions,
    artifact_options,
    context_option,
    debug_option,
    load_artifacts,
    model_options,
    require_extra,
    text_options,
)
from kvq_calib.cli.outputs import check_output

__all__ = ["report_command"]


@click.command(
    "report",
    cls=Command,
    examples=(
        "kvq-eval report MODEL --artifact model.kvq.safetensors --results results.json --dataset calib.txt -o report.html",
    ),
)
@artifact_options()
@section(
    "Artifacts",
    click.option(
        "--results",
        "result_files",
        type=FilePath(),
        multiple=True,
        metavar="FILE",
        help="JSON of kvq-eval perplexity (or compare) on these artifacts; may be given several times.",
    ),
)
@section(
    "Output",
    click.option(
        "-o", "--output", type=FilePath(), required=True, metavar="FILE", help="The HTML file to write."
    ),
)
@text_options(seqlen=512, windows=1, help="Text of the charts by layer and by token.")
@section(
    "Text",
    click.option(
        "--calibration-dataset",
        metavar="NAME|PATH",
        help="Text the artifacts were calibrated on, for the distributions under their levels.  [default: --dataset]",
    ),
)
@context_option
@model_options
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
    """Write an HTML page about artifacts of MODEL: accuracy against size, layer by layer, and how to repeat it."""
    from kvq_calib.files import write_atomically

    require_extra("a report", "report", "jinja2", "matplotlib")
    loaded_artifacts = load_artifacts(artifacts)
    check_output(output)
    text.check(calibration_dataset)

    from kvq_calib.evaluate.report.measure import measure
    from kvq_calib.evaluate.report.page import render
    from kvq_calib.evaluate.report.subjects import subjects
    from kvq_calib.progress import ProgressReporter
    from kvq_calib.schema.results import read_results

    results = read_results(result_files)
    files = dict(zip(loaded_artifacts, artifacts, strict=True))
    chosen = subjects(model.model, loaded_artifacts, files, results)
    loaded = model.load_for(loaded_artifacts)
    windows = text.load(loaded)
    with ProgressReporter() as progress:
        measured = measure(loaded, loaded_artifacts, windows, calibration_dataset or text.dataset, progress)
    command = ["kvq-eval", *(word for word in sys.argv[1:] if word != "--debug")]
    page = render(loaded, model.model, chosen, results, measured, context=context, command=command)
    write_atomically(output, page.encode())
    click.echo(output)
