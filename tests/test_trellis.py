"""The trellis codec: widths and computed levels of channels, pair rotation, coefficients in half precision."""

from dataclasses import replace

import pytest
import torch
from artifact_factory import random_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.codec.computed_levels import (
    coefficient_counts,
    computed_levels,
    level_places,
    store_levels,
    stored_coefficients,
)
from kvq_calib.codec.trellis import TrellisQuantizer, nearest_boundaries
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.schema.geometry import HeadShape, RopeSpec
from kvq_calib.schema.spec import TrellisSpec

HEADS, DIM = 2, 8
SHAPE = HeadShape(HEADS, DIM)
ROPE = RopeSpec(pairs=tuple((i, i + 4) for i in range(4)), inv_freq=(1.0, 0.5, 0.25, 0.125))


def values(tokens=50, seed=1, batch=2):
    return torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**31))
def test_with_one_state_codes_are_the_nearest_levels(max_bits, seed):
    quantizer = random_quantizer(TrellisSpec(max_bits=max_bits, states=1), SHAPE, seed=seed)
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


def test_levels_are_the_polynomial_at_every_place():
    spec, bits = TrellisSpec(max_bits=3), torch.arange(4, dtype=torch.uint8)
    coefficients = torch.tensor(
        [[0.25, 0, 0, 0, 0, 0], [1, 2, 0.5, 0.25, 0, 0], [0, 1, 0.25, 0.5, 0, 0], [-8, 4, -1, 2, 0.5, 1]]
    )
    found = computed_levels(coefficients, level_places(spec, bits))
    for channel, count in enumerate((1, 4, 8, 16)):
        for i in range(16):
            u = (2 * min(i, count - 1) + 1) / count - 1
            assert float(found[channel, i]) == sum(
                c * u**k for k, c in enumerate(coefficients[channel].tolist())
            )


def test_mixed_widths_use_their_own_levels_and_width_zero_its_only_one():
    spec, widths = TrellisSpec(max_bits=3), torch.arange(4, dtype=torch.uint8)
    exact = torch.tensor([[0.25, 0, 0, 0, 0, 0]] + [[0.0, 1, 0, 0, 0, 0]] * 3)
    params = TrellisParams(widths).with_levels(store_levels(spec, widths, exact))
    quantizer = TrellisQuantizer(spec, params, HeadShape(1, 4))
    x = torch.randn(2, 1, 50, 4, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    codes = quantizer.quantize(x).codes
    assert codes.amax((0, 1)).tolist() == [0, 1, 3, 7]
    seen = quantizer(x)
    assert (seen[..., 0] == 0.25).all()
    for width in range(1, 4):
        levels = torch.arange(1 - (2 << width), 2 << width, 2) / (2 << width)
        assert torch.isin(seen[..., width], levels).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.sampled_from([1, 4]), st.integers(0, 2**31))
def test_levels_come_back_from_how_they_are_stored(max_bits, states, seed):
    generator = torch.Generator().manual_seed(seed)
    spec = TrellisSpec(max_bits=max_bits, states=states)
    bits = torch.randint(0, max_bits + 1, (9,), generator=generator, dtype=torch.uint8)
    counts = coefficient_counts(spec, bits)
    levels = [spec.level_count(width) for width in bits.tolist()]
    assert counts.tolist() == [6 if count > 32 else min(count, 4) for count in levels]
    exact = torch.randn(9, 6, generator=generator) * (torch.arange(6) < counts[:, None])
    exact[:, 1] = exact[:, 1].abs() + 0.05 * exact[:, 2:].abs().sum(1)
    stored = store_levels(spec, bits, exact)
    assert [t.dtype for t in stored] == [torch.float16, torch.float16, torch.int8]
    assert [len(t) for t in stored] == [9, 9, int((counts - 2).clamp(min=0).sum())]
    found = stored_coefficients(spec, bits, stored)
    size = exact[:, 1:].abs().sum(1)
    torch.testing.assert_close(found[:, 0], exact[:, 0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[:, 1:].abs().sum(1), size, rtol=1e-3, atol=1e-6)
    # Half a step each, but the second coefficient takes the errors of all others.
    assert bool(((found - exact)[:, 2:].abs() <= (0.5 / 128 + 1e-3) * size[:, None]).all())
    assert bool(((found - exact)[:, 1].abs() <= (2.0 / 128 + 1e-3) * size).all())
    assert all(torch.equal(a, b) for a, b in zip(stored, store_levels(spec, bits, found), strict=True))
    far = store_levels(spec, bits, exact * 1e6)
    assert torch.equal(far.shape, stored.shape)
    if float(exact[:, 0].abs().max()) > 0.1:
        assert far.offset.dtype == torch.float32


def test_a_shape_leaves_something_to_the_second_coefficient():
    spec, bits = TrellisSpec(max_bits=1), torch.tensor([1, 1, 1], dtype=torch.uint8)
    exact = torch.zeros(3, 6)
    exact[:, :4] = torch.tensor([[0, 0, 0, 2.0], [0, 0, 1.0, 1.0], [0, 0, 0, 0]])
    stored = store_levels(spec, bits, exact)
    assert stored.shape.view(3, 2).tolist() == [[0, 127], [63, 64], [0, 0]]
    assert stored_coefficients(spec, bits, stored)[0].tolist() == [0, 2 / 128, 0, 2 * 127 / 128, 0, 0]
    assert not stored_coefficients(spec, bits, stored)[2].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.sampled_from([1, 4]), st.integers(0, 2**31))
def test_heads_alone_keep_their_levels(max_bits, states, seed):
    spec, shape = TrellisSpec(max_bits=max_bits, states=states), HeadShape(4, 3)
    whole = random_quantizer(spec, shape, seed=seed)
    part = whole.params.of_heads(spec, shape, 1, 2)
    mine = TrellisQuantizer(spec, part, HeadShape(2, 3))
    levels = whole.levels[3:9]
    assert torch.equal(mine.levels, levels[:, : mine.levels.shape[1]])
    assert mine.widths == whole.widths[3:9]
    TrellisQuantizer.check_values(spec, part.tensors())


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


@pytest.mark.parametrize("states", [1, 4])
def test_levels_in_float16_mean_their_numbers(states):
    narrow = random_quantizer(TrellisSpec(max_bits=2, states=states), SHAPE)
    offset, scale = narrow.params.level_offset, narrow.params.level_scale
    assert offset.dtype == scale.dtype == torch.float16
    params = replace(narrow.params, level_offset=offset.float(), level_scale=scale.float())
    wide = TrellisQuantizer(narrow.spec, params, SHAPE)
    x = values(tokens=70)
    assert torch.equal(narrow.quantize(x).codes, wide.quantize(x).codes)
    assert torch.equal(narrow(x), wide(x))
    assert narrow(x).dtype == torch.float32
