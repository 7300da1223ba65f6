"""Settings of a run: a recipe file, then the command line, validated once.

Recipes are YAML files (``configs/`` of the repository, shipped in the package) and strict: an unknown key is an
error. ``--set cache.key.bits=4`` changes one value by its path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvq_calib.artifact import first_problem
from kvq_calib.errors import ConfigError
from kvq_calib.files import shipped_folder
from kvq_calib.spec import KVCacheSpec

DEFAULT_RECIPE = "nuq3-1p"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FitConfig(_Settings):
    """How codebooks are fitted.

    Attributes:
        weights: ``fisher`` (squared gradients of the loss; needs a backward pass) or ``uniform``.
        solver: ``exact`` dynamic programming, or ``lloyd``, scikit-learn's ``KMeans`` as in the paper's code.
    """

    weights: Literal["fisher", "uniform"] = "fisher"
    solver: Literal["exact", "lloyd"] = "exact"


class CalibrationConfig(_Settings):
    """Everything that decides the content of an artifact, but for the model.

    Attributes:
        description: one line for people.
        cache: what is quantized how.
        fit: how codebooks are fitted.
        dataset: name or path of the calibration text.
        samples: windows of ``seqlen`` tokens.
        seed: of every random choice.
        recompute: recompute layers in the backward pass instead of keeping their activations.
    """

    description: str = ""
    cache: KVCacheSpec
    fit: FitConfig = FitConfig()
    dataset: str = "wikitext2"
    samples: Annotated[int, Field(ge=1)] = 16
    seqlen: Annotated[int, Field(ge=8)] = 2048
    seed: Annotated[int, Field(ge=0)] = 0
    recompute: bool = False


class EvalConfig(_Settings):
    """What an evaluation measures.

    Attributes:
        dataset: name or path of the evaluation text.
        windows: at most this many windows; ``None`` for all.
        seqlen: tokens of a window.
        mode: ``prefill`` quantizes inside one forward pass; ``decode`` sends the text through the packed cache.
        seed: of the data, where it is sampled.
        context: tokens of context at which bits per element are stated.
        chunk: tokens per step in ``decode`` mode.
    """

    dataset: str = "wikitext2"
    windows: Annotated[int, Field(ge=1)] | None = None
    seqlen: Annotated[int, Field(ge=8)] = 2048
    mode: Literal["prefill", "decode"] = "prefill"
    seed: Annotated[int, Field(ge=0)] = 0
    context: Annotated[int, Field(ge=1)] = 4096
    chunk: Annotated[int, Field(ge=1)] = 256


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(file.stem for file in shipped_folder("configs").glob("*.yaml"))


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """The content of a shipped recipe, or of a YAML file.

    Raises:
        ConfigError: no such recipe or file, or not a YAML mapping.
    """
    if name_or_file in recipe_names():
        text = (shipped_folder("configs") / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"no recipe or file {name_or_file!r}; the recipes are {', '.join(recipe_names())}"
            ) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name_or_file} is not a mapping of settings")
    return content


def calibration_config(
    recipe: str,
    *,
    command_line: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> CalibrationConfig:
    """Merge a recipe file, the command line's options and its ``--set`` assignments, in this order.

    Args:
        recipe: name or file.
        command_line: options by name; ``None`` values were not given.
        assignments: ``path.to.key=value`` each, the value in YAML.

    Raises:
        ConfigError: in one line, which key is wrong and why.
    """
    settings = read_recipe(recipe)
    settings.update({name: value for name, value in (command_line or {}).items() if value is not None})
    for assignment in assignments:
        _assign(settings, assignment)
    try:
        return CalibrationConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{recipe}: {first_problem(error)}") from error


def _assign(settings: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment}: write it as KEY=VALUE, for example cache.key.bits=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: {text!r} is not a YAML value") from error
    *parents, last = path.split(".")
    place = settings
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"--set {assignment}: {parent} is a value, not a section")
    place[last] = value
