"""The command that makes an artifact again, from what the artifact says of its calibration."""

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

#: A setting that is not worth an option: records have their text where it is looked for first.
NO_FIELD = ("text_field", "text")


@dataclass(frozen=True)
class MadeBy:
    """How an artifact is made again.

    Attributes:
        command: for a shell.
        recipe, file: content and name of a recipe that does not ship; empty where it does.
    """

    command: str
    recipe: str
    file: str


def calibration_command(model: str, artifact: Described, output: str) -> MadeBy | None:
    """The command that makes an artifact again, and the recipe's file where it is not one that ships.

    Args:
        model: as the command is to name it.
        artifact: what was made.
        output: file that the command is to write.

    Returns:
        ``None`` for an artifact that does not say how it was made.
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
    """A command for a shell, each option on a line of its own."""
    text = shlex.quote(words[0])
    for word in words[1:]:
        text += (" \\\n  " if word.startswith("-") else " ") + shlex.quote(word)
    return text


def _assignments(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What ``--set`` must change in ``old`` to make it ``new``."""
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
