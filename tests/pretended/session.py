"""Starts a simulated machine for the lifetime of a process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from pretended.device import pretended_cuda
from pretended.drivers import Machine, installed, write_nvcc

_open = contextlib.ExitStack()


def start() -> Machine:
    """Let this process, and those it starts, find nvcc and a folder for what is compiled; and this one a GPU.

    ``KVQ_CALIB_PRETENDED`` names the folder, where it is to be kept.
    """
    folder = os.environ.get("KVQ_CALIB_PRETENDED") or _open.enter_context(tempfile.TemporaryDirectory())
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = os.pathsep.join((folder, os.environ["PATH"]))
    os.environ["KVQ_CALIB_CACHE"] = str(Path(folder) / "cache")
    write_nvcc(Path(folder))
    machine = Machine()
    _open.enter_context(installed(machine, "cuda-bindings"))
    _open.enter_context(pretended_cuda())
    return machine
