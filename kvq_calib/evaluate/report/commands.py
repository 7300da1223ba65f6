"""The commands that made the results in a report."""

from __future__ import annotations

from collections.abc import Sequence

from kvq_calib.artifact.command import NO_FIELD, shell_lines
from kvq_calib.evaluate.report.subjects import Subject
from kvq_calib.schema.results import Results, eval_command

__all__ = ["evaluation_command"]


def evaluation_command(model: str, chosen: Sequence[Subject], results: Results) -> str:
    """The command that made a file of results, from the settings in the file."""
    files = {id(result): subject.file for subject in chosen for _, result in subject.results}
    named = [files.get(id(result), f"{result.name}.kvq.safetensors") for result in results.artifacts]
    options: list[str] = []
    for name in ("dataset", "text_field", "seqlen", "windows", "seed", "mode", "context"):
        value = results.fact(name)
        if name == "windows":  # a stopped run records those it measured
            value = results.fact("windows_measured") or value
        if value is not None and (name, value) != NO_FIELD:
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
