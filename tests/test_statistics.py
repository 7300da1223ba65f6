"""Streaming statistics: independent of order and grouping, close to the exact results, and additive."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistic_helpers import added

from kvq_calib.calibrate.statistics import LEVEL_BINS, ChannelHistogram, LevelHistogram
from kvq_calib.errors import CalibrationError


def sample(tokens=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1e-3, 1.0, 30.0, 1e4, 1e-30, 0.0])
    return torch.randn(tokens, 6, generator=generator) * spread + torch.tensor([0, 10.0, -5, 0, 0, 0])


def sketch(*parts):
    histogram = ChannelHistogram(6)
    for part in parts:
        histogram.update(part)
    return histogram


def assert_same(a, b):
    for name, tensor in a.state().items():
        assert torch.equal(tensor, b.state()[name]), name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=4), st.integers(0, 2**31))
def test_channel_histogram_depends_on_values_alone(cuts, seed):
    y = sample(500, seed)
    edges = [0, *sorted(cuts), 500]
    parts = [y[a:b] for a, b in itertools.pairwise(edges)]
    whole = sketch(y)
    assert_same(whole, sketch(*parts))
    assert_same(whole, sketch(*reversed(parts)))
    split = [sketch(*parts[:2]), sketch(*parts[2:])]
    before = [{name: tensor.clone() for name, tensor in each.state().items()} for each in split]
    assert_same(whole, added(*split))
    assert_same(whole, added(*reversed(split)))
    for each, state in zip(split, before, strict=True):  # what was added is left alone
        assert all(torch.equal(tensor, state[name]) for name, tensor in each.state().items())
    assert int(whole.counts.sum()) == y.numel()


@pytest.mark.parametrize("q", [0.0, 0.005, 0.3, 0.995, 1.0])
def test_quantiles_are_close_to_exact(q):
    y = sample()
    got, resolution = sketch(y).quantile(q), y.abs().amax(0) / 256
    # Between order statistics every value is as good: allow one to each side.
    low, high = (torch.quantile(y, min(max(q + step / len(y), 0), 1), dim=0) for step in (-1, 1))
    assert bool(((got >= low - resolution) & (got <= high + resolution)).all())
    if q in (0.0, 1.0):
        assert torch.equal(got, torch.quantile(y, q, dim=0))


def test_channel_histogram_state_does_not_grow_and_loads():
    small, large = sketch(sample(10)), sketch(*sample(4000).split(100))
    assert [t.nbytes for t in small.state().values()] == [t.nbytes for t in large.state().values()]
    other = ChannelHistogram(6)
    other.load(large.state())
    assert_same(large, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    y = sample(5)
    y[2, 3] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        ChannelHistogram(6).update(y)


def test_level_histogram_sums_weights_and_drops_outliers():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(300, 5, generator=generator) * 0.6
    weights = torch.rand(300, 5, generator=generator)
    outliers = u.abs() > 1.2
    histogram = LevelHistogram(weighted=True)
    histogram.update(u, outliers, weights)
    assert int(histogram.counts.sum()) == int((~outliers).sum())
    assert float(histogram.weights.sum()) == pytest.approx(float(weights[~outliers].double().sum()), rel=1e-6)
    assert histogram.outliers_per_token == pytest.approx(int(outliers.sum()) / 300)
    inside = ~outliers & (u.abs() <= 1)
    clamped = int((~outliers & (u > 1)).sum())
    assert int(histogram.counts[-1]) >= clamped
    mean = float((histogram.points * histogram.counts)[1:-1].sum() / histogram.counts[1:-1].sum())
    assert mean == pytest.approx(float(u[inside].mean()), abs=2e-3)


def test_level_histograms_add():
    u = torch.linspace(-1, 1, 4096).view(64, 64)
    parts = []
    for rows in (slice(0, 20), slice(20, 64)):
        part = LevelHistogram(weighted=False)
        part.update(u[rows], None, None)
        parts.append(part)
    whole = LevelHistogram(weighted=False)
    whole.update(u, None, None)
    assert_same(whole, added(*parts))
    assert whole.weights is not None
    assert torch.equal(whole.weights, whole.counts)
    assert whole.points[0] == -whole.points[-1] == -1 + 1 / LEVEL_BINS
