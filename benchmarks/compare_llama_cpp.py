"""The cache types of llama.cpp, run by llama.cpp itself on the windows of ``kvq-eval compare``.

    python benchmarks/compare_llama_cpp.py MODEL.gguf --dataset eval.raw [--windows 2] [--types q8_0 q4_0 ...]

llama.cpp keeps the weights as they are in the file, and its kernels round queries too. So its predictions with a
float16 cache are not those of transformers, and KL divergence is from these predictions. All tokens of a window are
predicted, as in ``kvq-eval``. llama.cpp's own perplexity tool only predicts the second half.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, environment_lines, markdown_table, write_results
from decode_llama_cpp import CACHE_TYPES, LlamaCpp, bits_per_element

from kvq_calib.data import load_windows
from kvq_calib.evaluate.text_pass import Baseline, Score
from kvq_calib.model.load import load_model

BASELINE = "f16"


def measured(model: Path, types: list[str], windows: torch.Tensor) -> dict[str, Score]:
    """Scores of cache types against a float16 cache, for windows int64 ``[N, T]``."""
    scores = {name: Score() for name in types}

    def logits(cache_type: str, ids: torch.Tensor) -> torch.Tensor:
        with closing(LlamaCpp(model, cache_type, len(ids))) as cache:
            cache.use_threads(torch.get_num_threads())
            return torch.from_numpy(cache.logits(ids.numpy()))

    for ids in windows:
        baseline = Baseline(logits(BASELINE, ids), ids)
        for name, score in scores.items():
            started = time.monotonic()
            score.add(baseline, logits(name, ids))
            score.seconds += time.monotonic() - started
            print(name, f"{score.kl_mean:.5f}", flush=True)
    return scores


def row(name: str, score: Score) -> dict[str, Any]:
    """The result of one type, with the fields of ``kvq-eval compare``."""
    divergence = torch.cat(score.divergences)
    return {
        "name": f"llama.cpp {name}",
        "bits_per_element": bits_per_element(name),
        "perplexity": float(torch.tensor(score.nll / score.tokens).exp()),
        "baseline_perplexity": float(torch.tensor(score.baseline_nll / score.tokens).exp()),
        "kl_mean": score.kl_mean,
        "kl_p99": float(divergence.quantile(0.99)),
        "kl_windows": [float(window.mean()) for window in score.divergences],
        "top1_agreement": score.agreed / score.tokens,
        "tokens": score.tokens,
        "seconds": score.seconds,
    }


def report(content: Mapping[str, Any]) -> list[str]:
    """The report in Markdown."""
    settings = content["settings"]
    table = [
        [
            one["name"],
            f"{one['bits_per_element']:.2f}",
            f"{one['perplexity']:.2f}",
            f"{one['kl_mean']:.4f}",
            f"{one['top1_agreement']:.4f}",
        ]
        for one in content["rows"]
    ]
    return [
        "# Cache types of llama.cpp, run by llama.cpp",
        "",
        f"{settings['model']}, {settings['windows']} windows of {settings['tokens']} tokens of {settings['data']['dataset']}; "
        f"perplexity with a float16 cache: {content['rows'][0]['baseline_perplexity']:.2f}. KL divergence is from "
        "llama.cpp's own predictions with that cache.",
        "",
        *markdown_table(["cache", "bits/element", "perplexity", "KL mean", "top-1"], table),
        "",
        *environment_lines(content["environment"]),
    ]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dataset", required=True, metavar="NAME|PATH")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=2048)
    types = [name for name in CACHE_TYPES if name != BASELINE]
    parser.add_argument("--types", nargs="+", choices=types, default=types)
    parser.add_argument("--output", type=Path, default=RESULTS / "compare-llamacpp-own.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args()

    facts = environment(options.note)
    tokenizer = load_model(str(options.model), dtype="float32").tokenizer
    windows = load_windows(
        options.dataset, tokenizer, samples=options.windows, seqlen=options.seqlen, split="evaluation"
    )
    scores = measured(options.model, options.types, windows.ids)
    settings = {
        "model": options.model.name,
        "data": dict(windows.source),
        "windows": len(windows.ids),
        "tokens": options.seqlen,
    }
    rows = [row(name, score) for name, score in scores.items()]
    content = {"settings": settings, "rows": rows, "environment": facts}
    write_results(options.output, content, report(content))


if __name__ == "__main__":
    main()
