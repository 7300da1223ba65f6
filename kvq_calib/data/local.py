"""Documents from local files."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from kvq_calib.data.chat import render_chat
from kvq_calib.data.files import STANDARD_INPUT, find_files
from kvq_calib.data.records import DEFAULT_FIELD, Record, read_records
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


def check_documents(dataset: str, field: str = DEFAULT_FIELD, seqlen: int = 2) -> None:
    """Look at the beginning of every file: its kind, its first record with text, and the field of that.

    As much of the text is read as might fill a window.

    Args:
        dataset, field: as `read_documents` takes them.
        seqlen: tokens of a window.

    Raises:
        DataError: as `read_documents`, as far as beginnings tell; or the text is too short for a window whatever the
            tokenizer.
    """
    most = 0.0
    for file in find_files(dataset):
        with contextlib.closing(read_records(file, field)) as records:
            for record in records:
                most += _most_tokens(record)
                if record.content and most >= seqlen:
                    break
    if not most:
        raise _no_text(dataset)
    if most < seqlen - 1:  # the first token of a window can be that of the beginning of a sequence
        raise DataError(
            f"{local_label(dataset)} has at most {most:.0f} tokens, less than one window of {seqlen}; use a smaller "
            "--seqlen or more text"
        )


def _most_tokens(record: Record) -> float:
    """Tokens that a document can have at most, with what separates it from the next.

    No tokenizer makes more than one of a byte. Some normalise first, which leaves ASCII alone and makes at most 11
    bytes of another byte (Unicode's NFKC); some put a space in front. What a template adds to a chat is not known.
    """
    if not record.content:
        return 0.0
    if not isinstance(record.content, str):
        return math.inf
    return len(record.content.encode(errors="replace")) * (1 if record.content.isascii() else 11) + 3


def local_label(dataset: str) -> str:
    """Return the name for records: the last part of a path, which may be passed on."""
    if dataset == STANDARD_INPUT:
        return "standard input"
    path = Path(dataset).expanduser()
    return path.resolve().name if os.path.exists(path) else path.name


def _no_text(dataset: str) -> DataError:
    return DataError(f"{local_label(dataset)} holds no text")
