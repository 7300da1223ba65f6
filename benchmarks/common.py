"""Records the environment of benchmarks, and writes results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kvq_calib.files import write_atomically

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("kvq-calib", "torch", "transformers", "numpy", "scikit-learn", "hqq", "optimum-quanto")


@dataclass(frozen=True)
class Seconds:
    """Wall time, and processor time over all threads, which other load on the machine hardly changes."""

    wall: float
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def environment(note: str = "") -> dict[str, Any]:
    """When, where and with what a benchmark ran. The command is recorded with file names, but without folders."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": None if load is None else round(load, 1),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        **({"note": note} if note else {}),
    }


def _cpu_model() -> str:
    """The processor's name if the system reports it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment_lines(facts: dict[str, Any]) -> list[str]:
    """The environment in Markdown."""
    machine = facts["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    lines = [
        f"Measured on {facts['date']}: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used; "
        f"load average before the run {machine['load_before']}. Versions: {versions}.",
    ]
    if facts.get("note"):
        lines.append(facts["note"])
    return [*lines, "", f"    {facts['command']}", ""]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, with the first column aligned left and the others right."""
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def markdown(lines: Sequence[str]) -> str:
    """Lines of a report as text, with paragraphs wrapped at 120 characters; tables and code stay as they are."""
    wrapped: list[str] = []
    for line in lines:
        is_prose = bool(line) and not line.startswith(("|", "#", " "))
        options = {"break_long_words": False, "break_on_hyphens": False}
        wrapped += textwrap.wrap(line, 120, **options) if is_prose else [line]
    return "\n".join(wrapped)


def write_results(output: Path, content: dict[str, Any], lines: Sequence[str]) -> None:
    """Write ``output`` (JSON) and the Markdown beside it, each atomically."""
    write_atomically(output, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(output.with_suffix(".md"), (markdown(lines) + "\n").encode())
