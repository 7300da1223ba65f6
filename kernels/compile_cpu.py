"""Compile the CPU kernels with GCC or Clang: one shared library for each instruction set of a machine.

It needs only Python. The package's build runs it; ``python kernels/compile_cpu.py FOLDER`` runs it by hand.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
#: No contraction, because it rounds a product and a sum once, and the reference rounds twice.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"),
)  # fmt: skip
_X86 = {isa: (f"-march={isa}",) for isa in ("x86-64-v2", "x86-64-v3", "x86-64-v4")}
_ARM: dict[str, tuple[str, ...]] = {"neon": ()}
#: Compiler flags for each instruction set, by machine.
TARGETS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}


class CompileError(RuntimeError):
    """No library could be made. The message is one line."""


def find_compiler() -> list[str] | None:
    """``$CXX``, or the first C++ compiler that is found."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def library_name(isa: str) -> str:
    """File name of a library."""
    return f"kvq-{isa}.so"


def compile_library(
    isa: str, folder: Path, compiler: Sequence[str], *, extra: Sequence[str] = (), machine: str = ""
) -> Path:
    """One library.

    Args:
        isa: instruction set.
        folder: folder for the library; created if needed.
        compiler: command and first arguments.
        extra: further arguments.
        machine: machine of the instruction set; this one by default.

    Raises:
        CompileError: the compiler is missing, too old, or fails.
    """
    flags = TARGETS[(machine or platform.machine()).lower()][isa]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name(isa)
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [
        *compiler,
        *FLAGS,
        *flags,
        *extra,
        *map(str, sorted(SOURCES.glob("*.cpp"))),
        "-o",
        str(unfinished),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it failed"]
            raise CompileError(f"{compiler[0]} made no library for {isa}: {lines[0]}")
        unfinished.replace(target)
    except OSError as error:
        raise CompileError(f"{compiler[0]} made no library for {isa}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def compile_all(folder: Path) -> tuple[list[Path], list[str]]:
    """Compile the libraries for this machine. Return them, and a line for each that could not be made."""
    targets = TARGETS.get(platform.machine().lower())
    if targets is None:
        return [], [f"there are no native kernels for {platform.machine()}; torch computes instead"]
    compiler = find_compiler()
    if compiler is None:
        return [], ["no C++ compiler was found, so there are no native kernels; torch computes instead"]

    def attempt(isa: str) -> Path | str:
        try:
            return compile_library(isa, folder, compiler)
        except CompileError as error:
            return f"{error}; torch computes instead where nothing else fits"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(attempt, targets))
    files = [each for each in made if isinstance(each, Path)]
    problems = [each for each in made if isinstance(each, str)]
    return files, problems if files else problems[:1]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(__file__).parent.parent / "kvq_calib" / "_native"
    )
    made, problems = compile_all(parser.parse_args().folder)
    print(*made, sep="\n")
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
