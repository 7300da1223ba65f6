"""Check the wheels in a folder: each has a library for every instruction set of this machine, and one runs here.

It needs only Python.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import tempfile
import zipfile
from pathlib import Path

from compile_cpu import TARGETS, library_name


def problem(wheel: Path) -> str:
    """The problem of a wheel, or ``None``."""
    if "-py3-none-" not in wheel.name or wheel.name.endswith("-any.whl"):
        return "its tags are not those of every Python and one platform"
    running = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for isa in TARGETS[platform.machine().lower()]:
            name = f"kvq_calib/_native/{library_name(isa)}"
            if name not in archive.namelist():
                return f"{name} is missing"
            functions = ctypes.CDLL(archive.extract(name, folder))
            functions.kvq_isa.restype = ctypes.c_char_p
            if functions.kvq_isa().decode() != isa:
                return f"{name} was built for {functions.kvq_isa().decode()}"
            if functions.kvq_runs_here():
                running.append(isa)
    return "" if running else "no library runs here"


def main() -> int:
    """Check every wheel, and print problems."""
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    problems = {wheel.name: problem(wheel) for wheel in wheels}
    for name, what in problems.items():
        print(f"{name}: {what or 'good'}")
    if not wheels:
        print(f"{sys.argv[1]}: no wheels")
    return int(not wheels or any(problems.values()))


if __name__ == "__main__":
    sys.exit(main())
