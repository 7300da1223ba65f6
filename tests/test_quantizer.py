"""The reference numerics: nearest levels, exact outliers, caps, token thresholds, transforms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.calibrate.error_compensation import compensation_factors
from kvq_calib.codec.quantizer import (
    Quantizer,
    QuantParams,
    cap_per_token,
    codebook_boundaries,
    reciprocal,
    storable_thresholds,
    token_thresholds,
)
from kvq_calib.schema.geometry import LayerGeometry, RopeSpec
from kvq_calib.schema.spec import OutlierSpec, QuantSpec

HEADS, DIM = 2, 8
CHANNELS = HEADS * DIM
SHAPE = LayerGeometry(num_query_heads=4, num_kv_heads=HEADS, head_dim=DIM)
ROPE = RopeSpec(pairs=tuple((i, i + 4) for i in range(4)), inv_freq=(1.0, 0.5, 0.25, 0.125))
CHANNEL = {"granularity": "channel"}
TOKEN = {"granularity": "token", "dynamic": True}


def params(bits, *, static=True, seed=0, phase=False, rotation=False):
    """Random sorted codebooks for channels of the given widths (a number, or one for each channel)."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor([bits] * CHANNELS if isinstance(bits, int) else bits, dtype=torch.uint8)
    distinct = sorted(set(widths.tolist()))
    codebook = torch.zeros(len(distinct), 1 << max(distinct))
    for row, width in enumerate(distinct):
        levels = (torch.rand(1 << width, generator=generator) * 2 - 1).sort().values
        codebook[row] = levels[-1]
        codebook[row, : 1 << width] = levels
    index = torch.tensor([distinct.index(w) for w in widths.tolist()], dtype=torch.int32)
    return QuantParams(
        widths,
        codebook,
        index,
        scale=torch.rand(CHANNELS, generator=generator) + 0.5 if static else None,
        zero_point=torch.randn(CHANNELS, generator=generator) if static else None,
        phase=torch.randn(HEADS, 4, generator=generator) if phase else None,
        rotation=torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator))[0] if rotation else None,
    )


def values(tokens=50, seed=1, batch=2):
    return torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6]])
def test_codes_are_the_nearest_levels(bits):
    spec = QuantSpec(
        bits=8 if isinstance(bits, list) else bits, variable_bits=isinstance(bits, list), **CHANNEL
    )
    quantizer = Quantizer(spec, params(bits), SHAPE)
    x = values()
    got = quantizer.quantize(x)
    u = quantizer.normalise(x).normalised
    for channel in range(CHANNELS):
        width = int(quantizer.params.bits[channel])
        levels = quantizer.levels[channel, : 1 << width]
        distance = (u[..., channel, None] - levels).abs()
        chosen = distance.gather(-1, got.codes[..., channel, None].long())[..., 0]
        assert int(got.codes[..., channel].max()) < 1 << width
        torch.testing.assert_close(chosen, distance.amin(-1), atol=1e-6, rtol=0)


def test_boundary_values_take_the_lower_code():
    codebook, bits = torch.tensor([[-1.0, 0.0, 1.0, 1.0]]), torch.tensor([1])
    assert codebook_boundaries(codebook, bits).tolist() == [[-0.5, torch.inf, torch.inf]]
    spec = QuantSpec(bits=1, **CHANNEL)
    p = QuantParams(
        torch.ones(CHANNELS, dtype=torch.uint8),
        torch.tensor([[-1.0, 0.0]]),
        torch.zeros(CHANNELS, dtype=torch.int32),
        torch.ones(CHANNELS),
        torch.zeros(CHANNELS),
    )
    x = torch.full((1, HEADS, 1, DIM), -0.5)
    assert not Quantizer(spec, p, SHAPE).quantize(x).codes.any()
    assert Quantizer(spec, p, SHAPE).quantize(x + 1e-3).codes.all()


def test_dequantize_follows_the_formula():
    quantizer = Quantizer(QuantSpec(bits=3, **CHANNEL), params(3), SHAPE)
    q = quantizer.quantize(values())
    y = quantizer.params.zero_point + quantizer.params.scale * quantizer.params.codebook[0][q.codes.long()]
    expected = y.view(2, 50, HEADS, DIM).transpose(1, 2)
    torch.testing.assert_close(quantizer.dequantize(q), expected, atol=0, rtol=0)


@pytest.mark.parametrize("granularity", [CHANNEL, TOKEN])
def test_outliers_come_back_to_storage_precision(granularity):
    spec = QuantSpec(bits=2, outliers=OutlierSpec(fraction=0.05, max_per_token=CHANNELS), **granularity)
    quantizer = Quantizer(spec, params(2, static=granularity is CHANNEL), SHAPE)
    x = values()
    x[0, 1, 3, 2] = 37.0
    q = quantizer.quantize(x)
    found = q.outliers.view(2, 50, HEADS, DIM).transpose(1, 2)
    assert bool(found[0, 1, 3, 2])
    restored = quantizer.dequantize(q)
    residual = q.residual.float().abs().view(2, 50, HEADS, DIM).transpose(1, 2)[found]
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


def test_a_tie_at_the_threshold_is_no_outlier():
    spec = QuantSpec(bits=2, outliers=OutlierSpec(fraction=0.05, max_per_token=2), **CHANNEL)
    p = params(2)
    quantizer = Quantizer(spec, p, SHAPE)
    at_threshold = (p.zero_point + p.scale).view(HEADS, 1, DIM)[None]
    exactly = ((at_threshold[0].view(-1) - p.zero_point).abs() == p.scale).view(1, 1, -1)
    assert exactly.any()
    assert not (quantizer.quantize(at_threshold).outliers & exactly).any()


@pytest.mark.parametrize("granularity", [CHANNEL, TOKEN])
def test_tokens_are_quantized_one_by_one(granularity):
    spec = QuantSpec(bits=3, outliers=OutlierSpec(fraction=0.02), **granularity)
    quantizer = Quantizer(spec, params(3, static=granularity is CHANNEL), SHAPE)
    x = values(tokens=12)
    whole = quantizer(x)
    parts = torch.cat([quantizer(part) for part in x.split([5, 1, 6], dim=2)], dim=2)
    assert torch.equal(whole, parts)
    assert torch.equal(whole[1:], quantizer(x[1:]))


def test_equal_elements_have_scale_zero_and_survive():
    spec = QuantSpec(bits=2, **TOKEN)
    quantizer = Quantizer(spec, params(2, static=False), SHAPE)
    x = torch.full((1, HEADS, 3, DIM), 1.5)
    assert torch.equal(quantizer(x), x)
    assert reciprocal(torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.25]


def test_phase_turns_each_pair_and_back():
    spec = QuantSpec(bits=8, phase=True, **CHANNEL)
    quantizer = Quantizer(spec, params(8, phase=True), SHAPE, ROPE)
    x = values()
    y = quantizer.transform(x)
    torch.testing.assert_close(quantizer.inverse_transform(y), x, atol=1e-5, rtol=1e-5)
    angle = quantizer.params.phase[1, 2]
    x0, x1 = x[0, 1, 7, 2], x[0, 1, 7, 6]
    torch.testing.assert_close(y[0, 7, DIM + 2], angle.cos() * x0 - angle.sin() * x1)
    torch.testing.assert_close(y[0, 7, DIM + 6], angle.sin() * x0 + angle.cos() * x1)


def test_rotation_is_undone_and_concerns_each_head_alone():
    spec = QuantSpec(bits=8, rotation=True, **TOKEN)
    quantizer = Quantizer(spec, params(8, static=False, rotation=True), SHAPE)
    x = values()
    y = quantizer.transform(x)
    torch.testing.assert_close(quantizer.inverse_transform(y), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[0, 7, DIM:], x[0, 1, 7] @ quantizer.params.rotation[1], atol=1e-5, rtol=1e-5)


def test_channel_normalisation_precedes_token_thresholds():
    spec = QuantSpec(bits=8, channel_normalized=True, **TOKEN)
    p = params(8)
    uniform = QuantParams(
        p.bits, torch.linspace(-1, 1, 256)[None], torch.zeros_like(p.codebook_index), p.scale, p.zero_point
    )
    quantizer = Quantizer(spec, uniform, SHAPE)
    x = values()
    error = ((quantizer(x) - x).transpose(1, 2).flatten(2) / p.scale).abs()
    span = quantizer.normalise(x).scale
    assert bool((error <= span / 255 * 1.01 + 1e-5).all())


def test_dynamic_channels_use_the_sequence_itself():
    spec = QuantSpec(bits=4, dynamic=True, outliers=OutlierSpec(fraction=0.05), **CHANNEL)
    quantizer = Quantizer(spec, params(4, static=False), SHAPE)
    x = values(tokens=200)
    q = quantizer.quantize(x)
    low, high = torch.quantile(x[1, 0, :, 3], torch.tensor([0.025, 0.975]))
    torch.testing.assert_close(q.channel_scale[1, 0, 3], (high - low) / 2)
    assert torch.equal(quantizer.quantize(x[1:]).codes, q.codes[1:])


def with_feedback(bits, strength=1.0, seed=0):
    """A quantizer with feedback and its twin without."""
    plain = params(bits)
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randint(-127, 128, (HEADS, DIM * (DIM - 1) // 2), generator=generator).to(torch.int8)
    fed = replace(plain, feedback=entries, feedback_scale=torch.full((HEADS,), strength / (127 * DIM)))
    return Quantizer(QuantSpec(bits=bits, feedback=True), fed, SHAPE), Quantizer(
        QuantSpec(bits=bits), plain, SHAPE
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 2), st.integers(0, 1000))
def test_feedback_follows_its_formula_token_by_token(bits, sweeps, seed):
    fed, plain = with_feedback(bits, strength=4.0, seed=seed)
    weight = torch.rand(HEADS, DIM, generator=torch.Generator().manual_seed(seed)).half()
    quantizer = Quantizer(
        fed.spec.model_copy(update={"sweeps": sweeps}), replace(fed.params, feedback_weight=weight), SHAPE
    )
    x = torch.randn(2, HEADS, 3, DIM, generator=torch.Generator().manual_seed(seed))
    codes = quantizer.quantize(x).codes.unflatten(-1, (HEADS, DIM))
    levels = plain.levels.unflatten(0, (HEADS, DIM))
    boundaries = plain.boundaries.unflatten(0, (HEADS, DIM))
    scale, zero = (
        plain.params.scale.unflatten(0, (HEADS, DIM)),
        plain.params.zero_point.unflatten(0, (HEADS, DIM)),
    )
    for head in range(HEADS):
        y, errors, found = x[1, head, 2], torch.zeros(DIM), [0] * DIM
        unit = torch.eye(DIM, dtype=torch.float64)
        for i in range(DIM):
            for j in range(i):
                entry = int(quantizer.params.feedback[head, i * (i - 1) // 2 + j])
                unit[i, j] = float(quantizer.params.feedback_scale[head] * entry)
        cost = unit.T @ torch.diag(weight[head].double()) @ unit
        for sweep in range(sweeps + 1):
            for i in range(DIM):
                share = (unit[i] if sweep == 0 else cost[i] / cost[i, i]).float()
                later = torch.zeros(())
                for j in range(i + 1, DIM if sweep else 0):
                    later = later + share[j] * errors[j]
                t = y[i] + later
                for j in range(i):
                    t = t + share[j] * errors[j]
                u = (t - zero[head, i]) * (1 / scale[head, i])
                found[i] = int((u > boundaries[head, i]).sum())
                errors[i] = y[i] - (zero[head, i] + scale[head, i] * levels[head, i, found[i]])
        assert found == codes[1, 2, head].tolist()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(0, 1000))
def test_a_factor_gives_the_matrices_of_the_weight_it_stands_for(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randint(-127, 128, (HEADS, DIM * rank), generator=generator).to(torch.int8)
    scale = torch.full((HEADS,), 0.9 / rank**0.5 / 127)
    weight = (0.01 + torch.rand(HEADS, DIM, generator=generator)).half()
    fed = replace(params(3), feedback=entries, feedback_scale=scale, feedback_weight=weight)
    quantizer = Quantizer(QuantSpec(bits=3, feedback=True, feedback_rank=rank, sweeps=1), fed, SHAPE)
    for head in range(HEADS):
        factor = scale[head].double() * entries[head].double().view(DIM, rank)
        root = weight[head].double().sqrt()
        cost = torch.empty(DIM, DIM, dtype=torch.float64)
        for i in range(DIM):
            for j in range(DIM):
                cost[i, j] = root[i] * root[j] * (1 if i == j else factor[i] @ factor[j])
        unit = torch.eye(DIM, dtype=torch.float64) + quantizer.feedback[head].double()
        assert not bool(quantizer.feedback[head].triu().any())
        pivots = torch.linalg.inv(unit.T) @ cost @ torch.linalg.inv(unit)
        assert torch.allclose(pivots, torch.diag(pivots.diagonal()), atol=1e-6)
        shares = cost / cost.diagonal()[:, None]
        shares.fill_diagonal_(0.0)
        assert torch.allclose(quantizer.sweep_shares[head].double(), shares, atol=1e-6)


def fed_for(weight, rank=0):
    """What is stored for the weight ``[D, D]`` of an error, all heads alike, and the cost of a quantizer's errors by it."""
    even = QuantParams.uniform(
        3,
        CHANNELS,
        torch.linspace(-1, 1, 8)[None],
        torch.full((CHANNELS,), 2.0),
        zero_point=torch.zeros(CHANNELS),
    )
    found = compensation_factors(weight.double().expand(HEADS, -1, -1), rank)
    x = 0.5 * torch.randn(1, HEADS, 500, DIM, generator=torch.Generator().manual_seed(1))

    def cost(**options):
        stored = {
            "feedback": found.entries,
            "feedback_scale": found.scale,
            "feedback_weight": found.weight,
        }
        params = replace(even, **stored) if options else even
        rank_of = {"feedback_rank": rank} if options else {}
        error = Quantizer(QuantSpec(bits=3, **options, **rank_of), params, SHAPE)(x) - x
        return float(torch.einsum("bhti,ij,bhtj->", error, weight, error))

    return cost


def test_feedback_lowers_the_error_that_its_matrix_was_made_for():
    cost = fed_for(torch.full((DIM, DIM), 0.9) + 0.1 * torch.eye(DIM))  # errors of equal sign cost most
    assert cost(feedback=True) < 0.5 * cost()


def test_a_factor_of_enough_columns_is_as_good_as_the_matrix():
    factor = torch.randn(DIM, 2, generator=torch.Generator().manual_seed(0))
    weight = factor @ factor.T + 0.2 * torch.eye(DIM)
    whole, two, one = (fed_for(weight, rank)(feedback=True, sweeps=1) for rank in (0, 2, 1))
    assert two < 1.05 * whole
    assert two < one < fed_for(weight)()


def test_sweeps_lower_it_further():
    factor = torch.randn(DIM, 2, generator=torch.Generator().manual_seed(0))
    cost = fed_for(factor @ factor.T + 0.2 * torch.eye(DIM))
    costs = [cost(feedback=True, sweeps=sweeps) for sweeps in range(4)]
    assert costs[1] < 0.95 * costs[0]
    assert costs[3] <= costs[2] <= costs[1]


def with_importance(bits=2, **options):
    """A quantizer with a trellis whose classes of tokens have these weights, by default all 1."""
    spec = QuantSpec(bits=bits, trellis=True, importance=True, **options)
    plain = QuantParams.uniform(
        bits,
        CHANNELS,
        torch.linspace(-1, 1, 2 << bits)[None],
        torch.full((CHANNELS,), 3.0),
        zero_point=torch.zeros(CHANNELS),
    )
    return spec, replace(
        plain, importance=torch.ones(HEADS, 32).half(), importance_unit=torch.full((HEADS,), float(DIM))
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(-14, 12), st.integers(0, HEADS - 1))
def test_classes_of_importance_are_half_octaves_of_the_squared_size(octaves, head):
    spec, plain = with_importance()
    importance = torch.arange(HEADS * 32).view(HEADS, 32).half()
    quantizer = Quantizer(spec, replace(plain, importance=importance), SHAPE)
    for within, past in ((0.05, 0), (0.55, 1)):
        y = torch.zeros(1, 1, HEADS, DIM)
        y[0, 0, head, 1] = (DIM * 2.0 ** (octaves + within)) ** 0.5
        found = int(quantizer.importance(y.flatten(2))[0, 0, head])
        assert found == 32 * head + min(max(2 * (octaves + 10) + past + 1, 0), 31)


def test_a_token_that_counts_more_gets_less_of_the_error():
    spec, plain = with_importance()
    x = torch.randn(4, HEADS, 64, DIM, generator=torch.Generator().manual_seed(3))
    x[:, :, ::16] *= 0.05
    importance = plain.importance.clone()
    importance[:, :8] = 100.0
    alike, weighed = (
        Quantizer(spec, replace(plain, importance=weights), SHAPE)
        for weights in (plain.importance, importance)
    )
    unweighted = Quantizer(spec.model_copy(update={"importance": False}), plain, SHAPE)
    assert torch.equal(alike.quantize(x).codes, unweighted.quantize(x).codes)
    before, after = ((q(x) - x).square().sum((0, 1, 3)) for q in (alike, weighed))
    assert float(after[::16].sum()) < 0.85 * float(before[::16].sum())
    assert float(after.sum()) > float(before.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": True}, "importance weighs the tokens of a path: it needs trellis"),
        ({"trellis": True, "sweeps": 1}, "sweeps repeat what feedback does: they need feedback"),
    ],
)
def test_what_an_encoder_does_needs_what_it_works_on(options, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(bits=3, **options)


@pytest.mark.parametrize(
    "options",
    [{"granularity": "token", "dynamic": True}, {"dynamic": True}, {"outliers": {"fraction": 0.01}}],
)
def test_feedback_needs_static_channels_without_outliers(options):
    with pytest.raises(ValueError, match="feedback needs"):
        QuantSpec(bits=3, feedback=True, **options)


def test_thresholds_are_stored_in_float16_where_that_reaches():
    wide = QuantSpec(bits=3, variable_bits=True)
    scale, zero_point = torch.tensor([0.3, 1e-9, 5.0]), torch.tensor([-7.7, 0.0, 60000.0])
    stored_scale, stored_zero_point = storable_thresholds(wide, scale, zero_point)
    assert stored_scale.dtype == stored_zero_point.dtype == torch.float16
    assert bool((stored_scale > 0).all())
    torch.testing.assert_close(stored_scale.float(), scale, rtol=2**-11, atol=2**-24)
    torch.testing.assert_close(stored_zero_point.float(), zero_point, rtol=2**-11, atol=0)
    for spec, zeros in ((QuantSpec(bits=3), zero_point), (wide, zero_point * 2)):
        kept = storable_thresholds(spec, scale, zeros)
        assert all(torch.equal(*pair) for pair in zip(kept, (scale, zeros), strict=True))
        assert kept[0].dtype == torch.float32


@pytest.mark.parametrize("trellis", [False, True])
def test_thresholds_in_float16_mean_their_numbers(trellis):
    generator = torch.Generator().manual_seed(0)
    channels = HEADS * DIM
    spec = QuantSpec(bits=2, variable_bits=True, trellis=trellis)
    narrow = QuantParams(
        bits=torch.full((channels,), 2, dtype=torch.uint8),
        codebook=torch.linspace(-1, 1, spec.level_count(2)).half(),
        codebook_index=torch.zeros(channels, dtype=torch.uint8),
        scale=(0.1 + torch.rand(channels, generator=generator)).half(),
        zero_point=torch.randn(channels, generator=generator).half(),
    )
    assert narrow.scale is not None
    assert narrow.zero_point is not None
    wide = replace(narrow, scale=narrow.scale.float(), zero_point=narrow.zero_point.float())
    x = torch.randn(2, HEADS, 70, DIM, generator=generator)
    one, other = (Quantizer(spec, params, SHAPE) for params in (narrow, wide))
    assert torch.equal(one.quantize(x).codes, other.quantize(x).codes)
    assert torch.equal(one(x), other(x))
    assert one(x).dtype == torch.float32
