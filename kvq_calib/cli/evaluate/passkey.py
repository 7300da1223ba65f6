"""``kvq-eval passkey``: retrieval of a number that is hidden in a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass

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
    write_json,
)
from kvq_calib.cli.outputs import check_output

__all__ = ["passkey_command"]


@dataclass(frozen=True)
class PasskeyOptions:
    """The fields of :class:`kvq_calib.evaluate.passkey.PasskeyConfig`."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    chunk: int


_passkey_options = collected(
    PasskeyOptions,
    "texts",
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
            help="Tokens of the text; may be given several times.",
        ),
        click.option(
            "--depth",
            "depths",
            type=click.FloatRange(0, 1),
            multiple=True,
            default=(0.0, 0.25, 0.5, 0.75, 1.0),
            show_default=True,
            metavar="SHARE",
            help="Where the number is hidden, 0 beginning to 1 end; may be given several times.",
        ),
        click.option(
            "--trials",
            type=click.IntRange(1),
            default=5,
            show_default=True,
            metavar="N",
            help="Texts for each length and depth.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            metavar="N",
            help="Seed of the texts and numbers.",
        ),
        click.option(
            "--chunk",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            metavar="TOKENS",
            help="Tokens per call.",
        ),
    ),
)


@click.command(
    "passkey",
    cls=Command,
    examples=("kvq-eval passkey MODEL --artifact model.kvq.safetensors --length 1024 --trials 2",),
)
@artifact_options()
@_passkey_options
@json_option
@model_options
@debug_option
def passkey_command(
    model: ModelOptions, artifacts: tuple[str, ...], texts: PasskeyOptions, json_file: str | None
) -> None:
    """Retrieve a hidden number through the packed cache, in texts where the unquantized model finds it."""

    loaded_artifacts = load_artifacts(artifacts)
    check_output(json_file)

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
