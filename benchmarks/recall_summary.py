"""Records of ``kvq-eval recall``, all tasks together: one row per length and cache.

    python benchmarks/recall_summary.py RECORD ...

Prints how many questions a cache answers, how many of those that the unquantized cache answers, and the difference of
the shares with its 95% confidence interval for pairs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import markdown_table

from kvq_calib.evaluate.intervals import paired_difference, wilson

HEADINGS = ("cache", "tokens", "bits/element", "answered", "of those answered unquantized", "95% interval", "difference", "95% interval")  # fmt: skip


def summary(record: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table."""
    rows = []
    for length in dict.fromkeys(cell["length"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["length"] == length]
        before = [answer for cell in cells for answer in cell["unquantized"]["answered"]]
        answered = f"{sum(before)} of {len(before)}"
        rows.append(["unquantized", f"{length:,}", "", answered, "", "", "", ""])
        for name in cells[0]["artifacts"]:
            after = [answer for cell in cells for answer in cell["artifacts"][name]["answered"]]
            kept = sum(a and b for a, b in zip(before, after, strict=True))
            share = wilson(kept, sum(before))
            difference, interval = paired_difference(before, after)
            rows.append(
                [
                    f"`{name}`",
                    f"{length:,}",
                    f"{record['bits_per_element'][name][str(length)]:.2f}",
                    f"{sum(after)} of {len(after)}",
                    f"{kept} of {sum(before)}",
                    f"{share[0]:.2f} to {share[1]:.2f}",
                    f"{difference:+.3f}",
                    f"{interval[0]:+.3f} to {interval[1]:+.3f}",
                ]
            )
    return rows


def main() -> None:
    """Print the table of the records that are named."""
    rows = [
        row for file in sys.argv[1:] for row in summary(json.loads(Path(file).read_text(encoding="utf-8")))
    ]
    print("\n".join(markdown_table(HEADINGS, rows)))


if __name__ == "__main__":
    main()
