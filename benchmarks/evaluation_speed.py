"""The cost of quantization in a prefill evaluation: time of a pass with each artifact, relative to an unquantized one.

python benchmarks/evaluation_speed.py MODEL ARTIFACT ARTIFACT ... --dataset wikitext2
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import load_windows
from kvq_calib.evaluate.prefill import PrefillHooks, PrefillQuantizer
from kvq_calib.model.load import load_model

UNQUANTIZED = "unquantized"


def measure(model: Any, artifacts: dict[str, KVArtifact], windows: torch.Tensor) -> dict[str, list[Seconds]]:
    """Seconds of every pass, measured in turns. The first window is not counted."""
    quantizers = {name: PrefillQuantizer.of(artifact, model) for name, artifact in artifacts.items()}
    hooks = PrefillHooks(model)
    found: dict[str, list[Seconds]] = {name: [] for name in (UNQUANTIZED, *artifacts)}
    with torch.no_grad(), hooks.in_place():
        for number, ids in enumerate(windows):
            ids = ids[None]
            for name in found:
                if name == UNQUANTIZED:
                    _, seconds = timed(lambda ids=ids: model(input_ids=ids, use_cache=False).logits)
                else:
                    _, seconds = timed(lambda ids=ids, own=quantizers[name]: hooks.logits(own, ids))
                if number:
                    found[name].append(seconds)
    return found


def ratio(passes: Sequence[Seconds], unquantized: Sequence[Seconds]) -> dict[str, float]:
    """Mean over windows of the processor time relative to the unquantized pass, and its standard error."""
    each = [mine.cpu / theirs.cpu for mine, theirs in zip(passes, unquantized, strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    return {"mean": statistics.mean(each), "standard_error": error}


def report(content: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    rows = [
        [
            name,
            f"{statistics.mean(s['cpu'] for s in row['seconds']):.2f}",
            f"{row['ratio']['mean']:.3f} ± {row['ratio']['standard_error']:.3f}",
        ]
        for name, row in content["passes"].items()
    ]
    return [
        "# What quantizing costs an evaluation",
        "",
        f"{content['settings']['model']}, {content['settings']['windows']} windows of {content['settings']['seqlen']} "
        "tokens. Processor seconds of a pass, and over that of the unquantized model on the same window (mean and "
        "standard error). `kvq-eval perplexity` makes one unquantized pass and one for each artifact.",
        "",
        *markdown_table(["", "seconds", "over unquantized"], rows),
        "",
        *environment_lines(content["environment"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "evaluation_speed.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    artifacts = {path.name.partition(".")[0]: KVArtifact.load(path) for path in options.artifacts}
    loaded = load_model(options.model)
    windows = load_windows(
        options.dataset,
        loaded.tokenizer,
        split="evaluation",
        samples=options.windows + 1,
        seqlen=options.seqlen,
    )
    found = measure(loaded.model, artifacts, windows.ids)
    content = {
        "settings": {
            "model": Path(options.model).name,
            "windows": options.windows,
            "seqlen": options.seqlen,
        },
        "environment": environment(options.note),
        "passes": {
            name: {"ratio": ratio(own, found[UNQUANTIZED]), "seconds": [asdict(each) for each in own]}
            for name, own in found.items()
        },
    }
    write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
