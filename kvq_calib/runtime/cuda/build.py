"""Compile kernel sources with nvcc, and cache the results in a folder."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.files import WriteError, shipped_folder, write_atomically

__all__ = ["cache_folder", "compile_cubin", "kernel_folder"]

_log = logging.getLogger("kvq_calib.runtime")


def kernel_folder() -> Path:
    """The folder of the sources: in the wheel, or next to the package in a checkout."""
    return shipped_folder("kernels") / "cuda"


def cache_folder() -> Path | None:
    """The folder of compiled kernels: ``$KVQ_CALIB_CACHE``, or the user's cache folder; ``None`` without a home."""
    named = os.environ.get("KVQ_CALIB_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "kvq-calib" / "kernels"
    except RuntimeError:
        return None


def compile_cubin(
    source: str,
    defines: tuple[str, ...],
    arch: str,
    cache: Path | None,
    nvcc: str = "nvcc",
    fresh: bool = False,
) -> bytes:
    """Compile ``kernels/cuda/<source>`` to machine code, or read it from the cache.

    The name of a file in the cache depends on everything that changes the result: all sources and options, and the
    compiler's version. Without a compiler, a file from any version of the compiler is used, so the cache may come from
    another machine. Files are written atomically. If the folder cannot be read or written, this only costs time.

    Args:
        source: name of the file.
        defines: preprocessor definitions, each ``NAME=VALUE``.
        arch: such as ``sm_90``.
        cache: folder of the cache, or ``None``.
        nvcc: name or path of the compiler.
        fresh: compile even if the result is in the cache.

    Raises:
        RuntimeMismatchError: there is no compiler, or it fails.
    """
    folder = kernel_folder()
    options = ["-std=c++17", "-arch", arch, "-cubin", *(f"-D{define}" for define in defines)]
    digest = hashlib.sha256()
    for part in (source, *options):
        digest.update(part.encode() + b"\0")
    for path in sorted([*folder.glob("*.cuh"), folder / source]):
        digest.update(path.read_bytes() + b"\0")
    name = f"{Path(source).stem}-{arch}-{digest.hexdigest()[:32]}"
    found = shutil.which(nvcc)
    if found is None:
        kept = None if cache is None or fresh else _newest(cache, name)
        if kept is None:
            raise RuntimeMismatchError("no nvcc on the PATH; install the CUDA toolkit to use the kernels")
        return kept
    version = hashlib.sha256(_run([found, "--version"]).stdout.encode()).hexdigest()[:8]
    target = None if cache is None else cache / f"{name}-{version}.cubin"
    if target is not None and not fresh and (kept := _read(target)) is not None:
        return kept
    code = _compile([found, *options, f"-I{folder}"], folder / source, arch)
    if target is not None:
        _keep(target, code)
    return code


def _newest(cache: Path, name: str) -> bytes | None:
    """The newest result for these sources and options, from any version of the compiler."""
    try:
        files = sorted(cache.glob(f"{name}-*.cubin"), key=lambda file: file.stat().st_mtime)
    except OSError:
        return None
    return _read(files[-1]) if files else None


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeMismatchError(f"{command[0]} cannot be run: {error.strerror or error}") from error


def _compile(command: list[str], source: Path, arch: str) -> bytes:
    try:
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / "built.cubin"
            done = _run([*command, str(source), "-o", str(built)])
            code = _read(built)
    except OSError as error:
        raise RuntimeMismatchError(
            f"nvcc needs a temporary folder ({error.strerror or error}); set TMPDIR"
        ) from error
    if done.returncode or code is None:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no output")
        raise RuntimeMismatchError(f"nvcc could not compile {source.name} for {arch}: {first.strip()}")
    return code


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _keep(target: Path, code: bytes) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, code)
    except (OSError, WriteError) as error:
        _say_not_kept(target.parent, str(error))


@lru_cache(maxsize=8)
def _say_not_kept(folder: Path, reason: str) -> None:
    _log.warning(
        "kernels are compiled again in every process: %s cannot be used as a cache (%s)", folder, reason
    )
