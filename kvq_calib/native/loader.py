"""Finding, choosing and checking the library for this processor.

``KVQ_CALIB_OPS`` says what computes: ``torch`` leaves the libraries alone, ``native`` makes it an error that there is
none. With any other backend of the cache, and without it, they are used where they are there. ``KVQ_CALIB_ISA`` names
the instruction set, for tests.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvq_calib.errors import ConfigError

__all__ = ["ABI", "FOLDER", "ISAS", "KvqTrellis", "Library", "library", "library_of", "usable_isas"]

#: ``KVQ_ABI`` of ``kernels/cpu/kvq_native.h``.
ABI = 2
#: Where the package's build puts the libraries.
FOLDER = Path(__file__).parent.parent / "_native"
#: Instruction sets by machine, the best first.
_BY_MACHINE = {
    "x86_64": ("x86-64-v4", "x86-64-v3", "x86-64-v2"),
    "amd64": ("x86-64-v4", "x86-64-v3", "x86-64-v2"),
    "aarch64": ("neon",),
    "arm64": ("neon",),
}
#: Those of this machine.
ISAS = _BY_MACHINE.get(platform.machine().lower(), ())

_log = logging.getLogger(__name__)


class KvqTrellis(ctypes.Structure):
    """``KvqTrellis`` of ``kernels/cpu/kvq_native.h``, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("heads", "head_dim", "states", "refinement_passes")),
        *((name, ctypes.c_int32) for name in ("level_stride", "size_classes", "pairs")),
        *((name, ctypes.c_void_p) for name in ("level_count", "levels")),
        *((name, ctypes.c_void_p) for name in ("shares", "refinement_shares", "size_edges", "class_weight")),
        *((name, ctypes.c_void_p) for name in ("pair", "cosine", "sine")),
    ]


@dataclass(frozen=True)
class Library:
    """A library that runs here.

    Attributes:
        isa: its instruction set.
        functions: the library, with the types of its functions set.
    """

    isa: str
    functions: ctypes.CDLL


def library() -> Library | None:
    """The library that is to be used, or ``None`` where torch is to compute.

    Raises:
        ConfigError: ``KVQ_CALIB_OPS`` or ``KVQ_CALIB_ISA`` asks for what is not there.
    """
    ops = os.environ.get("KVQ_CALIB_OPS", "")
    if ops == "torch":
        return None
    found = _chosen(os.environ.get("KVQ_CALIB_ISA", ""), FOLDER)
    if found is None and ops == "native":
        raise ConfigError(
            "KVQ_CALIB_OPS is 'native', and no native library is there; install the package with a C++ compiler"
        )
    return found


@lru_cache
def _chosen(isa: str, folder: Path) -> Library | None:
    """The library of this instruction set, or the best one that runs here.

    Raises:
        ConfigError: the set that was named cannot run here.
    """
    if isa:
        try:
            return library_of(isa, folder)
        except OSError as error:
            raise ConfigError(f"KVQ_CALIB_ISA is {isa!r}: {error}; leave it out, or see {folder}") from error
    for name in usable_isas(folder):
        return library_of(name, folder)
    return None


def usable_isas(folder: Path | None = None) -> Iterator[str]:
    """Instruction sets whose library is there, in :data:`FOLDER` by default, and runs here, the best first.

    What is there and does not fit is logged.
    """
    folder = FOLDER if folder is None else folder
    for isa in ISAS:
        if not _file(isa, folder).exists():
            continue
        try:
            library_of(isa, folder)
        except _NotHere:
            continue
        except OSError as error:
            _log.warning("the native library for %s is not used, torch computes: %s", isa, error)
            continue
        yield isa


class _NotHere(OSError):
    """The processor lacks the instruction set."""


def _file(isa: str, folder: Path) -> Path:
    return folder / f"kvq-{isa}.so"


@lru_cache
def library_of(isa: str, folder: Path) -> Library:
    """The library of an instruction set in a folder.

    Raises:
        OSError: it is not there, of another version, or not for this processor; one line says which.
    """
    if isa not in ISAS:
        raise _NotHere(f"this machine has {', '.join(ISAS) or 'no instruction set that is known'}")
    functions = ctypes.CDLL(str(_file(isa, folder)))
    try:
        abi = functions.kvq_abi()
        functions.kvq_isa.restype = ctypes.c_char_p
        built_for = functions.kvq_isa().decode()
        runs = bool(functions.kvq_runs_here())
    except AttributeError as error:
        raise OSError(f"{_file(isa, folder)} is no library of this package") from error
    if abi != ABI:
        raise OSError(f"it has version {abi} of the interface where {ABI} is needed; build the package again")
    if built_for != isa:
        raise OSError(f"{_file(isa, folder)} was built for {built_for}")
    if not runs:
        raise _NotHere("this processor does not have it")
    pointer, size, strides = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    encode = functions.kvq_encode_trellis
    encode.argtypes = [
        *(ctypes.POINTER(KvqTrellis), pointer, strides, pointer),
        *(size, size, ctypes.c_int32, pointer, pointer),
    ]
    encode.restype = ctypes.c_int32
    return Library(isa, functions)
