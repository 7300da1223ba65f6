"""The cost of calibration beyond the model's passes: resident memory by the number of samples, and wall time.

    python benchmarks/calibration_memory.py MODEL --text FILE

Memory: the same recipe is calibrated on few and on many windows, each in a separate process. The peak resident memory
above that of the loaded model is reported. Time: one process measures in turns the plain forward passes, the plain
forward and backward passes that the recipe needs, and the calibration of the same windows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
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
from torch import Tensor, nn

from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows, load_windows
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import load_model
from kvq_calib.schema.recipe import CalibrationConfig, calibration_config

#: Number of tokens whose logits are computed at a time, as in calibration.
_CHUNK = 256
_MIB = 2**20


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """A context manager that samples resident memory every 20 ms and keeps the peak."""

    def __enter__(self) -> Peak:
        self.before = self.highest = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.highest = max(self.highest, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, resident_bytes())


def run_calibration(model: Any, windows: TokenWindows, config: CalibrationConfig) -> dict[str, float]:
    """Calibrate, and return the wall time by part. The artifact is dropped."""
    fingerprint = model_fingerprint(model)
    return calibrate(
        model, windows, {"recipe": config}, model_id="benchmark", model_config=fingerprint
    ).seconds


def memory(model: Any, windows: TokenWindows, config: CalibrationConfig) -> dict[str, Any]:
    """Peak resident memory above that of the loaded model, which has run once."""
    with torch.no_grad():
        model(windows.ids[:1, : min(64, windows.ids.shape[1])], use_cache=False)
    with Peak() as peak:
        seconds = run_calibration(model, windows, config)
    return {
        "samples": len(windows.ids),
        "seqlen": windows.ids.shape[1],
        "model_bytes": peak.before,
        "above_model_bytes": peak.highest - peak.before,
        "seconds": sum(seconds.values()),
    }


def memory_in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    """The same in a new process, so that no memory of an earlier run is reused."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--worker"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def bare_forward(model: Any, ids: Tensor) -> None:
    """The first pass without calibration: the model without its head."""
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)


def bare_backward(model: Any, ids: Tensor) -> None:
    """The second pass without calibration: the loss, and its gradients with respect to activations.

    As in calibration, parameters are frozen, and logits are computed for a piece of the text at a time.
    """
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    gradient = torch.zeros_like(hidden)
    last = ids.shape[1] - 1
    for start in range(0, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        piece = hidden[:, start:stop].detach().requires_grad_()
        logits = model.get_output_embeddings()(piece)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, start + 1 : stop + 1].flatten(), reduction="sum"
        )
        (gradient[:, start:stop],) = torch.autograd.grad(loss, piece)
    hidden.backward(gradient)


def overhead(model: Any, windows: TokenWindows, config: CalibrationConfig, rounds: int) -> dict[str, Any]:
    """Median times of calibration and of the plain passes over the same windows, measured in turns."""
    first = windows.ids[:1, : min(64, windows.ids.shape[1])]
    bare_forward(model, first)
    bare_backward(model, first)
    work: dict[str, Callable[[], Any]] = {
        "forward": lambda: [bare_forward(model, ids[None]) for ids in windows.ids],
        "forward_backward": lambda: [bare_backward(model, ids[None]) for ids in windows.ids],
        "calibration": lambda: run_calibration(model, windows, config),
    }
    turns = []
    parts: dict[str, list[float]] = {}
    for _ in range(rounds):
        measured = {name: timed(each) for name, each in work.items()}
        for part, spent in measured["calibration"][0].items():
            parts.setdefault(part, []).append(spent)
        turns.append({name: seconds for name, (_, seconds) in measured.items()})

    def ratios(of: Callable[[Seconds], float]) -> list[float]:
        return [of(turn["calibration"]) / of(turn["forward"] + turn["forward_backward"]) for turn in turns]

    wall, cpu = ratios(lambda seconds: seconds.wall), ratios(lambda seconds: seconds.cpu)
    return {
        "samples": len(windows.ids),
        "seqlen": windows.ids.shape[1],
        "rounds": rounds,
        **{
            name: asdict(
                Seconds(
                    statistics.median(turn[name].wall for turn in turns),
                    statistics.median(turn[name].cpu for turn in turns),
                )
            )
            for name in work
        },
        "parts_wall": {part: statistics.median(spent) for part, spent in parts.items()},
        "ratio": statistics.median(wall),
        "ratio_cpu": statistics.median(cpu),
        "ratios": wall,
        "ratios_cpu": cpu,
    }


def report(content: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    settings = content["settings"]
    lines = [
        "# Cost of calibration",
        "",
        f"{settings['model']}, float32, recipe {settings['recipe']}, text {settings['text']}.",
        "",
        "Resident memory above the loaded model, each row in a process of its own:",
        "",
        *markdown_table(
            ["samples", "tokens each", "loaded model, MiB", "above it, MiB"],
            [
                [
                    str(row["samples"]),
                    f"{row['seqlen']:,}",
                    f"{row['model_bytes'] / _MIB:,.0f}",
                    f"{row['above_model_bytes'] / _MIB:,.0f}",
                ]
                for row in content["memory"]
            ],
        ),
        "",
    ]
    if content["time"] is not None:
        row = content["time"]
        parts = ", ".join(f"{part} {spent:.1f} s" for part, spent in row["parts_wall"].items())
        texts = {
            "forward": "bare forward passes",
            "forward_backward": "bare forward and backward passes",
            "calibration": f"calibration ({parts})",
        }
        lines += [
            f"Time over {row['samples']} windows of {row['seqlen']:,} tokens, in one process, medians of {row['rounds']} "
            "rounds in turns; processor time is over all threads, and hardly changes with other work on the machine:",
            "",
            *markdown_table(
                ["", "wall time, s", "processor time, s"],
                [
                    *(
                        [text, f"{row[name]['wall']:.1f}", f"{row[name]['cpu']:.1f}"]
                        for name, text in texts.items()
                    ),
                    ["calibration / bare passes", f"{row['ratio']:.2f}", f"{row['ratio_cpu']:.2f}"],
                ],
            ),
            "",
        ]
    return [*lines, *environment_lines(content["environment"])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, metavar="NAME|FILE")
    parser.add_argument("--recipe", default="nuq3-1p", metavar="NAME|FILE")
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 64], help="of the memory runs")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a window in the memory runs")
    parser.add_argument(
        "--time-samples", type=int, default=2, help="windows of the time runs; 0 leaves them out"
    )
    parser.add_argument("--time-seqlen", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration_memory.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    def load(samples: int, seqlen: int) -> tuple[str, Any, TokenWindows, CalibrationConfig]:
        loaded = load_model(options.model, dtype="float32", device="cpu")
        windows = load_windows(options.text, loaded.tokenizer, samples=samples, seqlen=seqlen)
        settings = {"dataset": options.text, "samples": samples, "seqlen": seqlen}
        return loaded.name, loaded.model, windows, calibration_config(options.recipe, command_line=settings)

    if options.worker:
        _, model, windows, config = load(options.samples[0], options.seqlen)
        print(json.dumps(memory(model, windows, config)))
        return
    content: dict[str, Any] = {
        "settings": {
            "recipe": options.recipe,
            "model": Path(options.model).name,
            "text": Path(options.text).name,
        },
        "environment": environment(options.note),
        "memory": [],
        "time": None,
    }
    for samples in options.samples:
        shared = [options.model, "--text", options.text, "--recipe", options.recipe]
        row = memory_in_own_process([*shared, "--samples", str(samples), "--seqlen", str(options.seqlen)])
        content["memory"].append(row)
        write_results(options.output, content, report(content))
    if options.time_samples:
        _, model, windows, config = load(options.time_samples, options.time_seqlen)
        content["time"] = overhead(model, windows, config, options.rounds)
        write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
