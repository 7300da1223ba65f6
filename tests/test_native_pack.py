"""What is stored is the same bit for bit with native kernels and with torch: scalar codes, packed words, outlier lists,
and new tokens behind the exact tail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artifact_factory import random_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from native_factory import variables
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PageLayout, pack_outliers
from kvq_calib.codec.scalar import ScalarQuantizer
from kvq_calib.model.rope import Rotation
from kvq_calib.native.encode_scalar import encode_scalar
from kvq_calib.native.join import Joiner
from kvq_calib.native.loader import Library
from kvq_calib.native.pack import list_outliers, pack_codes
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import ScalarSpec

#: Numbers beyond float16, subnormal there, tied, and of no size at all.
SIZES = st.sampled_from([1.0, 1e-6, 3e4, 1e5, 0.0])


def same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return mine.dtype == theirs.dtype and torch.equal(
        mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
    )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 8),
    thresholds=st.sampled_from(["channel", "token", "token_normalized"]),
    fraction=st.sampled_from([0.0, 0.02, 0.05]),
    cap=st.sampled_from([None, 1, 3]),
    storage=st.sampled_from(["float16", "bfloat16"]),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 7, 16, 33]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    steps=st.sampled_from([0.0, 0.5]),
    scale=SIZES,
)
def test_scalar_codes_are_those_of_torch(
    libraries: list[Library],
    seed: int,
    bits: int,
    thresholds: str,
    fraction: float,
    cap: int | None,
    storage: Any,
    heads: int,
    size: int,
    batch: int,
    tokens: int,
    steps: float,
    scale: float,
) -> None:
    channels = heads * size
    outliers = {"fraction": fraction, "max_per_token": cap} if fraction and channels > 2 else {}
    spec = ScalarSpec(bits=bits, thresholds=thresholds, outliers=outliers)
    drawn = random_quantizer(spec, HeadShape(heads, size), seed=seed)
    assert isinstance(drawn, ScalarQuantizer)
    quantizer = ScalarQuantizer(spec, drawn.params, drawn.shape, None, storage)
    x = torch.randn(batch, heads, tokens, size, generator=torch.Generator().manual_seed(seed))
    x = (x / steps).round() * steps if steps else x
    x[..., 0] *= scale
    with variables(KVQ_CALIB_OPS="torch"):
        want = quantizer.quantize(x)
    numbers = [part for part in (want.residual, want.token_scale, want.token_zero_point) if part is not None]
    for library in libraries:
        found = encode_scalar(library, quantizer.native_tables, x)
        if found is None:
            assert not all(bool(part.isfinite().all()) for part in numbers), library.isa
            continue
        assert same(found.codes, want.codes), library.isa
        assert same(found.outliers, want.outliers)
        assert same(found.residual, want.residual)
        for mine, theirs in zip(
            found.token or (None, None), (want.token_scale, want.token_zero_point), strict=True
        ):
            assert same(mine, theirs)


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0), (-0.0, -0.0)])
def test_thresholds_of_zeros_have_no_sign(libraries: list[Library], zeros: tuple[float, float]) -> None:
    quantizer = random_quantizer(ScalarSpec(bits=4, thresholds="token"), HeadShape(2, 1))
    x = torch.tensor(zeros).view(1, 2, 1, 1)
    for library in libraries:
        found = encode_scalar(library, quantizer.native_tables, x)
        assert found is not None
        assert found.token is not None
        for part in found.token:
            assert part.view(torch.int16).tolist() == [[0]], library.isa


def test_what_is_no_number_is_left_to_torch(libraries: list[Library]) -> None:
    quantizer = random_quantizer(ScalarSpec(bits=4, thresholds="token"), HeadShape(2, 8))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(1, 2, 40, 8)
        x[0, 1, 33, 3] = bad
        for library in libraries:
            assert encode_scalar(library, quantizer.native_tables, x) is None


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 5, 16, 24]),
    batch=st.integers(1, 3),
    first=st.integers(0, 7),
    blocks=st.integers(1, 8),
    density=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_pages_and_lists_are_those_of_torch(
    libraries: list[Library],
    seed: int,
    heads: int,
    size: int,
    batch: int,
    first: int,
    blocks: int,
    density: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = min(blocks, PAGE_BLOCKS - first)
    channels, tokens = heads * size, blocks * BLOCK_TOKENS
    widths = torch.randint(0, 9, (channels,), generator=generator)
    layout = PageLayout(tuple(widths.tolist()), heads, size, False, 0)
    codes = torch.randint(0, 256, (batch, tokens, channels), generator=generator)
    codes = (codes % (1 << widths)).to(torch.uint8)
    before = torch.randint(-(2**31), 2**31, (batch, 8 * sum(layout.widths)), generator=generator).int()
    want = before.clone()
    mask = torch.rand(codes.shape, generator=generator) < density
    residual = torch.randn(codes.shape, generator=generator).half()
    with variables(KVQ_CALIB_OPS="torch"):
        layout.write(want, codes, first)
        lists = pack_outliers(mask, residual, heads)
    for library in libraries:
        page = before.clone()
        pack_codes(library, widths.to(torch.uint8), codes, page, first)
        assert torch.equal(page, want), library.isa
        index, listed, counts = list_outliers(library, mask, residual, heads)
        assert torch.equal(counts, lists.counts)
        assert torch.equal(index, lists.index)
        assert same(listed, lists.residual)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Half-split, as most models have it."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return turned(q), turned(k)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    held=st.integers(0, 5),
    tokens=st.integers(1, 40),
    size=st.sampled_from([4, 16, 20]),
    value_size=st.sampled_from([1, 16, 9]),
    width=st.sampled_from([0, 4]),
    storage=st.sampled_from([torch.float16, torch.bfloat16]),
    shared=st.booleans(),
    scale=st.sampled_from([1.0, 1e-5, 1e-7, 3e4, 1e5]),
)
def test_new_tokens_behind_the_tail_are_those_of_torch(
    libraries: list[Library],
    seed: int,
    batch: int,
    heads: int,
    held: int,
    tokens: int,
    size: int,
    value_size: int,
    width: int,
    storage: torch.dtype,
    shared: bool,
    scale: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys = scale * drawn(batch, tokens, heads, size).transpose(1, 2)  # as models have them
    values = scale * drawn(batch, heads, tokens, value_size)
    tail = (
        drawn(batch, heads, held + 2, size)[:, :, 2:].to(storage),
        drawn(batch, heads, held, value_size).to(storage),
    )
    angle = 100 * drawn(1 if shared else batch, tokens, (width or size) // 2).repeat(1, 1, 2)
    rotation = Rotation(rotary, angle.cos(), angle.sin())
    pairs = tuple((i, i + (width or size) // 2) for i in range((width or size) // 2))
    assert rotation.turns(pairs, size)
    new = rotation.unrotate(keys).to(storage), values.to(storage)
    for library in libraries:
        joiner = Joiner(library, storage, torch.tensor(pairs, dtype=torch.int32))
        found = joiner.join(tail, (keys, values), rotation.inverse)
        if found is None:
            assert not all(bool(x.isfinite().all()) for x in new)
            continue
        for mine, before, after in zip(found, tail, new, strict=True):
            assert same(mine, torch.cat((before, after), 2)), library.isa
        plain = joiner.join(tail, (keys, values), None)
        assert plain is None or same(plain[0][:, :, held:], keys.to(storage))


def test_another_rotation_is_left_to_torch() -> None:
    def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(2 * x for x in rotary(q, k, cos, sin))  # type: ignore[return-value]

    angle = torch.randn(1, 3, 8).repeat(1, 1, 2)
    pairs = tuple((i, i + 8) for i in range(8))
    assert Rotation(rotary, angle.cos(), angle.sin()).turns(pairs, 16)
    assert not Rotation(scaled, angle.cos(), angle.sin()).turns(pairs, 16)
    assert not Rotation(rotary, angle.cos(), angle.sin()).turns(pairs[:-1], 16)
    assert not Rotation(rotary, angle.cos(), angle.sin()).turns(pairs, 12)
