"""``kvq-artifact``: inspect, convert and share artifacts."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from kvq_calib.cli.help import Command, section
from kvq_calib.cli.options import (
    SETTINGS,
    FilePath,
    artifact_options,
    collected,
    debug_option,
    json_option,
    load_artifacts,
    write_json,
)
from kvq_calib.cli.outputs import check_fields, check_output
from kvq_calib.errors import ConfigError

__all__ = ["artifact_group"]


@click.group("kvq-artifact", context_settings=SETTINGS)
@debug_option
def artifact_group() -> None:
    """Inspect, convert and share artifacts. No model is loaded."""


@artifact_group.command(
    "inspect", cls=Command, examples=("kvq-artifact inspect model.kvq.safetensors --layers",)
)
@click.argument("file", type=FilePath(), metavar="ARTIFACT")
@section(
    "Output",
    click.option(
        "--context",
        "contexts",
        type=click.IntRange(1),
        multiple=True,
        default=(2048, 4096, 32768, 131072),
        show_default=True,
        metavar="TOKENS",
        help="Contexts at which bits are stated; may be given several times.",
    ),
    click.option("--layers", is_flag=True, help="Also a line for each layer."),
)
@json_option
@debug_option
def inspect_command(file: str, contexts: tuple[int, ...], layers: bool, json_file: str | None) -> None:
    """Show what ARTIFACT contains, and its bits per element at given context lengths."""
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.evaluate.tables import artifact_facts, artifact_tables, print_table

    loaded = KVArtifact.load(file)
    check_output(json_file)
    for table in artifact_tables(loaded, contexts, per_layer=layers):
        print_table(table)
    write_json(json_file, artifact_facts(loaded, contexts))


@artifact_group.command("vllm-args", cls=Command, examples=("kvq-artifact vllm-args model.kvq.safetensors",))
@click.argument("artifact", type=FilePath(), metavar="ARTIFACT")
@debug_option
def vllm_command(artifact: str) -> None:
    """Check that vLLM can serve ARTIFACT, a file or a hub id, and print vLLM's options for it."""
    from kvq_calib.integrations.vllm.checks import ARTIFACT_KEY, artifact_of, check_artifact, is_installed

    check_artifact(artifact_of(artifact))
    if not is_installed():
        click.echo(
            "warning: the package is not installed here, so vLLM would not find its plug-in and serve an unquantized "
            "cache; pip install kvq-calib, not a folder on PYTHONPATH",
            err=True,
        )
    named = str(Path(artifact).resolve()) if Path(artifact).exists() else artifact
    options = json.dumps({ARTIFACT_KEY: named})
    click.echo(shlex.join(["--attention-backend", "CUSTOM", "--additional-config", options]))


@artifact_group.command(
    "shard",
    cls=Command,
    examples=("kvq-artifact shard model.kvq.safetensors --ranks 2 -o 'model.{rank}.kvq.safetensors'",),
)
@click.argument("file", type=FilePath(), metavar="ARTIFACT")
@section(
    "Output",
    click.option(
        "--ranks",
        type=click.IntRange(2),
        required=True,
        metavar="N",
        help="Number of ranks that divide the key-value heads.",
    ),
    click.option(
        "-o",
        "--output",
        type=FilePath(),
        required=True,
        metavar="FILE",
        help="Files to write, with {rank} in the name.",
    ),
)
@debug_option
def shard_command(file: str, ranks: int, output: str) -> None:
    """Divide ARTIFACT by key-value heads into one artifact for each rank of a tensor-parallel runtime."""
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.artifact.shard import shard

    check_fields(output, "rank")
    if "{rank}" not in output:
        raise click.UsageError("-o needs {rank} in the name, for example model.{rank}.kvq.safetensors")
    whole = KVArtifact.load(file)
    parts = [shard(whole, rank, ranks) for rank in range(ranks)]
    targets = [output.replace("{rank}", str(rank)) for rank in range(ranks)]
    for target in targets:
        check_output(target)
    for part, target in zip(parts, targets, strict=True):
        part.save(target)
        click.echo(target)


@artifact_group.command(
    "import-kvquant",
    cls=Command,
    examples=(
        "kvq-artifact import-kvquant quantizers.pickle --model MODEL -o model.kvq.safetensors --outliers 0.01",
    ),
)
@click.argument("file", type=FilePath(), metavar="PICKLE")
@section(
    "Output",
    click.option(
        "-o", "--output", type=FilePath(), required=True, metavar="FILE", help="The artifact to write."
    ),
)
@section(
    "What the pickle does not contain",
    click.option(
        "--model",
        type=FilePath(),
        required=True,
        metavar="MODEL",
        help="Model it was made for (hub id or folder); its configuration is read.",
    ),
    click.option(
        "--outliers",
        type=click.FloatRange(0, 0.05),
        default=0.01,
        show_default=True,
        metavar="SHARE",
        help="Share of elements kept exact.",
    ),
    click.option(
        "--sink-tokens",
        type=click.IntRange(0, 1024),
        default=0,
        show_default=True,
        metavar="N",
        help="First tokens kept exact.",
    ),
)
@debug_option
def import_command(file: str, output: str, model: str, outliers: float, sink_tokens: int) -> None:
    """Convert a quantizers.pickle of KVQuant into an artifact. The pickle is not executed."""
    from kvq_calib.artifact.import_kvquant import import_kvquant
    from kvq_calib.model.configuration import geometry_of_configuration

    check_output(output)
    geometry, config = geometry_of_configuration(model)
    made = import_kvquant(
        file, geometry, {"id": model, "config": config}, outliers=outliers, sink_tokens=sink_tokens
    )
    made.save(output)
    click.echo(f"{output}: {made.bits_per_element(4096):.3f} bits per element at 4096 tokens of context")


@artifact_group.command(
    "export",
    cls=Command,
    examples=("kvq-artifact export model.kvq.safetensors --format fp8-scales -o scales/ --force",),
)
@click.argument("file", type=FilePath(), metavar="ARTIFACT")
@section(
    "Output",
    click.option(
        "--format",
        "format_name",
        type=click.Choice(["fp8-scales", "modelopt", "sglang"]),
        required=True,
        help="FP8 cache scales for vLLM (compressed-tensors), TensorRT-LLM (ModelOpt) or SGLang.",
    ),
    click.option(
        "-o",
        "--output",
        type=FilePath(),
        required=True,
        metavar="FOLDER",
        help="Folder for the files; created if needed.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Write the scales even if an FP8 cache cannot represent everything in ARTIFACT.",
    ),
)
@section(
    "Scales",
    click.option(
        "--amax",
        type=FilePath(),
        metavar="FILE",
        help='JSON: {"key": [...], "value": [...]}, measured magnitudes of each layer.',
    ),
    click.option(
        "--prefix",
        metavar="NAME",
        help="Name of the attention modules in the checkpoint.  [default: model.layers.{layer}.self_attn]",
    ),
    click.option(
        "--ranks",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        metavar="N",
        help="Tensor-parallel ranks (sglang).",
    ),
)
@debug_option
def export_command(
    file: str,
    format_name: Any,
    output: str,
    amax: str | None,
    prefix: str | None,
    ranks: int,
    force: bool,
) -> None:
    """Write FP8 key-value scales for other runtimes, from the ranges in ARTIFACT."""
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


@dataclass(frozen=True)
class PushOptions:
    """The fields of :class:`kvq_calib.artifact.hub.Upload`."""

    private: bool | None
    revision: str | None
    commit_message: str | None
    create_pr: bool


_push_options = collected(
    PushOptions,
    "how",
    section(
        "Upload",
        click.option(
            "--private/--public",
            default=None,
            help="Whether a new repository is private.  [default: the account's]",
        ),
        click.option("--revision", metavar="BRANCH", help="Branch, created if needed.  [default: main]"),
        click.option("--message", "commit_message", metavar="TEXT", help="Message of the commit."),
        click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch."),
    ),
)


@artifact_group.command(
    "push",
    cls=Command,
    examples=("kvq-artifact push me/model-kv --artifact model.kvq.safetensors --results results.json",),
)
@click.argument("repository", metavar="NAME/REPOSITORY")
@artifact_options()
@section(
    "Artifacts",
    click.option(
        "--results",
        "result_files",
        type=FilePath(),
        multiple=True,
        metavar="FILE",
        help="JSON of kvq-eval perplexity on these artifacts, for the card; may be given several times.",
    ),
)
@_push_options
@debug_option
def push_command(
    repository: str, artifacts: tuple[str, ...], result_files: tuple[str, ...], how: PushOptions
) -> None:
    """Upload artifacts to the Hugging Face hub, with a model card that states bits, KL divergence, data and command.

    It uses the account that is logged in (hf auth login), or the token in HF_TOKEN.
    """
    from kvq_calib.artifact.hub import SUFFIX, Upload, push
    from kvq_calib.schema.results import read_results

    loaded = load_artifacts(artifacts)
    names = [Path(file).name.removesuffix(".safetensors").removesuffix(".kvq") + SUFFIX for file in artifacts]
    if len(set(names)) != len(names):
        raise ConfigError("two artifacts have the same file name; rename one of them")
    results = read_results(result_files)
    click.echo(
        push(Upload(repository, **asdict(how)), dict(zip(names, loaded.values(), strict=True)), results)
    )
