"""``kvq-eval generate``: greedy continuations, compared with those of the unquantized model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from kvq_calib.cli.help import Command, section
from kvq_calib.cli.options import (
    ModelOptions,
    artifact_options,
    collected,
    debug_option,
    json_option,
    load_artifacts,
    model_options,
    number_option,
    write_json,
)
from kvq_calib.cli.outputs import check_output

if TYPE_CHECKING:
    from kvq_calib.evaluate.generate import GenerateCell

__all__ = ["generate_command"]

#: Names in :data:`kvq_calib.evaluate.generate_prompts.TASKS`, because importing that module takes seconds.
TASKS = ("arithmetic", "copying", "patterns", "code")


@dataclass(frozen=True)
class GenerateOptions:
    """Settings, fields of :class:`kvq_calib.evaluate.generate_prompts.GenerateConfig`."""

    tasks: tuple[str, ...]
    texts: int
    length: int
    tokens: int
    batch: int
    seed: int
    chunk: int


_generate_options = collected(
    GenerateOptions,
    "config",
    section(
        "Texts",
        click.option(
            "--task",
            "tasks",
            type=click.Choice(TASKS),
            multiple=True,
            help="Task; may be given several times.  [default: all]",
        ),
        number_option("--texts", 4, "N", "Number of texts of each task."),
        number_option(
            "--length", 512, "TOKENS", "Number of tokens in a text before its continuation.", least=64
        ),
        number_option("--tokens", 256, "TOKENS", "Largest number of tokens in a continuation."),
        number_option("--batch", 4, "N", "Number of texts per batch."),
        number_option("--seed", 0, "N", "Random seed.", least=0),
        number_option("--chunk", 256, "TOKENS", "Number of tokens per call while a text is read."),
    ),
)


@click.command(
    "generate",
    cls=Command,
    examples=(
        "kvq-eval generate MODEL --artifact model.kvq.safetensors --json generate.json",
        "kvq-eval generate MODEL --artifact a.kvq.safetensors --task code --length 2048 --tokens 512 --batch 1",
    ),
)
@artifact_options()
@_generate_options
@json_option
@model_options
@debug_option
def generate_command(
    model: ModelOptions, artifacts: tuple[str, ...], config: GenerateOptions, json_file: str | None
) -> None:
    """Compare greedy continuations with the packed cache with those of the unquantized model.

    The texts are sums, lists to copy, patterns, and code of Python's standard library.
    """
    loaded_artifacts = load_artifacts(artifacts)
    check_output(json_file)

    from kvq_calib.evaluate.generate import measure_generate
    from kvq_calib.evaluate.generate_prompts import GenerateConfig
    from kvq_calib.evaluate.tables import generate_table, print_table, run_facts
    from kvq_calib.progress import ProgressReporter

    settings = GenerateConfig(**{**asdict(config), "tasks": tuple(dict.fromkeys(config.tasks)) or TASKS})
    loaded = model.load_for(loaded_artifacts)
    context = settings.length + settings.tokens
    bits = {name: artifact.bits_per_element(context) for name, artifact in loaded_artifacts.items()}
    facts = {**asdict(settings), **run_facts(loaded, dict(zip(loaded_artifacts, artifacts, strict=True)))}

    def keep(cells: Sequence[GenerateCell]) -> None:
        content = {"cells": [cell.to_json() for cell in cells], "bits_per_element": bits, "config": facts}
        write_json(json_file, content)

    with ProgressReporter() as progress:
        cells = measure_generate(loaded.model, loaded.tokenizer, loaded_artifacts, settings, progress, keep)
    print_table(generate_table(cells, bits))
