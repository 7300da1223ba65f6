"""What ``ablation.py`` and ``frontier.py`` share: rows that change a recipe, calibrated and measured together."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, environment

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows, load_windows
from kvq_calib.evaluate.perplexity import measure_perplexity
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import LoadedModel, load_model
from kvq_calib.schema.recipe import CalibrationConfig, EvalConfig, calibration_config

#: Recipe of the rows that name none.
BASE = "nuq3-1p"
#: Tokens at which bits are stated.
CONTEXT = 4096


@dataclass(frozen=True)
class Variant:
    """One row: a recipe with changes.

    Attributes:
        name: short name, also the artifact's file name.
        switch: the part of the method that it changes.
        text: the row's text in the table.
        assignments: ``--set`` assignments.
        recipe: the recipe to which they are applied.
    """

    name: str
    switch: str
    text: str
    assignments: tuple[str, ...] = ()
    recipe: str = BASE

    def config(self, **command_line: Any) -> CalibrationConfig:
        """The settings of the recipe with its changes. The settings of the run override both."""
        return calibration_config(self.recipe, command_line=command_line, assignments=self.assignments)


def chosen(
    parser: argparse.ArgumentParser,
    only: Sequence[str] | None,
    rows: Sequence[Variant],
    others: Iterable[str] = (),
) -> list[Variant]:
    """The rows that ``--only`` names; all by default. Any name but theirs and ``others`` is an error."""
    names = [*(row.name for row in rows), *others]
    if only and not set(only) <= set(names):
        parser.error(f"the rows are {', '.join(names)}")
    return [row for row in rows if not only or row.name in only]


def make_parser(description: str, name: str, windows: int) -> argparse.ArgumentParser:
    """The options that the scripts share, with their defaults. ``name`` is that of the record."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, metavar="NAME|FILE")
    parser.add_argument("--evaluation", required=True, metavar="NAME|FILE")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=windows, help="evaluation windows")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows; all by default")
    parser.add_argument("--work", type=Path, default=Path("build", name), help="folder for the artifacts")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    return parser


@dataclass(frozen=True)
class Study:
    """Rows to measure, with the model and its texts.

    Attributes:
        rows: the rows.
        loaded: the model.
        calibration, evaluation: windows of text.
        work: folder of the artifacts.
        content: the record, without rows.
        known: rows of an earlier record, by name.
    """

    rows: Sequence[Variant]
    loaded: LoadedModel
    calibration: TokenWindows
    evaluation: TokenWindows
    work: Path
    content: dict[str, Any]
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def configs(self, options: argparse.Namespace) -> dict[str, CalibrationConfig]:
        """Settings of the rows, by name."""
        run = {"dataset": options.calibration, "samples": options.samples, "seqlen": options.seqlen}
        return {row.name: row.config(**run) for row in self.rows}

    def described(self, results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that have results, as they are recorded."""
        return [
            {"switch": row.switch, "text": row.text, "recipe": row.recipe, "changes": row.assignments, **results[row.name]}
            for row in self.rows
            if row.name in results
        ]  # fmt: skip


def prepare(options: argparse.Namespace, rows: Sequence[Variant]) -> Study:
    """Load the model and its texts, and read what an earlier run has measured."""
    facts = environment(options.note)
    options.work.mkdir(parents=True, exist_ok=True)
    loaded = load_model(options.model, dtype="float32")

    def windows(text: str, count: int, split: Any) -> TokenWindows:
        return load_windows(text, loaded.tokenizer, samples=count, seqlen=options.seqlen, split=split)

    calibration = windows(options.calibration, options.samples, "calibration")
    evaluation = windows(options.evaluation, options.windows, "evaluation")
    settings = {"model": loaded.name, "calibration": calibration.source, "evaluation": evaluation.source}
    known: dict[str, dict[str, Any]] = {}
    if options.output.exists():
        known = {row["name"]: row for row in json.loads(options.output.read_text(encoding="utf-8"))["rows"]}
    content = {"settings": settings, "environment": facts, "rows": []}
    return Study(rows, loaded, calibration, evaluation, options.work, content, known)


def calibrated(study: Study, configs: Mapping[str, CalibrationConfig], progress: Any) -> dict[str, Path]:
    """Artifacts of all recipes, in the study's folder. Existing ones are kept; the others are made in one run."""
    loaded, windows, work = study.loaded, study.calibration, study.work
    files = {name: work / f"{name}.kvq.safetensors" for name in configs}
    missing = {name: config for name, config in configs.items() if not stands(files[name], config, windows)}
    if missing:
        result = calibrate(
            loaded.model,
            windows,
            missing,
            model_id=loaded.name,
            model_config=model_fingerprint(loaded.model),
            checkpoint=work / "calibration.checkpoint",
            resume=True,
            progress=progress,
        )
        for name, artifact in result.artifacts.items():
            artifact.save(files[name])
    return files


def stands(file: Path, config: CalibrationConfig, windows: TokenWindows) -> bool:
    """Whether ``file`` was made from this recipe and this text."""
    if not file.exists():
        return False
    artifact = KVArtifact.load(file)
    settings = json.loads(json.dumps(config.record()))
    made, spec = artifact.calibration, artifact.spec
    if config.allocation is not None:
        # Calibration only decides, for each layer, the form of error compensation.
        count, decided = len(artifact.geometry.layers), {"error_compensation"}
        for found, asked in zip(spec.resolved(count), config.cache.resolved(count), strict=True):
            keys = [each.key.model_dump(exclude=decided) for each in (found, asked)]
            if keys[0] != keys[1] or found.value != asked.value:
                return False
        spec = spec.model_copy(update={"layers": config.cache.layers})
    return spec == config.cache and (made["settings"], made["data"]) == (settings, windows.source)


def evaluated(
    study: Study, files: Mapping[str, Path], group: int, progress: Any, keep: Any
) -> dict[str, dict[str, Any]]:
    """Results by name. Known results for the same artifact and text are kept. ``keep`` is called after each group.

    A group shares one pass of the unquantized model.
    """
    loaded, windows, known = study.loaded, study.evaluation, study.known
    results: dict[str, dict[str, Any]] = {}
    todo: dict[str, str] = {}
    fingerprint = model_fingerprint(loaded.model)
    for name, file in files.items():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if name in known and known[name]["inputs"] == [digest, windows.source["sha256"]]:
            results[name] = known[name]
        else:
            todo[name] = digest
    names = list(todo)
    for start in range(0, len(names), group):
        artifacts = {name: KVArtifact.load(files[name]) for name in names[start : start + group]}
        for artifact in artifacts.values():
            artifact.check_model(fingerprint)
        config = EvalConfig(windows=len(windows.ids), seqlen=windows.ids.shape[1], context=CONTEXT)
        for result in measure_perplexity(loaded.model, artifacts, windows, config, progress):
            results[result.name] = {
                **result.to_json(),
                "inputs": [todo[result.name], windows.source["sha256"]],
            }
        keep(results)
    return results
