"""Levels of channels from their distributions: errors by width, and coefficients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistic_helpers import normal

from kvq_calib.calibrate.levels import errors_by_width, fit_levels, level_basis, storable_levels
from kvq_calib.codec.computed_levels import StoredLevels, store_levels
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.fit.density import lloyd, weighted_error
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import TrellisSpec


def quantizer_of(points, weights, widths, spec):
    """Levels fitted to a row for each channel."""
    params = fit_levels(points, weights, torch.tensor(widths, dtype=torch.uint8), spec)
    TrellisQuantizer.check_values(spec, params.tensors())
    return TrellisQuantizer(spec, params, HeadShape(1, len(widths)))


def of_normal(rows):
    grid = torch.linspace(-5, 5, 1001, dtype=torch.float64)[None].expand(rows, -1).contiguous()
    weights = torch.exp(-grid.square() / 2)
    return grid, weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("states", [1, 4])
def test_a_channel_without_weight_or_without_movement_is_no_special_case(states):
    points = torch.stack([torch.linspace(-1, 1, 50), torch.full((50,), 2.0), torch.zeros(50)]).double()
    weights = torch.stack([torch.zeros(50), torch.ones(50), torch.ones(50)]).double()
    spec = TrellisSpec(max_bits=3, states=states)
    assert float(errors_by_width(points, weights, spec).max()) < 1e-20
    for width in range(4):
        quantizer = quantizer_of(points, weights, [width] * 3, spec)
        assert bool(torch.isfinite(quantizer.levels).all())
        assert quantizer.levels[1].tolist() == pytest.approx([2.0] * quantizer.levels.shape[1], abs=1e-6)
        assert float(quantizer.levels[2].abs().max()) < 1e-6


def test_errors_at_large_widths_are_those_of_the_values_in_the_bins():
    """One point per bin would have 0.84 of the error with 128 levels."""
    step = 0.02  # of a bin, in standard deviations
    points = torch.arange(-4, 4, step, dtype=torch.float64)[None]
    weights = torch.exp(-points.square() / 2)
    fine = torch.arange(-4, 4, step / 50, dtype=torch.float64)[None]
    spec = TrellisSpec(max_bits=7, states=1)
    found = errors_by_width(points, weights / weights.sum(), spec)
    density = torch.exp(-fine.square() / 2)
    for width in (6, 7):
        levels = lloyd(fine, density, 2**width)
        exact = weighted_error(levels, fine, density / density.sum())
        torch.testing.assert_close(found[:, width], exact, rtol=0.03, atol=0)


def test_four_levels_or_fewer_can_be_any():
    """Coefficients as many as levels: nothing is lost against levels without a form."""
    x, w = normal(6, 300).double().sort(1).values, torch.ones(6, 300, dtype=torch.float64)
    x = (x * torch.linspace(0.1, 5, 6, dtype=torch.float64)[:, None]).exp() + 2
    spec, widths = TrellisSpec(max_bits=2, states=1), [0, 1, 2, 0, 1, 2]
    error = weighted_error(quantizer_of(x, w, widths, spec).levels.double(), x, w)
    least = errors_by_width(x, w, spec)[torch.arange(6), torch.tensor(widths)]
    assert bool((error < least * 1.02).all())


def test_levels_of_a_trellis_have_less_error_than_nearest_levels_can():
    points, weights = of_normal(4)
    spec = TrellisSpec(max_bits=3)
    quantizer = quantizer_of(points, weights, [3] * 4, spec)
    x = normal(1, 1, 4096, 4, seed=5)
    error = float((quantizer(x) - x).square().mean())
    assert error < 0.028  # 14.62 dB, 0.0345, is the least for nearest levels
    assert float(errors_by_width(points, weights, spec)[0, 3]) == pytest.approx(error, rel=0.15)


def test_levels_follow_a_distribution_that_is_not_symmetric():
    """A cubic fits a skewed channel: less than the error of the best straight line of levels."""
    grid = torch.linspace(0, 12, 1001, dtype=torch.float64)[None].contiguous()
    weights = torch.exp(-grid)
    spec = TrellisSpec(max_bits=4)
    levels = quantizer_of(grid, weights, [4], spec).levels[0]
    steps = levels.diff()
    assert float(steps[-1]) > 4 * float(steps[0])
    x = torch.rand(1, 1, 4096, 1, generator=torch.Generator().manual_seed(0)).log().neg()
    assert float((quantizer_of(grid, weights, [4], spec)(x) - x).square().mean()) < 0.011


def test_a_single_value_of_much_weight_does_not_draw_all_levels_to_it():
    grid = torch.cat((torch.linspace(-0.2, 0.2, 400), torch.tensor([0.27])))[None].double()
    weights = torch.ones_like(grid)
    weights[:, -1] = 1e6
    levels = quantizer_of(grid, weights, [6], TrellisSpec(max_bits=6)).levels.double()
    assert float(levels[0, 0]) < -0.18
    assert float(weighted_error(levels, grid, weights) / weights.sum()) < 1e-7


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 7), st.sampled_from([1, 4]), st.floats(-6, 6))
def test_what_is_stored_never_falls(seed, width, states, size):
    generator = torch.Generator().manual_seed(seed)
    spec, bits = TrellisSpec(max_bits=width, states=states), torch.full((8,), width, dtype=torch.uint8)
    basis = level_basis(spec, bits)
    slope = torch.rand(8, generator=generator, dtype=torch.float64) + 1e-3
    bend = torch.rand(8, generator=generator, dtype=torch.float64) * 2 - 1
    powers = (slope, slope * bend / 2, slope * bend.abs(), slope * bend / 4, slope * bend.abs())
    wanted = torch.stack((100 * bend, *powers), -1) * 10.0**size
    wanted = wanted * (basis != 0).any(1)
    params = TrellisParams(bits).with_levels(storable_levels(spec, bits, wanted))
    TrellisQuantizer.check_values(spec, params.tensors())
    quantizer = TrellisQuantizer(spec, params, HeadShape(1, 8))
    reach = float((basis @ wanted[..., None]).abs().max())
    exact = (basis @ wanted[..., None])[..., 0].float()
    assert float((quantizer.levels - exact).abs().max()) <= 2e-2 * reach + 1e-6


@pytest.mark.parametrize("width", [3, 6])
def test_lower_coefficients_make_up_for_the_rounding_of_higher_ones(width):
    """On random polynomials, less than a quarter of the squared error of rounding each coefficient by itself."""
    generator = torch.Generator().manual_seed(1)
    spec, bits = TrellisSpec(max_bits=width), torch.full((200,), width, dtype=torch.uint8)
    basis = level_basis(spec, bits)
    bend = 0.5 * (torch.rand(200, 5, generator=generator, dtype=torch.float64) - 0.5)
    bend[:, 0] += 4  # so that levels increase
    wanted = torch.cat((bend[:, 1:2], bend), dim=1) * (basis != 0).any(1)

    def error(stored: StoredLevels) -> float:
        found = TrellisQuantizer(spec, TrellisParams(bits).with_levels(stored), HeadShape(1, 200)).levels
        return float((found - (basis @ wanted[..., None])[..., 0]).square().mean())

    assert error(storable_levels(spec, bits, wanted)) < 0.25 * error(store_levels(spec, bits, wanted))
