"""Statistics, widths and codebooks of the rate-distortion fit, against brute force and closed forms."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models_zoo import tiny_model
from pydantic import ValidationError

from kvq_calib.calibrate import allocation
from kvq_calib.calibrate.distribution import ChannelMoments, WeightedHistogram, pair_channels
from kvq_calib.calibrate.run import calibrate
from kvq_calib.codec.quantizer import Quantizer, QuantParams, codebook_table
from kvq_calib.data import TokenWindows
from kvq_calib.errors import ConfigError
from kvq_calib.fit.kmeans import distortion, exact_kmeans
from kvq_calib.schema.geometry import LayerGeometry, RopeSpec
from kvq_calib.schema.recipe import AllocationConfig, CalibrationConfig
from kvq_calib.schema.spec import MAX_BITS, MAX_CODEBOOKS, QuantSpec

HALVES = RopeSpec(pairs=((0, 2), (1, 3)), inv_freq=(1.0, 0.1))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def widths_to(bits: int, trellis: bool = False) -> QuantSpec:
    return QuantSpec(bits=bits, variable_bits=True, trellis=trellis)


def gaussian_curves(deviations: list[float], max_bits: int = 6) -> allocation.Curves:
    grid = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    points = torch.tensor(deviations, dtype=torch.float64)[:, None] * grid
    weights = torch.exp(-grid.square() / 2).expand_as(points).contiguous()
    return allocation.fit_curves(points, weights / weights.sum(1, keepdim=True), widths_to(max_bits))


# ------------------------------------------------------------------ statistics


def test_moments_equal_those_of_the_data_and_phases_decorrelate_pairs() -> None:
    y = normal(500, 8) @ normal(8, 8, seed=1) + 3
    first, second = pair_channels(HALVES, 2, 4)
    assert first.tolist() == [[0, 1], [4, 5]]
    assert second.tolist() == [[2, 3], [6, 7]]
    moments = ChannelMoments(8, first, second)
    moments.update(y[:123])
    moments.update(y[123:])
    torch.testing.assert_close(moments.mean, y.double().mean(0))
    torch.testing.assert_close(moments.variance, y.double().var(0, correction=0))

    phase = moments.principal_phase()
    geometry = LayerGeometry(num_query_heads=2, num_kv_heads=2, head_dim=4)
    assert phase.dtype == torch.float16  # fitted to as it is stored
    idle = torch.zeros(8, dtype=torch.uint8)
    spec = QuantSpec(bits=1, variable_bits=True, phase=True)
    params = QuantParams(idle, torch.zeros(1, 1), idle, phase=phase)
    heads = y.view(1, 500, 2, 4).transpose(1, 2)
    turned = Quantizer(spec, params, geometry, HALVES).transform(heads)[0].double()
    mean, deviation = moments.turned(phase)
    torch.testing.assert_close(mean, turned.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deviation, turned.std(0, correction=0), rtol=1e-5, atol=1e-5)
    centred = turned - turned.mean(0)
    covariance = centred.T @ centred / 500
    # What rounding the angle leaves: at most 2^-11 rad off, times the difference of the two variances.
    first, second = first.flatten(), second.flatten()
    spread = (deviation[first].square() - deviation[second].square()).abs()
    assert bool((covariance[first, second].abs() <= spread * 2**-11 + 1e-4).all())
    # The product of variances, and so the error at a given number of bits, can only fall.
    assert bool(
        (
            deviation[first] * deviation[second]
            <= moments.variance[first].sqrt() * moments.variance[second].sqrt() + 1e-6
        ).all()
    )


def test_weighted_histogram_keeps_mass_and_moments_and_adds_up() -> None:
    y, w = normal(400, 3) * torch.tensor([1e-3, 1.0, 50.0]), normal(400, 3, seed=2).square()
    y[7] *= 1000  # far out, but not lost
    mean, deviation = y.double().mean(0), y.double().std(0)
    whole, one, two = (WeightedHistogram(3) for _ in range(3))
    whole.update(y, w, mean, deviation)
    one.update(y[:100], w[:100], mean, deviation)
    two.update(y[100:], w[100:], mean, deviation)
    one.merge(two)
    torch.testing.assert_close(one.sums, whole.sums)
    points, weights = whole.distribution(mean, deviation)
    assert bool((points.diff(dim=1) >= 0).all())
    torch.testing.assert_close(weights.sum(1), w.double().mean(0))
    torch.testing.assert_close((points * weights).sum(1), (w.double() * y).mean(0))
    restored = WeightedHistogram(3)
    restored.load(whole.state())
    assert torch.equal(restored.sums, whole.sums)


# -------------------------------------------------------------- levels and curves


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), bits=st.integers(0, 5))
@example(seed=35484, bits=3)  # from levels at shares of the optimal density, Lloyd's iteration ends 31% above
def test_lloyd_is_close_to_the_exact_optimum(seed: int, bits: int) -> None:
    # A histogram of a skewed, heavy-tailed channel, as activations have them.
    values = normal(2, 4000, seed=seed).double()
    values = (values + 0.3 * values.square()).sort(1).values.unflatten(1, (400, 10))
    points, weights = values.mean(2), values.abs().sum(2) + 0.1
    levels = allocation.lloyd(points, weights, 1 << bits)
    assert levels.shape == (2, 1 << bits)
    for row in range(2):
        x, w = points[row].numpy(), weights[row].numpy()
        best = distortion(x, w, exact_kmeans(x, w, 1 << bits))
        assert distortion(x, w, levels[row].numpy()) <= best * 1.1


def test_lloyd_with_fewer_points_than_levels_or_all_alike() -> None:
    points = torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    for weights in (torch.tensor([[1.0, 0.5, 2.0], [1.0, 0.0, 1.0]]).double(), torch.zeros(2, 3).double()):
        levels = allocation.lloyd(points, weights, 8)
        assert levels.shape == (2, 8)
        assert bool((levels.diff(dim=1) >= 0).all())
        torch.testing.assert_close(
            allocation.weighted_error(levels, points, weights), torch.zeros(2).double()
        )


def test_levels_for_a_trellis_follow_the_optimal_density() -> None:
    # Panter and Dite: of a unit normal, a normal of deviation sqrt(3).
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)[None]
    levels = allocation.spread_levels(grid, torch.exp(-grid.square() / 2), 16)
    shares = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    torch.testing.assert_close(
        levels[0], torch.special.ndtri(shares) * 3**0.5, atol=4e-3, rtol=0, check_dtype=False
    )
    one = allocation.spread_levels(grid + 2, torch.exp(-grid), 1)
    torch.testing.assert_close(one, allocation.lloyd(grid + 2, torch.exp(-grid), 1))
    # Lloyd's iteration puts a level on a single heavy value. These keep away from it: they make room by less than half of
    # what lies between the middle ones, but for the outermost, which is next to it.
    heavy = torch.exp(-grid.square() / 2)
    heavy[0, 6000] = heavy.sum() * 10
    moved = allocation.spread_levels(grid, heavy, 16)
    assert float((moved - levels)[0, :-1].abs().max()) < 0.11
    assert float((moved - grid[0, 6000]).abs().min()) > 0.4
    lloyd = allocation.lloyd(grid, heavy, 16)
    assert float((lloyd - grid[0, 6000]).abs().min()) < 0.01


def test_curves_of_a_normal_channel_follow_the_published_quantizer() -> None:
    # Max (1960), table of minimum mean squared errors for a unit normal.
    curves = gaussian_curves([1.0, 3.0], max_bits=5)
    published = torch.tensor([1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499], dtype=torch.float64)
    torch.testing.assert_close(curves.distortion[0], published, rtol=0.02, atol=0)
    torch.testing.assert_close(curves.distortion[1], 9 * curves.distortion[0], rtol=0.01, atol=0)


def test_a_channel_without_weight_or_without_movement_is_no_special_case() -> None:
    points = torch.stack([torch.linspace(-1, 1, 50), torch.full((50,), 2.0)]).double()
    weights = torch.stack([torch.zeros(50), torch.ones(50)]).double()
    curves = allocation.fit_curves(points, weights, widths_to(3))
    params = allocation.share_codebooks(curves, torch.tensor([3, 3], dtype=torch.uint8), 4, widths_to(3))
    assert bool(torch.isfinite(params.codebook).all())
    assert params.scale is not None
    assert bool((params.scale > 0).all())
    assert float(curves.distortion.max()) < 1e-20


# ---------------------------------------------------------------------- allocation


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    floor=st.integers(0, 1),
    budget=st.sampled_from([1.0, 1.25, 1.5, 2.0, 2.75]),
    tokens=st.sampled_from([(1, 1), (4096, 4096), (512, 4096), (7, 3)]),
)
def test_allocation_is_optimal_for_what_it_spends(
    seed: int, floor: int, budget: float, tokens: tuple[int, int]
) -> None:
    halving = 4.0 ** -torch.arange(4, dtype=torch.float64)
    tables = [halving * normal(2, 1, seed=seed + part).double().exp() for part in range(2)]
    widths = allocation.allocate(tables, [floor, floor], tokens, budget)
    chosen = torch.cat(widths).tolist()
    price = [tokens[0]] * 2 + [tokens[1]] * 2

    def stored(option: Sequence[int]) -> int:
        return sum(width * each for width, each in zip(option, price, strict=True))

    spent = stored(chosen)
    assert spent <= budget * sum(price)
    assert min(chosen) >= floor
    error = torch.cat(tables)
    best = min(
        sum(float(error[channel, width]) for channel, width in enumerate(option))
        for option in itertools.product(range(floor, 4), repeat=4)
        if stored(option) <= spent
    )
    assert sum(float(error[channel, width]) for channel, width in enumerate(chosen)) <= best * (1 + 1e-9)


def test_allocation_follows_reverse_water_filling() -> None:
    curves = gaussian_curves([0.001, 1.0, 2.0, 4.0])
    (widths,) = allocation.allocate([curves.distortion], [0], [1], 2.25)
    assert widths.tolist() == [0, 2, 3, 4]  # one bit for every factor of two
    with pytest.raises(ConfigError, match="min_key_bits"):
        allocation.allocate([curves.distortion], [3], [1], 2.25)


def test_budget_counts_what_is_stored_beside_the_codes() -> None:
    curves = gaussian_curves([1.0, 2.0, 4.0, 8.0] * 8)

    def stored(widths: list[torch.Tensor]) -> float:
        return float(widths[0].float().mean()) + 0.01 * float(widths[0].max()) + 0.1

    widths = allocation.spend(3.0, lambda b: allocation.allocate([curves.distortion], [1], [1], b), stored)
    assert 2.5 < stored(widths) <= 3.0
    with pytest.raises(ConfigError, match="bits_per_element"):
        allocation.spend(
            0.05, lambda b: allocation.allocate([curves.distortion], [0], [1], max(b, 0.0)), stored
        )


def test_shared_codebooks_cost_little_against_a_codebook_for_every_channel() -> None:
    x, w = normal(12, 300).double().sort(1).values, torch.ones(12, 300, dtype=torch.float64)
    x[4:8] = x[4:8].sign() * x[4:8].abs().sqrt()  # two kinds of shapes
    x = (x * torch.linspace(0.1, 5, 12, dtype=torch.float64)[:, None]).sort(1).values + 2
    curves = allocation.fit_curves(x, w, widths_to(4))
    widths = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 4, 4, 3, 2], dtype=torch.uint8)
    own = sum(float(curves.distortion[c, int(b)]) for c, b in enumerate(widths) if b > 1)
    errors = []
    for most in (1, 2, 12):
        params = allocation.share_codebooks(curves, widths, most, widths_to(4))
        assert len(params.codebook) == allocation.codebook_levels(widths, most, widths_to(4))
        table = codebook_table(widths_to(4), params)
        assert bool((table.diff(dim=1) >= 0).all())
        assert params.scale is not None
        assert params.zero_point is not None
        levels = params.zero_point[:, None] + params.scale[:, None] * table[params.codebook_index.long()]
        error = allocation.weighted_error(levels.double(), x, w)
        torch.testing.assert_close(error[:2], curves.distortion[[0, 1], [0, 1]], rtol=1e-3, atol=0)
        errors.append(float(error[widths > 1].sum()))
    assert errors[1] < errors[0]
    assert errors[2] <= own * 1.02  # float16 levels
    assert errors[1] <= own * 1.5


# ------------------------------------------------------------------- a whole recipe


def recipe(**changes: object) -> CalibrationConfig:
    settings: dict[str, object] = {
        "cache": {
            "key": {"bits": 4, "variable_bits": True, "phase": True, "datatype": "learned"},
            "value": {"bits": 4, "variable_bits": True, "datatype": "learned"},
        },
        "allocation": {"bits_per_element": 3.0, "context": 65536},
    }
    return CalibrationConfig.model_validate({**settings, **changes})


def tiny_windows() -> TokenWindows:
    ids = torch.randint(3, 128, (3, 48), generator=torch.Generator().manual_seed(0))
    return TokenWindows(ids=ids, source={"name": "random"})


@pytest.mark.model
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "smollm3"])
def test_recipe_keeps_its_budget_on_every_kind_of_rope(family: str) -> None:
    model = tiny_model(family)
    run = calibrate(model, tiny_windows(), {"r": recipe()}, model_id="tiny", model_config={})
    artifact = run.artifacts["r"]
    assert 2.9 < artifact.bits_per_element(65536) <= 3.0
    again = calibrate(model, tiny_windows(), {"r": recipe()}, model_id="tiny", model_config={})
    assert again.artifacts["r"].to_bytes() == artifact.to_bytes()  # writing checks every rule of the format
    widths = torch.cat([params.key.bits for params in artifact.layers])
    assert len(widths.unique()) > 1
    assert int(widths.min()) >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocation": None}, "variable_bits, phase, feedback and importance need an allocation"),
        ({"cache": {"key": {"bits": 4}, "value": {"bits": 4}}}, "allocation needs key.variable_bits"),
        (
            {"cache": {"key": {"bits": 4, "variable_bits": True, "outliers": {"fraction": 0.01}},
                       "value": {"bits": 4, "variable_bits": True}}},
            "without outliers",
        ),
        (
            {"cache": {"key": {"bits": 4, "variable_bits": True},
                       "value": {"bits": 4, "variable_bits": True, "rotation": True}}},
            "rotation",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("trellis", [False, True])
def test_as_many_codebooks_as_a_recipe_may_ask_for_can_be_numbered(trellis: bool) -> None:
    most = AllocationConfig.model_validate({"codebooks": 32}).codebooks
    with pytest.raises(ValidationError, match="codebooks"):
        AllocationConfig.model_validate({"codebooks": 33})
    spec = widths_to(MAX_BITS - trellis, trellis=trellis)
    widths = range(spec.bits + 1)
    assert sum(most if spec.level_count(width) > 2 else 1 for width in widths) <= MAX_CODEBOOKS


def test_shrinkage_moves_weights_towards_their_mean() -> None:
    y, w = normal(4000, 2), normal(4000, 2, seed=2).square()
    mean, deviation = y.double().mean(0), y.double().std(0)
    histogram = WeightedHistogram(2)
    histogram.update(y, w, mean, deviation)
    plain, own = histogram.distribution(mean, deviation)
    points, weights = histogram.distribution(mean, deviation, 0.5)
    assert bool((points.diff(dim=1) >= 0).all())
    torch.testing.assert_close(weights.sum(1), own.sum(1))
    spread = (weights * (points - mean[:, None]).square()).sum(1) / weights.sum(1)
    before = (own * (plain - mean[:, None]).square()).sum(1) / own.sum(1)
    expected = (before + deviation.square()) / 2
    torch.testing.assert_close(spread, expected, rtol=0.02, atol=0)


def test_levels_for_a_trellis_have_less_error_on_paths_than_their_start() -> None:
    grid = torch.linspace(-5, 5, 1001, dtype=torch.float64)[None].expand(4, -1).contiguous()
    weights = torch.exp(-grid.square() / 2)
    spec = widths_to(3, trellis=True)
    curves = allocation.fit_curves(grid, weights / weights.sum(1, keepdim=True), spec)
    assert [level.shape[1] for level in curves.levels] == [1, 4, 8, 16]
    # What is claimed of paths, and what they do: samples of the same distribution.
    params = allocation.share_codebooks(curves, torch.full((4,), 3, dtype=torch.uint8), 1, spec)
    x = normal(1, 1, 4096, 4, seed=5)
    geometry = LayerGeometry(num_query_heads=1, num_kv_heads=1, head_dim=4)
    error = (Quantizer(spec, params, geometry)(x) - x).square().mean()
    assert error < 0.028  # 14.62 dB, 0.0345, is the least for nearest levels
    assert float(curves.distortion[0, 3]) == pytest.approx(float(error), rel=0.15)
