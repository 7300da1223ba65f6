"""The scalar codec: nearest levels, exact outliers, caps, thresholds of every kind."""

import pytest
import torch
from artifact_factory import random_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.codec.outliers import cap_per_token
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.scalar import ScalarParams, ScalarQuantizer
from kvq_calib.codec.thresholds import reciprocal, token_thresholds
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import OutlierSpec, ScalarSpec

HEADS, DIM = 2, 8
SHAPE = HeadShape(HEADS, DIM)
CHANNELS = SHAPE.channels


def quantizer_of(bits: int = 3, seed: int = 0, **spec: object) -> Quantizer:
    return random_quantizer(ScalarSpec(bits=bits, **spec), SHAPE, seed=seed)


def values(tokens=50, seed=1, batch=2):
    return torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def by_head(channels):
    """``[B, T, C]`` to ``[B, H, T, D]``."""
    return channels.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_are_the_nearest_levels(bits):
    quantizer, x = quantizer_of(bits), values()
    codes = quantizer.quantize(x).codes
    u = quantizer.normalise(x).normalised
    distance = (u[..., None] - quantizer.shared_levels).abs()
    chosen = distance.gather(-1, codes[..., None].long())[..., 0]
    torch.testing.assert_close(chosen, distance.amin(-1), atol=1e-6, rtol=0)


def test_boundary_values_take_the_lower_code():
    params = ScalarParams(torch.tensor([[-1.0, 0.0]]), torch.ones(CHANNELS), torch.zeros(CHANNELS))
    quantizer = ScalarQuantizer(ScalarSpec(bits=1), params, SHAPE)
    assert quantizer.boundaries.tolist() == [-0.5]
    x = torch.full((1, HEADS, 1, DIM), -0.5)
    assert not quantizer.quantize(x).codes.any()
    assert quantizer.quantize(x + 1e-3).codes.all()


def test_dequantize_follows_the_formula():
    quantizer = quantizer_of()
    q, params = quantizer.quantize(values()), quantizer.params
    y = params.zero_point + params.scale * params.codebook[0][q.codes.long()]
    torch.testing.assert_close(quantizer.dequantize(q), by_head(y), atol=0, rtol=0)


@pytest.mark.parametrize("thresholds", ["channel", "token"])
def test_outliers_come_back_to_storage_precision(thresholds):
    outliers = OutlierSpec(fraction=0.05, max_per_token=CHANNELS)
    quantizer = quantizer_of(2, thresholds=thresholds, outliers=outliers)
    x = values()
    x[0, 1, 3, 2] = 37.0
    q = quantizer.quantize(x)
    found = by_head(q.outliers)
    assert bool(found[0, 1, 3, 2])
    restored = quantizer.dequantize(q)
    residual = by_head(q.residual.float().abs())[found]
    assert bool(((restored[found] - x[found]).abs() <= residual * 2**-11 + 1e-5).all())
    assert not q.residual[~q.outliers].any()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1000, 1000, width=32), min_size=8, max_size=8), min_size=1, max_size=5),
    per_side=st.integers(0, 3),
)
def test_token_thresholds_leave_out_no_more_than_asked(storage, rows, per_side):
    x = torch.tensor(rows)
    scale, zero_point = token_thresholds(x, per_side, storage)
    assert scale.dtype == zero_point.dtype == storage
    beyond = (x - zero_point.float()[:, None]).abs() > scale.float()[:, None]
    assert int(beyond.sum(-1).max()) <= 2 * per_side
    ordered = x.sort(-1).values
    kept = ordered[:, per_side : 8 - per_side]
    assert not ((kept - zero_point.float()[:, None]).abs() > scale.float()[:, None]).any()


def test_trimming_a_whole_token_is_refused():
    with pytest.raises(ValueError, match="cannot trim"):
        token_thresholds(torch.zeros(1, 4), 2, torch.float16)


@settings(max_examples=60, deadline=None)
@given(
    magnitudes=st.lists(st.lists(st.integers(0, 4), min_size=10, max_size=10), min_size=1, max_size=4),
    cap=st.integers(1, 6),
)
def test_ties_never_select_more_outliers_than_the_cap(magnitudes, cap):
    magnitude = torch.tensor(magnitudes, dtype=torch.float32)
    marked = magnitude > 1
    kept = cap_per_token(marked, magnitude, cap)
    assert not (kept & ~marked).any()
    for row, row_kept, row_marked in zip(magnitude, kept, marked, strict=True):
        candidates = [(-m, channel) for channel, m in enumerate(row.tolist()) if row_marked[channel]]
        assert row_kept.nonzero().flatten().tolist() == sorted(
            channel for _, channel in sorted(candidates)[:cap]
        )


def test_of_too_many_outliers_those_farthest_out_for_their_channels_stay():
    scale = torch.ones(CHANNELS)
    scale[:4] = 100.0
    spec = ScalarSpec(bits=2, outliers=OutlierSpec(fraction=0.05, max_per_token=2))
    params = ScalarParams(torch.tensor([[-1.0, -0.5, 0.5, 1.0]]), scale, torch.zeros(CHANNELS))
    y = torch.zeros(1, 1, CHANNELS)
    y[0, 0, 1], y[0, 0, 2], y[0, 0, 9], y[0, 0, 12] = 150.0, -400.0, 3.0, -5.0
    q = ScalarQuantizer(spec, params, SHAPE).quantize(by_head(y))
    assert q.outliers[0, 0].nonzero().flatten().tolist() == [2, 12]
    assert q.residual[0, 0, [2, 12]].tolist() == [-300.0, -4.0]


def test_a_tie_at_the_threshold_is_no_outlier():
    quantizer = quantizer_of(2, outliers=OutlierSpec(fraction=0.05, max_per_token=2))
    at_threshold = quantizer.zero_point + quantizer.scale
    exactly = (at_threshold - quantizer.zero_point).abs() == quantizer.scale
    assert exactly.any()
    assert not (quantizer.quantize(by_head(at_threshold[None, None])).outliers & exactly).any()


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0), (-0.0, -0.0)])
def test_thresholds_of_zeros_have_no_sign(zeros):
    for found in token_thresholds(torch.tensor([zeros]), 0, torch.float16):
        assert found.view(torch.int16).tolist() == [0]


@pytest.mark.parametrize("thresholds", ["channel", "token"])
def test_equal_elements_have_scale_zero_and_survive(thresholds):
    quantizer = quantizer_of(2, thresholds=thresholds)
    x = torch.full((1, HEADS, 3, DIM), 1.5)
    assert torch.equal(quantizer(x), x) == (thresholds == "token")
    assert reciprocal(torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.25]


def test_channel_normalisation_precedes_token_thresholds():
    spec = ScalarSpec(bits=8, thresholds="token_normalized", levels="uniform")
    scale, zero_point = torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS)
    quantizer = ScalarQuantizer(
        spec, ScalarParams(torch.linspace(-1, 1, 256)[None], scale, zero_point), SHAPE
    )
    x = values()
    error = ((quantizer(x) - x).transpose(1, 2).flatten(2) / scale).abs()
    span = quantizer.normalise(x).scale
    assert bool((error <= span / 255 * 1.01 + 1e-5).all())


def test_online_thresholds_come_from_the_sequence_itself():
    quantizer = quantizer_of(4, thresholds="channel_online", outliers=OutlierSpec(fraction=0.05))
    x = values(tokens=200)
    q = quantizer.quantize(x)
    low, high = torch.quantile(x[1, 0, :, 3], torch.tensor([0.025, 0.975]))
    torch.testing.assert_close(q.channel_scale[1, 0, 3], (high - low) / 2)
    torch.testing.assert_close(q.channel_zero_point[1, 0, 3], (high + low) / 2)
    assert torch.equal(quantizer.quantize(x[1:]).codes, q.codes[1:])
    assert float((quantizer(x) - x).abs().mean()) < 0.1 * float(x.abs().mean())


def test_what_cannot_stream_says_why():
    assert quantizer_of().cannot_stream() is None
    assert quantizer_of(thresholds="token").cannot_stream() is None
    assert "--set cache.key.thresholds=channel" in quantizer_of(thresholds="channel_online").cannot_stream()
    far = ScalarParams(
        torch.linspace(-1, 1, 8)[None], torch.ones(CHANNELS), torch.full((CHANNELS,), -65504.0)
    )
    for storage, message in (("float16", "reach 6.55e+04, more than float16 holds"), ("bfloat16", None)):
        quantizer = ScalarQuantizer(ScalarSpec(bits=3), far, SHAPE, storage_dtype=storage)
        reason = quantizer.cannot_stream()
        assert reason is None if message is None else message in reason


@pytest.mark.parametrize(
    ("thresholds", "fraction", "most", "meant", "cap"),
    [
        ("channel", 0.0, None, 0, 0),
        ("channel", 0.01, None, 1.92, 48),
        ("channel", 0.05, 3, 3, 3),
        ("token", 0.01, None, 2, 2),
        ("token_normalized", 0.05, None, 10, 10),
    ],
)
def test_outliers_that_are_meant(thresholds, fraction, most, meant, cap):
    outliers = OutlierSpec(fraction=fraction, max_per_token=most)
    spec, shape = ScalarSpec(bits=3, thresholds=thresholds, outliers=outliers), HeadShape(3, 64)
    assert ScalarQuantizer.nominal_outliers(spec, shape) == pytest.approx(meant)
    assert random_quantizer(spec, shape).outlier_cap == cap


def test_a_range_is_where_channels_have_thresholds():
    for thresholds in ("channel", "token_normalized"):
        quantizer = quantizer_of(thresholds=thresholds)
        centre, half = quantizer.channel_range()
        assert torch.equal(centre, quantizer.zero_point)
        assert torch.equal(half, quantizer.scale)
    for thresholds in ("token", "channel_online"):
        assert quantizer_of(thresholds=thresholds).channel_range() is None
