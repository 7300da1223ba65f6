"""Levels of weighted distributions, against exact k-means and closed forms."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from statistic_helpers import normal

from kvq_calib.fit.density import lloyd, spread_levels, spread_within_bins, weighted_error
from kvq_calib.fit.kmeans import distortion, exact_kmeans


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), bits=st.integers(0, 5))
@example(seed=35484, bits=3)  # from levels at shares of the optimal density, Lloyd's iteration ends 31% above
def test_lloyd_is_close_to_the_exact_optimum(seed: int, bits: int) -> None:
    # A histogram of a skewed, heavy-tailed channel, as activations have them.
    values = normal(2, 4000, seed=seed).double()
    values = (values + 0.3 * values.square()).sort(1).values.unflatten(1, (400, 10))
    points, weights = values.mean(2), values.abs().sum(2) + 0.1
    levels = lloyd(points, weights, 1 << bits)
    assert levels.shape == (2, 1 << bits)
    for row in range(2):
        x, w = points[row].numpy(), weights[row].numpy()
        best = distortion(x, w, exact_kmeans(x, w, 1 << bits))
        assert distortion(x, w, levels[row].numpy()) <= best * 1.1


def test_lloyd_with_fewer_points_than_levels_or_all_alike() -> None:
    points = torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    for weights in (torch.tensor([[1.0, 0.5, 2.0], [1.0, 0.0, 1.0]]).double(), torch.zeros(2, 3).double()):
        levels = lloyd(points, weights, 8)
        assert levels.shape == (2, 8)
        assert bool((levels.diff(dim=1) >= 0).all())
        torch.testing.assert_close(weighted_error(levels, points, weights), torch.zeros(2).double())


def test_levels_for_a_trellis_follow_the_optimal_density() -> None:
    # Panter and Dite: of a unit normal, a normal of deviation sqrt(3).
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)[None]
    levels = spread_levels(grid, torch.exp(-grid.square() / 2), 16)
    shares = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    torch.testing.assert_close(
        levels[0], torch.special.ndtri(shares) * 3**0.5, atol=4e-3, rtol=0, check_dtype=False
    )
    one = spread_levels(grid + 2, torch.exp(-grid), 1)
    torch.testing.assert_close(one, lloyd(grid + 2, torch.exp(-grid), 1))
    # Lloyd's iteration puts a level on a single heavy value. These keep away from it: they make room by less than half
    # of what lies between the middle ones, but for the outermost, which is next to it.
    heavy = torch.exp(-grid.square() / 2)
    heavy[0, 6000] = heavy.sum() * 10
    moved = spread_levels(grid, heavy, 16)
    assert float((moved - levels)[0, :-1].abs().max()) < 0.11
    assert float((moved - grid[0, 6000]).abs().min()) > 0.4
    least = lloyd(grid, heavy, 16)
    assert float((least - grid[0, 6000]).abs().min()) < 0.01


def test_spread_over_bins_by_hand() -> None:
    points = torch.tensor([[0.0, 1.0, 2.0, 4.0, 5.0, 6.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 2.0, 4.0, 2.0, 0.0, 8.0]], dtype=torch.float64)
    spread, shares = spread_within_bins(points, weights)
    assert shares.view(6, 4).tolist() == [
        *([1.0, 0, 0, 0], [0.5] * 4, [1.0] * 4, [2.0, 0, 0, 0], [0.0] * 4, [8.0, 0, 0, 0])
    ]
    # Half of the shorter way to the next bin, if both neighbours have weight; otherwise it stays one point.
    reach = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.5, 0.0]).double()
    parts = torch.tensor([-0.75, -0.25, 0.25, 0.75]).double()
    torch.testing.assert_close(spread.view(6, 4), points[0][:, None] + reach[:, None] * parts)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), empty=st.floats(0, 0.9))
def test_spread_over_bins_keeps_order_means_and_weights(seed: int, empty: float) -> None:
    points = normal(3, 200, seed=seed).double().sort(1).values
    weights = normal(3, 200, seed=seed + 1).double().square()
    weights[normal(3, 200, seed=seed + 2).abs() < empty] = 0.0
    spread, shares = spread_within_bins(points, weights)
    assert bool((spread.diff(dim=1) >= 0).all())
    torch.testing.assert_close(shares.unflatten(1, (200, 4)).sum(2), weights)
    torch.testing.assert_close((spread * shares).unflatten(1, (200, 4)).sum(2), points * weights)
