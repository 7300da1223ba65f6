"""Ablation at 3 bits, with one change at a time: KL divergence, perplexity and bits per element.

    python benchmarks/ablation.py MODEL --calibration FILE --evaluation FILE [--windows 2]

All recipes are calibrated in one run and share the passes over the text. Artifacts go to ``--work``, and results are
written as they are measured. After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, environment, environment_lines, markdown, markdown_table, write_results

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows, load_windows
from kvq_calib.evaluate.perplexity import measure_perplexity
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import LoadedModel, load_model
from kvq_calib.progress import ProgressReporter
from kvq_calib.schema.recipe import CalibrationConfig, EvalConfig, calibration_config

BASE = "nuq3-1p"
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


def _both(path: str, value: object) -> tuple[str, str]:
    """The same assignment for keys and values."""
    return f"cache.key.{path}={value}", f"cache.value.{path}={value}"


def _edges_at_four_bits() -> str:
    """Overrides that give the first and the last layer 4 bits."""
    cache = calibration_config(BASE).cache
    layer = {
        kind: {**spec.model_dump(mode="json", exclude_defaults=True), "bits": 4}
        for kind, spec in (("key", cache.key), ("value", cache.value))
    }
    return f"cache.layers={json.dumps({'0': layer, '-1': layer})}".replace('"0"', "0").replace('"-1"', "-1")


def variants() -> list[Variant]:
    """The rows, with the base recipe first. The others differ from it as their text says."""
    rows = [
        Variant("base", "base", "3 bits, k-means, Fisher weights, 1% outliers, 1 sink token (nuq3-1p)"),
        Variant("key-token", "key granularity", "keys per token", ("cache.key.thresholds=token",)),
        Variant("key-post-rope", "key RoPE", "keys after RoPE", ("cache.key.pre_rope=false",)),
        Variant(
            "key-online",
            "key thresholds",
            "keys' thresholds online (each text its own)",
            ("cache.key.thresholds=channel_online",),
        ),
        Variant(
            "value-channel",
            "value granularity",
            "values per channel, static thresholds",
            ("cache.value.thresholds=channel",),
        ),
        Variant(
            "value-normalized",
            "value granularity",
            "values per token after static normalisation per channel",
            ("cache.value.thresholds=token_normalized",),
        ),
        Variant("uniform", "datatype", "uniform levels", _both("levels", "uniform")),
        Variant("normal-float", "datatype", "NormalFloat levels", _both("levels", "normal_float")),
        Variant("unweighted", "weights", "k-means without Fisher weights", ("fit.weights=uniform",)),
        Variant("lloyd", "solver", "k-means by scikit-learn (Lloyd's iteration)", ("fit.solver=lloyd",)),
        Variant("q-norm", "Q-Norm", "Q-Norm", _both("q_norm", "true")),
    ]
    rows += [
        Variant(
            f"outliers-{percent}",
            "outliers",
            f"{percent}% outliers" if percent else "no outliers",
            _both("outliers.fraction", percent / 100),
        )
        for percent in (0, 0.5, 2, 5)
    ]
    rows += [
        Variant(
            f"cap-{cap}",
            "outlier cap",
            f"outliers per token capped at {cap}, for keys and for values",
            _both("outliers.max_per_token", cap),
        )
        for cap in (1, 2, 4)
    ]
    rows += [
        Variant("sink-0", "sink", "no exact sink token", ("cache.sink_tokens=0",)),
        Variant("sink-4", "sink", "4 exact sink tokens", ("cache.sink_tokens=4",)),
        Variant("k4v2", "bits", "keys at 4 bits, values at 2", ("cache.key.bits=4", "cache.value.bits=2")),
        Variant("k2v4", "bits", "keys at 2 bits, values at 4", ("cache.key.bits=2", "cache.value.bits=4")),
        Variant("edges-4", "layers", "first and last layer at 4 bits", (_edges_at_four_bits(),)),
        Variant("uniform-dense", "combination", "uniform levels, no outliers", recipe="uniform3"),
        Variant("normal-float-dense", "combination", "NormalFloat levels, no outliers", recipe="nf3"),
        Variant(
            "plain",
            "combination",
            "uniform levels, no outliers, keys per token after RoPE, no sink",
            ("cache.key.thresholds=token", "cache.key.pre_rope=false", "cache.sink_tokens=0"),
            recipe="uniform3",
        ),
    ]
    return rows


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


def calibrated(
    loaded: LoadedModel,
    windows: TokenWindows,
    configs: Mapping[str, CalibrationConfig],
    work: Path,
    progress: Any,
) -> dict[str, Path]:
    """Artifacts of all recipes, in ``work``. Existing ones are kept; the others are made in one run."""
    files = {name: work / f"{name}.kvq.safetensors" for name in configs}
    missing = {name: config for name, config in configs.items() if not _stands(files[name], config, windows)}
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


def _stands(file: Path, config: CalibrationConfig, windows: TokenWindows) -> bool:
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
    loaded: LoadedModel,
    windows: TokenWindows,
    files: Mapping[str, Path],
    known: Mapping[str, dict[str, Any]],
    group: int,
    progress: Any,
    keep: Any,
) -> dict[str, dict[str, Any]]:
    """Results by name. Results in ``known`` for the same artifact and text are kept. ``keep`` is called after each
    group.

    A group shares one pass of the unquantized model.
    """
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


def report(rows: Sequence[Variant], content: Mapping[str, Any]) -> list[str]:
    """The table in Markdown."""
    results = {row["name"]: row for row in content["rows"]}
    base = results.get("base")
    table = []
    for row in rows:
        if row.name not in results:
            continue
        result = results[row.name]
        ratio = f"{result['kl_mean'] / base['kl_mean']:.2f}" if base else ""
        table.append(
            [
                row.text,
                f"{result['bits_per_element']:.3f}",
                f"{result['perplexity']:.3f}",
                f"{result['kl_mean']:.5f}",
                ratio,
                f"{result['kl_p99']:.3f}",
                f"{result['top1_agreement']:.4f}",
            ]
        )
    settings = content["settings"]
    evaluation, calibration = settings["evaluation"], settings["calibration"]
    first = next(iter(results.values()), None)
    baseline = f" The unquantized model's perplexity is {first['baseline_perplexity']:.3f}." if first else ""
    tokens = f" ({first['tokens']:,} predicted tokens)" if first else ""
    return [
        "# Ablation at 3 bits",
        "",
        f"{settings['model']}, float32. Calibrated on {calibration['dataset']}, {calibration['windows']} windows of "
        f"{calibration['seqlen']} tokens; evaluated on {evaluation['dataset']}, {evaluation['windows']} windows of "
        f"{evaluation['seqlen']}{tokens}, every key and value quantized in one forward pass. Each row differs from the first "
        f"as it says. Bits count everything stored at {CONTEXT:,} tokens, outliers as found in this text; KL in nats "
        f"per token.{baseline}",
        "",
        *markdown_table(["", "bits/element", "perplexity", "KL", "KL / base", "KL p99", "top-1"], table),
        "",
        *environment_lines(content["environment"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, metavar="NAME|FILE")
    parser.add_argument("--evaluation", required=True, metavar="NAME|FILE")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=2, help="evaluation windows")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows; all by default")
    parser.add_argument(
        "--group", type=int, default=7, help="rows that share one pass of the unquantized model"
    )
    parser.add_argument("--work", type=Path, default=Path("build/ablation"), help="folder for the artifacts")
    parser.add_argument("--output", type=Path, default=RESULTS / "ablation.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)

    rows = chosen(parser, options.only, variants())
    facts = environment(options.note)
    options.work.mkdir(parents=True, exist_ok=True)
    configs = {
        row.name: row.config(dataset=options.calibration, samples=options.samples, seqlen=options.seqlen)
        for row in rows
    }
    loaded = load_model(options.model, dtype="float32")
    calibration = load_windows(
        options.calibration,
        loaded.tokenizer,
        samples=options.samples,
        seqlen=options.seqlen,
        split="calibration",
    )
    evaluation = load_windows(
        options.evaluation,
        loaded.tokenizer,
        samples=options.windows,
        seqlen=options.seqlen,
        split="evaluation",
    )
    content: dict[str, Any] = {
        "settings": {
            "model": loaded.name,
            "calibration": calibration.source,
            "evaluation": evaluation.source,
        },
        "environment": facts,
        "rows": [],
    }
    known: dict[str, dict[str, Any]] = {}
    if options.output.exists():
        known = {row["name"]: row for row in json.loads(options.output.read_text(encoding="utf-8"))["rows"]}

    def keep(results: Mapping[str, dict[str, Any]]) -> None:
        content["rows"] = [
            {
                "switch": row.switch,
                "text": row.text,
                "recipe": row.recipe,
                "changes": row.assignments,
                **results[row.name],
            }
            for row in rows
            if row.name in results
        ]
        write_results(options.output, content, report(rows, content))

    with ProgressReporter() as progress:
        started = time.monotonic()
        files = calibrated(loaded, calibration, configs, options.work, progress)
        progress.say(f"artifacts after {time.monotonic() - started:.0f} s")
        keep(evaluated(loaded, evaluation, files, known, options.group, progress, keep))
    print(markdown(report(rows, content)))


if __name__ == "__main__":
    main()
