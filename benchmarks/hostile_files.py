"""Damaged and hostile safetensors files, for robustness.py.

This module does not depend on the artifact format: it takes tensors by their names in the header, and metadata as any
JSON. The only exception is the digest. If the metadata has the digest of docs/reference/format.md, an attacker can
compute it, too. So half of the changed headers get a correct digest, in order to reach the checks of values.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

#: Placeholder in a header for text that no JSON writer would write.
_RAW = "@raw@"
_RAW_TEXTS = (
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    "1" * 5000,
    "[" * 100_000,
    '{"a":' * 5000,
    "",
    "nul",
    '"\\ud800"',
)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 255, 256, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**300, 0.5, 1e-320, "",
    "x" * 100_000, "../../etc/passwd", "\0", "key", [], [[]], {}, {"a": 1}, [None], list(range(10_000)),
    [[0] * 300] * 300,
)  # fmt: skip
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_DTYPES = (*_TORCH_NAMES, "F8_E4M3", "U64", "C64", "F4", "f32", "", "object")


@dataclass
class Parts:
    """The parts of a safetensors file.

    Attributes:
        header: tensors by name, and ``__metadata__``.
        body: the bytes of all tensors.
    """

    header: dict[str, Any]
    body: bytearray

    @classmethod
    def of(cls, data: bytes) -> Parts:
        """Split a valid file."""
        size = int.from_bytes(data[:8], "little")
        return cls(json.loads(data[8 : 8 + size]), bytearray(data[8 + size :]))

    def joined(self) -> bytes:
        """The file as bytes."""
        text = json.dumps(self.header)
        for number, raw in enumerate(_RAW_TEXTS):
            text = text.replace(json.dumps(f"{_RAW}{number}"), raw)
        encoded = text.encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded + bytes(self.body)

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(name for name in self.header if name != "__metadata__")

    def content(self, name: str) -> bytes:
        """The bytes of one tensor."""
        first, stop = self.header[name]["data_offsets"]
        return bytes(self.body[first:stop])

    def metadata(self) -> tuple[str, Any]:
        """The single entry of the metadata, and the JSON in it."""
        ((key, text),) = self.header["__metadata__"].items()
        return key, json.loads(text)

    def set_metadata(self, key: str, value: Any) -> None:
        """Write JSON by rule 2 of docs/reference/format.md, but allow text that is not JSON."""
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        for number, raw in enumerate(_RAW_TEXTS):
            text = text.replace(json.dumps(f"{_RAW}{number}"), raw)
        self.header["__metadata__"] = {key: text}


def digest(parts: Parts) -> str:
    """The digest of the file, as in docs/reference/format.md."""
    _, metadata = parts.metadata()
    metadata.pop("digest", None)
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    state = hashlib.sha256(text.encode())
    for name in parts.tensors:
        dtype, shape = f"torch.{_TORCH_NAMES[parts.header[name]['dtype']]}", list(parts.header[name]["shape"])
        state.update(f"\n{name} {dtype} {shape}\n".encode() + parts.content(name))
    return state.hexdigest()


def can_sign(data: bytes) -> bool:
    """Whether the file has a digest that equals the result of :func:`digest`."""
    parts = Parts.of(data)
    stated = parts.metadata()[1].get("digest")
    return stated is not None and stated == digest(parts)


def signed(data: bytes) -> bytes:
    """The file with the digest of its present content; unchanged if that cannot be computed."""
    try:
        parts = Parts.of(data)
        key, metadata = parts.metadata()
        metadata["digest"] = digest(parts)
        parts.set_metadata(key, metadata)
        return parts.joined()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data


# ----------------------------------------------------------------------------------------- damaged bytes

Draw = random.Random
Mutation = Callable[[Draw, bytes], bytes]


def _flip(draw: Draw, data: bytes, first: int, stop: int) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(first, stop)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip_bits(draw: Draw, data: bytes) -> bytes:
    return _flip(draw, data, 0, len(data))


def flip_header_bits(draw: Draw, data: bytes) -> bytes:
    return _flip(draw, data, 0, _header_end(data))


def overwrite(draw: Draw, data: bytes) -> bytes:
    first = draw.randrange(len(data))
    run = min(draw.choice((1, 8, 64, 4096)), len(data) - first)
    return data[:first] + draw.choice((bytes(run), b"\xff" * run, draw.randbytes(run))) + data[first + run :]


def cut(draw: Draw, data: bytes) -> bytes:
    return data[: draw.choice((draw.randrange(len(data)), draw.randrange(_header_end(data)), len(data) - 1))]


def grow(draw: Draw, data: bytes) -> bytes:
    return data + draw.choice((b"\0", b"\0" * 8, draw.randbytes(draw.randrange(1, 1000)), data))


def remove_piece(draw: Draw, data: bytes) -> bytes:
    first = draw.randrange(len(data) - 1)
    return data[:first] + data[first + draw.randint(1, min(4096, len(data) - first)) :]


def lie_about_header(draw: Draw, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    lies = (
        0,
        1,
        8,
        size - 8,
        size - 1,
        size + 1,
        size + 8,
        len(data),
        len(data) - 8,
        2**31,
        2**63,
        2**64 - 1,
    )
    return draw.choice((*lies, draw.randrange(2**64))).to_bytes(8, "little") + data[8:]


# ---------------------------------------------------------------------------------------- changed header


def _changed(change: Callable[[Draw, Parts], None]) -> Mutation:
    def mutation(draw: Draw, data: bytes) -> bytes:
        parts = Parts.of(data)
        change(draw, parts)
        return parts.joined()

    return mutation


def _hostile(draw: Draw) -> Any:
    return draw.choice((*_VALUES, *(f"{_RAW}{number}" for number in range(len(_RAW_TEXTS)))))


def change_offsets(draw: Draw, parts: Parts) -> None:
    entry = parts.header[draw.choice(parts.tensors)]
    first, stop = entry["data_offsets"]
    size, end = stop - first, len(parts.body)
    entry["data_offsets"] = draw.choice((
        [stop, first], [first, end], [0, size], [end - size, end], [first + 1, stop + 1], [first, stop - 1],
        [first, stop + 8], [end, end + size], [-size, 0], [first, 2**63], [2**64 - size, 2**64], [first],
        [first, stop, stop], _hostile(draw), [_hostile(draw), _hostile(draw)], [first, first],
    ))  # fmt: skip


def change_shape_or_dtype(draw: Draw, parts: Parts) -> None:
    entry = parts.header[draw.choice(parts.tensors)]
    shape = entry["shape"]
    if draw.random() < 0.4:
        entry["dtype"] = draw.choice((*_DTYPES, _hostile(draw)))
    else:
        entry["shape"] = draw.choice((
            shape[::-1], [1, *shape], [*shape, 1], shape[1:], [0], [], [2**32, 2**32], [2**63], [-1], [-2, -2],
            [1.0], ["1"], [0, 2**62], [1] * 1000, _hostile(draw), [_hostile(draw)],
        ))  # fmt: skip


def swap_tensors(draw: Draw, parts: Parts) -> None:
    names = parts.tensors
    one = draw.choice(names)

    def looks(name: str) -> tuple[Any, Any]:
        return parts.header[name]["dtype"], parts.header[name]["shape"]

    alike = [name for name in names if name != one and looks(name) == looks(one)]
    other = draw.choice(alike or names)
    parts.header[one], parts.header[other] = parts.header[other], parts.header[one]


def drop_tensor(draw: Draw, parts: Parts) -> None:
    """Drop one tensor and its bytes, so that the file is valid safetensors."""
    name = draw.choice(parts.tensors)
    first, stop = parts.header.pop(name)["data_offsets"]
    del parts.body[first:stop]
    for other in parts.tensors:
        start, end = parts.header[other]["data_offsets"]
        if start >= stop:
            parts.header[other]["data_offsets"] = [start - (stop - first), end - (stop - first)]


def rename_tensor(draw: Draw, parts: Parts) -> None:
    name = draw.choice(parts.tensors)
    new = draw.choice(
        (
            name + "x",
            name.upper(),
            "",
            "__metadata__ ",
            "layers.999.key.scale",
            "../" + name,
            "\0",
            "x" * 10_000,
        )
    )
    parts.header[new] = parts.header.pop(name)


def add_tensor(draw: Draw, parts: Parts) -> None:
    """Add a tensor: a copy of another, or one of an unusual shape."""
    like = parts.header[draw.choice(parts.tensors)]
    dtype, shape, data = draw.choice((
        (like["dtype"], like["shape"], bytes(parts.body[slice(*like["data_offsets"])])), ("F32", [], b"\0" * 4),
        ("F32", [0], b""), ("F16", [1, 0, 3], b""), ("BOOL", [1], b"\2"), ("F64", [1], b"\xff" * 8),
    ))  # fmt: skip
    name = draw.choice(parts.tensors) + draw.choice((".more", "2", " "))
    parts.header[name] = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [len(parts.body), len(parts.body) + len(data)],
    }
    parts.body += data


def change_values(draw: Draw, parts: Parts) -> None:
    """Change numbers of one tensor: some or all to zero, the largest value, NaN, or random bits."""
    first, stop = parts.header[draw.choice(parts.tensors)]["data_offsets"]
    begin = draw.choice((first, draw.randrange(first, max(stop, first + 1))))
    size = stop - begin
    fill = draw.choice(
        (b"\0", b"\xff", b"\x7f", b"\x00\x7c", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x01", b"")
    )
    parts.body[begin:stop] = (fill * size)[:size] if fill else draw.randbytes(size)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All places in JSON: a container, and a key or index in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def change_metadata(draw: Draw, parts: Parts) -> None:
    """Change one place of the JSON: another value, a similar value, removed, or an addition beside it."""
    key, metadata = parts.metadata()
    container, place = draw.choice(list(_places(metadata)))
    how = draw.randrange(4)
    if how == 0:
        del container[place]
    elif how == 1 and isinstance(container, dict):
        container[draw.choice(("unknown", "", "digest", "spec", "\0", str(place) + " "))] = _hostile(draw)
    elif how == 2:
        container[place] = _near(draw, container[place])
    else:
        container[place] = _hostile(draw)
    parts.set_metadata(key, metadata)


def _near(draw: Draw, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw.choice((value + 1, value - 1, -value, value * 2, str(value), float(value)))
    if isinstance(value, str):
        return draw.choice((value + " ", value[:-1], value[::-1], value.upper(), [value]))
    if isinstance(value, list):
        return draw.choice((value[:-1], value * 2, value[::-1], [value], value[:1]))
    return draw.choice(([value], None, {}))


def replace_metadata(draw: Draw, parts: Parts) -> None:
    """Replace the whole metadata text."""
    ((key, text),) = parts.header["__metadata__"].items()
    texts = (
        "",
        "{}",
        "[]",
        "null",
        "1",
        '"x"',
        text[:-1],
        text + text,
        f"[{text}]",
        text.replace(":", ";", 1),
        "\0",
    )
    parts.header["__metadata__"] = draw.choice((
        *({key: text} for text in (*texts, *_RAW_TEXTS, json.dumps({"format_version": 1e3}))), {},
        {key + "x": text}, None, [text], {key: text, "other": text}, {key: 5}, {key: None}, text,
    ))  # fmt: skip


DAMAGES: tuple[Mutation, ...] = (
    flip_bits,
    flip_header_bits,
    overwrite,
    cut,
    grow,
    remove_piece,
    lie_about_header,
)
CHANGES: tuple[Callable[[Draw, Parts], None], ...] = (
    change_offsets, change_shape_or_dtype, swap_tensors, drop_tensor, rename_tensor, add_tensor, change_values,
    change_metadata, change_metadata, replace_metadata,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Attributes:
        name: name of the change.
        data: its content.
        forged: whether it has a new, correct digest; then it may be another valid file.
    """

    name: str
    data: bytes
    forged: bool = False


def hostile_file(data: bytes, draw: Draw, sign: bool) -> Case:
    """Make a hostile file from a valid one.

    Args:
        data: the valid file.
        draw: random generator.
        sign: whether the digest can be computed, see :func:`can_sign`.
    """
    if draw.random() < 0.45:
        damage = draw.choice(DAMAGES)
        return Case(damage.__name__, damage(draw, data))
    change = draw.choice(CHANGES)
    changed = _changed(change)(draw, data)
    name = change.__name__
    if sign and draw.random() < 0.5:
        return Case(f"{name}, signed", signed(changed), forged=True)
    return Case(name, changed)
