"""The commands behind a report: what made its artifacts, and what measured them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvq_calib.evaluate.report.results import Results, eval_command, fact_of
from kvq_calib.evaluate.report.subjects import Subject
from kvq_calib.schema.recipe import calibration_config, recipe_names

#: A setting that is not worth an option: records have their text where it is looked for first.
_NO_FIELD = ("text_field", "text")

__all__ = ["MadeBy", "calibration_command", "evaluation_command", "shell_lines"]


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


def calibration_command(model: str, subject: Subject) -> MadeBy | None:
    """The command that makes an artifact again, and the recipe's file where it is not one that ships.

    ``None`` for an artifact that does not say how it was made.
    """
    record = subject.artifact.calibration
    settings = fact_of(record, "settings")
    if not isinstance(settings, Mapping):
        return None
    wanted = {**settings, "cache": subject.artifact.spec.model_dump(mode="json")}
    run = {name: wanted.pop(name, None) for name in ("dataset", "text_field", "samples", "seqlen", "seed")}
    recipe = str(record.get("recipe"))
    command = ["kvq-calibrate", model, "-o", subject.file]
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
        if value is not None and (name, value) != _NO_FIELD:
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


def evaluation_command(model: str, chosen: Sequence[Subject], results: Results) -> str:
    """The command behind a file of results, from the settings that the file records."""
    files = {id(result): subject.file for subject in chosen for _, result in subject.results}
    named = [files.get(id(result), f"{result.name}.kvq.safetensors") for result in results.artifacts]
    options: list[str] = []
    for name in ("dataset", "text_field", "seqlen", "windows", "seed", "mode", "context"):
        value = results.fact(name)
        if name == "windows":  # of a run that was stopped, those that it measured
            value = results.fact("windows_measured") or value
        if value is not None and (name, value) != _NO_FIELD:
            options += [f"--{name.replace('_', '-')}", str(value)]
    if results.rivals is None:
        decoded = "decode" in (results.fact("mode"), *(result.mode for result in results.artifacts))
        if decoded and results.fact("chunk") is not None:
            options += ["--chunk", str(results.fact("chunk"))]
        return shell_lines(eval_command("perplexity", model, named, *options, "--json", results.file))
    for rival in results.rivals:
        options += ["--rival", rival.name]
    if results.fact("calibration_data", "dataset") is not None:
        options += ["--calibration", str(results.fact("calibration_data", "dataset"))]
        options += ["--calibration-samples", str(results.fact("calibration_data", "requested"))]
    return shell_lines(eval_command("compare", model, named, *options, "--json", results.file))
