"""Atomic file writing: a file is complete, or it does not exist."""

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
    """A file could not be written. An older file of that name is unchanged."""


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` beside ``path``, then rename: a reader sees the old file or the new one, never a part.

    A symbolic link is followed. ``/dev/stdout``, a pipe and the like are written to directly, because a rename would
    replace them by a file.

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
    """Write a file that gets its name only once it is complete. Return whether the system can do that.

    If the process is killed, no temporary file is left behind. This needs Linux and a file system that supports unnamed
    files.
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
            try:  # Python follows the link only if it is named relative to a folder's descriptor
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
    """Lock ``path`` against other writers. The lock is a file beside it, which is removed afterwards.

    When a process ends, its lock ends too. Where the system has no file locks, nothing is locked.

    Raises:
        WriteError: another process holds the lock.
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
            if not _is_at(handle, file):  # the previous holder has just released and removed it
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``."""
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
    """Check before hours of work that the folder of ``path`` exists and can be written to.

    Raises:
        WriteError: it does not exist, or cannot be written to.
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
