"""The trellis codec: widths and codebooks of channels, turned pairs, thresholds in half precision."""

from dataclasses import replace

import pytest
import torch
from artifact_factory import random_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.codec.trellis import TrellisQuantizer, nearest_boundaries
from kvq_calib.codec.trellis_params import (
    TrellisParams,
    codebook_table,
    pack_codebooks,
    storable_levels,
    storable_thresholds,
)
from kvq_calib.schema.geometry import HeadShape, RopeSpec
from kvq_calib.schema.spec import TrellisSpec

HEADS, DIM = 2, 8
SHAPE = HeadShape(HEADS, DIM)
ROPE = RopeSpec(pairs=tuple((i, i + 4) for i in range(4)), inv_freq=(1.0, 0.5, 0.25, 0.125))


def values(tokens=50, seed=1, batch=2):
    return torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 2**31))
def test_with_one_state_codes_are_the_nearest_levels(max_bits, codebooks, seed):
    quantizer = random_quantizer(
        TrellisSpec(max_bits=max_bits, states=1), SHAPE, seed=seed, codebooks=codebooks
    )
    x = values(seed=seed)
    codes, u = quantizer.quantize(x).codes, quantizer.normalise(x).normalised
    for channel, width in enumerate(quantizer.widths):
        levels = quantizer.levels[channel, : 1 << width]
        distance = (u[..., channel, None] - levels).abs()
        chosen = distance.gather(-1, codes[..., channel, None].long())[..., 0]
        assert int(codes[..., channel].max()) < 1 << width
        torch.testing.assert_close(chosen, distance.amin(-1), atol=1e-6, rtol=0)


def test_boundaries_are_between_the_levels_that_are_used():
    levels = torch.tensor([[-1.0, 0.0, 1.0, 1.0], [-1.0, -0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]])
    found = nearest_boundaries(levels, torch.tensor([1, 2, 0]))
    assert found.tolist() == [[-0.5, torch.inf, torch.inf], [-0.75, 0, 0.75], [torch.inf] * 3]


def test_mixed_widths_use_their_own_levels_and_width_zero_its_only_one():
    rows = [torch.linspace(-1, 1, 1 if width == 0 else 2 << width) for width in range(4)]
    rows[0] = torch.tensor([0.25])
    rows = [storable_levels(row[None])[0] for row in rows]
    widths = torch.arange(4, dtype=torch.uint8)
    params = TrellisParams(widths, torch.cat(rows).half(), widths.clone(), torch.ones(4), torch.zeros(4))
    quantizer = TrellisQuantizer(TrellisSpec(max_bits=3), params, HeadShape(1, 4))
    x = torch.randn(2, 1, 50, 4, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    codes = quantizer.quantize(x).codes
    assert codes.amax((0, 1)).tolist() == [0, 1, 3, 7]
    seen = quantizer(x)
    assert (seen[..., 0] == 0.25).all()
    for width in range(1, 4):
        assert torch.isin(seen[..., width], rows[width]).all()


def test_packed_codebooks_are_those_that_are_used():
    spec = TrellisSpec(max_bits=2, states=1)
    table = torch.tensor([[9.0, 9, 9, 9], [-1, -0.5, 0.5, 1], [0, 1, 1, 1]])
    bits = torch.tensor([2, 1, 0, 2], dtype=torch.uint8)
    codebook, index = pack_codebooks(spec, bits, table, torch.tensor([1, 1, 2, 1]))
    assert (codebook.dtype, index.dtype) == (torch.float16, torch.uint8)
    assert codebook.tolist() == [-1, -0.5, -1, -0.5, 0.5, 1, 0]
    assert index.tolist() == [1, 0, 2, 1]
    params = TrellisParams(bits, codebook, index, torch.ones(4), torch.zeros(4))
    padded = codebook_table(spec, params)
    assert padded.tolist() == [[-1, -0.5, -0.5, -0.5], [-1, -0.5, 0.5, 1], [0, 0, 0, 0]]
    assert (
        codebook_table(spec, replace(params, codebook=padded)) is padded
    )  # as it is while levels are trained
    with pytest.raises(ValueError, match="no float16"):
        pack_codebooks(spec, bits, table + 1e-5, torch.tensor([1, 1, 2, 1]))


def test_more_codebooks_than_a_byte_can_number_are_refused():
    spec, table = TrellisSpec(max_bits=1, states=1), torch.tensor([[-1.0, 1.0]])
    for channels, message in ((256, None), (257, "has 257 codebooks, a codebook_index can name 256")):
        bits = torch.ones(channels, dtype=torch.uint8)
        levels, rows = table.expand(channels, 2), torch.arange(channels)
        if message is None:
            codebook, index = pack_codebooks(spec, bits, levels, rows)
            assert index.tolist() == list(range(256))
            params = TrellisParams(bits, codebook, index, torch.ones(channels), torch.zeros(channels))
            assert torch.equal(codebook_table(spec, params), levels)
        else:
            with pytest.raises(ValueError, match=message):
                pack_codebooks(spec, bits, levels, rows)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.sampled_from([1, 4]), st.integers(1, 3), st.integers(0, 2**31))
def test_heads_alone_keep_their_levels_and_no_codebook_that_others_use(max_bits, states, codebooks, seed):
    spec, shape = TrellisSpec(max_bits=max_bits, states=states), HeadShape(4, 3)
    whole = random_quantizer(spec, shape, seed=seed, codebooks=codebooks)
    part = whole.params.of_heads(spec, shape, 1, 2)
    mine = TrellisQuantizer(spec, part, HeadShape(2, 3))
    levels = whole.levels[3:9]
    assert torch.equal(mine.levels, levels[:, : mine.levels.shape[1]])
    assert mine.widths == whole.widths[3:9]
    TrellisQuantizer.check_values(spec, part.tensors())  # every codebook is used


def test_pairs_are_turned_and_turned_back():
    quantizer = random_quantizer(TrellisSpec(max_bits=7, pair_rotation=True), SHAPE, ROPE)
    x = values()
    y = quantizer.transform(x)
    torch.testing.assert_close(quantizer.inverse_transform(y), x, atol=1e-5, rtol=1e-5)
    angle = quantizer.pair_angle[1, 2]
    assert quantizer.pair_angle.dtype == torch.float32
    assert abs(float(angle)) > 0.01
    x0, x1 = x[0, 1, 7, 2], x[0, 1, 7, 6]
    torch.testing.assert_close(y[0, 7, DIM + 2], angle.cos() * x0 - angle.sin() * x1)
    torch.testing.assert_close(y[0, 7, DIM + 6], angle.sin() * x0 + angle.cos() * x1)


def test_channels_in_no_pair_are_not_turned():
    partial = RopeSpec(pairs=((0, 4), (1, 5)), inv_freq=(1.0, 0.5))
    quantizer = random_quantizer(TrellisSpec(max_bits=3, pair_rotation=True), SHAPE, partial)
    x = values()
    y = quantizer.transform(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    alone = [2, 3, 6, 7]
    assert torch.equal(y[..., alone], x[..., alone])
    assert not torch.equal(y[..., [0, 4]], x[..., [0, 4]])


def test_thresholds_are_stored_in_float16_where_that_reaches():
    scale, zero_point = torch.tensor([0.3, 1e-9, 5.0]), torch.tensor([-7.7, 0.0, 60000.0])
    stored_scale, stored_zero_point = storable_thresholds(scale, zero_point)
    assert stored_scale.dtype == stored_zero_point.dtype == torch.float16
    assert bool((stored_scale > 0).all())
    torch.testing.assert_close(stored_scale.float(), scale, rtol=2**-11, atol=2**-24)
    torch.testing.assert_close(stored_zero_point.float(), zero_point, rtol=2**-11, atol=0)
    kept = storable_thresholds(scale.double(), zero_point.double() * 2)
    assert [part.dtype for part in kept] == [torch.float32] * 2
    assert all(torch.equal(*pair) for pair in zip(kept, (scale, zero_point * 2), strict=True))


@pytest.mark.parametrize("states", [1, 4])
def test_thresholds_in_float16_mean_their_numbers(states):
    narrow = random_quantizer(TrellisSpec(max_bits=2, states=states), SHAPE, codebooks=2)
    scale, zero_point = narrow.params.scale, narrow.params.zero_point
    assert scale.dtype == zero_point.dtype == torch.float16
    wide = TrellisQuantizer(
        narrow.spec, replace(narrow.params, scale=scale.float(), zero_point=zero_point.float()), SHAPE
    )
    x = values(tokens=70)
    assert torch.equal(narrow.quantize(x).codes, wide.quantize(x).codes)
    assert torch.equal(narrow(x), wide(x))
    assert narrow(x).dtype == torch.float32
