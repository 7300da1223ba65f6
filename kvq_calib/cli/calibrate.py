"""``kvq-calibrate``."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq_calib.cli.help import Command, section
from kvq_calib.cli.options import (
    SETTINGS,
    TEXT_FIELD_HELP,
    FilePath,
    ModelOptions,
    collected,
    debug_option,
    model_options,
)
from kvq_calib.cli.outputs import announce, check_fields
from kvq_calib.cli.target import TargetOptions, target_options

if TYPE_CHECKING:
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.calibrate.run import Calibrated
    from kvq_calib.model.load import LoadedModel
    from kvq_calib.progress import ProgressReporter
    from kvq_calib.schema.recipe import CalibrationConfig

__all__ = ["calibrate_command"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeChanges:
    """The recipes to calibrate, and the settings that the command line changes.

    Attributes:
        recipes: names or files.
        budgets: budgets of ``kvq-BITS`` recipes, in bits per element.
        dataset, text_field, samples, seqlen, seed, recompute: settings of the run; ``None`` if not given.
        weights: short for ``fit.weights``.
        assignments: ``KEY=VALUE`` strings.
    """

    recipes: tuple[str, ...]
    budgets: tuple[float, ...]
    dataset: str | None
    text_field: str | None
    samples: int | None
    seqlen: int | None
    seed: int | None
    weights: str | None
    recompute: bool | None
    assignments: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All recipes, or the default recipe."""
        from kvq_calib.schema.recipe import DEFAULT_RECIPE, budget_recipe

        return (*self.recipes, *map(budget_recipe, self.budgets)) or (DEFAULT_RECIPE,)

    def of_budget(self, bits: float) -> CalibrationConfig:
        """The kvq recipe of a budget with these changes."""
        from kvq_calib.schema.recipe import budget_recipe

        return self.config(budget_recipe(bits))

    def config(self, recipe: str) -> CalibrationConfig:
        """The settings of a recipe, with these changes.

        Raises:
            ConfigError: in one line, which key is wrong and why.
        """
        from kvq_calib.schema.recipe import calibration_config

        names = ("dataset", "text_field", "samples", "seqlen", "seed", "recompute")
        weights = () if self.weights is None else (f"fit.weights={self.weights}",)
        return calibration_config(
            recipe,
            command_line={name: getattr(self, name) for name in names},
            assignments=(*weights, *self.assignments),
        )


_changes = collected(
    RecipeChanges,
    "changes",
    section(
        "Text",
        click.option(
            "--dataset",
            metavar="NAME|PATH",
            help="wikitext2, c4, python-docs, a file or folder of text or records, a glob, or - for standard input.  "
            "[default: wikitext2]",
        ),
        click.option("--text-field", metavar="NAME", help=f"{TEXT_FIELD_HELP}  [default: text]"),
        click.option(
            "--samples", type=click.IntRange(1), metavar="N", help="Number of windows of text.  [default: 16]"
        ),
        click.option(
            "--seqlen", type=click.IntRange(8), metavar="TOKENS", help="Tokens per window.  [default: 2048]"
        ),
        click.option(
            "--seed", type=click.IntRange(0), metavar="N", help="Seed of all random choices.  [default: 0]"
        ),
    ),
    section(
        "Recipe",
        click.option(
            "--config",
            "recipes",
            type=FilePath(),
            multiple=True,
            metavar="NAME|FILE",
            help="Recipe or YAML file; give several to calibrate them in one run.  [default: nuq3-1p]",
        ),
        click.option(
            "--bits",
            "budgets",
            type=click.FloatRange(1.5, 6.0),
            multiple=True,
            metavar="BITS",
            help="A kvq recipe of this budget, 1.5 to 6 bits per element with everything counted; the same as "
            "--config kvq-BITS.",
        ),
        click.option(
            "--weights",
            type=click.Choice(["fisher", "uniform"]),
            help="Weights of the codebook fit: squared gradients, or none, which saves the backward pass.  "
            "[default: the recipe's]",
        ),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one setting of the recipe, e.g. cache.key.bits=4; may be given several times.",
        ),
    ),
    section(
        "Model",
        click.option(
            "--recompute",
            is_flag=True,
            default=None,
            help="Recompute layers in the backward pass: less memory.",
        ),
    ),
)


@dataclass(frozen=True)
class _Job:
    """A calibration that is about to start.

    Attributes:
        outputs: output file of each recipe, by its short name; a search has one.
        configs: settings of each recipe, or of those that a search plans with.
        run: the settings that all recipes share.
        resume: whether to continue from a checkpoint.
        changes, target: options of the command line.
    """

    outputs: Mapping[str, Path]
    configs: Mapping[str, CalibrationConfig]
    run: Mapping[str, Any]
    resume: bool
    changes: RecipeChanges
    target: TargetOptions

    @property
    def first(self) -> Path:
        """The first output, after which the checkpoint is named."""
        return next(iter(self.outputs.values()))

    @property
    def checkpoint(self) -> Path:
        """The file that an interrupted run leaves. With several ranks, their files have names derived from it."""
        return self.first.with_name(f"{self.first.name}.checkpoint")


@dataclass(frozen=True)
class OutputOptions:
    """What a run writes and reports.

    Attributes:
        output: file to write, with ``{recipe}`` for the recipe's name; ``None`` if not given.
        resume: continue from the checkpoint of an interrupted run.
        profile: report where time and memory went.
    """

    output: str | None
    resume: bool
    profile: bool


_output_options = collected(
    OutputOptions,
    "output",
    section(
        "Output",
        click.option(
            "-o",
            "--output",
            type=FilePath(),
            metavar="ARTIFACT",
            help="File to write; {recipe} stands for the recipe's name.  [required, but for --check]",
        ),
        click.option("--resume", is_flag=True, help="Continue from the checkpoint of an interrupted run."),
        click.option("--profile", is_flag=True, help="Show where time and memory went."),
    ),
)


@click.command(
    "kvq-calibrate",
    cls=Command,
    context_settings=SETTINGS,
    examples=(
        "kvq-calibrate MODEL -o model.kvq.safetensors --config kvq3 --dataset wikitext2",
        "kvq-calibrate MODEL -o '{recipe}.kvq.safetensors' --config kvq4 --config kvq3 --dataset my-text/",
        "kvq-calibrate MODEL -o model.kvq.safetensors --target-kl 0.01 --dataset wikitext2",
        "kvq-calibrate MODEL --check",
    ),
)
@_output_options
@_changes
@target_options
@section(
    "Model",
    click.option(
        "--check",
        is_flag=True,
        help="Say whether MODEL can be used, and how, from its configuration alone; nothing is calibrated.",
    ),
    click.option(
        "--max-memory",
        metavar="DEVICE=SIZE,...",
        help="With --device-map: most bytes of weights on each GPU and on cpu, e.g. 0=20GiB,cpu=64GiB; the rest is "
        "read from disk.",
    ),
)
@model_options
@debug_option
def calibrate_command(
    model: ModelOptions,
    output: OutputOptions,
    changes: RecipeChanges,
    target: TargetOptions,
    check: bool,
    max_memory: str | None,
) -> None:
    """Calibrate MODEL and write one artifact for each recipe.

    MODEL is a hub id, a local folder of safetensors, or a .gguf file.
    """
    if check:
        _check(model)
        return
    if output.output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from kvq_calib.files import check_writable

    limits = _max_memory(max_memory)
    if target.target_kl is None:
        outputs = _outputs(output.output, changes.names)
        configs = {name: changes.config(recipe) for name, recipe in zip(outputs, changes.names, strict=True)}
    else:
        outputs, configs = _outputs(output.output, (target.name,)), _planned(changes)
    for file in outputs.values():
        check_writable(file)

    from kvq_calib.calibrate.distributed import local_device, process_group
    from kvq_calib.calibrate.run import shared_setting
    from kvq_calib.data import check_dataset
    from kvq_calib.progress import ProgressReporter

    run = {
        name: shared_setting(configs, name) for name in ("dataset", "text_field", "samples", "seqlen", "seed")
    }
    check_dataset(run["dataset"], run["text_field"], run["seqlen"])
    if target.target_kl is not None:
        check_dataset(**target.dataset(run), seqlen=run["seqlen"])
    job = _Job(outputs, configs, run, output.resume, changes, target)
    with process_group() as (rank, ranks), ProgressReporter(quiet=rank > 0) as progress:
        if ranks > 1:
            progress.say(f"{ranks} ranks; progress and --profile are those of rank 0")
        with _manners(job, rank, ranks):
            started = time.monotonic()
            loaded = model.load(device=local_device(model.device), max_memory=limits)
            before = {"loading the model": time.monotonic() - started}
            result = _calibrate(job, loaded, progress, before)
    if rank > 0:  # one rank writes and speaks
        return
    for file, artifact in zip(outputs.values(), result.artifacts.values(), strict=True):
        bits = artifact.bits_per_element(4096)
        click.echo(f"{file}: {bits:.3f} bits per element at 4096 tokens of context")
    if output.profile:
        from kvq_calib.calibrate.profiling import profile_lines

        click.echo("\n".join(profile_lines(loaded.model, before, result)), err=True)


def _planned(changes: RecipeChanges) -> dict[str, CalibrationConfig]:
    """What a search for a budget plans with.

    Raises:
        UsageError: the command line names recipes too.
    """
    from kvq_calib.calibrate.budget_search import planned_recipes

    if changes.recipes or changes.budgets:
        raise click.UsageError("--target-kl finds the recipe's budget itself: leave out --config and --bits")
    return planned_recipes(changes.of_budget)


def _check(model: ModelOptions) -> None:
    """Print whether and how a model can be used."""
    from kvq_calib.model.check import check_configuration, words_of
    from kvq_calib.model.load import load_configuration

    config = load_configuration(model.model, trust_remote_code=model.trust_remote_code)
    verdict = check_configuration(config)
    click.echo(f"{model.model} ({config.model_type}, {verdict.layers} layers) can be calibrated and used")
    for line in words_of(verdict):
        click.echo(f"  {line}")


def _calibrate(
    job: _Job, loaded: LoadedModel, progress: ProgressReporter, before: dict[str, float]
) -> Calibrated:
    """Read the text, calibrate, and save the artifacts. ``before`` gets the seconds spent on reading."""
    from kvq_calib.calibrate.run import calibrate
    from kvq_calib.data import load_windows
    from kvq_calib.model.fingerprint import model_fingerprint
    from kvq_calib.model.load import check_length

    check_length(loaded.model, job.run["seqlen"])
    started = time.monotonic()
    windows = load_windows(**job.run, tokenizer=loaded.tokenizer, split="calibration")
    before["reading the text"] = time.monotonic() - started

    def save(artifacts: Mapping[str, KVArtifact]) -> None:
        for file, artifact in zip(job.outputs.values(), artifacts.values(), strict=True):
            artifact.save(file)

    search = None
    if job.target.target_kl is not None:
        held_out = job.target.windows(loaded, job.run, windows)
        search = job.target.search(job.changes.of_budget, loaded, held_out, progress.say)

    return calibrate(
        loaded.model,
        windows,
        job.configs,
        model_id=loaded.name,
        model_config=model_fingerprint(loaded.model),
        checkpoint=job.checkpoint,
        resume=job.resume,
        progress=progress,
        deliver=save,
        search=search,
    )


@contextlib.contextmanager
def _manners(job: _Job, rank: int, ranks: int) -> Iterator[None]:
    """Announce which files are replaced, lock them against other runs, and after a failure say how to continue.

    Raises:
        WriteError: another run has the same output.
    """
    from kvq_calib.calibrate.checkpoint import file_of_rank
    from kvq_calib.files import exclusive

    checkpoint = file_of_rank(job.checkpoint, rank, ranks)
    with exclusive(job.first) if rank == 0 else contextlib.nullcontext():
        for file in job.outputs.values():
            announce(file)
        there = _changed_at(checkpoint)
        if job.resume and there is None:
            _log.warning(
                "there is no checkpoint %s to resume from: this run starts from the beginning", checkpoint
            )
        elif there is not None and not job.resume:
            _log.warning(
                "%s of an earlier run exists: --resume would continue from it, but this run replaces it",
                checkpoint,
            )
        try:
            yield
        except BaseException as error:
            changed = _changed_at(checkpoint) not in (None, there)
            if changed or (job.resume and there is not None and isinstance(error, KeyboardInterrupt)):
                error.add_note("the same command with --resume goes on from its checkpoint")
            raise


def _changed_at(file: Path) -> int | None:
    """Time of the last change of a file, in nanoseconds; ``None`` if it does not exist."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _outputs(output: str, recipes: tuple[str, ...]) -> dict[str, Path]:
    """The output file of each recipe, by the recipe's short name."""
    check_fields(output, "recipe")
    names = [Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe for recipe in recipes]
    if len(set(names)) != len(names):
        raise click.UsageError("a recipe is named twice")
    if len(names) > 1 and "{recipe}" not in output:
        raise click.UsageError(
            "several recipes need {recipe} in the output, e.g. -o 'model-{recipe}.kvq.safetensors'"
        )
    return {name: Path(output.replace("{recipe}", name)) for name in names}


def _max_memory(text: str | None) -> dict[int | str, str] | None:
    """Parse ``0=20GiB,cpu=64GiB`` into the form that accelerate takes."""
    if text is None:
        return None
    limits: dict[int | str, str] = {}
    for part in text.split(","):
        device, equals, size = (word.strip() for word in part.partition("="))
        if not (equals and (device == "cpu" or device.isdigit()) and re.fullmatch(r"[\d.]+[KMG]i?B", size)):
            raise click.UsageError(
                f"--max-memory {text}: write it as DEVICE=SIZE,..., for example 0=20GiB,cpu=64GiB"
            )
        limits[int(device) if device.isdigit() else device] = size
    return limits
