"""KL divergence relative to a baseline recipe, from records of ``kvq-eval perplexity --json``.

    python benchmarks/ratios.py RECORD ...

Records on the same windows of the same text are combined. The standard error is that of a ratio of means over paired
windows. Records without ``kl_windows`` have none.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import markdown_table

#: The recipe, its baseline recipe, and the ratio to reach.
TARGETS = (("kvq3", "nuq4-1p", 1.0), ("kvq2", "nuq3-1p", 1.0), ("kvq4", "nuq4-1p", 0.25))


def standard_error(over: Sequence[float], under: Sequence[float]) -> float:
    """Standard error of the ratio of the sums of two paired series, to first order; infinite for a single pair."""
    pairs = len(over)
    if pairs < 2:
        return math.inf
    ratio = sum(over) / sum(under)
    left = sum((a - ratio * b) ** 2 for a, b in zip(over, under, strict=True))
    return math.sqrt(left * pairs / (pairs - 1)) / sum(under)


def by_text(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], dict[str, Mapping[str, Any]]]:
    """Results by name, for each text. A text is its name, the hash of its tokens, and the number of windows.

    Raises:
        ValueError: two artifacts have the same name.
    """
    found: dict[tuple[str, str, int], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        config, data = record["config"], record["config"]["data"]
        text = (data["dataset"], data["sha256"], config.get("windows_measured", data["windows"]))
        results = found.setdefault(text, {})
        for result in record["artifacts"]:
            if result["name"] in results:
                raise ValueError(f"{result['name']} was measured twice on {data['dataset']}")
            results[result["name"]] = result
    return found


def report(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table in Markdown.

    Raises:
        ValueError: see :func:`by_text`, or there is nothing to compare.
    """
    rows = []
    for (text, _, windows), results in by_text(records).items():
        for over, under, target in TARGETS:
            if over not in results or under not in results:
                continue
            a, b = results[over], results[under]
            error = ""
            if "kl_windows" in a and "kl_windows" in b:
                error = f"{standard_error(a['kl_windows'], b['kl_windows']):.3f}"
            ratio = a["kl_mean"] / b["kl_mean"]
            figures = [f"{a['kl_mean']:.5f}", f"{b['kl_mean']:.5f}", f"{ratio:.3f}", error, f"{target:g}"]
            rows.append([f"{over} / {under}", text, str(windows), *figures])
    if not rows:
        pairs = ", ".join(f"{over} and {under}" for over, under, _ in TARGETS)
        raise ValueError(f"no record, or records of the same windows, with both of {pairs}")
    return markdown_table(["", "text", "windows", "KL", "KL of", "ratio", "standard error", "target"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(report([json.loads(file.read_text(encoding="utf-8")) for file in options.records])))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
