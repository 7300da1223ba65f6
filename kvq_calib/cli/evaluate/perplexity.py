"""``kvq-eval perplexity``: perplexity, KL divergence and bits of artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kvq_calib.cli.help import Command, section
from kvq_calib.cli.options import (
    ModelOptions,
    TextOptions,
    artifact_options,
    context_option,
    debug_option,
    json_option,
    load_artifacts,
    mode_option,
    model_options,
    text_options,
    write_json,
)
from kvq_calib.cli.outputs import check_output

if TYPE_CHECKING:
    from kvq_calib.evaluate.perplexity import PerplexityResult

__all__ = ["perplexity_command"]


@click.command(
    "perplexity",
    cls=Command,
    examples=(
        "kvq-eval perplexity MODEL --artifact model.kvq.safetensors --dataset wikitext2 --windows 8 --json results.json",
        "kvq-eval perplexity MODEL --artifact a.kvq.safetensors --artifact b.kvq.safetensors --mode decode",
    ),
)
@artifact_options()
@text_options()
@mode_option("Artifacts with a window of recent exact tokens are always measured in decode mode.")
@section(
    "Measurement",
    click.option(
        "--chunk",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        metavar="TOKENS",
        help="Tokens per step of decode mode; at most 32 where recent tokens are exact.",
    ),
)
@context_option
@json_option
@model_options
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
    """Measure perplexity, KL divergence and bits of artifacts on MODEL, against the unquantized model."""
    from kvq_calib.schema.recipe import EvalConfig

    config = EvalConfig(**asdict(text), mode=mode, context=context, chunk=chunk)
    loaded_artifacts = load_artifacts(artifacts)
    check_output(json_file)
    text.check()

    from kvq_calib.evaluate.contenders import forced_to_decode
    from kvq_calib.evaluate.perplexity import measure_perplexity
    from kvq_calib.evaluate.tables import perplexity_table, print_table, run_facts
    from kvq_calib.progress import ProgressReporter

    loaded = model.load_for(loaded_artifacts)
    windows = text.load(loaded)
    files = dict(zip(loaded_artifacts, artifacts, strict=True))
    facts = {**config.record(), **run_facts(loaded, files, windows)}
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
