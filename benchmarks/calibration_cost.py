"""The cost of calibrating with each recipe, relative to the first one named.

python benchmarks/calibration_cost.py MODEL --dataset wikitext2 --config nuq3-1p --config kvq3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, environment_lines, markdown, markdown_table, timed, write_results

from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows, load_windows
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import load_model
from kvq_calib.schema.recipe import calibration_config


def measure(model: Any, windows: TokenWindows, recipe: str) -> dict[str, Any]:
    """Processor and wall seconds of a calibration, and wall seconds of its parts; without loading and writing."""
    configs = {recipe: calibration_config(recipe)}
    found, seconds = timed(
        lambda: calibrate(
            model, windows, configs, model_id="benchmark", model_config=model_fingerprint(model)
        )
    )
    return {"seconds": asdict(seconds), "parts": found.seconds}


def report(content: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    settings, rows = content["settings"], content["rows"]
    first = next(iter(rows.values()))["seconds"]["cpu"]
    parts = list(dict.fromkeys(part for row in rows.values() for part in row["parts"]))
    return [
        "# What a calibration costs",
        "",
        f"{settings['model']}, {settings['windows']} windows of {settings['seqlen']} tokens, {settings['threads']} "
        "thread. Processor seconds of the whole, without loading the model and writing the artifact, and wall seconds "
        "of the parts.",
        "",
        *markdown_table(
            ["recipe", "processor", "relative", *parts],
            [
                [
                    f"`{name}`",
                    f"{row['seconds']['cpu']:.0f}",
                    f"{row['seconds']['cpu'] / first:.2f}",
                    *(f"{row['parts'].get(part, 0):.0f}" for part in parts),
                ]
                for name, row in rows.items()
            ],
        ),
        "",
        *environment_lines(content["environment"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--config", dest="recipes", action="append", required=True)
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration_cost.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    windows = load_windows(
        options.dataset,
        loaded.tokenizer,
        split="calibration",
        samples=options.samples,
        seqlen=options.seqlen,
    )
    content = {
        "settings": {
            "model": Path(options.model).name,
            "windows": options.samples,
            "seqlen": options.seqlen,
            "threads": options.threads,
        },
        "environment": environment(options.note),
        "rows": {recipe: measure(loaded.model, windows, recipe) for recipe in options.recipes},
    }
    write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
