"""Lower bounds on decode time from the counted instructions, for several GPUs.

It reads the output of ``make kernel-counts`` and prints the tables of docs/reference/kernels.md. Softmax and other work
once per page is not counted, and no GPU keeps all units busy, so measured times will be longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).parent.parent / "benchmarks/results/kernel_instructions.json"
#: Nominal bits per element, everything counted.
BITS = {"nuq4-1p": 4.4, "nuq3-1p": 3.4, "nuq2-1p": 2.4, "kvq4": 4.4, "kvq3": 3.4, "kvq2": 2.4}


@dataclass(frozen=True)
class Gpu:
    """A GPU, from its data sheet.

    Attributes:
        multiprocessors: number of multiprocessors. Each issues 128 thread instructions per clock, or 64 on the integer
            unit.
        clock: boost clock in Hz.
        bandwidth: memory bandwidth in bytes per second.
    """

    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def issued(self) -> float:
        """Thread instructions per second."""
        return self.multiprocessors * 128 * self.clock


H200 = Gpu(132, 1.98e9, 4.8e12)
#: Llama-3-8B at 128K tokens, batch 1: number of elements of a layer's keys, and the same of its values.
ELEMENTS = 131072 * 8 * 128


@dataclass(frozen=True)
class Bound:
    """Lower bounds in seconds for the decode attention of a layer."""

    issue: float
    alu: float
    memory: float

    @property
    def seconds(self) -> float:
        """The largest bound."""
        return max(self.issue, self.alu, self.memory)


def bound(counts: Sequence[Mapping[str, Any]], recipe: str, gpu: Gpu = H200) -> Bound:
    """The bounds of a recipe, from its lines of the counts."""
    own = [count for count in counts if count["recipe"] == recipe]
    return Bound(
        issue=ELEMENTS * sum(count["instructions"] for count in own) / gpu.issued,
        alu=ELEMENTS * sum(count["alu"] for count in own) / (gpu.issued / 2),
        memory=2 * ELEMENTS * BITS[recipe] / 8 / gpu.bandwidth,
    )


def count_rows(counts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of Markdown per recipe: all instructions, integer instructions, and loads, of keys and values."""
    rows = []
    for recipe in dict.fromkeys(count["recipe"] for count in counts):
        cells = [f"`{recipe}`"]
        for kind in ("key", "value"):
            (own,) = (count for count in counts if (count["recipe"], count["kind"]) == (recipe, kind))
            cells += [f"{own['instructions']:.1f}", f"{own['alu']:.1f}", f"{own['loads']:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def bound_rows(counts: Sequence[Mapping[str, Any]], gpu: Gpu = H200) -> list[str]:
    """One line of Markdown per recipe: each bound in microseconds, and the largest possible speed-up over float16."""
    float16 = 2 * ELEMENTS * 2 / gpu.bandwidth
    rows = [f"| float16 | | | {1e6 * float16:.0f} | 1 |"]
    for recipe in dict.fromkeys(count["recipe"] for count in counts):
        least = bound(counts, recipe, gpu)
        times = [f"{1e6 * seconds:.0f}" for seconds in (least.issue, least.alu, least.memory)]
        rows.append(f"| `{recipe}` | {' | '.join(times)} | {float16 / least.seconds:.1f} |")
    return rows


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", type=Path, nargs="?", default=COUNTS)
    counts = json.loads(parser.parse_args().counts.read_text())
    print(*count_rows(counts), "", *bound_rows(counts), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
