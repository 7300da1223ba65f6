"""``kvq-eval recall``: retrieval from long texts. ``kvq-eval passkey`` is its first task alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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
    from kvq_calib.evaluate.recall import RecallCell

__all__ = ["passkey_command", "recall_command"]

#: Names in :data:`kvq_calib.evaluate.recall_texts.TASKS`, because importing that module takes seconds.
TASKS = ("passkey", "key-value", "variables", "common-words")


@dataclass(frozen=True)
class RecallOptions:
    """Settings of the texts, fields of :class:`kvq_calib.evaluate.recall_texts.RecallConfig`."""

    lengths: tuple[int, ...]
    texts: int
    seed: int
    chunk: int


_text_options = collected(
    RecallOptions,
    "hidden",
    section(
        "Texts",
        click.option(
            "--length",
            "lengths",
            type=click.IntRange(64),
            multiple=True,
            default=(512, 1024, 2048),
            show_default=True,
            metavar="TOKENS",
            help="Number of tokens in a text and its question. May be given several times.",
        ),
        number_option("--texts", 5, "N", "Number of texts of each length. Each has the facts of all tasks."),
        number_option("--seed", 0, "N", "Random seed.", least=0),
        number_option("--chunk", 256, "TOKENS", "Number of tokens per call."),
    ),
)

_task_options = section(
    "Tasks",
    click.option(
        "--task",
        "tasks",
        type=click.Choice(TASKS),
        multiple=True,
        help="Task; may be given several times.  [default: all]",
    ),
    number_option("--needles", 8, "N", "Number of facts in the task key-value.", most=30),
    number_option("--hops", 2, "N", "Number of steps in a chain of the task variables.", least=0, most=8),
)


@click.command(
    "recall",
    cls=Command,
    examples=(
        "kvq-eval recall MODEL --artifact model.kvq.safetensors --length 2048 --texts 4 --json recall.json",
        "kvq-eval recall MODEL --artifact a.kvq.safetensors --task key-value --task variables --needles 16",
    ),
)
@artifact_options()
@_task_options
@_text_options
@json_option
@model_options
@debug_option
def recall_command(
    model: ModelOptions,
    artifacts: tuple[str, ...],
    tasks: tuple[str, ...],
    needles: int,
    hops: int,
    hidden: RecallOptions,
    json_file: str | None,
) -> None:
    """Compare retrieval from long texts with the packed and the unquantized cache, with 95% confidence intervals.

    Texts contain numbers, chains of variables and frequent words to find, similar to RULER.
    """
    _recall(model, artifacts, hidden, json_file, tasks=tasks or TASKS, needles=needles, hops=hops)


@click.command(
    "passkey",
    cls=Command,
    examples=("kvq-eval passkey MODEL --artifact model.kvq.safetensors --length 1024 --texts 2",),
)
@artifact_options()
@_text_options
@json_option
@model_options
@debug_option
def passkey_command(
    model: ModelOptions, artifacts: tuple[str, ...], hidden: RecallOptions, json_file: str | None
) -> None:
    """Compare retrieval of a hidden number: recall with only the task passkey."""
    _recall(model, artifacts, hidden, json_file, tasks=("passkey",))


def _recall(
    model: ModelOptions,
    artifacts: tuple[str, ...],
    hidden: RecallOptions,
    json_file: str | None,
    *,
    tasks: Sequence[str],
    **settings: Any,
) -> None:
    loaded_artifacts = load_artifacts(artifacts)
    check_output(json_file)

    from kvq_calib.evaluate.recall import measure_recall
    from kvq_calib.evaluate.recall_texts import RecallConfig
    from kvq_calib.evaluate.tables import print_table, recall_table, run_facts
    from kvq_calib.progress import ProgressReporter

    config = RecallConfig(tasks=tuple(dict.fromkeys(tasks)), **asdict(hidden), **settings)
    loaded = model.load_for(loaded_artifacts)
    files = dict(zip(loaded_artifacts, artifacts, strict=True))
    bits = {
        name: {str(length): artifact.bits_per_element(length) for length in config.lengths}
        for name, artifact in loaded_artifacts.items()
    }
    facts = {**asdict(config), **run_facts(loaded, files)}

    def keep(cells: Sequence[RecallCell]) -> None:
        content = {"cells": [cell.to_json() for cell in cells], "bits_per_element": bits, "config": facts}
        write_json(json_file, content)

    with ProgressReporter() as progress:
        cells = measure_recall(loaded.model, loaded.tokenizer, loaded_artifacts, config, progress, keep)
    print_table(recall_table(cells))
