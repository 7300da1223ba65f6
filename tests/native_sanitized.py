"""Calls a library that was compiled with sanitizers on arrays of exactly the size they must have; run by a test.

Without torch, which sanitizers know too little of. Prints "equal" where the codes are those of the plain library.
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
    }
    arrays: dict[str, Any] = {
        "level_count": counts.astype(np.int32),
        "levels": np.sort(generator.standard_normal((channels, stride)).astype(np.float32), 1),
    }
    if generator.integers(2):
        scale = np.exp(generator.standard_normal(channels)).astype(np.float32)
        arrays |= {"scale": scale, "inverse": 1 / scale, "zero_point": scale * np.float32(0.5)}
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
    batch, tokens = int(generator.integers(1, 4)), int(generator.integers(1, 330))
    y = generator.standard_normal((batch, tokens, channels)).astype(np.float32)
    weight = generator.random((batch, tokens, heads), np.float32) if generator.integers(2) else None
    return {"numbers": numbers, "arrays": arrays, "y": y, "weight": weight}


def codes(library: Library, drawn: dict[str, Any], threads: int) -> tuple[Any, Any]:
    """Codes and what was coded."""
    arrays = {name: own(array) for name, array in drawn["arrays"].items()}
    codec = KvqTrellis(**drawn["numbers"], **{name: pointer(array) for name, array in arrays.items()})
    y, weight = own(drawn["y"]), None if drawn["weight"] is None else own(drawn["weight"])
    found, coded = np.empty(y.shape, np.uint8), np.empty(y.shape, np.float32)
    status = library.functions.kvq_encode_trellis(
        ctypes.byref(codec),
        pointer(y),
        pointer(weight),
        *y.shape[:2],
        threads,
        pointer(found),
        pointer(coded),
    )
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
    ):
        arrays = {each: pointer(array) for each, array in drawn["arrays"].items()}
        codec = KvqTrellis(**{**drawn["numbers"], name: value}, **arrays)
        y, found = drawn["y"], np.empty(drawn["y"].shape, np.uint8)
        status = library.functions.kvq_encode_trellis(
            ctypes.byref(codec), pointer(y), None, *y.shape[:2], 1, pointer(found), None
        )
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
