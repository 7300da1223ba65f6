"""The command that makes an artifact again, from the artifact's record of its calibration."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvq_calib.artifact.described import Described
from kvq_calib.schema.recipe import calibration_config, recipe_names

__all__ = ["NO_FIELD", "MadeBy", "calibration_command", "shell_lines"]

#: A setting and its default value, which the command does not show.
NO_FIELD = ("text_field", "text")


@dataclass(frozen=True)
class MadeBy:
    """How an artifact is made again.

    Attributes:
        command: the command line, for a shell.
        recipe, file: content and file name of the recipe; empty for a shipped recipe.
    """

    command: str
    recipe: str
    file: str


def calibration_command(model: str, artifact: Described, output: str) -> MadeBy | None:
    """The command that makes an artifact again, and the recipe file if the recipe is not shipped.

    Args:
        model: name of the model in the command.
        artifact: the artifact.
        output: file that the command writes.

    Returns:
        ``None`` if the artifact does not record how it was made.
    """
    settings = artifact.calibration.get("settings")
    if not isinstance(settings, Mapping):
        return None
    wanted = {**settings, "cache": artifact.spec.model_dump(mode="json")}
    run = {name: wanted.pop(name, None) for name in ("dataset", "text_field", "samples", "seqlen", "seed")}
    recipe = str(artifact.calibration.get("recipe"))
    command = ["kvq-calibrate", model, "-o", output]
    content = file = ""
    if recipe in recipe_names():
        shipped = calibration_config(recipe).model_dump(mode="json")
        command += ["--config", recipe]
        for assignment in _assignments({name: shipped.get(name) for name in wanted}, wanted):
            command += ["--set", assignment]
    else:
        file = f"{Path(recipe).name}.yaml"
        content = yaml.safe_dump(wanted, sort_keys=False)
        command += ["--config", file]
    for name, value in run.items():
        if value is not None and (name, value) != NO_FIELD:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return MadeBy(shell_lines(command), content, file)


def shell_lines(words: Sequence[str]) -> str:
    """A command for a shell, with one option per line."""
    text = shlex.quote(words[0])
    for word in words[1:]:
        text += (" \\\n  " if word.startswith("-") else " ") + shlex.quote(word)
    return text


def _assignments(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The ``--set`` assignments that turn ``old`` into ``new``."""
    found = []
    for key, value in new.items():
        was = old.get(key)
        if value == was:
            continue
        if isinstance(value, Mapping) and isinstance(was, Mapping) and value.keys() == was.keys():
            found += _assignments(was, value, f"{path}{key}.")
        else:
            found.append(f"{path}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return found
