"""Like native_sanitized.py, for attention, dequantizing, packing, lists of outliers, and the scalar encoder.

Pages have random bits, and lists of outliers random starts and indices. Nothing may be read beyond its end.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
from native_sanitized import own, pointer

from kvq_calib.native.loader import (
    KvqAttention,
    KvqCodes,
    KvqDequantize,
    KvqJoin,
    KvqScalar,
    Library,
    library_of,
)

OK, BAD_ARGUMENT = 0, 2


class Memory:
    """Arrays that a call points to, each in memory of its own."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def keep(self, array: Any) -> int:
        self.held.append(own(np.ascontiguousarray(array)))
        return int(self.held[-1].ctypes.data)


def codes_of(generator: Any, memory: Memory, heads: int, size: int, bfloat: int) -> tuple[KvqCodes, int]:
    """How codes are read, any way; and whether there are lists of outliers."""
    channels, computed = heads * size, int(generator.integers(2))
    trellis = int(generator.integers(2))
    widths = generator.integers(0, 9 - trellis, channels)
    if not computed:
        widths[:] = widths[0]
    count = int(1 << (widths.max() + trellis)) if widths.max() else 1
    codes = KvqCodes(
        heads, size, trellis, int(generator.integers(2)) * (1 - computed), bfloat, 8 * int(widths.sum())
    )
    codes.level_count = 0 if computed else count
    codes.width = memory.keep(widths.astype(np.uint8))
    codes.offset = memory.keep((widths.cumsum() - widths).astype(np.int32))
    numbers = generator.standard_normal((channels, 6)).astype(np.float32)
    if computed:
        codes.coefficient = memory.keep(numbers)
    else:
        codes.level = memory.keep(np.sort(generator.standard_normal(count).astype(np.float32)))
    if not computed and (generator.integers(2) or not codes.token_scales):
        codes.scale = memory.keep(np.abs(numbers[:, 0]) + 0.1)
        codes.zero_point = memory.keep(numbers[:, 1])
    return codes, int(generator.integers(2))


def pages_of(generator: Any, memory: Memory, codes: KvqCodes, lists: int, batch: int, count: int) -> int:
    """Pages of any bits."""
    rows = np.zeros((count, 8), np.int64)
    for row in rows:
        row[0] = memory.keep(generator.integers(-(2**31), 2**31, (batch, codes.row_words)).astype(np.int32))
        if codes.token_scales:
            row[1] = memory.keep(generator.standard_normal((batch, 256, 2)).astype(np.float16))
        row[7] = batch
        if lists:
            entries, width = int(generator.integers(0, 40)), int(generator.choice([2, 4]))
            starts = generator.integers(-50, 90, 8 * batch * codes.heads + 1)
            row[2] = memory.keep(generator.integers(0, 2**16, entries).astype(np.uint16))
            row[3] = memory.keep(generator.standard_normal(entries).astype(np.float16))
            row[4] = memory.keep(starts.astype(np.int16 if width == 2 else np.int32))
            row[5:7] = width, entries
    return memory.keep(rows)


def attention(generator: Any, libraries: tuple[Library, Library]) -> None:
    """The two libraries on one call."""
    memory = Memory()
    heads, group, batch = (int(generator.integers(1, 4)) for _ in range(3))
    group = int(generator.choice([1, 2, 3, 5, 9])) if group else 1
    sizes = [int(generator.choice([1, 3, 16, 17, 33])) for _ in range(2)]
    bfloat, pages = 0, int(generator.integers(0, 7))
    (key, key_lists), (value, value_lists) = (
        codes_of(generator, memory, heads, size, bfloat) for size in sizes
    )
    spare, first = int(generator.integers(0, 3)), int(generator.integers(0, 3))
    tables = first + pages + spare
    call = KvqAttention(batch, group, pages, first, tables, int(generator.integers(1, 4)))
    call.first_token = int(generator.integers(0, 600))
    call.scale, call.softcap = 0.2, float(generator.choice([0.0, 1.5]))
    call.query = memory.keep(generator.standard_normal((batch, heads * group, sizes[0])).astype(np.float32))
    call.key_page = pages_of(generator, memory, key, key_lists, batch, pages)
    call.value_page = pages_of(generator, memory, value, value_lists, batch, pages)
    call.seen = memory.keep(generator.integers(0, 2**32, (batch, 8 * tables)).astype(np.uint32))
    counts = [int(generator.integers(0, 3)), int(generator.integers(0, 40))]
    for part, count in zip((call.sinks, call.tail), counts, strict=True):
        part.tokens = count
        for name, size in (("key", sizes[0]), ("value", sizes[1])):
            x = generator.standard_normal((batch, heads, count, size)).astype(np.float16)
            setattr(part, name, memory.keep(x))
            getattr(part, f"{name}_stride")[:] = (heads * count * size, count * size)
    exact = sum(counts)
    call.exact_seen = memory.keep(generator.integers(0, 2, (batch, exact)).astype(np.uint8))
    if generator.integers(2):
        call.sink_logit = memory.keep(generator.standard_normal(heads * group).astype(np.float32))
    turns = call.turns
    turns.pairs, turns.scaling = int(generator.integers(0, sizes[0] // 2 + 1)), 1.1
    turns.pair = memory.keep(generator.permutation(sizes[0])[: 2 * turns.pairs].astype(np.int32))
    if generator.integers(2):
        turns.own_cosine, turns.own_sine = (
            memory.keep(generator.random((heads, turns.pairs), np.float32)) for _ in range(2)
        )
    turns.block = memory.keep(generator.random((batch, tables, turns.pairs, 2, 8), np.float32))
    turns.exact = memory.keep(generator.random((batch, exact, 2, turns.pairs), np.float32))
    frequency = memory.keep(generator.random(turns.pairs))
    results = []
    for library in libraries:
        within = np.empty((turns.pairs, 64), np.float32)
        assert library.functions.kvq_turns_within(frequency, turns.pairs, within.ctypes.data) == OK
        turns.within = within.ctypes.data
        out = np.empty((batch, heads * group, sizes[1]), np.float32)
        call.out = out.ctypes.data
        assert library.functions.kvq_attend(*map(ctypes.byref, (key, value, call))) == OK
        results.append(out)
    assert np.allclose(*results, rtol=1e-4, atol=1e-4, equal_nan=True)
    for name, wrong in (
        ("batch", 0),
        ("pages", -1),
        ("first_page", spare + first + 1),
        ("group", 0),
        ("query", None),
    ):
        before = getattr(call, name)
        setattr(call, name, wrong)
        assert libraries[0].functions.kvq_attend(*map(ctypes.byref, (key, value, call))) == BAD_ARGUMENT, name
        setattr(call, name, before)
    dequantized(generator, libraries, memory, value, call.value_page, batch, pages)


def dequantized(
    generator: Any,
    libraries: tuple[Library, Library],
    memory: Memory,
    codes: KvqCodes,
    page: int,
    batch: int,
    pages: int,
) -> None:
    first = int(generator.integers(0, 8 * pages + 1))
    blocks = int(generator.integers(0, 8 * pages - first + 1))
    call = KvqDequantize(batch, pages, first, blocks, 2, 0, page, scaling=1.0)
    results = []
    for library in libraries:
        out = np.empty((batch, codes.heads, 32 * blocks, codes.size), np.float32)
        call.out = out.ctypes.data
        assert library.functions.kvq_dequantize(ctypes.byref(codes), ctypes.byref(call)) == OK
        results.append(out)
    assert np.allclose(*results, rtol=1e-4, atol=1e-4)
    call.blocks = 8 * pages - first + 1
    assert libraries[0].functions.kvq_dequantize(ctypes.byref(codes), ctypes.byref(call)) == BAD_ARGUMENT


def packing(generator: Any, libraries: tuple[Library, Library]) -> None:
    """The scalar encoder, then packing and lists of what it found; equal in both libraries."""
    memory = Memory()
    heads, size = int(generator.integers(1, 4)), int(generator.choice([1, 5, 16, 40]))
    channels, batch, blocks = heads * size, int(generator.integers(1, 4)), int(generator.integers(1, 4))
    bits, tokens = int(generator.integers(1, 9)), 32 * blocks
    levels = np.sort(generator.standard_normal(1 << bits).astype(np.float32))
    token, cap = int(generator.integers(2)), int(generator.integers(0, 4))
    codec = KvqScalar(
        heads, size, len(levels), int(generator.integers(2)), token, token * (channels > 2), cap
    )
    codec.level, codec.boundary = memory.keep(levels), memory.keep((levels[1:] + levels[:-1]) / 2)
    if not token or generator.integers(2):
        scale = np.abs(generator.standard_normal(channels)).astype(np.float32) + np.float32(0.1)
        codec.scale, codec.inverse = memory.keep(scale), memory.keep(1 / scale)
        codec.zero_point = memory.keep(scale / 2)
    x = memory.keep(generator.standard_normal((batch, heads, tokens, size)).astype(np.float32))
    strides = (ctypes.c_int64 * 3)(heads * tokens * size, size, tokens * size)
    widths = own(np.full(channels, bits, np.uint8))
    found = []
    for number, library in enumerate(libraries):
        functions, shape = library.functions, (batch, tokens, channels)
        codes, outliers, residual = (
            np.empty(shape, np.uint8),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.uint16),
        )
        scales = np.zeros((2, batch, tokens), np.uint16)
        arrays = [array.ctypes.data for array in (codes, scales, outliers, residual)]
        assert (
            functions.kvq_encode_scalar(ctypes.byref(codec), x, strides, batch, tokens, 1 + number, *arrays)
            == OK
        )
        first = 8 - blocks
        page = np.zeros((batch, 8 * bits * channels), np.int32)
        packed = (pointer(widths), channels, codes.ctypes.data, batch, blocks)
        assert functions.kvq_pack(*packed, first, page.ctypes.data) == OK
        assert functions.kvq_pack(*packed, first + 1, page.ctypes.data) == BAD_ARGUMENT
        entries, counts = int(outliers.sum()), np.empty((blocks, batch, heads), np.int32)
        index, listed = np.empty(entries, np.uint16), np.empty(entries, np.uint16)
        lists = (outliers.ctypes.data, residual.ctypes.data, batch, blocks, heads, size, counts.ctypes.data)
        assert functions.kvq_list_outliers(*lists, entries, index.ctypes.data, listed.ctypes.data) == OK
        found.append((codes, scales, outliers, residual, page, counts, index, listed))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def joining(generator: Any, libraries: tuple[Library, Library]) -> None:
    """New tokens behind a tail; equal in both libraries."""
    memory = Memory()
    batch, heads, tokens = (int(generator.integers(1, 4)) for _ in range(3))
    held, sizes = int(generator.integers(0, 4)), [int(generator.choice([2, 9, 16, 40])) for _ in range(2)]
    call = KvqJoin(batch, heads, held=held, tokens=tokens, bfloat=int(generator.integers(2)))
    for side, size in enumerate(sizes):
        call.size[side] = size
        call.tail[side] = memory.keep(
            generator.standard_normal((batch, heads, held, size)).astype(np.float16)
        )
        call.tail_stride[side][:] = (heads * held * size, held * size)
        call.x[side] = memory.keep(generator.standard_normal((batch, heads, tokens, size)).astype(np.float32))
        call.stride[side][:] = (heads * tokens * size, tokens * size, size)
    call.width, call.pairs = sizes[0], int(generator.integers(0, sizes[0] // 2 + 1))
    call.pair = memory.keep(generator.permutation(sizes[0])[: 2 * call.pairs].astype(np.int32))
    call.cosine, call.sine = (memory.keep(generator.random((tokens, sizes[0]), np.float32)) for _ in range(2))
    found = []
    for library in libraries:
        out = [np.empty((batch, heads, held + tokens, size), np.uint16) for size in sizes]
        call.out[:] = [array.ctypes.data for array in out]
        assert library.functions.kvq_join(ctypes.byref(call)) == OK
        found.append(out)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def main() -> None:
    libraries = tuple(library_of(sys.argv[1], Path(folder)) for folder in sys.argv[2:4])
    assert len(libraries) == 2
    generator = np.random.default_rng(0)
    for _ in range(60):
        attention(generator, libraries)
        packing(generator, libraries)
        joining(generator, libraries)
    print("equal")


if __name__ == "__main__":
    main()
