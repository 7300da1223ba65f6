"""Codebooks: exact k-means against brute force and scikit-learn, and the data-free datatypes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.fit.kmeans import distortion, exact_kmeans, lloyd_kmeans
from kvq_calib.fit.levels import fit_levels, normal_float_levels, q_norm, storable, uniform_levels


def least_distortion(points, weights, k):
    """Over every way to cut the sorted points into at most k runs."""
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(points) + 1), k - 1):
        total = 0.0
        for start, stop in itertools.pairwise([0, *cuts, len(points)]):
            w, x = weights[start:stop], points[start:stop]
            if w.sum() > 0:
                total += float((w * (x - np.average(x, weights=w)) ** 2).sum())
        best = min(best, total)
    return best / weights.sum()


weighted_points = st.lists(
    st.tuples(st.floats(-1, 1), st.sampled_from([0.0, 1e-6, 0.5, 1.0, 100.0])), min_size=1, max_size=9
).filter(lambda rows: any(weight > 0 for _, weight in rows))


@settings(max_examples=150, deadline=None)
@given(weighted_points, st.integers(1, 4))
def test_exact_kmeans_is_optimal(rows, k):
    rows = sorted(rows)
    points, weights = (np.array(column) for column in zip(*rows, strict=True))
    levels = exact_kmeans(points, weights, k)
    assert levels.shape == (k,)
    assert (np.diff(levels) >= 0).all()
    assert distortion(points, weights, levels) <= least_distortion(points, weights, k) + 1e-12


@pytest.mark.parametrize("k", [2, 8, 16, 64])
def test_exact_is_never_worse_than_scikit_learn(k):
    rng = np.random.default_rng(k)
    points = np.sort(rng.laplace(size=3000).clip(-6, 6) / 6)
    weights = rng.gamma(0.3, size=3000)
    exact = distortion(points, weights, exact_kmeans(points, weights, k))
    for seed in range(3):
        assert exact <= distortion(points, weights, lloyd_kmeans(points, weights, k, seed)) * (1 + 1e-9)


def test_lloyd_is_close_and_repeatable():
    rng = np.random.default_rng(0)
    points = np.sort(rng.normal(size=2000).clip(-3, 3) / 3)
    weights = rng.random(2000)
    first, second = (lloyd_kmeans(points, weights, 8, seed=5) for _ in range(2))
    assert np.array_equal(first, second)
    best = distortion(points, weights, exact_kmeans(points, weights, 8))
    assert distortion(points, weights, first) < 1.2 * best


def test_fewer_points_than_levels_repeat_the_last():
    points, weights = np.array([-0.5, 0.25, 0.75]), np.array([1.0, 0.0, 2.0])
    for solve in (exact_kmeans, lloyd_kmeans):
        assert solve(points, weights, 4).tolist() == [-0.5, 0.75, 0.75, 0.75]


@pytest.mark.parametrize(
    ("points", "weights", "k", "problem"),
    [
        ([0.0, 1.0], [1.0, 1.0], 0, "at least one level"),
        ([0.0, 1.0], [1.0], 2, "one length"),
        ([0.0, np.nan], [1.0, 1.0], 2, "finite"),
        ([0.0, 1.0], [1.0, -1.0], 2, "not negative"),
        ([0.0, 1.0], [0.0, 0.0], 2, "positive weight"),
        ([1.0, 0.0], [1.0, 1.0], 2, "sorted"),
    ],
)
def test_bad_input_is_named(points, weights, k, problem):
    for solve in (exact_kmeans, lloyd_kmeans):
        with pytest.raises(ValueError, match=problem):
            solve(np.array(points), np.array(weights), k)


@pytest.mark.parametrize("bits", range(9))
def test_data_free_levels(bits):
    for levels in (uniform_levels(bits), normal_float_levels(bits)):
        assert levels.shape == (1 << bits,)
        assert (np.diff(levels) > 0).all()
        if bits:
            assert levels[0] == -1 or levels[-1] == 1
            assert np.abs(levels).max() == 1


def test_normal_float_4_matches_the_published_table():
    # QLoRA, appendix E.
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert np.abs(normal_float_levels(4) - np.array(published)).max() < 2e-3


def test_q_norm_keeps_mean_and_deviation():
    points = np.linspace(-1, 1, 4001)
    counts = np.exp(-8 * (points - 0.1) ** 2)
    levels = q_norm(exact_kmeans(points, counts, 4), points, counts, rounds=30)
    quantized = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, points)]
    mean, quantized_mean = (np.average(v, weights=counts) for v in (points, quantized))
    deviation = np.sqrt(np.average((points - mean) ** 2, weights=counts))
    quantized_deviation = np.sqrt(np.average((quantized - quantized_mean) ** 2, weights=counts))
    assert abs(quantized_mean - mean) < 1e-3
    assert abs(quantized_deviation - deviation) < 1e-3


def test_q_norm_leaves_what_it_cannot_help():
    levels = np.array([-1.0, 1.0])
    assert q_norm(levels, np.linspace(0, 1, 5), np.zeros(5)) is levels
    assert q_norm(levels, np.array([0.5]), np.ones(1)) is levels


def test_fitted_levels_are_float16_and_follow_the_solver():
    points = np.linspace(-1, 1, 512)
    weights = np.exp(-5 * points**2)
    exact = fit_levels("kmeans", 3, points, weights)
    assert np.array_equal(exact, storable(exact_kmeans(points, weights, 8)))
    assert np.array_equal(exact, exact.astype(np.float16))
    lloyd = fit_levels("kmeans", 3, points, weights, solver="lloyd", seed=1)
    assert np.array_equal(lloyd, storable(lloyd_kmeans(points, weights, 8, seed=1)))
    assert np.array_equal(fit_levels("kmeans", 3, points, np.zeros(512)), storable(uniform_levels(3)))
