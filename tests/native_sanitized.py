"""Calls a library that was compiled with sanitizers, with arrays of exactly the right size. A test runs it.

It does not use torch, which sanitizers do not support well. It prints "equal" if the codes equal those of the normal
library.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kvq_calib.native.loader import KvqTrellis, Library, library_of


def own(array: Any) -> Any:
    """A copy in memory of its own, with nothing before or behind it."""
    copy = np.empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def pointer(array: Any) -> int | None:
    return None if array is None else array.ctypes.data


def case(generator: Any) -> dict[str, Any]:
    """A quantizer and its input, with any sizes."""
    heads, size = int(generator.integers(1, 4)), int(generator.choice([1, 3, 4, 7, 16, 18]))
    states, channels = int(generator.choice([1, 4])), heads * size
    widths = generator.integers(0, 8 if states == 4 else 9, channels)
    counts = np.where(widths == 0, 1, 1 << (widths + (states > 1)))
    stride = int(counts.max() + generator.integers(0, 3))
    numbers = {
        "heads": heads,
        "head_dim": size,
        "states": states,
        "level_stride": stride,
        "refinement_passes": 0,
        "size_classes": 0,
        "pairs": 0,
    }
    arrays: dict[str, Any] = {
        "level_count": counts.astype(np.int32),
        "levels": np.sort(generator.standard_normal((channels, stride)).astype(np.float32), 1),
    }
    if generator.integers(2):
        arrays["shares"] = (generator.standard_normal((heads, size, size)) / size).astype(np.float32)
        if generator.integers(2):
            arrays["refinement_shares"] = own(arrays["shares"])
            numbers["refinement_passes"] = int(generator.integers(0, 3))
    if generator.integers(2):
        classes = int(generator.integers(1, 33))
        numbers["size_classes"] = classes
        arrays["class_weight"] = generator.random((heads, classes), np.float32)
        arrays["size_edges"] = np.sort(generator.random((heads, classes - 1), np.float32) * size, 1)
    if states == 4 and "shares" not in arrays and generator.integers(2):
        arrays["feedback"] = generator.uniform(-1, 1, heads).astype(np.float32)
    if generator.integers(2):
        numbers["pairs"] = pairs = int(generator.integers(0, size // 2 + 1))
        arrays["pair"] = generator.permutation(size)[: 2 * pairs].astype(np.int32).reshape(pairs, 2)
        arrays["cosine"], arrays["sine"] = generator.random((2, heads, pairs), np.float32)
    batch, tokens = int(generator.integers(1, 4)), int(generator.integers(1, 330))
    # Heads before tokens or after them.
    by_head = bool(generator.integers(2))
    shape = (batch, heads, tokens, size) if by_head else (batch, tokens, heads, size)
    x = generator.standard_normal(shape).astype(np.float32)
    weight = generator.random((batch, tokens, heads), np.float32) if generator.integers(2) else None
    return {"numbers": numbers, "arrays": arrays, "x": x, "weight": weight, "by_head": by_head}


def call(library: Library, drawn: dict[str, Any], codec: KvqTrellis, threads: int) -> tuple[int, Any, Any]:
    """Status, codes and what was coded."""
    x, weight = own(drawn["x"]), None if drawn["weight"] is None else own(drawn["weight"])
    steps = [step // 4 for step in x.strides[:3]]
    batch, tokens = x.shape[0], x.shape[2 if drawn["by_head"] else 1]
    strides = (steps[0], steps[2], steps[1]) if drawn["by_head"] else tuple(steps)
    shape = (batch, tokens, drawn["numbers"]["heads"] * drawn["numbers"]["head_dim"])
    found, coded = np.empty(shape, np.uint8), np.empty(shape, np.float32)
    status = library.functions.kvq_encode_trellis(
        ctypes.byref(codec),
        pointer(x),
        (ctypes.c_int64 * 3)(*strides),
        pointer(weight),
        batch,
        tokens,
        threads,
        pointer(found),
        pointer(coded),
    )
    return status, found, coded


def codes(library: Library, drawn: dict[str, Any], threads: int) -> tuple[Any, Any]:
    """Codes and what was coded."""
    arrays = {name: own(array) for name, array in drawn["arrays"].items()}
    codec = KvqTrellis(**drawn["numbers"], **{name: pointer(array) for name, array in arrays.items()})
    status, found, coded = call(library, drawn, codec, threads)
    assert status == 0, status
    return found, coded


def refused(library: Library, drawn: dict[str, Any]) -> None:
    """Numbers that would lead beyond the arrays."""
    for name, value in (
        ("heads", 0),
        ("heads", 1 << 20),
        ("head_dim", -1),
        ("head_dim", 1 << 20),
        ("states", 2),
        ("refinement_passes", -1),
        ("size_classes", -1),
        ("level_stride", 0),
        ("pairs", -1),
        ("pairs", 1 << 20),
    ):
        arrays = {each: pointer(array) for each, array in drawn["arrays"].items()}
        codec = KvqTrellis(**{**drawn["numbers"], name: value}, **arrays)
        status, _, _ = call(library, drawn, codec, 1)
        assert status == 2, (name, value, status)


def main() -> None:
    isa, checked, plain = sys.argv[1], *(library_of(sys.argv[1], Path(folder)) for folder in sys.argv[2:4])
    generator = np.random.default_rng(0)
    for number in range(120):
        drawn = case(generator)
        mine, theirs = codes(checked, drawn, 1 + number % 3), codes(plain, drawn, 1)
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)), (isa, number)
    refused(checked, drawn)
    print("equal")


if __name__ == "__main__":
    main()
