"""As ``native_sanitized.py``, for the call that closes blocks of many layers: pages, scales and lists of outliers."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
from native_sanitized import case, own, pointer

from kvq_calib.native.loader import KvqBlock, KvqScalar, KvqTrellis, Library, library_of


def scalar_case(generator: Any) -> dict[str, Any]:
    """A scalar codec with any sizes."""
    heads, size, levels = (
        int(generator.integers(1, 4)),
        int(generator.choice([1, 3, 16, 18])),
        1 << int(generator.integers(1, 9)),
    )
    table = np.sort(generator.standard_normal(levels).astype(np.float32))
    scale = generator.random(heads * size, np.float32) + 0.5
    token_scales = bool(generator.integers(2))
    cap = int(generator.integers(0, min(4, heads * size + 1)))
    numbers = {
        "heads": heads,
        "size": size,
        "level_count": levels,
        "token_scales": token_scales,
        "outlier_cap": cap,
    }
    arrays = {"level": table, "boundary": (table[1:] + table[:-1]) / 2}
    if not token_scales or generator.integers(2):
        arrays |= {"scale": scale, "zero_point": np.zeros_like(scale), "inverse": 1 / scale}
    return {"numbers": numbers, "arrays": arrays, "width": levels.bit_length() - 1}


def close(library: Library, drawn: list[dict[str, Any]], batch: int, place: int, threads: int) -> list[Any]:
    """Everything that is written, in arrays of exactly the right size."""
    held: list[Any] = []
    written: list[Any] = []
    blocks = (KvqBlock * len(drawn))()

    def keep(array: Any) -> int | None:
        held.append(own(array))
        return pointer(held[-1])

    def write(*shape: int, dtype: Any = np.uint16) -> int | None:
        written.append(np.zeros(shape, dtype))
        return pointer(written[-1])

    for block, each in zip(blocks, drawn, strict=True):
        numbers, arrays = each["numbers"], {name: keep(array) for name, array in each["arrays"].items()}
        scalar = "size" in numbers
        codec = (KvqScalar if scalar else KvqTrellis)(**numbers, **arrays)
        held.append(codec)
        size = numbers["size"] if scalar else numbers["head_dim"]
        channels = numbers["heads"] * size
        if scalar:
            block.scalar, width = ctypes.addressof(codec), np.full(channels, each["width"])
        else:
            count = each["arrays"]["level_count"]
            bits = np.log2(count).astype(int) - (numbers["states"] > 1)
            block.trellis, width = ctypes.addressof(codec), np.where(count == 1, 0, bits)
        block.width = keep(width.astype(np.uint8))
        block.x = keep(each["x"].view(np.uint16))
        block.stride[:] = [32 * channels, 32 * size]
        block.page = write(batch, 8 * int(width.sum()), dtype=np.int32) if width.any() else None
        if scalar and numbers["token_scales"]:
            block.token = write(batch, 256, 2)
        if scalar and (cap := numbers["outlier_cap"]):
            block.index, block.listed = write(batch, 32 * cap), write(batch, 32 * cap)
            block.counts = write(batch, numbers["heads"], dtype=np.int32)
    status = library.functions.kvq_close_blocks(ctypes.addressof(blocks), len(drawn), batch, place, threads)
    assert status == 0, status
    return written


def main() -> None:
    checked, plain = (library_of(sys.argv[1], Path(folder)) for folder in sys.argv[2:4])
    generator = np.random.default_rng(0)
    for number in range(80):
        batch = int(generator.choice([1, 2, 3, 17]))
        drawn = [case(generator) if generator.integers(2) else scalar_case(generator) for _ in range(4)]
        for each in drawn:
            size = each["numbers"].get("size") or each["numbers"]["head_dim"]
            shape = (batch, each["numbers"]["heads"], 32, size)
            each["x"] = generator.standard_normal(shape).astype(np.float16)
        place = number % 8
        mine = close(checked, drawn, batch, place, 1 + number % 3)
        theirs = close(plain, drawn, batch, place, 1)
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)), number
    print("equal")


if __name__ == "__main__":
    main()
