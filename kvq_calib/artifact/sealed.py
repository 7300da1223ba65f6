"""Sealed files: safetensors whose metadata is one JSON object with a digest of the whole content.

Artifacts, saved caches and checkpoints of a calibration are sealed files. ``docs/reference/format.md`` defines the
digest. It reveals damage but does not stop a forger, so values are checked even if the digest is right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from kvq_calib.errors import one_line

__all__ = ["SealError", "Sealed", "canonical", "digest", "read_sealed", "seal", "unseal"]

Fault = Literal["missing", "file", "kind", "metadata", "digest"]


class SealError(Exception):
    """A file that cannot be used. The message is one line that continues after the file's name.

    Attributes:
        fault: "missing" if no file can be read; "file" if it is not a safetensors file; "kind" if it is a safetensors
            file of another kind; "metadata" if its metadata is not a JSON object; "digest" if the content does not
            match.
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class Sealed(NamedTuple):
    """The content of a file: metadata without the digest, and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def canonical(metadata: Mapping[str, Any]) -> str:
    """Write a JSON object in its canonical form: sorted keys, no white space, ASCII, no NaN or infinity.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the canonical metadata, without the digest, and then all tensors in the order of their names.

    Args:
        metadata: a JSON object.
        tensors: tensors on the CPU.

    Raises:
        ValueError: a number in the metadata is NaN or infinite.
        RecursionError: the metadata is nested too deep.
    """
    state = hashlib.sha256(canonical(metadata).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def seal(key: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Make the content of a file.

    Args:
        key: of the entry of the safetensors metadata.
        metadata: a JSON object without ``digest``.
        tensors: contiguous tensors on the CPU.
    """
    complete = {**metadata, "digest": digest(metadata, tensors)}
    return safetensors.torch.save(dict(tensors), {key: canonical(complete)})


def unseal(data: bytes, key: str, check_kind: Callable[[Mapping[str, Any]], None] | None = None) -> Sealed:
    """Split a file into metadata and tensors, and check its digest.

    Args:
        data: the file's content.
        key: of the entry of the safetensors metadata.
        check_kind: called with the metadata before the digest is checked, because another version may define the digest
            differently. Its exceptions are not caught.

    Raises:
        SealError: the content was not made by :func:`seal`.
    """
    metadata, tensors = _parse(data, key)
    stated = metadata.pop("digest", None)
    if check_kind is not None:
        check_kind(metadata)
    try:
        actual = digest(metadata, tensors)
    except (ValueError, RecursionError) as error:  # 1e999, or nested deeper than can be written again
        raise SealError("metadata", f"its metadata is not plain JSON ({one_line(error)})") from error
    except (RuntimeError, TypeError) as error:  # a dtype smaller than a byte
        raise SealError("file", f"it has a tensor of an unknown kind ({one_line(error)})") from error
    if stated != actual:
        raise SealError("digest", "it is damaged: its content does not match its digest")
    return Sealed(metadata, tensors)


def read_sealed(
    path: Path, key: str, check_kind: Callable[[Mapping[str, Any]], None] | None = None
) -> Sealed:
    """:func:`unseal` for a file on disk.

    Raises:
        SealError: it cannot be read, or was not made by :func:`seal`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SealError("missing", str(error.strerror or error)) from error
    return unseal(data, key, check_kind)


def _parse(data: bytes, key: str) -> Sealed:
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    # A hostile header can fail anywhere between the parser and the tensor constructor.
    except Exception as error:
        raise SealError("file", one_line(error)) from error
    text = (header.get("__metadata__") or {}).get(key)
    if text is None:
        raise SealError("kind", f"its metadata has no entry {key!r}")
    try:
        metadata = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise SealError("metadata", f"its metadata is not JSON ({one_line(error)})") from error
    if not isinstance(metadata, dict):
        raise SealError("metadata", "its metadata is not a JSON object")
    return Sealed(metadata, tensors)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
