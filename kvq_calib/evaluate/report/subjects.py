"""The artifacts of a report, with their results."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.schema.results import ReportError, Result, Results, eval_command

__all__ = ["Subject", "subjects"]

#: CSS classes of the artifacts' colours.
_COLOURS = 8


@dataclass(frozen=True, eq=False)
class Subject:
    """An artifact in the report.

    Attributes:
        name: short name.
        file: path as the user named it.
        artifact: its content.
        sha256, size: hash, and size in bytes, of the file.
        colour: class of its marks.
        results: its results, each with the file that contains it.
    """

    name: str
    file: str
    artifact: KVArtifact
    sha256: str
    size: int
    colour: str
    results: tuple[tuple[Results, Result], ...]


def subjects(
    model: str, artifacts: Mapping[str, KVArtifact], files: Mapping[str, str], results: Sequence[Results]
) -> list[Subject]:
    """Find the results of each artifact: by the file's hash, or by name if results have no hash.

    Args:
        model: model as the user named it, for the message.
        artifacts, files: artifacts and paths, by the artifacts' short names.
        results: results from :func:`~kvq_calib.schema.results.read_results`.

    Raises:
        ReportError: an artifact has no results; the message says what to run.
    """
    found = []
    for number, (name, artifact) in enumerate(artifacts.items()):
        content = Path(files[name]).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        own = tuple(
            (each, result)
            for each in results
            for result in each.artifacts
            if each.fact("artifact_sha256", result.name) == digest
            or (result.name == name and each.fact("artifact_sha256", name) is None)
        )
        if not own:
            where = " in " + ", ".join(each.file for each in results) if results else ""
            command = shlex.join(eval_command("perplexity", model, [files[name]], "--json", "results.json"))
            raise ReportError(
                f"no results for {name}{where}; measure it first: {command}, then add --results results.json"
            )
        found.append(Subject(name, files[name], artifact, digest, len(content), f"s{number % _COLOURS}", own))
    return found
