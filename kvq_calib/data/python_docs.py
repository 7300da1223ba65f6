"""Chapters of the Python manual that ship with CPython, so that calibration works without network."""

from __future__ import annotations

import hashlib
import sys
from pydoc_data.topics import topics
from typing import Literal

__all__ = ["python_docs", "python_docs_version"]


def python_docs_version() -> str:
    """Return the Python release that the manual belongs to. The text differs between releases."""
    return f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


def python_docs(split: Literal["calibration", "evaluation"]) -> list[str]:
    """Return the help topics of one split, sorted by name.

    A hash of the name puts two of three topics into the calibration split. Topics repeat parts of one another, so the
    evaluation split leaves out every paragraph of the calibration split.
    """
    names = {
        part: [name for name in sorted(topics) if _is_calibration(name) == (part == "calibration")]
        for part in ("calibration", "evaluation")
    }
    seen: set[str] = set()
    documents = {part: [_unseen(topics[name], seen) for name in names[part]] for part in names}
    return [document for document in documents[split] if document]


def _is_calibration(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 3 != 0


def _unseen(text: str, seen: set[str]) -> str:
    """Return the text without the paragraphs in `seen`, and add its paragraphs to `seen`."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)
