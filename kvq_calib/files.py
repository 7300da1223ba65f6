"""Writing files so that they are whole or not there at all."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from kvq_calib.errors import KVQError


class WriteError(KVQError):
    """A file could not be written; what stood there before still does."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` beside ``path``, then rename: a reader sees the old file or the new one, never a part.

    A symbolic link is followed. What is no file, such as ``/dev/stdout`` or a pipe, is written to as it stands: a
    rename would put a file in its place.

    Raises:
        WriteError: the folder is missing or not writable, or the disk is full. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    if _is_stream(path):
        try:
            with open(path, "wb") as stream:
                stream.write(data)
        except OSError as error:
            raise _failure(path, error) from error
        return
    # The name is known before the file is there, so that an interrupt at any point finds it.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _failure(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _failure(path: str | os.PathLike[str], error: OSError) -> WriteError:
    reason = error.strerror or str(error)
    return WriteError(f"cannot write {os.fspath(path)}: {reason}; choose another place or free some space")


def _is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether there is something at ``path`` that is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before hours of work rather than after: the folder of ``path`` must exist and take a file.

    Raises:
        WriteError: it does not.
    """
    if _is_stream(path):
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise WriteError(f"cannot write {os.fspath(path)}: it is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"cannot write {os.fspath(path)}: {reason}; name a folder that exists and can be written"
        ) from error


def shipped_folder(name: str) -> Path:
    """Folder ``configs`` or ``kernels``: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / f"_{name}"
    return installed if installed.is_dir() else package.parent / name
