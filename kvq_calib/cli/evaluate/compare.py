"""``kvq-eval compare``: artifacts against other ways to quantize a cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from kvq_calib.cli.help import Command, section
from kvq_calib.cli.options import (
    FilePath,
    ModelOptions,
    TextOptions,
    artifact_options,
    collected,
    debug_option,
    json_option,
    load_artifacts,
    mode_option,
    model_options,
    require_extra,
    text_options,
    write_json,
)
from kvq_calib.cli.outputs import check_output
from kvq_calib.errors import ConfigError

__all__ = ["compare_command"]


@dataclass(frozen=True)
class RivalOptions:
    """Which rivals run, and the text to calibrate them on.

    Attributes:
        rivals: names; empty for all.
        calibration: name or path of the calibration text.
        calibration_samples: number of windows of it.
    """

    rivals: tuple[str, ...]
    calibration: str | None
    calibration_samples: int


_rival_options = collected(
    RivalOptions,
    "beside",
    section(
        "Rivals",
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
            metavar="N",
            help="Windows of that text.",
        ),
    ),
)


@dataclass(frozen=True)
class CompareFiles:
    """Files that a comparison writes."""

    json_file: str | None
    chart_file: str | None

    def check(self) -> None:
        """Check before measuring that the files can be written.

        Raises:
            ConfigError: the chart is neither .svg nor .png, or matplotlib is missing.
            WriteError: a folder cannot be written to.
        """
        check_output(self.json_file)
        if self.chart_file is not None:
            if Path(self.chart_file).suffix.lower() not in (".svg", ".png"):
                raise ConfigError(f"cannot draw {self.chart_file}: name a file that ends in .svg or .png")
            require_extra("a chart", "report", "matplotlib")
            check_output(self.chart_file)


_compare_files = collected(
    CompareFiles,
    "files",
    json_option,
    section(
        "Output",
        click.option(
            "--chart",
            "chart_file",
            type=FilePath(),
            metavar="FILE",
            help="Draw KL divergence against bits, .svg or .png.",
        ),
    ),
)


@click.command(
    "compare",
    cls=Command,
    examples=(
        "kvq-eval compare MODEL --artifact model.kvq.safetensors --dataset eval.txt --windows 3 --chart compare.svg",
        "kvq-eval compare MODEL --artifact model.kvq.safetensors --rival fp8-head --rival kivi-4bit --windows 1",
    ),
)
@artifact_options()
@_rival_options
@text_options()
@mode_option(
    "How artifacts are measured; rivals, and artifacts with recent exact tokens, as their windows ask for."
)
@section(
    "Measurement",
    click.option(
        "--context",
        type=click.IntRange(1),
        metavar="TOKENS",
        help="Context at which bits are stated.  [default: the windows' length, which is what is measured]",
    ),
)
@_compare_files
@model_options
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
    """Compare artifacts with other ways to quantize a cache: same model, text and windows, all bits counted."""
    from kvq_calib.evaluate.rivals import make_rivals
    from kvq_calib.schema.recipe import EvalConfig

    config = EvalConfig(**asdict(text), mode=mode, context=context or text.seqlen)
    chosen = make_rivals(beside.rivals)
    loaded_artifacts = load_artifacts(artifacts)
    files.check()
    text.check(beside.calibration)

    from kvq_calib.evaluate.compare import compare, runnable
    from kvq_calib.evaluate.contenders import forced_to_decode
    from kvq_calib.evaluate.tables import compare_table, print_table, run_facts
    from kvq_calib.progress import ProgressReporter

    loaded = model.load_for(loaded_artifacts)
    windows = text.load(loaded)
    calibration = None
    if beside.calibration is not None:
        calibration = text.load_calibration(loaded, beside.calibration, beside.calibration_samples)
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
                **run_facts(loaded, dict(zip(loaded_artifacts, artifacts, strict=True)), windows),
                "calibration_data": None if calibration is None else dict(calibration.source),
            },
        },
    )
    if files.chart_file is not None:
        from kvq_calib.evaluate.charts.comparison import write_chart

        write_chart(files.chart_file, result, f"{loaded.name}, {windows.source['dataset']}")
