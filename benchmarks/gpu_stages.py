"""All checks and measurements that need a GPU, in two stages of a few minutes.

Stage 1 (8 minutes): the launcher, the tests that need a GPU, a comparison with float64, the headline at 128K tokens,
memory and race checks. Stage 2 (5 minutes): lengths, models and batches, tokens per second end to end, a profile.

Each step writes its results as they come. A step that fails or takes too long does not stop the next ones;
``stage-1.json`` and ``stage-2.json`` have the outcome of each. If there is a bundle (``make gpu-bundle``: compiled
kernels, and wheels of packages that the machine may lack), neither a network nor nvcc is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / ".gpu"
LAUNCHER = """
import json, sys, torch
from kvq_calib.runtime.cuda.launcher import launcher_for
launcher = launcher_for(torch.device("cuda", 0))
for source in ("append.cu", "dequantize.cu"):
    launcher.prepare(source)
found = {"gpu": torch.cuda.get_device_name(0), "arch": launcher.arch, "driver_package": launcher.driver.name,
    "multiprocessors": launcher.multiprocessors, "shared_limit": launcher.shared_limit,
    "torch": torch.__version__, "torch_cuda": torch.version.cuda}
open(sys.argv[1], "w").write(json.dumps(found, indent=1))
print(found)
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of a stage.

    Attributes:
        name: its log is ``<name>.log``.
        command: the command line.
        seconds: limit on its time.
        program: a program that must be installed, beside Python.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    program: str = ""


def steps_of(stage: int, arguments: argparse.Namespace) -> list[Step]:
    """The steps of a stage, in order."""
    python, out = tuple(shlex.split(arguments.interpreter)), arguments.out
    kernels, generate = (
        (*python, str(ROOT / f"benchmarks/{name}_gpu.py")) for name in ("kernels", "generate")
    )
    tests = (*python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--timeout", "60")
    checked = (*kernels, "--check-only")
    headline = ("--lengths", "131072", "--models", "Llama-3-8B", "--batches", "1")
    profiled = ("--lengths", "131072", "--models", "Llama-3-8B", "--batches", "1", "--recipes")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--print-limit", "10")
    if stage == 1:
        return [
            Step("launcher", (*python, "-c", LAUNCHER, str(out / "launcher.json")), 60),
            Step("tests", (*tests, f"--junitxml={out / 'tests.xml'}", *arguments.tests), 150),
            Step("check", checked, 45),
            Step("headline", _timed(kernels, out / "headline.json", 70, headline, arguments), 90),
            Step("memcheck", (*sanitizer, "--tool", "memcheck", *checked), 65, "compute-sanitizer"),
            Step("racecheck", (*sanitizer, "--tool", "racecheck", *checked), 65, "compute-sanitizer"),
        ]
    sections = (
        "SpeedOfLight",
        "WarpStateStats",
        "Occupancy",
        "MemoryWorkloadAnalysis",
        "ComputeWorkloadAnalysis",
    )
    ncu = ("ncu", "--clock-control", "none", "-k", "regex:decode_attention", "-s", "3", "-c", "1")
    ncu += tuple(word for section in sections for word in ("--section", section))
    profiles = [
        Step(f"profile-{name}", (*ncu, *kernels, *profiled, name), 35, "ncu") for name in ("nuq3-1p", "kvq3")
    ]
    return [
        Step("sweep", _timed(kernels, out / "sweep.json", 100, (), arguments), 120),
        Step("generate", _timed(generate, out / "generate.json", 80, (), arguments), 100),
        *profiles,
    ]


def _timed(
    script: Sequence[str], result: Path, budget: int, options: Sequence[str], arguments: argparse.Namespace
) -> tuple[str, ...]:
    """A benchmark with a budget, so that it ends by itself before its limit. ``--small`` is for rehearsals."""
    small: tuple[str, ...] = ()
    if arguments.small:
        small = ("--lengths", "512", "--recipes", "nuq3-1p", "kvq3")
        is_kernels = "kernels_gpu" in script[-1]
        small += ("--models", "Llama-3-8B", "--batches", "1") if is_kernels else ("--model", "tiny")
    return (*script, "--json", str(result), "--budget", str(budget), *options, *small)


def install_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack the bundle's wheels of packages that are not installed. Returns their names."""
    missing = []
    for wheel in sorted(folder.glob("*.whl")):
        name = wheel.name.split("-")[0].replace("_", "-")
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(wheel)
    if missing:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--target",
            str(site),
        ]
        subprocess.run([*command, *map(str, missing)], check=True)
    return [wheel.name for wheel in missing]


def surroundings(site: Path) -> dict[str, str]:
    """The environment of all steps."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), str(site)]
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    if "KVQ_CALIB_CACHE" not in found and (BUNDLE / "cubins").is_dir():
        found["KVQ_CALIB_CACHE"] = str(BUNDLE / "cubins")
    return found


def run(step: Step, out: Path, environment: dict[str, str]) -> dict[str, object]:
    """Run a step. Returns its outcome."""
    if step.program and shutil.which(step.program) is None:
        return {"step": step.name, "status": f"left out: no {step.program}"}
    begun, log = time.perf_counter(), out / f"{step.name}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                step.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                timeout=step.seconds,
            )
            status = "passed" if done.returncode == 0 else f"failed: exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {step.seconds:.0f} seconds"
        except OSError as error:
            status = f"failed: {error}"
    lines = log.read_text(errors="replace").splitlines()
    return {
        "step": step.name,
        "status": status,
        "seconds": round(time.perf_counter() - begun, 1),
        "command": shlex.join(step.command) if "\n" not in "".join(step.command) else step.command[0],
        "last_lines": lines[-8:],
    }


def main() -> int:
    """Run from the command line. The exit status is 1 if a step failed or was stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", type=int, nargs="+", choices=(1, 2))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu")
    parser.add_argument("--interpreter", default=sys.executable, help="command that runs Python")
    parser.add_argument("--tests", nargs="+", default=[str(ROOT / "tests")])
    parser.add_argument("--small", action="store_true", help="a rehearsal: short texts, two recipes")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    site = BUNDLE / "site"
    installed = install_wheels(BUNDLE / "wheels", site)
    environment, failed = surroundings(site), False
    for stage in arguments.stages:
        begun = time.perf_counter()
        results: list[dict[str, object]] = []
        for step in steps_of(stage, arguments):
            print(f"== {time.perf_counter() - begun:.0f} s: {step.name}", flush=True)
            results.append(run(step, arguments.out, environment))
            print(*map(str, results[-1].get("last_lines", ())), results[-1]["status"], sep="\n", flush=True)
            failed |= str(results[-1]["status"]).startswith(("failed", "stopped"))
            summary = {"stage": stage, "wheels": installed, "steps": results}
            (arguments.out / f"stage-{stage}.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
