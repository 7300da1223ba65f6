"""kill -9 at random moments: output files must be complete, and resumed runs must give the same result."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from robustness_model import (
    CACHE_TOKENS,
    RECIPES,
    Place,
    calibration,
    filled_cache,
    forced,
    load_model,
    run_to_the_end,
    started,
)

from kvq_calib import KVArtifact

#: Longest time in seconds that the saving of caches runs before it is killed.
_SAVING_SECONDS = 0.5


def _killed(process: Any, after: float) -> tuple[bool, float]:
    """Kill a process after a time. Return whether it was still running, and the seconds that it ran."""
    began = time.monotonic()
    process.join(after)
    at_work, seconds = process.exitcode is None, time.monotonic() - began
    process.kill()
    process.join()
    return at_work, seconds


def _finished(command: str, words: list[str]) -> tuple[int, float]:
    """Run a command to its end. Return its exit status, and the seconds that it took."""
    began = time.monotonic()
    process = started(run_to_the_end, command, words)
    process.join()
    return process.exitcode, time.monotonic() - began


# ------------------------------------------------------------------------------------- the three commands


class _Calibration:
    """``kvq-calibrate``, and then the same with ``--resume``."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.words = [
            *calibration(place.folder, folder / "{recipe}.kvq.safetensors"),
            *forced("kvq-calibrate"),
        ]
        self.outputs = {folder / f"{recipe}.kvq.safetensors": place.expected[recipe] for recipe in RECIPES}
        self.checkpoint = folder / f"{RECIPES[0]}.kvq.safetensors.checkpoint"
        status, self.seconds = _finished("kvq-calibrate", self.words)
        if status or self._wrong():
            raise RuntimeError(f"kvq-calibrate ended with {status}, or does not give the same bytes again")

    def _wrong(self) -> list[str]:
        """Output files with wrong content."""
        there = {file: expected for file, expected in self.outputs.items() if file.exists()}
        return [file.name for file, expected in there.items() if file.read_bytes() != expected]

    def start(self) -> Any:
        for file in self.outputs:
            file.unlink(missing_ok=True)
        return started(run_to_the_end, "kvq-calibrate", self.words)

    def found(self) -> dict[str, bool]:
        there = any(file.exists() for file in self.outputs)
        return {"with_result": there, "with_checkpoint": self.checkpoint.exists()}

    def problem(self) -> str:
        if wrong := self._wrong():
            return f"half written: {', '.join(wrong)}"
        resume = ["--resume"] if self.checkpoint.exists() else []
        status, _ = _finished("kvq-calibrate", [*self.words, *resume])
        if status:
            return f"{' '.join(resume) or 'the same command'} ends with {status}"
        missing = [file.name for file in self.outputs if not file.exists()]
        if missing or self._wrong():
            return f"--resume does not give the same: {', '.join(missing or self._wrong())}"
        return "the checkpoint is left" if self.checkpoint.exists() else ""


class _Evaluation:
    """``kvq-eval perplexity --json`` over an older result."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.file = folder / "result.json"
        artifacts = [word for recipe in RECIPES for word in ("--artifact", str(place.artifact(recipe)))]
        self.words = [
            "perplexity", str(place.model), *artifacts, "--dataset", str(place.folder / "text.txt"), "--windows", "8",
            "--seqlen", "64", "--device", "cpu", "--json", str(self.file), *forced("kvq-eval", "perplexity"),
        ]  # fmt: skip
        status, self.seconds = _finished("kvq-eval", self.words)
        if status:
            raise RuntimeError(f"kvq-eval ended with {status}")
        self.whole = json.loads(self.file.read_text(encoding="utf-8"))
        self.old = b'{"artifacts": [], "config": {}}\n'

    def start(self) -> Any:
        self.file.write_bytes(self.old)
        return started(run_to_the_end, "kvq-eval", self.words)

    def found(self) -> dict[str, bool]:
        return {
            "with_result": self.file.exists() and self.file.read_bytes() != self.old,
            "with_checkpoint": False,
        }

    def problem(self) -> str:
        """The file must be the older one, or have the result of some of the windows and state their number."""
        try:
            data = self.file.read_bytes()
            if data == self.old:
                return ""
            found = json.loads(data)
            count = found["config"]["windows_measured"]
            for part, whole in zip(found["artifacts"], self.whole["artifacts"], strict=True):
                if part["name"] != whole["name"] or part["kl_windows"] != whole["kl_windows"][:count]:
                    return f"{part['name']} is not what {count} windows give"
        except (OSError, ValueError, KeyError) as error:
            return f"half written: {error!r}"
        return ""


def save_without_end(place: Place, file: Path, connection: Any) -> None:
    """A process that saves two caches in turns to one file."""
    torch.set_num_threads(1)
    model, artifact = load_model(place), KVArtifact.load(place.artifact(RECIPES[-1]))
    caches = [filled_cache(model, artifact, tokens) for tokens in CACHE_TOKENS]
    connection.send("ready")
    while True:
        for cache in caches:
            cache.save(file)


class _Saving:
    """``KVQCache.save`` over an older file of another cache."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.file, self.seconds = place, folder / "cache.safetensors", _SAVING_SECONDS
        model, artifact = load_model(place), KVArtifact.load(place.artifact(RECIPES[-1]))
        self.wholes = []
        for tokens in CACHE_TOKENS:
            filled_cache(model, artifact, tokens).save(self.file)
            self.wholes.append(self.file.read_bytes())

    def start(self) -> Any:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = started(save_without_end, self.place, self.file, theirs)
        theirs.close()
        ours.recv()
        return process

    def found(self) -> dict[str, bool]:
        return {"with_result": self.file.exists(), "with_checkpoint": False}

    def problem(self) -> str:
        there = self.file.exists() and self.file.read_bytes() in self.wholes
        return "" if there else "half written: the file is neither of the two caches"


KINDS: dict[str, Callable[[Place, Path], Any]] = {
    "kvq-calibrate": _Calibration,
    "kvq-eval --json": _Evaluation,
    "saving a cache": _Saving,
}


def run(kind: str, place: Place, count: int, seed: int) -> dict[str, Any]:
    """Kill a command ``count`` times, each time at a random moment.

    Returns:
        Counts, including kills before the command had ended by itself, and one line for each failure.
    """
    folder = place.folder / "killed"
    folder.mkdir()
    draw = random.Random(f"{seed} {kind}")
    names = ("in_time", "with_result", "with_checkpoint", "with_temporary")
    counts = dict.fromkeys(names, 0)
    failures = []
    try:
        subject = KINDS[kind](place, folder)
        for number in range(count):
            after = draw.uniform(0, subject.seconds)
            at_work, took = _killed(subject.start(), after)
            if not at_work:  # it ended before the kill
                subject.seconds = min(subject.seconds, took)
            left = any(file.name.startswith(".") for file in folder.iterdir())
            facts = {"in_time": at_work, **subject.found(), "with_temporary": left}
            for name in names:
                counts[name] += facts[name]
            if problem := subject.problem():
                failures.append(f"kill {number} after {after:.2f} s: {problem}")
            for file in folder.glob(".*"):  # a killed process cannot remove its temporary files
                file.unlink()
            print(f"{kind}: {number + 1} of {count}", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    return {
        "kills": count,
        "seconds": subject.seconds,
        **counts,
        "failed": len(failures),
        "failures": failures,
    }
