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

FOLDER = Path(__file__).parent / "cuda"
HEAD_DIMS = (64, 96, 128, 256)
GROUPS = (1, 3, 4, 8)
#: Bits of every channel, with a table of levels; or :data:`COMPUTED`.
TABLES = (1, 2, 3, 4, 5, 8)
#: The value of bits for channels with different widths and computed levels.
COMPUTED = 0


def decode_variants(full: bool) -> list[dict[str, int]]:
    """Compile-time constants of ``decode.cu``.

    The variants of the recipes are compiled in full: every head size, group and width, with and without outliers. Flags
    and pairs of different widths would multiply their number, so these are compiled at one head size, and in full with
    ``full``.
    """
    base = {"KEY_OUTLIERS": 1, "VALUE_OUTLIERS": 1, "VALUE_TOKEN": 1, "ROPE": 1}
    off = {"SOFTCAP": 0, "QUERY_BFLOAT": 0, "STORAGE_BFLOAT": 0}

    def variant(size: int, group: int, key: int, value: int, paths: int = 1, **flags: int) -> dict[str, int]:
        names = {"HEAD_DIM": size, "GROUP": group, "KEY_BITS": key, "VALUE_BITS": value}
        names |= {
            "KEY_PATHS": int(key == COMPUTED and paths),
            "VALUE_PATHS": int(value == COMPUTED and paths),
        }
        # Computed levels are per channel, and without outliers.
        own: dict[str, int] = {"KEY_OUTLIERS": 0} if key == COMPUTED else {}
        own |= {"VALUE_OUTLIERS": 0, "VALUE_TOKEN": 0} if value == COMPUTED else {}
        return {**names, **base, **off, **flags, **own}

    dense = {"KEY_OUTLIERS": 0, "VALUE_OUTLIERS": 0}
    widths = (*TABLES, COMPUTED)
    found = [
        variant(size, group, width, width, **flags)
        for size, group, width in itertools.product(HEAD_DIMS, GROUPS, widths)
        for flags in (({},) if width == COMPUTED else ({}, dense))
    ]
    found += [variant(128, 4, COMPUTED, COMPUTED, paths=0)]
    sizes = HEAD_DIMS if full else (128,)
    found += [
        variant(size, group, key, value)
        for size, group in itertools.product(sizes, GROUPS if full else (4,))
        for key, value in itertools.permutations(widths, 2)
    ]
    flags = ("SOFTCAP", "QUERY_BFLOAT", "STORAGE_BFLOAT")
    found += [
        variant(
            size, group, width, width, VALUE_TOKEN=token, ROPE=rope, **dict(zip(flags, values, strict=True))
        )
        for size, group in ([(128, 4), (256, 8)] if not full else itertools.product(HEAD_DIMS, GROUPS))
        for width in (3, 4, COMPUTED)
        for token, rope in ((0, 1), (1, 0))
        for values in ((0, 0, 0), (1, 1, 1))
    ]
    return found


def compile_one(
    nvcc: str, arch: str, source: str, defines: dict[str, int], folder: str
) -> tuple[str, list[str], int]:
    """Compile one variant. Return its name, its problem, and the largest number of registers of a kernel."""
    options = [f"-DKVQ_{name}={value}" for name, value in defines.items()]
    name = f"{source} {arch} " + " ".join(f"{key.lower()}={value}" for key, value in defines.items())
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
    parser.add_argument(
        "--full", action="store_true", help="flags and mixed pairs at every head size and group"
    )
    arguments = parser.parse_args()
    work = [(source, {}) for source in ("append.cu", "dequantize.cu", "step.cu")]
    work += [("decode.cu", defines) for defines in decode_variants(arguments.full)]
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
