"""A launcher that compiles the kernels as C++ and runs them on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from kvq_calib.runtime.cuda.build import kernel_folder

SHIM = Path(__file__).parent
KERNELS = {
    "append.cu": {"append_blocks": "AppendParams", "place_outliers": "PlaceParams"},
    "decode.cu": {"decode_attention": "DecodeParams"},
    "dequantize.cu": {"dequantize_blocks": "DequantizeParams"},
    "step.cu": {"advance_step": "StepParams"},
}
BUILDS = Path(tempfile.gettempdir()) / f"kvq-calib-shim-{os.getuid()}"


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


@cache
def build(source: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of a source; kept between runs under a key of all that goes into it."""
    text = f'#include "{source}"\n' + "".join(
        f"KVQ_HOST_LAUNCH({kernel}, {params})\n" for kernel, params in KERNELS[source].items()
    )
    # Products and sums must round separately, as they do on the device where the kernels ask for it.
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w"]
    folder = kernel_folder()
    digest = hashlib.sha256("\0".join([text, *options, *defines]).encode())
    for path in (folder / source, *sorted(folder.glob("*.cuh")), SHIM / "cuda_shim.h"):
        digest.update(path.read_bytes())
    library = BUILDS / f"{Path(source).stem}-{digest.hexdigest()[:32]}.so"
    if not library.exists():
        BUILDS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILDS) as scratch:
            unit = Path(scratch) / "unit.cpp"
            unit.write_text(text)
            command = [compiler(), *options, f"-I{folder}", f"-I{SHIM}", *(f"-D{d}" for d in defines)]
            done = subprocess.run(
                [*command, str(unit), "-o", f"{scratch}/unit.so"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-4000:]
            os.replace(f"{scratch}/unit.so", library)
    return ctypes.CDLL(str(library))


class HostLauncher:
    """Runs kernels on the host, a thread block at a time. ``multiprocessors`` decides how work is split."""

    def __init__(self, multiprocessors: int = 3) -> None:
        self.multiprocessors = multiprocessors
        self.shared_limit = 163 << 10  # what sm_80 has
        self.launches: list[str] = []

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        return ctypes.c_int.in_dll(build(source, defines), name).value

    def kernel(self, source: str, defines: tuple[str, ...], name: str, params: type[ctypes.Structure]):
        library = build(source, defines)
        size = getattr(library, f"size_{name}")()
        assert size == ctypes.sizeof(params), f"{name}: {ctypes.sizeof(params)} bytes here, {size} in C++"
        run = getattr(library, f"launch_{name}")

        def launch(
            grid: tuple[int, int, int], threads: int, shared_bytes: int, given: ctypes.Structure
        ) -> None:
            assert type(given) is params
            assert shared_bytes <= self.shared_limit
            self.launches.append(name)
            run(ctypes.byref(given), *grid, threads, shared_bytes)

        return launch
