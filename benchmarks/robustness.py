"""Tests with hostile files and kill -9: no damaged file is accepted, and no file is left half written.

    python benchmarks/robustness.py [--artifacts 7000] [--caches 2500] [--checkpoints 500] [--pickles 1000] [--kills 50]

The files are damaged and forged artifacts, saved caches, checkpoints of a calibration, and hostile pickles for
``import-kvquant``, all of a tiny random model. Each must be refused with an error of the package, or give the same as
the valid file. A file with a new, correct digest may also be another valid file. Then ``kvq-calibrate``, ``kvq-eval
--json`` and the saving of a cache are killed at random moments. Their output files must be complete, and ``--resume``
must give the same bytes as an uninterrupted run.

``--case artifacts:17`` repeats one case in this process and shows what it raises. The exit status is 1 if any case
failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import robustness_cases as cases
import robustness_kills as kills
from common import RESULTS, environment, environment_lines, markdown_table, write_results
from robustness_model import Place, prepare

COUNTS = {"artifacts": 7000, "caches": 2500, "checkpoints": 500, "pickles": 1000}
KILLS = 50


def measure(place: Place, counts: Mapping[str, int], kill_count: int, seed: int) -> dict[str, Any]:
    """Run all cases and kills.

    Args:
        place: from :func:`robustness_model.prepare`.
        counts: number of cases by kind.
        kill_count: number of kills of each of the three commands.
        seed: seed of everything random, except the scheduling of processes.
    """
    files = {kind: _summary(cases.run(kind, place, count, seed)) for kind, count in counts.items() if count}
    killed = {kind: kills.run(kind, place, kill_count, seed) for kind in kills.KINDS if kill_count}
    return {"seed": seed, "files": files, "kills": killed}


def _summary(results: Sequence[cases.Result]) -> dict[str, Any]:
    by_name: dict[str, Counter[str]] = {}
    for result in results:
        by_name.setdefault(result.name, Counter())[result.outcome] += 1
    failures = [result for result in results if result.failed]
    return {
        "cases": len(results),
        "outcomes": dict(Counter(result.outcome for result in results)),
        "by_attack": {name: dict(by_name[name]) for name in sorted(by_name)},
        "slowest_seconds": max(result.seconds for result in results),
        "largest_growth_mib": max(result.growth for result in results) / 2**20,
        "failed": len(failures),
        "failures": [result.line() for result in failures[:20]],
    }


def failures(content: Mapping[str, Any]) -> list[str]:
    """One line for each recorded failure."""
    parts = [*content["files"].items(), *content["kills"].items()]
    return [f"{kind}: {line}" for kind, part in parts for line in part["failures"]]


def report(content: Mapping[str, Any]) -> list[str]:
    """The record in Markdown."""
    lines = ["# Hostile files and kill -9", "", *environment_lines(content["environment"])]
    lines += [
        f"Seed {content['seed']}. Read as the good file: same content, for example where white space changed.",
        "",
    ]
    headings = [
        "files",
        "cases",
        "refused",
        "read as the good one",
        "forged, valid",
        "failed",
        "slowest",
        "memory grew by",
    ]
    rows = [
        [
            kind,
            str(part["cases"]),
            *(str(part["outcomes"].get(outcome, 0)) for outcome in ("refused", "same", "valid")),
            str(part["failed"]),
            f"{part['slowest_seconds']:.2f} s",
            f"{part['largest_growth_mib']:.0f} MiB",
        ]
        for kind, part in content["files"].items()
    ]
    lines += [*markdown_table(headings, rows), ""]
    headings = [
        "killed",
        "times",
        "before it ended",
        "result there",
        "checkpoint there",
        "temporary file left",
        "failed",
    ]
    rows = [
        [
            kind,
            *(
                str(part[name])
                for name in ("kills", "in_time", "with_result", "with_checkpoint", "with_temporary", "failed")
            ),
        ]
        for kind, part in content["kills"].items()
    ]
    lines += [*markdown_table(headings, rows), ""]
    lines += [f"- {line}" for line in failures(content)] or ["Nothing failed."]
    return lines


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"cases, default {count}")
    parser.add_argument("--kills", type=int, default=KILLS, help=f"of each command, default {KILLS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", metavar="KIND:NUMBER", help="repeat one case and show what happens")
    parser.add_argument("--note", default="", help="a sentence for the record")
    parser.add_argument("--output", type=Path, default=RESULTS / "robustness.json")
    return parser.parse_args(words)


def main() -> None:
    options = arguments()
    facts = environment(options.note)
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(Path(folder))
        if options.case is not None:
            kind, _, number = options.case.partition(":")
            cases.show(kind, place, int(number), options.seed)
            return
        counts = {kind: getattr(options, kind) for kind in COUNTS}
        content = {"environment": facts, **measure(place, counts, options.kills, options.seed)}
    lines = report(content)
    write_results(options.output, content, lines)
    print("\n".join(lines))
    sys.exit(bool(failures(content)))


if __name__ == "__main__":
    main()
