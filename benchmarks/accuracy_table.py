"""The table of recipes in README and docs/results/accuracy.md, from records of ``kvq-eval perplexity --json``.

    python benchmarks/accuracy_table.py RECORD ...

One row for each recipe and record. The standard error of the KL divergence is over windows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import markdown_table

from kvq_calib.evaluate.intervals import mean_and_error

HEADER = (
    "recipe", "text", "windows", "bits/element", "perplexity", "KL mean", "KL p99", "top-1 agreement"
)  # fmt: skip


def rows(record: Mapping[str, Any]) -> Iterator[list[str]]:
    """The cells of each recipe of a record."""
    for one in record["artifacts"]:
        mean, error = mean_and_error(one["kl_windows"])
        digits = 5 if mean < 0.01 else 4
        yield [
            f"`{one['name']}`",
            record["config"]["data"]["dataset"],
            str(len(one["kl_windows"])),
            f"{one['bits_per_element']:.3f}",
            f"{one['perplexity'] / one['baseline_perplexity']:.4f}",
            f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}"),
            f"{one['kl_p99']:.3f}",
            f"{one['top1_agreement']:.4f}",
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    files = parser.parse_args(arguments).records
    found = [row for file in files for row in rows(json.loads(file.read_text(encoding="utf-8")))]
    print("\n".join(markdown_table(HEADER, found)))


if __name__ == "__main__":
    main()
