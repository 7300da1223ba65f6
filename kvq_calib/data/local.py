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
    """Return the documents of a file, a folder, a glob or standard input, sorted by path.

    Args:
        dataset: as `find_files` takes it.
        tokenizer: used only to render chats.
        field: see `read_records`.

    Raises:
        DataError: no file, a malformed file or record, or no text.
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
    """Check the beginning of every file: its kind, its first record with text, and the field that holds the text.

    Files are read until there may be enough text for one window.

    Args:
        dataset, field: as `read_documents` takes them.
        seqlen: tokens in a window.

    Raises:
        DataError: as `read_documents`, for the part that is read; or the text is too short for one window with any
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
    if most < seqlen - 1:  # the first token of a window can be the beginning-of-sequence token
        raise DataError(
            f"{local_label(dataset)} has at most {most:.0f} tokens, less than one window of {seqlen}; use a smaller "
            "--seqlen or more text"
        )


def _most_tokens(record: Record) -> float:
    """Largest possible number of tokens of a document and the separator after it.

    A tokenizer makes at most one token of each byte. Some normalise first: Unicode's NFKC keeps ASCII and turns any
    other byte into at most 11. Some put a space in front. What a template adds to a chat is not known.
    """
    if not record.content:
        return 0.0
    if not isinstance(record.content, str):
        return math.inf
    return len(record.content.encode(errors="replace")) * (1 if record.content.isascii() else 11) + 3


def local_label(dataset: str) -> str:
    """Return the name to write to results: the last part of a path, so that no folder names are passed on."""
    if dataset == STANDARD_INPUT:
        return "standard input"
    path = Path(dataset).expanduser()
    return path.resolve().name if os.path.exists(path) else path.name


def _no_text(dataset: str) -> DataError:
    return DataError(f"{local_label(dataset)} holds no text")
