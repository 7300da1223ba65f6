"""Finding and opening local text: a file, a folder, a glob or standard input, plain or compressed."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvq_calib.errors import DataError, one_line

__all__ = ["DATA_SETS", "KNOWN_KINDS", "STANDARD_INPUT", "TextFile", "find_files"]

#: Data sets that are chosen by name.
DATA_SETS = ("wikitext2", "c4", "python-docs")
STANDARD_INPUT = "-"
KNOWN_KINDS = ".txt, .raw, .jsonl, .json, .csv (each also as .gz or .zst) and .parquet"

_KINDS = (".txt", ".raw", ".jsonl", ".json", ".csv", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile:
    """One file of text or records.

    Attributes:
        name: its name in messages.
        kind: one of the suffixes ".txt", ".raw", ".jsonl", ".json", ".csv" and ".parquet".
        content: its path, or its bytes.
        compression: "gzip", "zstd" or None.
    """

    name: str
    kind: str
    content: Path | bytes
    compression: str | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open a stream of the decompressed content.

        Raises:
            DataError: it cannot be opened; or, while the stream is in use, it cannot be read or decompressed.
        """
        try:
            with contextlib.ExitStack() as stack:
                stream = stack.enter_context(self._raw())
                if self.compression is not None:
                    stream = stack.enter_context(_decompressed(stream, self.compression))
                yield stream
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error.strerror or one_line(error)}") from error

    def _raw(self) -> BinaryIO:
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")


def find_files(dataset: str) -> list[TextFile]:
    """Return the files that a path or glob names, sorted by path.

    Args:
        dataset: path of a file; path of a folder, which is searched recursively; a glob, in which `**` stands for any
            folders; or "-" for standard input. Files of unknown kinds in folders and globs are left out.

    Raises:
        DataError: no file is found, or none of a known kind.
    """
    if dataset == STANDARD_INPUT:
        return [_standard_input()]
    path = Path(dataset).expanduser()
    if os.path.isdir(path):
        files = _known(path.rglob("*"))
        if not files:
            raise DataError(f"{path} holds no {KNOWN_KINDS} files")
    elif os.path.exists(path):
        files = _known([path])
        if not files:
            raise DataError(f"{path} is of an unknown kind; known are {KNOWN_KINDS}")
    elif glob.has_magic(dataset):
        files = _known(Path(name) for name in glob.iglob(str(path), recursive=True))
        if not files:
            raise DataError(
                f"{dataset} matches no {KNOWN_KINDS} files; quote it, so that the shell leaves it alone"
            )
    else:
        raise DataError(
            f"no such data set or file: {dataset}; use {', '.join(DATA_SETS)}, or a path: of a {KNOWN_KINDS} file, "
            'of a folder of those, a quoted glob, or "-" for standard input'
        )
    return files


def _known(paths: Any) -> list[TextFile]:
    found = []
    for path in sorted(paths):
        compression = _COMPRESSIONS.get(path.suffix.lower())
        kind = (Path(path.stem) if compression else path).suffix.lower()
        compressible = kind != ".parquet"  # it compresses its columns itself
        if kind in _KINDS and (compressible or compression is None) and path.exists() and not path.is_dir():
            found.append(TextFile(str(path), kind, path, compression))
    return found


def _decompressed(stream: BinaryIO, compression: str) -> Any:
    """Return a context manager with the decompressed stream. Reading broken data raises OSError."""
    import pyarrow  # only this and .parquet need it

    if not pyarrow.Codec.is_available(compression):
        raise DataError(f"this pyarrow cannot read {compression}: pip install --force-reinstall pyarrow")
    return io.BufferedReader(pyarrow.CompressedInputStream(stream, compression))


@functools.cache
def _standard_input() -> TextFile:
    """Return the bytes of standard input. They are kept: it can be read only once, and it is needed twice."""
    name = "standard input"
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(f"no text on {name}: pipe some into the command, or name a file")
    data = sys.stdin.buffer.read()
    compression = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if compression is not None:
        with TextFile(name, "", data, compression).opened() as stream:
            data = stream.read()
    return TextFile(name, _kind_of(data), data)


def _kind_of(data: bytes) -> str:
    """Return the kind of content that has no file name: JSON if it begins with an object or a list, else text."""
    if data.startswith(b"PAR1"):
        return ".parquet"
    text = data.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith((b"{", b"[")):
        for part in (text.split(b"\n", 1)[0], text):
            with contextlib.suppress(ValueError, RecursionError):
                first = json.loads(part)
                if isinstance(first[0] if isinstance(first, list) and first else first, dict):
                    return ".json"
    return ".txt"
