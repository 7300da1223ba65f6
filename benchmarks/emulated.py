"""Run the tests of the CPU kernels against a library for another machine: aarch64 under an emulator.

Needs ``qemu-user`` and a compiler for that machine, such as PyPI's ``ziglang``. The tests run here. Each call is sent
to a process under the emulator, with all memory that it reads and writes.

    python benchmarks/emulated.py
    python benchmarks/emulated.py --compiler "aarch64-linux-gnu-g++ -static" -- -x

It is also a pytest plugin, which is how it replaces the library in the tests.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import os
import shlex
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvq_calib.native.attend import PageRows
from kvq_calib.native.loader import ABI, Library

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/test_native_encode.py", "tests/test_native_attend.py", "tests/test_native_pack.py")
#: Tests that depend on this machine: on its processes, its libraries, or guarded memory.
NOT_EMULATED = (
    *(
        "a_forked_child",
        "the_benchmark_runs",
        "the_switch",
        "an_instruction_set_is",
        "a_library_that_does_not_fit",
    ),
    *("a_set_that_the_processor_lacks", "beyond_its_end"),
)
#: The functions, in the order of ``emulated_calls.cpp``.
FUNCTIONS = (
    *("kvq_abi", "kvq_runs_here", "kvq_encode_trellis", "kvq_encode_scalar", "kvq_pack", "kvq_list_outliers"),
    *("kvq_join", "kvq_attend", "kvq_dequantize", "kvq_turns_within", "kvq_turns_of_blocks"),
)
#: Environment variable by which the script tells its plugin what to run.
COMMAND = "KVQ_CALIB_EMULATED"
_POINTER = struct.calcsize("P")


class Memory:
    """Regions of memory that calls may refer to: the storage of tensors whose address was taken."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, size: int) -> None:
        """Add a region, and drop older ones that overlap with it."""
        if not size:
            return
        first = bisect.bisect_right(self._ends, start)
        last = bisect.bisect_left(self._starts, start + size)
        self._starts[first:last], self._ends[first:last] = [start], [start + size]

    def find(self, address: int) -> tuple[int, int] | None:
        """Start and size of the region that contains an address."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._ends[at]:
            return None
        return self._starts[at], self._ends[at] - self._starts[at]


class Call:
    """One call: its memory regions, the pointers in them, and its arguments."""

    def __init__(self, memory: Memory, described: set[int]) -> None:
        self._memory, self._described = memory, described
        self.regions: dict[tuple[int, int], int] = {}
        self.pointers: list[int] = []
        self.arguments: list[int] = []

    def argue(self, value: Any) -> None:
        """Add an argument: a structure by reference, an array, an address, a number or nothing."""
        thing = getattr(value, "_obj", value)
        if isinstance(thing, ctypes.Structure | ctypes.Array):
            size = ctypes.sizeof(thing)
            self.arguments += [self._region((ctypes.addressof(thing), size), inside=True), 0]
        elif (found := self._memory.find(value or 0)) is not None:
            self.arguments += [self._region(found, inside=False), value - found[0]]
        else:
            self.arguments += [-1, value or 0]

    def _region(self, place: tuple[int, int], inside: bool) -> int:
        """The number of a region. Adds it with all regions that it points to."""
        if place in self.regions:
            return self.regions[place]
        number = self.regions[place] = len(self.regions)
        if inside or place[0] in self._described:
            for offset in range(0, place[1] - _POINTER + 1, _POINTER):
                (value,) = struct.unpack("P", ctypes.string_at(place[0] + offset, _POINTER))
                if (found := self._memory.find(value)) is not None:
                    self.pointers += [number, offset, self._region(found, False), value - found[0]]
        return number

    def message(self, function: int) -> bytes:
        """The call in the format that ``emulated_calls.cpp`` reads."""
        numbers = [function, len(self.regions), len(self.pointers) // 4, len(self.arguments) // 2]
        numbers += [number for start, size in self.regions for number in (size, start % 64)]
        numbers += self.pointers + self.arguments
        contents = [ctypes.string_at(*place) for place in self.regions]
        return struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(contents)


class Emulated:
    """The functions of a library that runs in another process."""

    def __init__(self, command: Sequence[str], memory: Memory, described: set[int]) -> None:
        self._memory, self._described = memory, described
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in FUNCTIONS:
            raise AttributeError(name)
        return lambda *arguments: self._call(FUNCTIONS.index(name), arguments)

    def _call(self, function: int, arguments: Sequence[Any]) -> int:
        call = Call(self._memory, self._described)
        for argument in arguments:
            call.argue(argument)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(call.message(function))
        self._process.stdin.flush()
        answer = self._process.stdout.read(8)
        if len(answer) != 8:
            raise RuntimeError(f"the emulated process ended in {FUNCTIONS[function]}")
        pointers = {tuple(call.pointers[at : at + 2]) for at in range(0, len(call.pointers), 4)}
        for (start, size), number in call.regions.items():
            content = self._process.stdout.read(size)
            if not any(region == number for region, _ in pointers):  # regions with pointers are only read
                ctypes.memmove(start, content, size)
        self.calls += 1
        return ctypes.c_int32(struct.unpack("<q", answer)[0]).value


def pytest_sessionstart(session: pytest.Session) -> None:
    """Replace this machine's library by the emulated one, in the tests and in the package."""
    import native_factory  # in tests/

    from kvq_calib.native import loader

    memory, described = Memory(), set[int]()
    address_of, rows_of = torch.Tensor.data_ptr, PageRows.address.fget
    assert rows_of is not None

    def data_ptr(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        memory.add(storage.data_ptr(), storage.nbytes())
        return address_of(tensor)

    def rows_address(rows: PageRows) -> int:
        address = int(rows_of(rows))
        memory.add(address, rows.tensor.numel() * rows.tensor.element_size())
        described.add(address)
        return address

    functions = Emulated(shlex.split(os.environ[COMMAND]), memory, described)
    assert functions.kvq_abi() == ABI
    assert functions.kvq_runs_here() == 1
    weakref.finalize(session, functions._process.kill)
    library = Library("neon", functions)  # type: ignore[arg-type]
    loader._chosen = lambda isa, folder: library  # type: ignore[assignment]
    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
    PageRows.address = property(rows_address)  # type: ignore[assignment]
    native_factory.built_folder = lambda config: Path()
    native_factory.usable_isas = lambda folder: ["neon"]  # type: ignore[assignment]
    native_factory.library_of = lambda isa, folder: library  # type: ignore[assignment]
    session.config.stash[_FUNCTIONS] = functions


_FUNCTIONS = pytest.StashKey[Emulated]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Report the number of calls to the emulator. A run without calls has tested nothing."""
    terminalreporter.write_line(f"{config.stash[_FUNCTIONS].calls} calls under the emulator")


def compiled(compiler: Sequence[str], folder: Path) -> Path:
    """Compile the kernels into a program that answers calls, and return it.

    Raises:
        SystemExit: the compiler fails.
    """
    sys.path.insert(0, str(ROOT / "kernels"))
    import compile_cpu

    flags = [flag for flag in compile_cpu.FLAGS if flag not in ("-shared", "-fPIC")]
    sources = sorted(compile_cpu.SOURCES.glob("*.cpp"))
    program = folder / "emulated_calls"
    command = [*compiler, *flags, "-Wno-cast-function-type", *map(str, sources)]
    command += [str(Path(__file__).parent / "emulated_calls.cpp"), "-o", str(program)]
    if subprocess.run(command).returncode:
        raise SystemExit(f"{compiler[0]} made no program; see --compiler")
    return program


def main() -> int:
    """Compile, and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--compiler",
        default=f"{shlex.quote(sys.executable)} -m ziglang c++ -target aarch64-linux-musl",
        help="of programs for the other machine (default: %(default)s)",
    )
    parser.add_argument("--emulator", default="qemu-aarch64", help="that runs them (default: %(default)s)")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(shlex.split(arguments.compiler), Path(folder))
        command = [sys.executable, "-m", "pytest", "-p", "emulated", *TESTS]
        command += ["-k", "not " + " and not ".join(NOT_EMULATED), *arguments.pytest]
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        answers = shlex.join([*shlex.split(arguments.emulator), str(program)])
        environment = {**os.environ, COMMAND: answers, "PYTHONPATH": paths}
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
