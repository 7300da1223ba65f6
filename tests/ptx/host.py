"""Compiles translated PTX, as ``shim.host`` compiles the sources."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from shim.host import BUILDS, SHIM, compiler

from kvq_calib.runtime.cuda.build import kernel_folder
from ptx.translate import translate

FOLDER = Path(__file__).parent
ARCH = os.environ.get("KVQ_PTX_ARCH", "sm_90")
#: Of everything built: to be asked for races.
libraries: list[ctypes.CDLL] = []


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("nvcc")


def ptx_of(source: str, defines: tuple[str, ...], folder: Path) -> str:
    """What nvcc makes of ``folder/<source>``."""
    with tempfile.TemporaryDirectory() as scratch:
        target = f"{scratch}/unit.ptx"
        options = ["-std=c++17", "-arch", ARCH, "-ptx", "-w", f"-I{folder}", *(f"-D{d}" for d in defines)]
        _run(nvcc(), *options, str(folder / source), "-o", target)
        return Path(target).read_text()


def compiled(text: str) -> ctypes.CDLL:
    """The library of a PTX file; kept between runs under a key of all that goes into it."""
    options = [
        "-std=c++17",
        "-fPIC",
        "-w",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
        f"-I{SHIM}",
        f"-I{FOLDER}",
    ]
    digest = hashlib.sha256("\0".join([text, *options]).encode())
    for path in (SHIM / "cuda_shim.h", *sorted(FOLDER.glob("*.h")), FOLDER / "translate.py"):
        digest.update(path.read_bytes())
    library = BUILDS / f"ptx-{digest.hexdigest()[:32]}.so"
    if not library.exists():
        BUILDS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILDS) as scratch:
            units = translate(text)
            calls, functions, built = (
                f"{scratch}/{name}" for name in ("calls.cpp", "functions.cpp", "unit.so")
            )
            Path(calls).write_text(units.calls)
            Path(functions).write_text(units.functions)
            _run(compiler(), *options, "-O1", "-c", functions, "-o", f"{functions}.o")
            _run(compiler(), *options, "-O0", "-shared", calls, f"{functions}.o", "-o", built)
            os.replace(built, library)
    made = ctypes.CDLL(str(library))
    made.ptx_races.restype = ctypes.c_long
    libraries.append(made)
    return made


def _run(*command: str | None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


@cache
def build(source: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a kernel source, by way of PTX; the PTX is kept too."""
    folder = kernel_folder()
    digest = hashlib.sha256(repr((source, defines, ARCH)).encode())
    for path in (folder / source, *sorted(folder.glob("*.cuh"))):
        digest.update(path.read_bytes())
    kept = BUILDS / f"{Path(source).stem}-{digest.hexdigest()[:32]}.ptx"
    if not kept.exists():
        BUILDS.mkdir(exist_ok=True)
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_text(ptx_of(source, defines, folder))
        os.replace(beside, kept)
    return compiled(kept.read_text())


def races() -> int:
    """Races found since the last call."""
    return sum(library.ptx_races() for library in libraries)
