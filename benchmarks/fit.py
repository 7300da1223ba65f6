"""Fitting a codebook: scikit-learn on all values, as in KVQuant's code, against a histogram and an exact fit.

    python benchmarks/fit.py MODEL --artifact FILE --text FILE

The data are those of a calibration: keys and values of one layer, normalised by the thresholds of ARTIFACT, without its
outliers, and weighted by squared gradients. A layer of the size of LLaMA-7B's is drawn from them. Our time includes
building the histogram. Distortions are computed on single values, not on bins.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    RESULTS,
    Seconds,
    environment,
    environment_lines,
    markdown,
    markdown_table,
    timed,
    write_results,
)
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.calibrate.statistics import LevelHistogram
from kvq_calib.data import load_windows
from kvq_calib.fit.kmeans import Floats, distortion, exact_kmeans
from kvq_calib.model.capture import LayerKV
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import load_model
from kvq_calib.progress import ProgressReporter
from kvq_calib.schema.spec import KINDS, Kind

#: 16 windows of 2,048 tokens in 4,096 channels, which KVQuant's code fits for a layer of LLaMA-7B.
LLAMA_7B_LAYER = 16 * 2048 * 4096
#: Number of values that calibration adds to a histogram at a time: a window of 2,048 tokens in 192 channels.
CHUNK = 2048 * 192


@dataclass(frozen=True)
class Captured:
    """The data that calibration fits.

    Attributes:
        values, weights: float32 ``[n]`` by kind, of one layer, without outliers.
        histograms: histograms of every layer and kind.
    """

    values: dict[Kind, Tensor]
    weights: dict[Kind, Tensor]
    histograms: list[LevelHistogram]


def capture(model: Any, artifact: KVArtifact, windows: Tensor, layer: int, progress: Any = None) -> Captured:
    """Normalised values and their weights, as in calibration, from ``windows [N, T]``."""
    quantizers = artifact.quantizers(model.device)
    sinks = artifact.spec.sink_tokens
    histograms = {(n, kind): LevelHistogram(weighted=True) for n in range(len(quantizers)) for kind in KINDS}
    kept: dict[Kind, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in KINDS}

    def see(kv: LayerKV, grad_keys: Tensor, grad_values: Tensor) -> None:
        for kind, x, gradient in (("key", kv.keys, grad_keys), ("value", kv.values, grad_values)):
            quantizer = quantizers[kv.layer][kind]
            found = quantizer.normalise(x[:, :, sinks:])
            weights = (quantizer.transform(gradient[:, :, sinks:]) * found.scale).square()
            flat = None if found.outliers is None else found.outliers.flatten(0, 1)
            histograms[kv.layer, kind].update(found.normalised.flatten(0, 1), flat, weights.flatten(0, 1))
            if kv.layer == layer:
                inside = slice(None) if found.outliers is None else ~found.outliers
                # Clamped, as the quantizer does with values beyond the cap of outliers.
                kept[kind].append(
                    (found.normalised[inside].clamp(-1, 1).flatten(), weights[inside].flatten())
                )

    for number, ids in enumerate(windows):
        fisher_pass(model, ids[None], see)
        if progress is not None:
            progress("capture", number + 1, len(windows))
    return Captured(
        {kind: torch.cat([x for x, _ in kept[kind]]) for kind in KINDS},
        {kind: torch.cat([w for _, w in kept[kind]]) for kind in KINDS},
        list(histograms.values()),
    )


def save_captured(captured: Captured, file: Path) -> None:
    tensors = {f"values.{kind}": captured.values[kind] for kind in KINDS}
    tensors |= {f"weights.{kind}": captured.weights[kind] for kind in KINDS}
    tensors["histograms"] = torch.stack([h.sums for h in captured.histograms])
    save_file(tensors, file)


def load_captured(file: Path) -> Captured:
    tensors = load_file(file)
    histograms = []
    for sums in tensors["histograms"]:
        histogram = LevelHistogram(weighted=True)
        histogram.sums = sums
        histograms.append(histogram)
    return Captured(
        {kind: tensors[f"values.{kind}"] for kind in KINDS},
        {kind: tensors[f"weights.{kind}"] for kind in KINDS},
        histograms,
    )


def fit_all_values(values: Tensor, weights: Tensor, levels: int) -> tuple[Floats, int]:
    """scikit-learn on every value, with the settings of KVQuant's code: levels, and number of iterations."""
    model = KMeans(n_clusters=levels, n_init="auto", max_iter=50, random_state=0)
    model.fit(values.numpy()[:, None], sample_weight=weights.numpy())
    return np.sort(model.cluster_centers_[:, 0].astype(np.float64)), int(model.n_iter_)


def build_histogram(values: Tensor, weights: Tensor, threads: int) -> LevelHistogram:
    """The histogram of all values, added in pieces as in calibration, by one or several threads."""

    def part(numbers: range) -> LevelHistogram:
        histogram = LevelHistogram(weighted=True)
        for start in numbers:
            piece = slice(start, start + CHUNK)
            histogram.update(values[piece][:, None], None, weights[piece][:, None])
        return histogram

    def add(total: LevelHistogram, other: LevelHistogram) -> LevelHistogram:
        parts = other.state()
        total.load({name: tensor + parts[name] for name, tensor in total.state().items()})
        return total

    starts = range(0, len(values), CHUNK)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # so that one thread means one
    try:
        with ThreadPoolExecutor(threads) as pool:
            return reduce(add, pool.map(part, [starts[n::threads] for n in range(threads)]))
    finally:
        torch.set_num_threads(before)


def fit_histogram(histogram: LevelHistogram, levels: int) -> Floats:
    return exact_kmeans(histogram.points.numpy(), histogram.weights.numpy(), levels)


def raw_distortion(values: Tensor, weights: Tensor, levels: Floats) -> float:
    """Weighted mean squared error over single values."""
    error = total = 0.0
    for x, w in zip(values.split(1 << 22), weights.split(1 << 22), strict=True):
        weight = w.double().numpy()
        if (mass := weight.sum()) > 0:
            error += distortion(x.double().numpy(), weight, levels) * mass
            total += mass
    return error / total


def compare(name: str, values: Tensor, weights: Tensor, levels: int, threads: int) -> dict[str, Any]:
    """Fit the same values in both ways."""
    histogram, one = timed(lambda: build_histogram(values, weights, 1))
    several = timed(lambda: build_histogram(values, weights, threads))[1] if threads > 1 else one
    ours, fitting = timed(lambda: fit_histogram(histogram, levels))
    (theirs, iterations), peer = timed(lambda: fit_all_values(values, weights, levels))
    ours_error, peer_error = (raw_distortion(values, weights, each) for each in (ours, theirs))
    return {
        "data": name,
        "values": len(values),
        "levels": levels,
        "sklearn": {**asdict(peer), "iterations": iterations, "distortion": peer_error},
        "ours": {
            "histogram": asdict(one),
            "histogram_threads": asdict(several),
            "fit": asdict(fitting),
            "distortion": ours_error,
        },
        "speedup": peer.wall / (one + fitting).wall,
        "speedup_threads": peer.wall / (several + fitting).wall,
        "speedup_cpu": peer.cpu / (one + fitting).cpu,
        "distortion_excess": peer_error / ours_error - 1,
    }


def codebooks(histograms: Sequence[LevelHistogram], levels: int) -> dict[str, Any]:
    """Time to fit the codebooks of all layers to their histograms."""
    fitted, seconds = timed(lambda: [fit_histogram(histogram, levels) for histogram in histograms])
    return {"codebooks": len(fitted), "levels": levels, **asdict(seconds)}


def drawn(captured: Captured, kind: Kind, size: int) -> tuple[Tensor, Tensor]:
    """``size`` pairs of value and weight, drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.empty(size), torch.empty(size)
    for start in range(0, size, 1 << 22):
        stop = min(start + (1 << 22), size)
        chosen = torch.randint(len(captured.values[kind]), (stop - start,), generator=generator)
        values[start:stop] = captured.values[kind][chosen]
        weights[start:stop] = captured.weights[kind][chosen]
    return values, weights


def _shown(seconds: Seconds) -> str:
    return f"{seconds.wall:.2f} s ({seconds.cpu:.2f})"


def report(content: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    settings, threads = content["settings"], content["environment"]["machine"]["threads"]
    rows = [
        [
            row["data"],
            f"{row['values']:,}",
            str(row["levels"]),
            _shown(Seconds(row["sklearn"]["wall"], row["sklearn"]["cpu"])),
            _shown(Seconds(**row["ours"]["histogram"]) + Seconds(**row["ours"]["fit"])),
            _shown(Seconds(**row["ours"]["histogram_threads"]) + Seconds(**row["ours"]["fit"])),
            f"{row['speedup']:.0f}x",
            f"{row['speedup_threads']:.0f}x",
            f"{row['speedup_cpu']:.0f}x",
            f"{row['distortion_excess']:+.2%}",
        ]
        for row in content["comparisons"]
    ]
    headings = [
        "data",
        "values",
        "levels",
        f"scikit-learn, {threads} threads",
        "ours, 1 thread",
        f"ours, {threads} threads",
        "faster, 1 thread",
        f"faster, {threads} threads",
        "less processor time",
        "scikit-learn's distortion against ours",
    ]
    lines = [
        "# Fitting a codebook",
        "",
        f"Normalised keys and values of layer {settings['layer']} of {settings['model']}, weighted by squared gradients, "
        f"{settings['text']['windows']} windows of {settings['text']['seqlen']} tokens of {settings['text']['dataset']}, "
        'outliers left out. Peer: scikit-learn `KMeans(n_init="auto", max_iter=50)` on all values in float32 with '
        f"`sample_weight`, {threads} threads. Ours: `LevelHistogram` built from the same values, then the exact fit. Larger "
        "layers are drawn from the captured values with replacement. Seconds are wall time, with processor time over all "
        "threads in brackets, which is the one to compare where the machine was shared; ours count the histogram and the "
        "fit. Distortion is the weighted mean squared error of the single values.",
        "",
        *markdown_table(headings, rows),
        "",
    ]
    for row in content["codebooks"]:
        lines.append(
            f"Fitting all {row['codebooks']} codebooks at {row['levels']} levels: {row['wall']:.2f} s ({row['cpu']:.2f} s of processor time)."
        )
    return [*lines, "", *environment_lines(content["environment"])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--artifact", type=Path, required=True, help="of this model; gives the thresholds")
    parser.add_argument("--text", required=True, metavar="NAME|FILE")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--layer", type=int, help="whose values are fitted; the middle one by default")
    parser.add_argument("--levels", type=int, nargs="+", default=[8, 16])
    parser.add_argument(
        "--drawn",
        type=int,
        nargs="*",
        default=[LLAMA_7B_LAYER],
        metavar="SIZE",
        help="sizes of layers drawn from the captured keys; LLaMA-7B's by default",
    )
    parser.add_argument(
        "--captured", type=Path, help="file that keeps the captured values; used if it is there"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "fit.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)

    facts = environment(options.note)
    loaded = load_model(options.model, dtype="float32", device="cpu")
    artifact = KVArtifact.load(options.artifact)
    artifact.check_model(model_fingerprint(loaded.model))
    windows = load_windows(options.text, loaded.tokenizer, samples=options.samples, seqlen=options.seqlen)
    layer = len(artifact.layers) // 2 if options.layer is None else options.layer
    with ProgressReporter() as progress:
        if options.captured is not None and options.captured.exists():
            captured = load_captured(options.captured)
        else:
            captured = capture(loaded.model, artifact, windows.ids, layer, progress)
            if options.captured is not None:
                save_captured(captured, options.captured)
        name = loaded.name
        del loaded
        content: dict[str, Any] = {
            "settings": {
                "model": name,
                "artifact": options.artifact.name,
                "layer": layer,
                "text": windows.source,
            },
            "environment": facts,
            "comparisons": [],
            "codebooks": [codebooks(captured.histograms, levels) for levels in options.levels],
        }
        threads = facts["machine"]["threads"]
        for kind in KINDS:
            for levels in options.levels:
                result = compare(f"{kind}s", captured.values[kind], captured.weights[kind], levels, threads)
                content["comparisons"].append(result)
                write_results(options.output, content, report(content))
        for size in options.drawn:
            values, weights = drawn(captured, "key", size)
            for levels in options.levels:
                progress.say(f"{size:,} values, {levels} levels")
                content["comparisons"].append(compare("keys, drawn", values, weights, levels, threads))
                write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
