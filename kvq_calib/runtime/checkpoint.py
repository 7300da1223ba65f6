"""A filled cache as one safetensors file.

Tensors are named after the storage they come from; one metadata entry, ``kvq_cache``, holds the rest as
JSON. A reader derives the shape and dtype of every tensor from the artifact and that entry, and checks
before it uses any.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.packing import BLOCK_TOKENS, COORDINATE_BITS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.files import write_atomically
from kvq_calib.runtime.storage import LayerStorage, PackedTensor, Page, SlotTable

if TYPE_CHECKING:
    from kvq_calib.runtime.cache import KVQCache

__all__ = ["load_cache", "save_cache"]

FORMAT_VERSION = 1
_METADATA_KEY = "kvq_cache"
_EXACT = ("tail_key", "tail_value", "sink_key", "sink_value")


def _artifact_digest(artifact: KVArtifact) -> str:
    return hashlib.sha256(artifact.to_bytes()).hexdigest()


def save_cache(cache: KVQCache, path: str | os.PathLike[str]) -> None:
    """Write a filled cache; see :meth:`KVQCache.save`."""
    table = cache.table
    if table is None:
        raise RuntimeMismatchError("the cache is empty: there is nothing to save")
    tensors: dict[str, Tensor] = {"sink_slots": table.sink_slots}
    tensors["block_first"] = torch.tensor(table.first, dtype=torch.int32)
    tensors["block_fill"] = torch.tensor(table.fill, dtype=torch.int32)
    for number, positions in enumerate(table.position_pages):
        tensors[f"positions.{number}"] = positions
    for layer in cache.layers:
        prefix = f"layers.{layer.index}."
        for name in _EXACT:
            tensors[prefix + name] = getattr(layer.storage, name)
        for kind in ("key", "value"):
            for number, page in enumerate(getattr(layer.storage, kind).pages):
                for name, tensor in page.tensors().items():
                    tensors[f"{prefix}{kind}.{number}.{name}"] = tensor
    metadata = {
        "format_version": FORMAT_VERSION,
        "artifact": _artifact_digest(cache.artifact),
        "batch": table.batch,
        "length": table.length,
        "recent_tokens": table.recent_tokens,
        "dropped_pages": [layer.storage.key.dropped_pages for layer in cache.layers],
    }
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(
        path, safetensors.torch.save(data, {_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    )


class _Reader:
    """Hands out tensors by name, each checked and each once."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        try:
            data = path.read_bytes()
            self.tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            self.metadata: dict[str, Any] = json.loads(header["__metadata__"][_METADATA_KEY])
        except OSError as error:
            raise RuntimeMismatchError(f"cannot read {path}: {error.strerror or error}") from error
        except Exception as error:  # a hostile header can fail anywhere in the parser
            raise self.problem("it is not a cache of kvq-calib") from error

    def problem(self, what: str) -> RuntimeMismatchError:
        return RuntimeMismatchError(f"cannot use {self.path}: {what}")

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


def load_cache(cache: KVQCache, path: str | os.PathLike[str]) -> None:
    """Fill an empty cache from a file; see :meth:`KVQCache.load`. On an error the cache stays empty."""
    reader = _Reader(Path(path), cache.device)
    if reader.metadata.get("format_version") != FORMAT_VERSION:
        raise reader.problem(
            f"it has format version {reader.metadata.get('format_version')!r}, not {FORMAT_VERSION}"
        )
    # Caches saved before the artifact's format changed name the older file.
    names = {_artifact_digest(cache.artifact), cache.artifact.older_sha256}
    if reader.metadata.get("artifact") not in names - {None}:
        raise reader.problem("it was filled with another artifact")
    dropped = reader.metadata.get("dropped_pages")
    if not isinstance(dropped, list) or len(dropped) != len(cache.layers):
        raise reader.problem("dropped_pages does not fit the layers")
    table = _read_table(reader, cache)
    storages = [_read_layer(reader, cache, index, table, count) for index, count in enumerate(dropped)]
    if reader.tensors:
        raise reader.problem(f"tensor {sorted(reader.tensors)[0]} is unknown")
    cache.recent_tokens, cache.table = table.recent_tokens, table
    for layer, storage in zip(cache.layers, storages, strict=True):
        layer.storage = storage


def _read_table(reader: _Reader, cache: KVQCache) -> SlotTable:
    batch, length = reader.count("batch", 1), reader.count("length", 1)
    if cache.max_tokens is not None and length > cache.max_tokens:
        raise reader.problem(f"its {length} tokens are more than the model's {cache.max_tokens}")
    recent = reader.count("recent_tokens", 0)
    sinks = cache.artifact.spec.sink_tokens
    first = reader.take("block_first", (None,), torch.int32).tolist()
    fill = reader.take("block_fill", (len(first),), torch.int32).tolist()
    expected = 0
    for start, count in zip(first, fill, strict=True):
        if start != expected or not 1 <= count <= BLOCK_TOKENS:
            raise reader.problem("its block table is not consistent")
        expected += count
    if expected > length:
        raise reader.problem("its block table is longer than the text")
    table = SlotTable(batch, sinks, recent, cache.device)
    pages = [
        reader.take(f"positions.{number}", (batch, PAGE_TOKENS), torch.int32)
        for number in range(-(-length // PAGE_TOKENS))
    ]
    sink_slots = reader.take("sink_slots", (batch, sinks), torch.int32)
    if bool((sink_slots >= length).any()):
        raise reader.problem("a sink lies outside the text")
    table.restore(length, array("i", first), array("i", fill), pages, sink_slots)
    return table


def _read_layer(reader: _Reader, cache: KVQCache, index: int, table: SlotTable, dropped: Any) -> LayerStorage:
    ops = cache.layers[index].ops
    storage = LayerStorage(ops.key, ops.value, table.batch, table.sink_slots.shape[1], cache.device)
    pages = -(-table.blocks // PAGE_BLOCKS)
    if (
        not isinstance(dropped, int)
        or isinstance(dropped, bool)
        or not 0 <= dropped <= table.blocks // PAGE_BLOCKS
    ):
        raise reader.problem(f"dropped_pages of layer {index} is {dropped!r}")
    if dropped and cache.layers[index].sliding_window is None:
        raise reader.problem(f"layer {index} sees all tokens, but pages of it are missing")
    heads, size = ops.geometry.num_kv_heads, ops.geometry.head_dim
    tail = table.length - table.packed_slots
    for name in _EXACT:
        tokens = tail if name.startswith("tail") else table.sink_slots.shape[1]
        shape = (table.batch, heads, tokens, size)
        setattr(storage, name, reader.take(f"layers.{index}.{name}", shape, ops.key.storage))
    for kind, packed in (("key", storage.key), ("value", storage.value)):
        packed.dropped_pages, packed.blocks = dropped, table.blocks
        for number in range(pages - dropped):
            packed.pages.append(_read_page(reader, f"layers.{index}.{kind}.{number}.", packed))
    storage.length = table.length
    return storage


def _read_page(reader: _Reader, prefix: str, packed: PackedTensor) -> Page:
    layout, storage, batch = packed.layout, packed.quantizer.storage, packed.batch
    page = Page(reader.take(prefix + "codes", (batch, PAGE_BLOCKS * layout.words_per_block), torch.int32))
    if layout.token_params:
        page.token_params = reader.take(prefix + "token_params", (batch, PAGE_TOKENS, 2), storage)
    if layout.outlier_cap:
        lists = PAGE_BLOCKS * batch * layout.heads
        start = reader.take(prefix + "outlier_start", (lists + 1,), layout.start_dtype(batch))
        entries = int(start[-1])
        if int(start[0]) != 0 or bool((start.diff() < 0).any()):
            raise reader.problem(f"{prefix}outlier_start is not sorted")
        index = reader.take(prefix + "outlier_index", (entries,), torch.int16)
        if bool(((index & ((1 << COORDINATE_BITS) - 1)) >= layout.head_dim).any()):
            raise reader.problem(f"{prefix}outlier_index points outside a head")
        page.outlier_start, page.outlier_index = start, index
        page.outlier_residual = reader.take(prefix + "outlier_residual", (entries,), storage)
    return page
