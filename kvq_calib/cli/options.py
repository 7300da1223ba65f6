"""Options that several commands share. A command gets each group as one object.

For example, a command decorated with :func:`model_options` gets an argument ``model`` of class :class:`ModelOptions`.
Importing torch and transformers takes seconds, so it is done only when an object is used.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvq_calib.cli.help import section
from kvq_calib.errors import ConfigError

if TYPE_CHECKING:
    from kvq_calib.artifact.artifact import KVArtifact
    from kvq_calib.data import Split, TokenWindows
    from kvq_calib.model.load import LoadedModel

__all__ = [
    "SETTINGS",
    "FilePath",
    "Invocation",
    "ModelOptions",
    "TextOptions",
    "artifact_options",
    "collected",
    "context_option",
    "debug_option",
    "json_option",
    "load_artifacts",
    "mode_option",
    "model_options",
    "number_option",
    "require_extra",
    "text_options",
    "write_json",
]

Decorator = Callable[[Any], Any]

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Of every command."""


class FilePath(click.Path):
    """A path, or a name where both are allowed. It expands ``~``, which shells do not do in ``--output=~/x``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path with ``~`` replaced."""
        return super().convert(os.path.expanduser(value), param, ctx)


@dataclass
class Invocation:
    """Settings of a whole command line; the object of click's context.

    Attributes:
        debug: whether ``--debug`` was given, before or after the subcommand.
    """

    debug: bool = False


def _remember_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Invocation).debug = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show a traceback on errors."
)
json_option = section(
    "Output",
    click.option("--json", "json_file", type=FilePath(), metavar="FILE", help="Write the result as JSON."),
)
context_option = section(
    "Measurement",
    click.option(
        "--context", type=click.IntRange(1), default=4096, show_default=True, metavar="TOKENS",
        help="Context at which bits are stated.",
    ),
)  # fmt: skip


def mode_option(help: str) -> Decorator:
    """The option ``--mode``, with the command's help text."""
    modes = click.Choice(["prefill", "decode"])
    return section(
        "Measurement", click.option("--mode", type=modes, default="prefill", show_default=True, help=help)
    )


def collected(cls: type[Any], name: str, *options: Decorator) -> Decorator:
    """A decorator that passes the values of several options to a command as one object.

    Args:
        cls: a dataclass with a field for each option, of the option's name.
        name: name of the command's argument.
        options: the options, in the order of the help.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            values = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(cls)}
            return function(*args, **{name: cls(**values)}, **kwargs)

        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def number_option(
    name: str, default: int, metavar: str, text: str, *, least: int = 1, most: int | None = None
) -> Decorator:
    """An option for an integer from ``least`` to ``most``, with its default in the help.

    Args:
        name: name of the option.
        default: its default.
        metavar: unit of the number.
        text: text of the help.
        least, most: limits; ``None`` for no limit.
    """
    return click.option(
        name, type=click.IntRange(least, most), default=default, show_default=True, metavar=metavar, help=text
    )


def artifact_options(required: bool = True) -> Decorator:
    """The option ``--artifact``, which may be given several times."""
    return section(
        "Artifacts",
        click.option(
            "--artifact", "artifacts", type=FilePath(), multiple=True, required=required, metavar="FILE",
            help="An artifact; may be given several times.",
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded.

    Attributes:
        model: hub id, folder or ``.gguf`` file.
        device, dtype, device_map, trust_remote_code: as in :func:`kvq_calib.model.load.load_model`.
    """

    model: str
    device: str
    dtype: str
    device_map: str | None
    trust_remote_code: bool

    def load(
        self, *, device: str | None = None, max_memory: Mapping[int | str, str] | None = None
    ) -> LoadedModel:
        """Load the model, on ``device`` if given."""
        from kvq_calib.model.load import load_model

        return load_model(
            self.model,
            device=device or self.device,
            dtype=self.dtype,
            device_map=self.device_map,
            max_memory=max_memory,
            trust_remote_code=self.trust_remote_code,
        )

    def load_for(self, artifacts: Mapping[str, KVArtifact]) -> LoadedModel:
        """Load the model, and check that every artifact was calibrated for it."""
        from kvq_calib.model.fingerprint import model_fingerprint

        loaded = self.load()
        fingerprint = model_fingerprint(loaded.model)
        for artifact in artifacts.values():
            artifact.check_model(fingerprint)
        return loaded


model_options = collected(
    ModelOptions,
    "model",
    click.argument("model"),
    section(
        "Model",
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:1, ...",
        ),
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
    ),
)


# ------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class TextOptions:
    """The text that something is measured on.

    Attributes:
        dataset: name or path.
        text_field: field of the records in a local file that holds their text.
        seqlen: tokens in a window.
        windows: at most this many, ``None`` for all.
        seed: seed for drawing windows, where they are drawn.
    """

    dataset: str
    text_field: str
    seqlen: int
    windows: int | None
    seed: int

    def field_of(self, dataset: str) -> str:
        """The field to read from ``dataset``: ``text_field``, or the default for a published data set."""
        from kvq_calib.data import DATA_SETS, DEFAULT_FIELD

        return DEFAULT_FIELD if dataset in DATA_SETS else self.text_field

    def check(self, calibration: str | None = None) -> None:
        """Check before a model is loaded that the text exists, and the calibration text if there is one.

        Raises:
            DataError: not the name of a data set and not a path, or less text than one window.
        """
        from kvq_calib.data import check_dataset

        check_dataset(self.dataset, self.text_field, self.seqlen)
        if calibration is not None:
            check_dataset(calibration, self.field_of(calibration), self.seqlen)

    def load(self, loaded: LoadedModel) -> TokenWindows:
        """Cut the text into windows for evaluation.

        Raises:
            ModelError: the windows are longer than the model's context, or have tokens outside its vocabulary.
            DataError: the text is missing, unreadable or too short.
        """
        return self._windows(loaded, self.dataset, self.windows, "evaluation")

    def load_calibration(self, loaded: LoadedModel, dataset: str, samples: int) -> TokenWindows:
        """Cut a calibration text into windows of the same length. Raises as :meth:`load`."""
        return self._windows(loaded, dataset, samples, "calibration")

    def _windows(self, loaded: LoadedModel, dataset: str, samples: int | None, split: Split) -> TokenWindows:
        from kvq_calib.data import load_windows
        from kvq_calib.model.load import check_length, check_tokens

        check_length(loaded.model, self.seqlen)
        found = load_windows(
            dataset,
            loaded.tokenizer,
            samples=samples,
            seqlen=self.seqlen,
            seed=self.seed,
            split=split,
            text_field=self.field_of(dataset),
        )
        check_tokens(loaded.model, found.ids)
        return found


TEXT_FIELD_HELP = "Field that holds the text of records in your own files (.jsonl, .parquet, .csv)."


def text_options(
    *,
    seqlen: int = 2048,
    windows: int | None = None,
    help: str = "wikitext2, c4, python-docs, or a file, folder, glob or - of your own.",
) -> Decorator:
    """The options of :class:`TextOptions`, with their defaults. The argument is ``text``."""
    return collected(
        TextOptions,
        "text",
        section(
            "Text",
            click.option(
                "--dataset", default="wikitext2", show_default=True, metavar="NAME|PATH", help=help
            ),
            click.option(
                "--text-field", default="text", show_default=True, metavar="NAME", help=TEXT_FIELD_HELP
            ),
            click.option(
                "--seqlen", type=click.IntRange(8), default=seqlen, show_default=True, metavar="TOKENS",
                help="Tokens per window.",
            ),
            click.option(
                "--windows", type=click.IntRange(1), default=windows, show_default=windows is not None, metavar="N",
                help="At most this many windows." + ("  [default: all]" if windows is None else ""),
            ),
            click.option(
                "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N",
                help="Seed for drawing windows, where they are drawn.",
            ),
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------------------- artifacts and files


def load_artifacts(files: tuple[str, ...]) -> dict[str, KVArtifact]:
    """Load artifacts, by a short name: the file name as far as it is unique.

    Raises:
        ConfigError: one is named twice.
        ArtifactError: a file is not an artifact.
    """
    from kvq_calib.artifact.artifact import KVArtifact

    short = [Path(file).name.removesuffix(".safetensors").removesuffix(".kvq") for file in files]
    names = short if len(set(short)) == len(short) else list(files)
    if len(set(names)) != len(names):
        raise ConfigError("the same artifact is named twice")
    return {name: KVArtifact.load(file) for name, file in zip(names, files, strict=True)}


def write_json(file: str | None, content: Mapping[str, Any]) -> None:
    """Write a result to the file of ``--json``, if given. It is always valid JSON, without NaN or infinity.

    Raises:
        ConfigError: the result contains NaN or infinity.
        WriteError: the file cannot be written.
    """
    if file is None:
        return
    from kvq_calib.files import write_atomically

    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"{file} is not written: a result is not a finite number") from error
    write_atomically(file, (text + "\n").encode())


def require_extra(purpose: str, extra: str, *modules: str) -> None:
    """Check before any work that an extra is installed.

    Args:
        purpose: what needs the extra, the subject of the message.
        extra: name of the extra of this package.
        modules: modules that the extra installs.

    Raises:
        ConfigError: a module is missing; the message says what to install.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {' and '.join(missing)}: pip install 'kvq-calib[{extra}]'")
