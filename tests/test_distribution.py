"""Moments and weighted distributions of channels, against their data."""

import torch
from statistic_helpers import added, normal

from kvq_calib.calibrate.distribution import ChannelMoments, WeightedHistogram, pair_channels
from kvq_calib.codec.pair_rotation import turn_pairs
from kvq_calib.schema.geometry import RopeSpec

HALVES = RopeSpec(pairs=((0, 2), (1, 3)), inv_freq=(1.0, 0.1))


def test_moments_equal_those_of_the_data_and_angles_decorrelate_pairs() -> None:
    y = normal(500, 8) @ normal(8, 8, seed=1) + 3
    first, second = pair_channels(HALVES, 2, 4)
    assert first.tolist() == [[0, 1], [4, 5]]
    assert second.tolist() == [[2, 3], [6, 7]]
    moments = ChannelMoments(8, first, second)
    moments.update(y[:123])
    moments.update(y[123:])
    torch.testing.assert_close(moments.mean, y.double().mean(0))
    torch.testing.assert_close(moments.variance, y.double().var(0, correction=0))

    angle = moments.principal_angle()
    assert angle.dtype == torch.float16  # fitted to as it is stored
    heads = y.view(1, 500, 2, 4).transpose(1, 2)
    turned = turn_pairs(heads, angle, HALVES).transpose(1, 2).reshape(500, 8).double()
    mean, deviation = moments.turned(angle)
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
    torch.testing.assert_close(added(one, two).sums, whole.sums)
    points, weights = whole.distribution(mean, deviation)
    assert bool((points.diff(dim=1) >= 0).all())
    torch.testing.assert_close(weights.sum(1), w.double().mean(0))
    torch.testing.assert_close((points * weights).sum(1), (w.double() * y).mean(0))
    restored = WeightedHistogram(3)
    restored.load(whole.state())
    assert torch.equal(restored.sums, whole.sums)


def test_bins_are_equal_steps_of_asinh() -> None:
    y = normal(500, 2) * torch.tensor([1.0, 100.0])
    y[:2] = torch.tensor([[0.0, 1e30], [1e-30, -1e30]])
    mean, deviation = torch.tensor([0.5, -3.0]).double(), torch.tensor([1.0, 20.0]).double()
    histogram = WeightedHistogram(2)
    histogram.update(y, None, mean, deviation)
    place = torch.asinh((y.double() - mean) / deviation) / torch.asinh(torch.tensor(64.0).double())
    bins = ((place + 1) * 256).to(torch.int64).clamp(0, 511)
    for channel in range(2):
        expected = torch.bincount(bins[:, channel], minlength=512).double()
        assert torch.equal(histogram.sums[2, channel], expected)


def test_no_weights_are_weights_of_one() -> None:
    y = normal(400, 3)
    mean, deviation = y.double().mean(0), y.double().std(0)
    plain, ones = WeightedHistogram(3), WeightedHistogram(3)
    plain.update(y, None, mean, deviation)
    ones.update(y, torch.ones_like(y), mean, deviation)
    assert torch.equal(plain.sums, ones.sums)
    assert torch.equal(plain.count, ones.count)


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
