"""Writing files so that they are whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
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
        if not _written_unnamed(temporary, data):
            with temporary.open("xb") as file:
                _write(file.fileno(), data)
        os.replace(temporary, target)
    except OSError as error:
        raise _failure(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _written_unnamed(path: Path, data: bytes) -> bool:
    """Write a file that gets its name when it is whole; whether that can be done here.

    Of a process that is killed nothing is left, which a temporary file would be. It takes Linux, and a file system that
    has files without a name.
    """
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None:
        return False
    try:
        handle = os.open(path.parent, flag | os.O_WRONLY, 0o666)
    except OSError:
        return False
    try:
        _write(handle, data)
        with contextlib.suppress(OSError):  # no /proc
            handles = os.open("/proc/self/fd", os.O_RDONLY)
            try:  # by a number in a folder: Python follows a link to a file in no other case
                os.link(str(handle), path, src_dir_fd=handles, follow_symlinks=True)
            finally:
                os.close(handles)
            return True
    finally:
        os.close(handle)
    return False


def _write(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]
    os.fsync(handle)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold what is written to ``path`` alone, by a lock on a file beside it, which is there as long as it is held.

    The lock of a process that ends goes with it. Where the system has no such locks nothing is held.

    Raises:
        WriteError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    target = Path(os.path.realpath(path))
    if _is_stream(path):
        yield
        return
    file = target.with_name(f"{target.name}.lock")
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise WriteError(
                        f"another run is writing {os.fspath(path)}; wait for it, or choose another place"
                    ) from error
            if not _is_at(handle, file):  # whoever had it has just let go and removed it
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file stands at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


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
