"""Saves and loads a filled cache as one safetensors file.

Tensors are named after their storage. One metadata entry, ``kvq_cache``, has the rest as JSON, and a digest of
everything. A reader derives the shape and dtype of every tensor from the artifact and that entry, and checks them
before use.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.sealed import SealError, read_sealed, seal
from kvq_calib.codec.packing import BLOCK_TOKENS, COORDINATE_BITS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.files import write_atomically
from kvq_calib.runtime.contents import CacheContents
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage, PackedTensor, Page

__all__ = ["load_contents", "save_contents"]

FORMAT_VERSION = 2
_METADATA_KEY = "kvq_cache"
_STATE = "states."
_EXACT = ("tail_key", "tail_value", "sink_key", "sink_value")


def _artifact_digest(artifact: KVArtifact) -> str:
    return hashlib.sha256(artifact.to_bytes()).hexdigest()


def save_contents(
    contents: CacheContents, artifact: KVArtifact, path: str | os.PathLike[str], states: Mapping[str, Tensor]
) -> None:
    """Write the contents of a cache to one file, atomically.

    Args:
        contents: contents of the cache.
        artifact: artifact of the cache.
        path: the file.
        states: states of other layers of the model, by name.

    Raises:
        RuntimeMismatchError: the cache is empty.
    """
    table = contents.table
    if table is None:
        raise RuntimeMismatchError("the cache is empty: there is nothing to save")
    tensors: dict[str, Tensor] = {"sink_slots": table.sink_slots}
    tensors["block_first"] = torch.tensor(table.first, dtype=torch.int32)
    tensors["block_fill"] = torch.tensor(table.fill, dtype=torch.int32)
    for number, positions in enumerate(table.position_pages):
        tensors[f"positions.{number}"] = positions
    for index, storage in enumerate(contents.storages):
        prefix = f"layers.{index}."
        for name in _EXACT:
            tensors[prefix + name] = getattr(storage, name)
        for kind in ("key", "value"):
            for number, page in enumerate(getattr(storage, kind).pages):
                for name, tensor in page.tensors().items():
                    tensors[f"{prefix}{kind}.{number}.{name}"] = tensor
    tensors.update({_STATE + name: tensor for name, tensor in states.items()})
    metadata = {
        "format_version": FORMAT_VERSION,
        "artifact": _artifact_digest(artifact),
        "batch": table.batch,
        "length": table.length,
        "recent_tokens": table.recent_tokens,
        "dropped_pages": [storage.key.dropped_pages for storage in contents.storages],
    }
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, seal(_METADATA_KEY, metadata, data))


class _Reader:
    """Returns tensors by name, checked, and each only once."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        try:
            self.metadata, self.tensors = read_sealed(path, _METADATA_KEY, self._check_version)
        except SealError as error:
            if error.fault == "missing":
                raise RuntimeMismatchError(f"cannot read {path}: {error}") from error
            kinds = ("file", "kind")
            reason = "it is not a cache of kvq-calib" if error.fault in kinds else str(error)
            raise self.problem(reason) from error

    def _check_version(self, metadata: Mapping[str, Any]) -> None:
        version = metadata.get("format_version")
        if version != FORMAT_VERSION or not isinstance(version, int):
            raise self.problem(f"it has format version {version!r}, not {FORMAT_VERSION}")

    def problem(self, what: str) -> RuntimeMismatchError:
        return RuntimeMismatchError(f"cannot use {self.path}: {what[:200]}")

    def count(self, name: str, least: int) -> int:
        value = self.metadata.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.problem(f"{name} is {value!r}")
        return value

    def take(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise self.problem(f"tensor {name} is missing")
        fits = tensor.dtype == dtype and tensor.ndim == len(shape)
        if not fits or any(want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True)):
            raise self.problem(
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, which does not fit the artifact"
            )
        return tensor.to(self.device)


def load_contents(
    contents: CacheContents, artifact: KVArtifact, path: str | os.PathLike[str], max_tokens: int | None
) -> dict[str, Tensor]:
    """Fill an empty cache from a file. After an error it is still empty.

    Args:
        contents: contents of the cache.
        artifact: artifact of the cache.
        path: the file.
        max_tokens: most tokens that the cache takes.

    Returns:
        States of other layers of the model, by name.

    Raises:
        RuntimeMismatchError: the file is damaged, belongs to another artifact, or holds too many tokens.
    """
    reader = _Reader(Path(path), contents.device)
    if reader.metadata.get("artifact") != _artifact_digest(artifact):
        raise reader.problem("it was filled with another artifact")
    dropped = reader.metadata.get("dropped_pages")
    if not isinstance(dropped, list) or len(dropped) != len(contents.stored):
        raise reader.problem("dropped_pages does not fit the layers")
    table = _read_table(reader, contents, max_tokens)
    storages = [_read_layer(reader, contents, index, table, count) for index, count in enumerate(dropped)]
    states = _read_states(reader, table.batch, contents.device)
    if reader.tensors:
        raise reader.problem(f"tensor {sorted(reader.tensors)[0]} is unknown")
    contents.recent_tokens, contents.table, contents.storages = table.recent_tokens, table, storages
    return states


def _read_states(reader: _Reader, batch: int, device: torch.device) -> dict[str, Tensor]:
    """States of other layers. Of their shapes only the number of sequences is checked.

    Counters in a state are integers without dimensions.
    """
    found = {}
    for name in [name for name in reader.tensors if name.startswith(_STATE)]:
        tensor = reader.tensors.pop(name)
        whole = not (tensor.is_floating_point() or tensor.is_complex())
        if not (whole and tensor.ndim == 0) and batch not in tensor.shape[: 2 if whole else 1]:
            raise reader.problem(f"tensor {name} is {tensor.dtype} {list(tensor.shape)}")
        found[name.removeprefix(_STATE)] = tensor.to(device)
    return found


def _read_table(reader: _Reader, contents: CacheContents, max_tokens: int | None) -> SlotTable:
    batch, length = reader.count("batch", 1), reader.count("length", 1)
    if max_tokens is not None and length > max_tokens:
        raise reader.problem(f"its {length} tokens are more than the model's {max_tokens}")
    recent = reader.count("recent_tokens", 0)
    sinks = contents.sink_tokens
    first = reader.take("block_first", (None,), torch.int32).tolist()
    fill = reader.take("block_fill", (len(first),), torch.int32).tolist()
    expected = 0
    for start, count in zip(first, fill, strict=True):
        if start != expected or not 1 <= count <= BLOCK_TOKENS:
            raise reader.problem("its block table is not consistent")
        expected += count
    if expected > length:
        raise reader.problem("its block table is longer than the text")
    # Before anything is allocated, this refuses a batch or a length without positions in the file.
    pages = [
        reader.take(f"positions.{number}", (batch, PAGE_TOKENS), torch.int32)
        for number in range(-(-length // PAGE_TOKENS))
    ]
    table = SlotTable(batch, sinks, recent, contents.device)
    sink_slots = reader.take("sink_slots", (batch, sinks), torch.int32)
    if bool(((sink_slots >= length) | (sink_slots < -1)).any()):
        raise reader.problem("a sink lies outside the text")
    table.restore(length, array("i", first), array("i", fill), pages, sink_slots)
    return table


def _read_layer(
    reader: _Reader, contents: CacheContents, index: int, table: SlotTable, dropped: Any
) -> LayerStorage:
    storage = contents.new_storage(index, table.batch)
    pages = -(-table.blocks // PAGE_BLOCKS)
    if (
        not isinstance(dropped, int)
        or isinstance(dropped, bool)
        or not 0 <= dropped <= table.blocks // PAGE_BLOCKS
    ):
        raise reader.problem(f"dropped_pages of layer {index} is {dropped!r}")
    if dropped and contents.windows[index] is None:
        raise reader.problem(f"layer {index} sees all tokens, but pages of it are missing")
    tail = table.length - table.packed_slots
    for name in _EXACT:
        tokens = tail if name.startswith("tail") else contents.sink_tokens
        batch, heads, _, size = getattr(storage, name).shape
        shape = (batch, heads, tokens, size)
        setattr(storage, name, reader.take(f"layers.{index}.{name}", shape, getattr(storage, name).dtype))
    for kind, packed in (("key", storage.key), ("value", storage.value)):
        packed.dropped_pages, packed.blocks = dropped, table.blocks
        for number in range(pages - dropped):
            packed.pages.append(_read_page(reader, f"layers.{index}.{kind}.{number}.", packed))
    storage.length = table.length
    return storage


def _read_page(reader: _Reader, prefix: str, packed: PackedTensor) -> Page:
    layout, storage, batch = packed.layout, packed.dtype, packed.batch
    page = Page(reader.take(prefix + "codes", (batch, PAGE_BLOCKS * layout.words_per_block), torch.int32))
    if layout.token_params:
        page.token_params = reader.take(prefix + "token_params", (batch, PAGE_TOKENS, 2), storage)
    if layout.outlier_cap:
        lists = PAGE_BLOCKS * batch * layout.heads
        start = reader.take(prefix + "outlier_start", (lists + 1,), layout.start_dtype(batch))
        entries = int(start[-1])
        if int(start[0]) != 0 or bool((start[1:] < start[:-1]).any()):
            raise reader.problem(f"{prefix}outlier_start is not sorted")
        index = reader.take(prefix + "outlier_index", (entries,), torch.int16)
        if bool(((index & ((1 << COORDINATE_BITS) - 1)) >= layout.head_dim).any()):
            raise reader.problem(f"{prefix}outlier_index points outside a head")
        page.outlier_start, page.outlier_index = start, index
        page.outlier_residual = reader.take(prefix + "outlier_residual", (entries,), storage)
    return page
