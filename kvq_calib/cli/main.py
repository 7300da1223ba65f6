"""The commands: parse, call, print. Progress goes to stderr, results to stdout.

Exit status: 0 on success, 2 on a usage error, 1 on anything else, with one line that says what was wrong.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq_calib.errors import ConfigError, KVQError

if TYPE_CHECKING:
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.evaluate.perplexity import PerplexityResult
    from kvq_calib.model.load import LoadedModel

# Imports of torch and transformers take seconds: every command imports what it needs, so --help is immediate.


def run_command(command: click.Command) -> None:
    """Run a command; turn every failure into one line and the right exit status."""
    debug = "--debug" in sys.argv
    # A job that is told to stop writes nothing half, just as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = command.main(standalone_mode=False)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except SystemExit:
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the last word is a whole line
        if debug and not isinstance(error, KeyboardInterrupt | click.Abort | click.ClickException):
            traceback.print_exc()
        if _is_ours_to_report():
            _report(error)
        sys.exit(2 if isinstance(error, click.UsageError) else 1)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: BaseException) -> None:
    """One line on stderr, and for wrong usage what would be right."""
    text = " ".join(str(error).split())
    if isinstance(error, click.ClickException):
        error.show()
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        notes = getattr(error.__cause__ or error, "__notes__", [])
        click.echo("; ".join(["error: interrupted", "nothing half written is left", *notes]), err=True)
    elif isinstance(error, KVQError):
        click.echo(f"error: {text}", err=True)
    else:
        click.echo(
            f"error: {type(error).__name__}: {text[:500]}; run with --debug for the traceback", err=True
        )


def _is_ours_to_report() -> bool:
    """Whether no other rank reports what ended the run; always true of a process by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from kvq_calib.calibrate.distributed import first_to_report

    return first_to_report()


def calibrate() -> None:
    """Entry point of ``kvq-calibrate``."""
    run_command(calibrate_command)


def evaluate() -> None:
    """Entry point of ``kvq-eval``."""
    run_command(eval_group)


def artifact() -> None:
    """Entry point of ``kvq-artifact``."""
    run_command(artifact_group)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class _Path(click.Path):
    """A path, or a name where paths are allowed too; shells leave ``~`` alone in ``--output=~/x``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


_debug = click.option("--debug", is_flag=True, help="Show a traceback on errors.")
_model_options = _options(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="auto is float32 on a CPU, else the checkpoint's.",
    ),
    click.option(
        "--device-map", metavar="MAP", help="Spread the model over devices (accelerate), e.g. auto."
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint."),
)


def _artifacts(required: bool = True) -> Callable[[Any], Any]:
    """``--artifact``, by which several artifacts are named."""
    return click.option(
        "--artifact", "artifacts", type=_Path(), multiple=True, required=required, metavar="FILE",
        help="May be given several times.",
    )  # fmt: skip


_json_file = click.option(
    "--json", "json_file", type=_Path(), metavar="FILE", help="Write the result as JSON."
)
_seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
_context = click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Context at which bits are stated.",
)
_mode = click.Choice(["prefill", "decode"])
_evaluation_text = _options(
    click.option("--dataset", default="wikitext2", show_default=True, metavar="NAME|PATH"),
    click.option("--seqlen", type=click.IntRange(8), default=2048, show_default=True, help="Tokens of a window."),
    click.option("--windows", type=click.IntRange(1), help="At most this many windows; all by default."),
    _seed,
)  # fmt: skip


def _load(
    model: str,
    device: str,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
    max_memory: dict[int | str, str] | None = None,
) -> LoadedModel:
    from kvq_calib.model.load import load_model

    return load_model(
        model,
        device=device,
        dtype=dtype,
        device_map=device_map,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
    )


def _load_fitting(model: str, artifacts: dict[str, KVArtifact], *options: Any) -> LoadedModel:
    """The model, which every artifact must be for."""
    from kvq_calib.model.fingerprint import model_fingerprint

    loaded = _load(model, *options)
    fingerprint = model_fingerprint(loaded.model)
    for artifact in artifacts.values():
        artifact.check_model(fingerprint)
    return loaded


def _write_json(file: str | None, content: dict[str, Any]) -> None:
    if file is not None:
        from kvq_calib.files import write_atomically

        write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())


# --------------------------------------------------------------------------------------------- calibrate


def _outputs(output: str, recipes: tuple[str, ...]) -> dict[str, Path]:
    """Where the artifact of each recipe goes, by the recipe's short name."""
    names = [Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe for recipe in recipes]
    if len(set(names)) != len(names):
        raise click.UsageError("a recipe is named twice")
    if len(names) > 1 and "{recipe}" not in output:
        raise click.UsageError(
            "several recipes need {recipe} in the output, e.g. -o 'model-{recipe}.kvq.safetensors'"
        )
    return {name: Path(output.replace("{recipe}", name)) for name in names}


@click.command("kvq-calibrate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=_Path(),
    required=True,
    metavar="ARTIFACT",
    help="File to write; {recipe} stands for the recipe's name.",
)
@click.option(
    "--config",
    "recipes",
    type=_Path(),
    multiple=True,
    metavar="NAME|FILE",
    help="Recipe or YAML file, default nuq3-1p; give several to calibrate them in one run.",
)
@click.option(
    "--dataset", metavar="NAME|PATH", help="wikitext2, c4, python-docs, or a text or .jsonl file or folder."
)
@click.option("--samples", type=click.IntRange(1), help="Windows of text, default 16.")
@click.option("--seqlen", type=click.IntRange(8), help="Tokens of a window, default 2048.")
@click.option("--seed", type=click.IntRange(0), help="Of every random choice, default 0.")
@click.option("--weights", type=click.Choice(["fisher", "uniform"]), help="Weights of the codebook fit.")
@click.option(
    "--recompute", is_flag=True, default=None, help="Recompute layers in the backward pass: less memory."
)
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change one setting of the recipe."
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of an interrupted run.")
@click.option("--profile", is_flag=True, help="Say where time and memory went.")
@_model_options
@click.option(
    "--max-memory",
    metavar="DEVICE=SIZE,...",
    help="With --device-map: most bytes of weights on each GPU and on cpu, e.g. 0=20GiB,cpu=64GiB; the rest is read from disk.",
)
@_debug
def calibrate_command(
    model: str,
    output: str,
    recipes: tuple[str, ...],
    dataset: str | None,
    samples: int | None,
    seqlen: int | None,
    seed: int | None,
    weights: str | None,
    recompute: bool | None,
    assignments: tuple[str, ...],
    resume: bool,
    profile: bool,
    device: str,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
    max_memory: str | None,
    debug: bool,
) -> None:
    """Calibrate MODEL (hub id, folder or .gguf file) and write one artifact per recipe."""
    from kvq_calib.files import check_writable
    from kvq_calib.schema.recipe import DEFAULT_RECIPE, calibration_config

    recipes = recipes or (DEFAULT_RECIPE,)
    outputs = _outputs(output, recipes)
    limits = _max_memory(max_memory)
    options = {
        "dataset": dataset,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "recompute": recompute,
    }
    if weights is not None:
        assignments = (f"fit.weights={weights}", *assignments)
    configs = {
        name: calibration_config(recipe, command_line=options, assignments=assignments)
        for name, recipe in zip(outputs, recipes, strict=True)
    }
    for file in outputs.values():
        check_writable(file)

    from kvq_calib.calibrate.distributed import local_device, process_group
    from kvq_calib.calibrate.run import calibrate, shared_setting
    from kvq_calib.data import check_dataset, load_windows
    from kvq_calib.model.fingerprint import model_fingerprint
    from kvq_calib.model.load import check_length
    from kvq_calib.progress import ProgressReporter

    run = {name: shared_setting(configs, name) for name in ("dataset", "samples", "seqlen", "seed")}
    check_dataset(run["dataset"])
    with process_group() as (rank, ranks), ProgressReporter(quiet=rank > 0) as progress:
        if ranks > 1:
            progress.say(f"{ranks} ranks; progress and --profile are those of rank 0")
        started = time.monotonic()
        loaded = _load(model, local_device(device), dtype, device_map, trust_remote_code, limits)
        before = {"loading the model": time.monotonic() - started}
        check_length(loaded.model, run["seqlen"])
        started = time.monotonic()
        windows = load_windows(
            run["dataset"],
            loaded.tokenizer,
            samples=run["samples"],
            seqlen=run["seqlen"],
            seed=run["seed"],
            split="calibration",
        )
        before["reading the text"] = time.monotonic() - started
        first = next(iter(outputs.values()))
        checkpoint = first.with_name(f"{first.name}.checkpoint")

        def save(artifacts: Mapping[str, KVArtifact]) -> None:
            for name, file in outputs.items():
                artifacts[name].save(file)

        try:
            result = calibrate(
                loaded.model,
                windows,
                configs,
                model_id=loaded.name,
                model_config=model_fingerprint(loaded.model),
                checkpoint=checkpoint,
                resume=resume,
                progress=progress,
                deliver=save,
            )
        except KeyboardInterrupt as stop:
            if checkpoint.exists():
                stop.add_note("the same command with --resume goes on from its checkpoint")
            raise
    if rank > 0:  # one rank writes and speaks
        return
    for name, file in outputs.items():
        bits = result.artifacts[name].bits_per_element(4096)
        click.echo(f"{file}: {bits:.3f} bits per element at 4096 tokens of context")
    if profile:
        from kvq_calib.calibrate.profiling import profile_lines

        click.echo("\n".join(profile_lines(loaded.model, before, result)), err=True)


def _max_memory(text: str | None) -> dict[int | str, str] | None:
    """``0=20GiB,cpu=64GiB`` as accelerate takes it."""
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


# ---------------------------------------------------------------------------------------------- evaluate


@click.group("kvq-eval", context_settings={"help_option_names": ["-h", "--help"]})
def eval_group() -> None:
    """Measure what an artifact costs and saves."""


def _load_artifacts(files: tuple[str, ...]) -> dict[str, KVArtifact]:
    """Artifacts by a short name: the file's, as far as it is unique."""
    from kvq_calib.artifact.artifact import KVArtifact

    short = [Path(file).name.removesuffix(".safetensors").removesuffix(".kvq") for file in files]
    names = short if len(set(short)) == len(short) else list(files)
    if len(set(names)) != len(names):
        raise ConfigError("the same artifact is named twice")
    return {name: KVArtifact.load(file) for name, file in zip(names, files, strict=True)}


@eval_group.command("perplexity")
@click.argument("model")
@_artifacts()
@_evaluation_text
@click.option("--mode", type=_mode, default="prefill", show_default=True)
@click.option(
    "--chunk", type=click.IntRange(1), default=256, show_default=True, help="Tokens per step of decode mode."
)
@_context
@_json_file
@_model_options
@_debug
def perplexity_command(
    model: str,
    artifacts: tuple[str, ...],
    dataset: str,
    seqlen: int,
    windows: int | None,
    seed: int,
    mode: Any,
    chunk: int,
    context: int,
    json_file: str | None,
    device: str,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """Perplexity, KL divergence and bits of artifacts on MODEL, beside the unquantized model."""
    from kvq_calib.files import check_writable
    from kvq_calib.schema.recipe import EvalConfig

    config = EvalConfig(
        dataset=dataset, windows=windows, seqlen=seqlen, mode=mode, seed=seed, context=context, chunk=chunk
    )
    loaded_artifacts = _load_artifacts(artifacts)
    if json_file is not None:
        check_writable(json_file)

    from kvq_calib.data import check_dataset, load_windows
    from kvq_calib.evaluate.perplexity import measure_perplexity
    from kvq_calib.evaluate.tables import perplexity_table, print_table, run_facts
    from kvq_calib.model.load import check_length
    from kvq_calib.progress import ProgressReporter

    check_dataset(dataset)
    loaded = _load_fitting(model, loaded_artifacts, device, dtype, device_map, trust_remote_code)
    check_length(loaded.model, seqlen)
    text = load_windows(
        dataset, loaded.tokenizer, samples=windows, seqlen=seqlen, seed=seed, split="evaluation"
    )
    files = dict(zip(loaded_artifacts, artifacts, strict=True))
    facts = {**config.record(), **run_facts(loaded, text, files)}
    measured = 0

    def keep(results: Sequence[PerplexityResult]) -> None:
        nonlocal measured
        measured += 1
        _write_json(
            json_file,
            {
                "artifacts": [result.to_json() for result in results],
                "config": {**facts, "windows_measured": measured},
            },
        )

    try:
        with ProgressReporter() as progress:
            results = measure_perplexity(loaded.model, loaded_artifacts, text, config, progress, keep)
    except KeyboardInterrupt as stop:
        if json_file is not None and measured:
            stop.add_note(f"{json_file} has the results of {measured} windows of {len(text.ids)}")
        raise
    print_table(perplexity_table(results, config))


@eval_group.command("compare")
@click.argument("model")
@_artifacts()
@click.option(
    "--rival",
    "rivals",
    multiple=True,
    metavar="NAME",
    help="May be given several times; all by default, a wrong name lists them.",
)
@_evaluation_text
@click.option("--calibration", metavar="NAME|PATH", help="Text of rivals that are calibrated.")
@click.option(
    "--calibration-samples",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Windows of that text.",
)
@click.option(
    "--mode",
    type=_mode,
    default="prefill",
    show_default=True,
    help="How artifacts are measured; rivals as their exact windows ask for.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Context at which bits are stated; by default the windows' length, which is what was measured.",
)
@_json_file
@click.option(
    "--chart", "chart_file", type=_Path(), metavar="FILE", help="Draw divergence against bits, .svg or .png."
)
@_model_options
@_debug
def compare_command(
    model: str,
    artifacts: tuple[str, ...],
    rivals: tuple[str, ...],
    dataset: str,
    calibration: str | None,
    calibration_samples: int,
    seqlen: int,
    windows: int | None,
    seed: int,
    mode: Any,
    context: int | None,
    json_file: str | None,
    chart_file: str | None,
    device: str,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """Artifacts beside other ways to quantize a cache: same model, text and windows, every bit counted."""
    from kvq_calib.evaluate.rivals import make_rivals
    from kvq_calib.files import check_writable
    from kvq_calib.schema.recipe import EvalConfig

    config = EvalConfig(
        dataset=dataset, windows=windows, seqlen=seqlen, mode=mode, seed=seed, context=context or seqlen
    )
    chosen = make_rivals(rivals)
    loaded_artifacts = _load_artifacts(artifacts)
    if json_file is not None:
        check_writable(json_file)
    if chart_file is not None:
        from kvq_calib.evaluate.chart import check_chart

        check_chart(chart_file)

    from kvq_calib.data import load_windows
    from kvq_calib.evaluate.compare import compare, runnable
    from kvq_calib.evaluate.tables import compare_table, print_table, run_facts
    from kvq_calib.progress import ProgressReporter

    loaded = _load_fitting(model, loaded_artifacts, device, dtype, device_map, trust_remote_code)
    text = load_windows(
        dataset, loaded.tokenizer, samples=windows, seqlen=seqlen, seed=seed, split="evaluation"
    )
    calibration_text = None
    if calibration is not None:
        calibration_text = load_windows(
            calibration,
            loaded.tokenizer,
            samples=calibration_samples,
            seqlen=seqlen,
            seed=seed,
            split="calibration",
        )
    with ProgressReporter() as progress:
        running, skipped = runnable(chosen, loaded.model, calibration is not None)
        for name, reason in skipped:
            progress.say(f"{name}: skipped, {reason}")
        result = compare(loaded.model, loaded_artifacts, running, text, config, calibration_text, progress)
    print_table(compare_table(result, config))
    for line in result.verdicts():
        click.echo(line)
    _write_json(
        json_file,
        {
            "artifacts": [one.to_json() for one in result.artifacts],
            "rivals": [one.to_json() for one in result.rivals],
            "skipped": dict(skipped),
            "config": {
                **config.record(),
                **run_facts(loaded, text, dict(zip(loaded_artifacts, artifacts, strict=True))),
                "calibration_data": None if calibration_text is None else dict(calibration_text.source),
            },
        },
    )
    if chart_file is not None:
        from kvq_calib.evaluate.chart import write_chart

        write_chart(chart_file, result, f"{loaded.name}, {text.source['dataset']}")


@eval_group.command("memory")
@_artifacts(required=False)
@click.option(
    "--shape",
    metavar="NAME",
    help="A model's shape alone (llama-7b, llama-3-8b, mistral-7b, ...), with --config.",
)
@click.option(
    "--config",
    "recipes",
    type=_Path(),
    multiple=True,
    metavar="NAME|FILE",
    help="Recipes for --shape, default the paper's three.",
)
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
@click.option(
    "--gpus",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="GPUs of 80 GB that share heads and layers of --shape.",
)
@click.option("--paper", is_flag=True, help="LLaMA-7B from 128K to 10M tokens beside the paper's figures.")
@_json_file
@_debug
def memory_command(
    artifacts: tuple[str, ...],
    shape: str | None,
    recipes: tuple[str, ...],
    contexts: tuple[int, ...],
    batch: int,
    gpus: int,
    paper: bool,
    json_file: str | None,
    debug: bool,
) -> None:
    """Bytes of the packed cache by kind, at any context, for artifacts or for a model's shape alone."""
    if not (artifacts or shape or paper):
        raise click.UsageError("name an --artifact, a --shape, or --paper")
    from kvq_calib.evaluate import memory
    from kvq_calib.evaluate.tables import memory_table, paper_table, print_table
    from kvq_calib.files import check_writable
    from kvq_calib.schema.recipe import calibration_config

    if json_file is not None:
        check_writable(json_file)
    recipes = recipes or ("nuq4-1p", "nuq3-1p", "nuq2-1p")
    content: dict[str, Any] = {}
    reports = {
        name: [memory.artifact_report(loaded, context, batch) for context in contexts]
        for name, loaded in _load_artifacts(artifacts).items()
    }
    longest: dict[str, int] = {}
    on_one: dict[str, list[float]] = {}
    if shape is not None:
        model_shape = memory.model_shape(shape)
        for recipe in recipes:
            spec = calibration_config(recipe).cache
            name = f"{model_shape.name} {recipe}"
            reports[name] = [memory.shape_report(model_shape, spec, context, batch) for context in contexts]
            longest[name] = memory.longest_context(model_shape, spec, gpus)
            on_one[name] = [
                memory.per_gpu_report(model_shape, spec, context, batch, gpus).total for context in contexts
            ]
    if reports:
        print_table(memory_table(reports, longest, on_one, gpus))
        content["reports"] = {name: [report.as_dict() for report in rows] for name, rows in reports.items()}
        content["longest_context"] = longest
        content["bytes_on_fullest_gpu"] = {"gpus": gpus, **on_one}
    if paper:
        rows = memory.paper_comparison(
            {recipe: calibration_config(recipe).cache for recipe in (*recipes, *({"nuq2"} - set(recipes)))}
        )
        print_table(paper_table(rows))
        content["paper"] = rows
    _write_json(json_file, content)


@eval_group.command("passkey")
@click.argument("model")
@_artifacts()
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(64),
    multiple=True,
    default=(512, 1024, 2048),
    show_default=True,
    help="Tokens of the text; may be given several times.",
)
@click.option(
    "--depth",
    "depths",
    type=click.FloatRange(0, 1),
    multiple=True,
    default=(0.0, 0.25, 0.5, 0.75, 1.0),
    show_default=True,
    help="Where the number is hidden, 0 beginning to 1 end.",
)
@click.option(
    "--trials", type=click.IntRange(1), default=5, show_default=True, help="Texts per length and depth."
)
@_seed
@click.option("--chunk", type=click.IntRange(1), default=256, show_default=True, help="Tokens per call.")
@_json_file
@_model_options
@_debug
def passkey_command(
    model: str,
    artifacts: tuple[str, ...],
    lengths: tuple[int, ...],
    depths: tuple[float, ...],
    trials: int,
    seed: int,
    chunk: int,
    json_file: str | None,
    device: str,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """Retrieval of a hidden number through the packed cache, where the unquantized model can do it."""
    from kvq_calib.files import check_writable

    loaded_artifacts = _load_artifacts(artifacts)
    if json_file is not None:
        check_writable(json_file)

    from kvq_calib.evaluate.passkey import measure_passkey
    from kvq_calib.evaluate.tables import passkey_table, print_table
    from kvq_calib.progress import ProgressReporter

    loaded = _load_fitting(model, loaded_artifacts, device, dtype, device_map, trust_remote_code)
    with ProgressReporter() as progress:
        cells = measure_passkey(
            loaded.model,
            loaded.tokenizer,
            loaded_artifacts,
            lengths=lengths,
            depths=depths,
            trials=trials,
            seed=seed,
            chunk=chunk,
            progress=lambda _, done, total: progress("texts", done, total),
        )
    print_table(passkey_table(cells))
    _write_json(
        json_file,
        {
            "cells": [cell.as_dict() for cell in cells],
            "config": {"model": loaded.name, "trials": trials, "seed": seed, "chunk": chunk},
        },
    )


@eval_group.command("report")
@click.argument("model")
@_artifacts()
@click.option(
    "--results",
    "result_files",
    type=_Path(),
    multiple=True,
    metavar="FILE",
    help="JSON of kvq-eval perplexity (or compare) on these artifacts; may be given several times.",
)
@click.option("-o", "--output", type=_Path(), required=True, metavar="FILE", help="The HTML file to write.")
@click.option(
    "--dataset",
    default="wikitext2",
    show_default=True,
    metavar="NAME|PATH",
    help="Text of the charts by layer and by token.",
)
@click.option(
    "--calibration-dataset",
    metavar="NAME|PATH",
    help="Text the artifacts were calibrated on, for the distributions under their codebooks; --dataset by default.",
)
@click.option("--seqlen", type=click.IntRange(8), default=512, show_default=True, help="Tokens of a window.")
@click.option("--windows", type=click.IntRange(1), default=1, show_default=True)
@_seed
@_context
@_model_options
@_debug
def report_command(
    model: str,
    artifacts: tuple[str, ...],
    result_files: tuple[str, ...],
    output: str,
    dataset: str,
    calibration_dataset: str | None,
    seqlen: int,
    windows: int,
    seed: int,
    context: int,
    device: str,
    dtype: str,
    device_map: str | None,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """One HTML page about artifacts of MODEL: accuracy against size, layer by layer, and how to repeat it."""
    from kvq_calib.files import check_writable, write_atomically

    loaded_artifacts = _load_artifacts(artifacts)
    check_writable(output)

    from kvq_calib.evaluate import report
    from kvq_calib.model.load import check_length
    from kvq_calib.progress import ProgressReporter

    files = dict(zip(loaded_artifacts, artifacts, strict=True))
    results = report.read_results(result_files)
    subjects = report.subjects(model, loaded_artifacts, files, results)
    loaded = _load_fitting(model, loaded_artifacts, device, dtype, device_map, trust_remote_code)
    check_length(loaded.model, seqlen)
    with ProgressReporter() as progress:
        measured = report.measure(
            loaded,
            loaded_artifacts,
            dataset=dataset,
            calibration_dataset=calibration_dataset or dataset,
            windows=windows,
            seqlen=seqlen,
            seed=seed,
            progress=progress,
        )
    command = ["kvq-eval", *(word for word in sys.argv[1:] if word != "--debug")]
    page = report.render(loaded, model, subjects, results, measured, context=context, command=command)
    write_atomically(output, page.encode())
    click.echo(output)


# ---------------------------------------------------------------------------------------------- artifact


@click.group("kvq-artifact", context_settings={"help_option_names": ["-h", "--help"]})
def artifact_group() -> None:
    """Look at artifacts and convert them; no model is loaded."""


@artifact_group.command("inspect")
@click.argument("file", type=_Path(), metavar="ARTIFACT")
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(1),
    multiple=True,
    default=(2048, 4096, 32768, 131072),
    show_default=True,
    help="Context lengths at which bits are stated.",
)
@click.option("--layers", is_flag=True, help="Also a line per layer.")
@click.option("--json", "json_file", type=_Path(), metavar="FILE", help="Write the same as JSON.")
@_debug
def inspect_command(
    file: str, contexts: tuple[int, ...], layers: bool, json_file: str | None, debug: bool
) -> None:
    """Content of ARTIFACT, and its bits per element at chosen context lengths."""
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.evaluate.tables import artifact_facts, artifact_tables, print_table
    from kvq_calib.files import check_writable

    loaded = KVArtifact.load(file)
    if json_file is not None:
        check_writable(json_file)
    for table in artifact_tables(loaded, contexts, per_layer=layers):
        print_table(table)
    _write_json(json_file, artifact_facts(loaded, contexts))


@artifact_group.command("shard")
@click.argument("file", type=_Path(), metavar="ARTIFACT")
@click.option("--ranks", type=click.IntRange(2), required=True, help="Ranks that divide the key-value heads.")
@click.option("-o", "--output", type=_Path(), required=True, metavar="FILE", help="With {rank} in its name.")
@_debug
def shard_command(file: str, ranks: int, output: str, debug: bool) -> None:
    """Divide ARTIFACT by key-value heads: one artifact for every rank of a tensor-parallel runtime."""
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.artifact.shard import shard
    from kvq_calib.files import check_writable

    if "{rank}" not in output:
        raise click.UsageError("-o needs {rank} in the name, for example model.{rank}.kvq.safetensors")
    whole = KVArtifact.load(file)
    parts = [shard(whole, rank, ranks) for rank in range(ranks)]
    targets = [output.replace("{rank}", str(rank)) for rank in range(ranks)]
    for target in targets:
        check_writable(target)
    for part, target in zip(parts, targets, strict=True):
        part.save(target)
        click.echo(target)


@artifact_group.command("import-kvquant")
@click.argument("file", type=_Path(), metavar="PICKLE")
@click.option("-o", "--output", type=_Path(), required=True, metavar="FILE", help="The artifact to write.")
@click.option(
    "--model",
    type=_Path(),
    required=True,
    metavar="MODEL",
    help="Model it was made for; its configuration is read.",
)
@click.option(
    "--outliers",
    type=click.FloatRange(0, 0.05),
    default=0.01,
    show_default=True,
    help="Share of elements kept exact, which the pickle does not say.",
)
@click.option("--sink-tokens", type=click.IntRange(0, 1024), default=0, show_default=True)
@_debug
def import_command(
    file: str, output: str, model: str, outliers: float, sink_tokens: int, debug: bool
) -> None:
    """Turn the quantizers.pickle of KVQuant's own code into an artifact; nothing in it is executed."""
    from kvq_calib.artifact.import_kvquant import geometry_of, import_kvquant
    from kvq_calib.files import check_writable

    check_writable(output)
    geometry, config = geometry_of(model)
    made = import_kvquant(
        file, geometry, {"id": model, "config": config}, outliers=outliers, sink_tokens=sink_tokens
    )
    made.save(output)
    click.echo(f"{output}: {made.bits_per_element(4096):.3f} bits per element at 4096 tokens of context")


@artifact_group.command("export")
@click.argument("file", type=_Path(), metavar="ARTIFACT")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["fp8-scales", "modelopt", "sglang"]),
    required=True,
    help="FP8 cache scales for vLLM (compressed-tensors), TensorRT-LLM (ModelOpt) or SGLang.",
)
@click.option(
    "-o",
    "--output",
    type=_Path(),
    required=True,
    metavar="FOLDER",
    help="Where the files go; made if it is not there.",
)
@click.option(
    "--amax",
    type=_Path(),
    metavar="FILE",
    help='JSON: {"key": [...], "value": [...]}, measured magnitudes per layer.',
)
@click.option(
    "--prefix",
    help="Name of the attention modules in the checkpoint, default model.layers.{layer}.self_attn.",
)
@click.option(
    "--ranks", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel ranks (sglang)."
)
@click.option("--force", is_flag=True, help="Write although an FP8 cache cannot express all of the artifact.")
@_debug
def export_command(
    file: str,
    format_name: Any,
    output: str,
    amax: str | None,
    prefix: str | None,
    ranks: int,
    force: bool,
    debug: bool,
) -> None:
    """Write FP8 key-value scales that other runtimes read, from the ranges that ARTIFACT holds."""
    from kvq_calib.artifact import export_fp8 as fp8
    from kvq_calib.artifact.artifact import KVArtifact

    loaded = KVArtifact.load(file)
    measured = None if amax is None else fp8.read_amax(amax, len(loaded.layers))
    files = fp8.export(loaded, format_name, amax=measured, prefix=prefix or fp8.DEFAULT_PREFIX, ranks=ranks)
    lost = fp8.losses(loaded, measured)
    if not force:
        raise ConfigError(
            f"an FP8 cache has one scale for the keys and one for the values of a layer, so {file} would lose: "
            f"{'; '.join(lost)}; repeat with --force to write the scales all the same"
        )
    for written in fp8.write(files, output):
        click.echo(str(written))
    click.echo(f"lost: {'; '.join(lost)}", err=True)
