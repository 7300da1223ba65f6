"""Compile every kernel variant for given architectures with nvcc; no GPU is needed.

It fails if a kernel uses local memory, for spilled registers or for an array indexed at run time.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvq_calib.runtime.cuda.decode import DecodeVariant

FOLDER = Path(__file__).parent / "cuda"
HEAD_DIMS = (64, 96, 128, 256)
#: Query heads per thread block.
HEADS = (4, 8)
#: Bits of every channel, with a table of levels; or :data:`COMPUTED`.
TABLES = (1, 2, 3, 4, 5, 6, 7, 8)
#: The value of bits for channels with different widths and computed levels.
COMPUTED = 0


def variant(size: int, heads: int, key: int, value: int, outliers: bool, paths: bool = True) -> DecodeVariant:
    """A variant; ``paths``: where levels are computed, codes follow a trellis."""
    return DecodeVariant(
        size, heads, key, value, outliers, *(paths and bits == COMPUTED for bits in (key, value))
    )


def decode_variants(full: bool) -> list[DecodeVariant]:
    """Compile-time constants of ``decode.cu``.

    The recipes that are shipped are compiled for heads of 128 channels, and one with tables and one with computed
    levels for the other sizes. With ``full``, every width is compiled for every size, and other combinations once.
    """
    if full:
        found = [
            variant(size, heads, bits, bits, outliers)
            for size, heads, bits in itertools.product(HEAD_DIMS, HEADS, (*TABLES, COMPUTED))
            for outliers in ((False,) if bits == COMPUTED else (False, True))
        ]
        found += [variant(128, 4, COMPUTED, bits, outliers=True) for bits in TABLES]
        found += [variant(128, 4, bits, COMPUTED, outliers=True) for bits in TABLES]
        return [*found, variant(128, 4, COMPUTED, COMPUTED, outliers=False, paths=False)]
    recipes = [(COMPUTED, False), *itertools.product((2, 3, 4), (False, True))]
    found = [variant(128, heads, bits, bits, own) for heads in HEADS for bits, own in recipes]
    found += [
        variant(size, heads, bits, bits, bits != COMPUTED)
        for size in HEAD_DIMS
        if size != 128
        for heads in HEADS
        for bits in (4, COMPUTED)
    ]
    return found


def compile_one(
    nvcc: str, arch: str, source: str, defines: tuple[str, ...], folder: str
) -> tuple[str, list[str], int]:
    """Compile one variant. Return its name, its problem, and the largest number of registers of a kernel."""
    options = [f"-D{define}" for define in defines]
    name = " ".join((source, arch, *(define.removeprefix("KVQ_").lower() for define in defines)))
    target = Path(folder) / f"{abs(hash(name))}.cubin"
    command = [nvcc, "-std=c++17", "-arch", arch, "-cubin", "-Xptxas", "-v", *options, str(FOLDER / source)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    target.unlink(missing_ok=True)
    faults = [line for line in text.splitlines() if re.search(r"\berror\b", line)]
    if done.returncode and not faults:
        faults = [text.strip().splitlines()[-1] if text.strip() else f"{nvcc} failed"]
    for stack, stores, loads in re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", text
    ):
        if int(stack) or int(stores) or int(loads):
            faults.append(f"{stack} bytes of stack, {stores} stored and {loads} loaded to spill registers")
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", text)]
    return name, faults, max(registers, default=0)


def main() -> int:
    """Compile and report. The exit status is 1 if a variant fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", nargs="+")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="every width at every head size")
    arguments = parser.parse_args()
    work: list[tuple[str, tuple[str, ...]]] = [
        (source, ()) for source in ("append.cu", "dequantize.cu", "step.cu")
    ]
    work += [("decode.cu", variant.defines) for variant in decode_variants(arguments.full)]
    failed = most = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(compile_one, arguments.nvcc, arch, source, defines, folder)
            for arch in arguments.archs
            for source, defines in work
        ]
        for number, job in enumerate(jobs, 1):
            try:
                name, faults, registers = job.result()
            except OSError as error:
                print(
                    f"{arguments.nvcc} cannot be run ({error.strerror}); install the CUDA toolkit",
                    file=sys.stderr,
                )
                return 1
            most = max(most, registers)
            for fault in faults:
                print(f"{name}: {fault}")
            failed += bool(faults)
            print(f"\r{number}/{len(jobs)}", end="", file=sys.stderr)
    print(f"\n{len(jobs)} variants, {failed} failed, at most {most} registers", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
