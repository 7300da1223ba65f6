"""Compares our calibration with that of KVQuant's code: time, memory and weighted distortion.

    python benchmarks/calibration.py MODEL --text FILE

KVQuant's code keeps all keys, values and squared gradients of the text in memory, takes thresholds from these values,
and runs scikit-learn's `KMeans` on all values of a layer. Both ways start from the same windows and make an artifact,
each in a separate process. A third process measures the error of both on those windows. The same quantizer computes
thresholds, normalisation and outliers, so only the statistics and the fit of codebooks differ. `fit.py` compares the
fit alone, at the size of a layer of LLaMA-7B.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from calibration_memory import Peak
from common import RESULTS, environment, environment_lines, markdown, markdown_table, timed, write_results
from fit import fit_all_values
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.calibrate.run import calibrate
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.scalar import ScalarParams, ScalarQuantizer
from kvq_calib.data import TokenWindows, load_windows
from kvq_calib.model.capture import LayerKV
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.model.load import load_model
from kvq_calib.progress import ProgressReporter
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.recipe import CalibrationConfig, calibration_config
from kvq_calib.schema.spec import KINDS, Kind, ScalarSpec

_MIB = 2**20
Pairs = dict[tuple[int, Kind], list[tuple[Tensor, Tensor]]]


def ours(model: Any, windows: TokenWindows, config: CalibrationConfig) -> tuple[KVArtifact, dict[str, Any]]:
    """Calibrate, and measure the time of statistics and fit separately from that of the model's passes."""
    fingerprint = model_fingerprint(model)
    with Peak() as peak, ProgressReporter() as progress:
        result, seconds = timed(
            lambda: calibrate(
                model,
                windows,
                {"recipe": config},
                model_id="benchmark",
                model_config=fingerprint,
                progress=progress,
            )
        )
    beside = sum(result.statistics_seconds.values()) + result.seconds["fit"]
    return result.artifacts["recipe"], {
        "passes": seconds.wall - beside,
        "statistics_and_fit": beside,
        "all": asdict(seconds),
        "above_model_bytes": peak.highest - peak.before,
    }


def thresholds(values: Tensor, spec: ScalarSpec) -> tuple[Tensor | None, Tensor | None]:
    """Scale and zero point of each channel from all values ``[N, C]``; ``None`` with thresholds per token."""
    if not spec.calibrated_thresholds:
        return None, None
    tail = spec.outliers.fraction / 2
    # One channel at a time, because the function refuses large tensors.
    found = [torch.quantile(column, torch.tensor([tail, 1 - tail])) for column in values.T.contiguous()]
    low, high = torch.stack(found, dim=1)
    return ((high - low) / 2).clamp(min=1e-8), (high + low) / 2


def fit_layer(
    pairs: list[tuple[Tensor, Tensor]],
    spec: ScalarSpec,
    shape: HeadShape,
    config: CalibrationConfig,
) -> ScalarParams:
    """Thresholds and a codebook from all values of a layer's keys or values."""
    x, gradient = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # [N, H, T, D]
    own = thresholds(x.transpose(1, 2).flatten(2).flatten(0, 1), spec)
    start = ScalarParams(torch.zeros(1, 1 << spec.bits), *own)
    quantizer = ScalarQuantizer(spec, start, shape, storage_dtype=config.cache.storage_dtype)
    found = quantizer.normalise(x)
    inside = slice(None) if found.outliers is None else ~found.outliers
    weights = (quantizer.transform(gradient) * found.scale).square()
    levels, _ = fit_all_values(found.normalised[inside].clamp(-1, 1).flatten(), weights[inside].flatten(), 1 << spec.bits)  # fmt: skip
    return ScalarParams(torch.tensor(levels, dtype=torch.float32).half().float()[None], *own)


def keep_everything(
    model: Any, windows: TokenWindows, config: CalibrationConfig
) -> tuple[KVArtifact, dict[str, Any]]:
    """Keep all keys, values and gradients of the text in memory, then fit layer after layer."""
    geometry, sinks = inspect_model(model), config.cache.sink_tokens
    kept: Pairs = {}

    def keep(kv: LayerKV, grad_keys: Tensor, grad_values: Tensor) -> None:
        for kind, x, gradient in (("key", kv.keys, grad_keys), ("value", kv.values, grad_values)):
            pair = (x[:, :, sinks:].float().clone(), gradient[:, :, sinks:].float().clone())
            kept.setdefault((kv.layer, kind), []).append(pair)

    with Peak() as peak, ProgressReporter() as progress:

        def passes() -> None:
            for number, ids in enumerate(windows.ids):
                fisher_pass(model, ids[None], keep)
                progress("capture", number + 1, len(windows.ids))

        def fit() -> tuple[LayerParams, ...]:
            layers = []
            for number, spec in enumerate(config.cache.resolved(len(geometry.layers))):
                fitted = {
                    kind: fit_layer(
                        kept[number, kind], spec.of(kind), geometry.layers[number].shape(kind), config
                    )
                    for kind in KINDS
                }
                layers.append(LayerParams(fitted["key"], fitted["value"]))
                progress("scikit-learn", number + 1, len(geometry.layers))
            return tuple(layers)

        _, capturing = timed(passes)
        layers, fitting = timed(fit)
    nothing = {kind: [0.0] * len(layers) for kind in KINDS}
    fingerprint = model_fingerprint(model)
    artifact = KVArtifact(
        spec=config.cache,
        geometry=geometry,
        layers=layers,
        model={"id": "benchmark", "config": fingerprint},
        calibration={"recipe": "everything in memory"},
        outliers_per_token=nothing,
    )
    return artifact, {
        "passes": capturing.wall,
        "statistics_and_fit": fitting.wall,
        "all": asdict(capturing + fitting),
        "above_model_bytes": peak.highest - peak.before,
    }


def distortion(model: Any, windows: TokenWindows, artifacts: dict[str, KVArtifact]) -> dict[str, Any]:
    """Weighted error relative to weighted size, of keys and of values: ``sum g^2 (x - x')^2 / sum g^2 x^2``."""
    quantizers = {name: artifact.quantizers() for name, artifact in artifacts.items()}
    sinks = next(iter(artifacts.values())).spec.sink_tokens
    error = {name: dict.fromkeys(KINDS, 0.0) for name in artifacts}
    size = dict.fromkeys(KINDS, 0.0)

    def see(kv: LayerKV, grad_keys: Tensor, grad_values: Tensor) -> None:
        for kind, x, gradient in zip(KINDS, (kv.keys, kv.values), (grad_keys, grad_values), strict=True):
            x, weights = x[:, :, sinks:].float(), gradient[:, :, sinks:].double().square()
            size[kind] += float((weights * x.square()).sum())
            for name, layers in quantizers.items():
                missed = layers[kv.layer][kind](x) - x
                error[name][kind] += float((weights * missed.square()).sum())

    for ids in windows.ids:
        fisher_pass(model, ids[None], see)
    return {name: {kind: error[name][kind] / size[kind] for kind in KINDS} for name in artifacts}


WAYS = {"ours": ours, "everything": keep_everything}
NAMES = {"ours": "streaming statistics, exact fit", "everything": "everything in memory, scikit-learn"}


def report(content: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    settings, ways = content["settings"], content["ways"]
    rows = []
    for name, row in ways.items():
        errors = content["distortion"].get(name, {})
        rows.append(
            [
                NAMES[name],
                f"{row['passes']:.1f}",
                f"{row['statistics_and_fit']:.1f}",
                f"{row['all']['wall']:.1f}",
                f"{row['all']['cpu']:.1f}",
                f"{row['above_model_bytes'] / _MIB:,.0f}",
                *(f"{errors[kind]:.5f}" if errors else "" for kind in KINDS),
            ]
        )
    headings = [
        "",
        "model's passes, s",
        "statistics and fit, s",
        "all, s",
        "processor time, s",
        "peak above the model, MiB",
        "weighted distortion of keys",
        "of values",
    ]
    text = settings["text"]
    return [
        "# Calibration, two ways",
        "",
        f"{settings['model']}, float32, recipe {settings['recipe']}, {text['windows']} windows of {text['seqlen']:,} tokens of {text['dataset']}. "
        "Ours reads the text twice (forward; forward and backward) and keeps statistics; the original implementation's way reads it once "
        "(forward and backward), keeps every key, value and gradient in float32, and fits each layer with scikit-learn's "
        '`KMeans(n_init="auto", max_iter=50)`. Distortion is `sum g^2 (x - x\')^2 / sum g^2 x^2` over the same windows, outliers included.',
        "",
        *markdown_table(headings, rows),
        "",
        *environment_lines(content["environment"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, metavar="NAME|FILE")
    parser.add_argument("--recipe", default="nuq3-1p", metavar="NAME|FILE", help="one of KVQuant's")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--work", type=Path, help="folder that keeps both artifacts")
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    parser.add_argument("--worker", choices=[*WAYS, "distortion"], help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)

    def file(name: str) -> Path:
        return Path(options.work) / f"{name}.kvq.safetensors"

    if options.worker is not None:
        loaded = load_model(options.model, dtype="float32", device="cpu")
        windows = load_windows(options.text, loaded.tokenizer, samples=options.samples, seqlen=options.seqlen)
        settings = {"dataset": options.text, "samples": options.samples, "seqlen": options.seqlen}
        config = calibration_config(options.recipe, command_line=settings)
        fisher_pass(loaded.model, windows.ids[:1, :64], lambda *_: None)  # warm up
        if options.worker == "distortion":
            found = distortion(loaded.model, windows, {name: KVArtifact.load(file(name)) for name in WAYS})
            print(json.dumps({"distortion": found, "text": windows.source}))
        else:
            artifact, measured = WAYS[options.worker](loaded.model, windows, config)
            artifact.save(file(options.worker))
            print(json.dumps(measured))
        return
    facts = environment(options.note)
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(temporary if options.work is None else options.work)

        def worker(name: str) -> dict[str, Any]:
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                *words,
                "--work",
                folder,
                "--worker",
                name,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return answer

        ways = {name: worker(name) for name in WAYS}
        measured = worker("distortion")
    content: dict[str, Any] = {
        "settings": {
            "model": Path(options.model).name,
            "recipe": options.recipe,
            "text": measured["text"],
        },
        "environment": facts,
        "ways": ways,
        "distortion": measured["distortion"],
    }
    write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
