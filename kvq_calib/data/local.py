"""Documents from local files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from kvq_calib.data.chat import render_chat
from kvq_calib.data.files import STANDARD_INPUT, TextFile, find_files
from kvq_calib.data.records import DEFAULT_FIELD, read_records
from kvq_calib.errors import DataError

__all__ = ["check_documents", "local_label", "read_documents"]


def read_documents(dataset: str, tokenizer: Any, field: str = DEFAULT_FIELD) -> list[str]:
    """Return the documents of a file, folder, glob or of standard input, in the order of the paths.

    Args:
        dataset: as `find_files` takes it.
        tokenizer: writes out chats; used for nothing else.
        field: see `read_records`.

    Raises:
        DataError: nothing to read, a file or record that is not what it should be, or no text at all.
    """
    documents = [
        record.content
        if isinstance(record.content, str)
        else render_chat(record.content, tokenizer, record.where)
        for file in find_files(dataset)
        for record in read_records(file, field)
    ]
    if not any(documents):
        raise _no_text(dataset)
    return documents


def check_documents(dataset: str, field: str = DEFAULT_FIELD) -> None:
    """Look at the beginning of every file: its kind, its first record with text, and the field of that.

    Raises:
        DataError: as `read_documents`, as far as beginnings tell.
    """
    found = [_has_text(file, field) for file in find_files(dataset)]
    if not any(found):
        raise _no_text(dataset)


def _has_text(file: TextFile, field: str) -> bool:
    with contextlib.closing(read_records(file, field)) as records:
        return any(record.content for record in records)


def local_label(dataset: str) -> str:
    """Return the name for records: the last part of a path, which may be passed on."""
    if dataset == STANDARD_INPUT:
        return "standard input"
    path = Path(dataset).expanduser()
    return path.resolve().name if os.path.exists(path) else path.name


def _no_text(dataset: str) -> DataError:
    return DataError(f"{local_label(dataset)} holds no text")
