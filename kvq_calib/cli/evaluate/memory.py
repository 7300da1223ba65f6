"""``kvq-eval memory``: bytes of the packed cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from kvq_calib.cli.help import Command, section
from kvq_calib.cli.options import (
    FilePath,
    artifact_options,
    collected,
    debug_option,
    json_option,
    load_artifacts,
    write_json,
)
from kvq_calib.cli.outputs import check_output

__all__ = ["memory_command"]


@dataclass(frozen=True)
class ShapeOptions:
    """Options for sizes without an artifact.

    Attributes:
        shape: name of a published model.
        recipes: recipes to size for it.
        gpus: number of 80 GB GPUs that share heads and layers.
        paper: whether to show LLaMA-7B beside the paper's figures.
    """

    shape: str | None
    recipes: tuple[str, ...]
    gpus: int
    paper: bool


_shape_options = collected(
    ShapeOptions,
    "alone",
    section(
        "A shape without an artifact",
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
            help="Recipes for --shape.  [default: the paper's three, nuq4-1p, nuq3-1p, nuq2-1p]",
        ),
        click.option(
            "--gpus",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            metavar="N",
            help="GPUs of 80 GB that share heads and layers of --shape.",
        ),
        click.option(
            "--paper", is_flag=True, help="LLaMA-7B from 128K to 10M tokens beside the paper's figures."
        ),
    ),
)


@click.command(
    "memory",
    cls=Command,
    examples=(
        "kvq-eval memory --artifact model.kvq.safetensors --context 131072",
        "kvq-eval memory --shape llama-7b --config kvq3 --config nuq2 --context 1000000 --gpus 8",
    ),
)
@artifact_options(required=False)
@_shape_options
@section(
    "Measurement",
    click.option(
        "--context",
        "contexts",
        type=click.IntRange(1),
        multiple=True,
        default=(4096, 32768, 131072),
        show_default=True,
        metavar="TOKENS",
        help="Tokens of context; may be given several times.",
    ),
    click.option(
        "--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences."
    ),
)
@json_option
@debug_option
def memory_command(
    artifacts: tuple[str, ...],
    alone: ShapeOptions,
    contexts: tuple[int, ...],
    batch: int,
    json_file: str | None,
) -> None:
    """Show the bytes of the packed cache at any context, for artifacts or for a published model's shape."""
    if not (artifacts or alone.shape or alone.paper):
        raise click.UsageError("name an --artifact, a --shape, or --paper")
    from kvq_calib.evaluate import memory
    from kvq_calib.evaluate.shapes import model_shape
    from kvq_calib.evaluate.tables import memory_table, paper_table, print_table
    from kvq_calib.schema.recipe import calibration_config

    check_output(json_file)
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
            config = calibration_config(recipe)
            spec, budget = config.cache, config.allocation
            name = f"{shape.name} {recipe}"
            reports[name] = [memory.shape_report(shape, spec, context, batch, budget) for context in contexts]
            longest[name] = memory.longest_context(shape, spec, gpus, allocation=budget)
            on_one[name] = [
                memory.per_gpu_report(shape, spec, context, batch, gpus, budget).total for context in contexts
            ]
    if reports:
        print_table(memory_table(reports, longest, on_one, alone.gpus))
        content["reports"] = {name: [report.as_dict() for report in rows] for name, rows in reports.items()}
        content["longest_context"] = longest
        content["bytes_on_fullest_gpu"] = {"gpus": alone.gpus, **on_one}
    if alone.paper:
        names = dict.fromkeys((*alone.recipes, "nuq2"))
        rows = memory.paper_comparison({recipe: calibration_config(recipe) for recipe in names})
        print_table(paper_table(rows))
        content["paper"] = rows
    write_json(json_file, content)
