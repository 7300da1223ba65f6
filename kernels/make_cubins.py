"""Compile the kernels that tests and benchmarks load on a GPU in advance, for a machine without nvcc.

To find these kernels, tests and benchmarks are run on the simulated GPU of ``tests/pretended``, whose compiler records
the requests. Results get the file names that the package's kernel cache expects.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent


def asked_for(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Sources and options that were requested from the simulated compiler."""
    found = {json.dumps(json.loads(file.read_text())) for file in folder.glob("*.cubin")}
    return sorted((source, tuple(defines)) for source, defines in map(json.loads, found))


def rehearse(folder: Path, tests: list[str]) -> None:
    """Run on the simulated GPU what would run on a GPU."""
    paths = [str(ROOT / name) for name in ("", "tests", "benchmarks")]
    environment = {**os.environ, "KVQ_CALIB_PRETENDED": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    pretended = [sys.executable, "-m", "pretended"]
    kernels, generate = (str(ROOT / f"benchmarks/{name}_gpu.py") for name in ("kernels", "generate"))
    commands = [
        [*pretended, "-m", "pytest", "-q", "-m", "gpu", *tests],
        [*pretended, kernels, "--check-only"],
        [*pretended, kernels, "--lengths", "256", "--batches", "1"],
        [*pretended, generate, "--model", "tiny", "--lengths", "256"],
    ]
    for command in commands:
        print(shlex.join(command[1:]), file=sys.stderr)
        if subprocess.run(command, env=environment, cwd=ROOT).returncode:
            raise SystemExit("the rehearsal failed; kernels may be missing")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the compiled kernels")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--requests", type=Path, default=ROOT / "build/pretended", help="folder of what is asked for"
    )
    parser.add_argument("--no-rehearsal", action="store_true", help="take what --requests has")
    parser.add_argument("--tests", nargs="+", default=[str(ROOT / "tests")])
    arguments = parser.parse_args()
    if not arguments.no_rehearsal:
        rehearse(arguments.requests, arguments.tests)
    from kvq_calib.errors import RuntimeMismatchError
    from kvq_calib.runtime.cuda.build import compile_cubin

    wanted, begun = asked_for(arguments.requests / "cache"), time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(compile_cubin, source, defines, arguments.arch, arguments.out, arguments.nvcc)
            for source, defines in wanted
        ]
        try:
            size = sum(len(job.result()) for job in jobs)
        except RuntimeMismatchError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{len(jobs)} kernels, {size / 1e6:.1f} MB, {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return 0 if jobs else 1


if __name__ == "__main__":
    sys.exit(main())
