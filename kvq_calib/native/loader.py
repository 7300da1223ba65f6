"""Finds, chooses and checks the library for this processor.

``KVQ_CALIB_OPS`` chooses the backend. With ``torch`` the libraries are not used, and with ``native`` a missing library
is an error. Otherwise a library is used if there is one. ``KVQ_CALIB_ISA`` chooses the instruction set, for tests.
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
from typing import Any

from kvq_calib.errors import ConfigError

__all__ = [
    "ABI",
    "FOLDER",
    "ISAS",
    "KvqAttention",
    "KvqBlock",
    "KvqCodes",
    "KvqDequantize",
    "KvqExact",
    "KvqJoin",
    "KvqScalar",
    "KvqTrellis",
    "KvqTurns",
    "Library",
    "library",
    "library_of",
    "usable_isas",
]

#: Value of ``KVQ_ABI`` in ``kernels/cpu/kvq_native.h``.
ABI = 6
#: Folder of the libraries, which the package's build fills.
FOLDER = Path(__file__).parent.parent / "_native"
#: Instruction sets by machine, best first.
_BY_MACHINE = {
    "x86_64": ("x86-64-v4", "x86-64-v3", "x86-64-v2"),
    "amd64": ("x86-64-v4", "x86-64-v3", "x86-64-v2"),
    "aarch64": ("neon",),
    "arm64": ("neon",),
}
#: Instruction sets of this machine.
ISAS = _BY_MACHINE.get(platform.machine().lower(), ())

#: Functions that return a ``KvqStatus``.
_RETURN_STATUS = (
    *("kvq_encode_trellis", "kvq_encode_scalar", "kvq_pack", "kvq_list_outliers"),
    *(
        "kvq_close_blocks",
        "kvq_join",
        "kvq_attend",
        "kvq_attend_each",
        "kvq_dequantize",
        "kvq_turns_within",
        "kvq_turns_of_blocks",
    ),
)

_log = logging.getLogger(__name__)


class KvqTrellis(ctypes.Structure):
    """``KvqTrellis`` of ``kernels/cpu/kvq_native.h``, which documents the fields."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("heads", "head_dim", "states", "refinement_passes")),
        *((name, ctypes.c_int32) for name in ("level_stride", "size_classes", "pairs")),
        *((name, ctypes.c_void_p) for name in ("level_count", "levels")),
        *((name, ctypes.c_void_p) for name in ("shares", "refinement_shares", "size_edges", "class_weight")),
        *((name, ctypes.c_void_p) for name in ("feedback", "pair", "cosine", "sine")),
    ]


def _numbers(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class KvqScalar(ctypes.Structure):
    """``KvqScalar`` of ``kernels/cpu/kvq_native.h``, which documents the fields."""

    _fields_ = [
        *_numbers(ctypes.c_int32, "heads", "size", "level_count", "bfloat", "token_scales", "per_side"),
        *_numbers(ctypes.c_int32, "outlier_cap", "unused"),
        *_numbers(ctypes.c_void_p, "level", "boundary", "scale", "zero_point", "inverse"),
    ]


class KvqCodes(ctypes.Structure):
    """``KvqCodes`` of ``kernels/cpu/kvq_native.h``, which documents the fields."""

    _fields_ = [
        *_numbers(ctypes.c_int32, "heads", "size", "trellis", "token_scales", "bfloat", "row_words"),
        *_numbers(ctypes.c_int32, "level_count", "unused"),
        *_numbers(ctypes.c_void_p, "width", "offset", "level", "coefficient"),
        *_numbers(ctypes.c_void_p, "scale", "zero_point"),
    ]


class KvqExact(ctypes.Structure):
    """``KvqExact`` of the same header."""

    _fields_ = [
        *_numbers(ctypes.c_void_p, "key", "value"),
        *_numbers(ctypes.c_int64 * 2, "key_stride", "value_stride"),
        *_numbers(ctypes.c_int32, "tokens", "unused"),
    ]


class KvqTurns(ctypes.Structure):
    """``KvqTurns`` of the same header."""

    _fields_ = [
        ("pairs", ctypes.c_int32),
        ("scaling", ctypes.c_float),
        *_numbers(ctypes.c_void_p, "pair", "own_cosine", "own_sine", "within", "block", "exact"),
    ]


class KvqAttention(ctypes.Structure):
    """``KvqAttention`` of the same header."""

    _fields_ = [
        *_numbers(ctypes.c_int32, "batch", "group", "pages", "first_page", "table_pages", "threads"),
        ("first_token", ctypes.c_int64),
        *_numbers(ctypes.c_float, "scale", "softcap"),
        *_numbers(ctypes.c_void_p, "query", "key_page", "value_page", "seen", "exact_seen", "sink_logit"),
        ("out", ctypes.c_void_p),
        ("turns", KvqTurns),
        *_numbers(KvqExact, "sinks", "tail"),
    ]


class KvqDequantize(ctypes.Structure):
    """``KvqDequantize`` of the same header."""

    _fields_ = [
        *_numbers(ctypes.c_int32, "batch", "pages", "first_block", "blocks", "threads", "pairs"),
        *_numbers(ctypes.c_void_p, "page", "pair", "own_cosine", "own_sine", "cosine", "sine", "out"),
        ("scaling", ctypes.c_float),
        ("unused", ctypes.c_int32),
    ]


class KvqJoin(ctypes.Structure):
    """``KvqJoin`` of the same header."""

    _fields_ = [
        *_numbers(ctypes.c_int32, "batch", "heads"),
        ("size", ctypes.c_int32 * 2),
        *_numbers(ctypes.c_int32, "bfloat", "pairs"),
        *_numbers(ctypes.c_int64, "held", "tokens"),
        ("tail", ctypes.c_void_p * 2),
        ("tail_stride", ctypes.c_int64 * 2 * 2),
        ("x", ctypes.c_void_p * 2),
        ("stride", ctypes.c_int64 * 3 * 2),
        *_numbers(ctypes.c_void_p, "pair", "cosine", "sine"),
        *_numbers(ctypes.c_int64, "angle_stride", "width"),
        ("out", ctypes.c_void_p * 2),
    ]


class KvqBlock(ctypes.Structure):
    """``KvqBlock`` of the same header."""

    _fields_ = [
        *_numbers(ctypes.c_void_p, "trellis", "scalar", "width", "x"),
        ("stride", ctypes.c_int64 * 2),
        *_numbers(ctypes.c_void_p, "page", "token", "index", "listed", "counts"),
        *_numbers(ctypes.c_int32, "bfloat", "status"),
    ]


@dataclass(frozen=True)
class Library:
    """A library that runs here.

    Attributes:
        isa: its instruction set.
        functions: the loaded library, with the types of its functions.
    """

    isa: str
    functions: ctypes.CDLL


def library() -> Library | None:
    """The library to use; ``None`` if torch computes.

    Raises:
        ConfigError: the library that ``KVQ_CALIB_OPS`` or ``KVQ_CALIB_ISA`` asks for is missing.
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
    """The library for the given instruction set, or the best one for this processor.

    Raises:
        ConfigError: the given instruction set cannot run here.
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
    """Instruction sets with a library that runs here, best first; in :data:`FOLDER` by default.

    Libraries that do not fit are logged.
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
    """The processor does not have the instruction set."""


def _file(isa: str, folder: Path) -> Path:
    return folder / f"kvq-{isa}.so"


@lru_cache
def library_of(isa: str, folder: Path) -> Library:
    """Load the library for an instruction set from a folder.

    Raises:
        OSError: the library is missing, of another version, or not for this processor; the message says which.
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
        raise OSError(f"{_file(isa, folder)} is not a library of this package") from error
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
    attend = functions.kvq_attend
    codes = ctypes.POINTER(KvqCodes)
    attend.argtypes = [codes, codes, ctypes.POINTER(KvqAttention)]
    functions.kvq_attend_each.argtypes = [codes, codes, pointer, ctypes.c_int32, ctypes.c_int32]
    functions.kvq_dequantize.argtypes = [codes, ctypes.POINTER(KvqDequantize)]
    functions.kvq_turns_within.argtypes = [pointer, ctypes.c_int32, pointer]
    functions.kvq_turns_of_blocks.argtypes = [pointer, ctypes.c_int32, pointer, size, pointer]
    number, outputs = ctypes.c_int32, (pointer, pointer, pointer, pointer)
    scalar = functions.kvq_encode_scalar
    scalar.argtypes = [ctypes.POINTER(KvqScalar), pointer, strides, size, size, number, *outputs]
    functions.kvq_pack.argtypes = [pointer, size, pointer, size, number, number, pointer]
    lists = functions.kvq_list_outliers
    lists.argtypes = [pointer, pointer, size, number, number, number, pointer, size, pointer, pointer]
    functions.kvq_close_blocks.argtypes = [pointer, number, number, number, number]
    functions.kvq_join.argtypes = [ctypes.POINTER(KvqJoin)]
    for name in _RETURN_STATUS:
        getattr(functions, name).restype = ctypes.c_int32
    return Library(isa, functions)
