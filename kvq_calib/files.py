"""Writing files so that they are whole or not there at all."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from kvq_calib.errors import KVQError


class WriteError(KVQError):
    """A file could not be written; what stood there before still does."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` beside ``path``, then rename: a reader sees the old file or the new one, never a part.

    Raises:
        WriteError: the folder is missing or not writable, or the disk is full. Nothing is left behind.
    """
    target = Path(path)
    # The name is known before the file is there, so that an interrupt at any point finds it.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"cannot write {target}: {reason}; choose another place or free some space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before hours of work rather than after: the folder of ``path`` must exist and take a file.

    Raises:
        WriteError: it does not.
    """
    target = Path(path)
    if target.is_dir():
        raise WriteError(f"cannot write {target}: it is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"cannot write {target}: {reason}; name a folder that exists and can be written"
        ) from error


def shipped_folder(name: str) -> Path:
    """Folder ``configs`` or ``kernels``: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / f"_{name}"
    return installed if installed.is_dir() else package.parent / name
