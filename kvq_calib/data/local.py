"""Documents from local files."""

from __future__ import annotations

import json
from pathlib import Path

from kvq_calib.errors import DataError

__all__ = ["SUFFIXES", "read_documents"]

SUFFIXES = (".txt", ".raw", ".jsonl")


def read_documents(path: Path) -> list[str]:
    """Return the documents of a text file (one), of a `.jsonl` file (one per line), or of a folder of those.

    A folder is searched with everything below it, in the order of the paths.

    Raises:
        DataError: unknown suffix, not UTF-8, not JSON with a string `text`, or no text at all.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} files")
        return [document for file in files for document in _read_file(file)]
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is of an unknown kind; text files end in {', '.join(SUFFIXES)}")
    return _read_file(path)


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix.lower() != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}, line {number}: not JSON ({reason})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f'{path}, line {number}: no string under "text"')
        try:
            record["text"].encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
            raise DataError(f'{path}, line {number}: "text" is not Unicode text ({error.reason})') from error
        documents.append(record["text"])
    return documents
