"""Reading the documents in files of every kind: texts, and chats as lists of messages."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from kvq_calib.data.chat import Messages, check_messages
from kvq_calib.data.files import TextFile
from kvq_calib.errors import DataError, one_line

__all__ = ["DEFAULT_FIELD", "Record", "read_records"]

DEFAULT_FIELD = "text"
_CHAT_FIELD = "messages"
#: Largest number of fields that a message lists.
_LISTED_FIELDS = 8


@dataclass(frozen=True)
class Record:
    """One document.

    Attributes:
        where: file and place in it, for messages.
        content: a text, or the messages of a chat.
    """

    where: str
    content: str | Messages


def read_records(file: TextFile, field: str = DEFAULT_FIELD) -> Generator[Record, None, None]:
    """Yield the documents of a file as they are read. A plain text file is one document.

    Args:
        file: the file, of any kind.
        field: field of a record that holds its text, or its chat as a list of `{role, content}`. A record without the
            default field is read from "messages".

    Raises:
        DataError: the content does not match the file's kind, or a record has no text under `field`.
    """
    rows = _READERS.get(file.kind)
    with file.opened() as stream:
        if rows is None:
            yield Record(file.name, _decoded(stream.read(), file.name))
            return
        fields = (DEFAULT_FIELD, _CHAT_FIELD) if field == DEFAULT_FIELD else (field,)
        with contextlib.closing(rows(stream, file.name, fields)) as found:
            for where, row in found:
                yield Record(where, _content(row, fields, where))


def _decoded(data: bytes, name: str) -> str:
    """Decode UTF-8: without byte-order mark, and with every line end as a single newline."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise DataError(f"{name} is not text: character {text.index(chr(0))} is a NUL")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ----------------------------------------------------------------------------------------------- records

_Rows = Generator[tuple[str, Any], None, None]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise DataError(f"{where}: not JSON ({reason})") from error


def _json_lines(stream: BinaryIO, name: str, fields: tuple[str, ...]) -> _Rows:
    number = 0
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                yield from _json_line(line, f"{name}, line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (after line {number})") from error


def _json_line(line: str, where: str) -> _Rows:
    if line.strip():
        yield where, _parsed(line, where)


def _json(stream: BinaryIO, name: str, fields: tuple[str, ...]) -> _Rows:
    """Yield the records of a JSON list, or a single object. Many .json files hold JSON lines, which are read too."""
    text = _decoded(stream.read(), name)
    try:
        content = _parsed(text, name)
    except DataError as error:
        cause = error.__cause__
        if not isinstance(cause, json.JSONDecodeError) or cause.msg != "Extra data":
            raise
        for number, line in enumerate(text.split("\n"), start=1):
            yield from _json_line(line, f"{name}, line {number}")
        return
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield f"{name}, record {number}", row


def _csv(stream: BinaryIO, name: str, fields: tuple[str, ...]) -> _Rows:
    """Yield the rows below the header, with all values as text."""
    with _long_fields(), io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            _check_columns(reader.fieldnames or (), fields, name)
            for row in reader:
                yield f"{name}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{name} is not CSV after line {reader.line_num} ({error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8 text (after line {reader.line_num})") from error


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Allow CSV fields as long as a document. Python's default limit is 128 KiB."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet(stream: BinaryIO, name: str, fields: tuple[str, ...]) -> _Rows:
    """Yield rows, with only the columns that can hold text."""
    import pyarrow  # only this and compressed files need it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(stream)
        columns = _check_columns(file.schema_arrow.names, fields, name)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: a row after {number} is not UTF-8 text") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a readable Parquet file ({one_line(error)})") from error


def _check_columns(columns: Iterable[str], fields: tuple[str, ...], name: str) -> list[str]:
    """Return those of `fields` that the table has as columns."""
    found = [field for field in fields if field in columns]
    if not found:
        raise DataError(f'{name} has no column "{fields[0]}"{_instead(columns)}')
    return found


_READERS: Mapping[str, Callable[[BinaryIO, str, tuple[str, ...]], _Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


# ---------------------------------------------------------------------------------------------- a record


def _content(row: Any, fields: tuple[str, ...], where: str) -> str | Messages:
    """Return the text or chat under the first of `fields` that a record has."""
    missing = f'{where}: no string under "{fields[0]}"'
    if not isinstance(row, dict):
        raise DataError(f"{missing}, for the record is {_type_name(row)}")
    present = [field for field in fields if field in row]
    if not present:
        raise DataError(missing + _instead(row))
    name = next((field for field in present if row[field] is not None), present[0])
    value = row[name]
    if isinstance(value, list):
        return check_messages(value, f'{where}, "{name}"')
    if not isinstance(value, str):
        raise DataError(f'{where}: no string under "{name}" but {_type_name(value)}')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which is not a character
        raise DataError(f'{where}: "{name}" is not Unicode text ({error.reason})') from error
    return value


def _instead(names: Iterable[Any]) -> str:
    """Return the end of a message: which fields there are, and how to choose one."""
    known = [str(name)[:40] for name in names]
    if not known:
        return ""
    listed = ", ".join(known[:_LISTED_FIELDS]) + (", ..." if len(known) > _LISTED_FIELDS else "")
    return f"; choose one of {listed} with --text-field"


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")
