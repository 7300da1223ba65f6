"""Confidence intervals hold what they promise."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_calib.evaluate.intervals import mean_and_error, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "ends"),
    [(0, 10, (0.0, 0.27753)), (7, 10, (0.39678, 0.89221)), (10, 10, (0.72247, 1.0)), (81, 263, (0.25527, 0.36621))],
)  # fmt: skip
def test_wilson_gives_the_published_ends(successes, trials, ends):
    assert wilson(successes, trials) == pytest.approx(ends, abs=1e-4)


def covered(truth, draw, interval, repeats=1500):
    return sum(low <= truth <= high for low, high in (interval(draw()) for _ in range(repeats))) / repeats


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_wilson_holds_the_truth_about_as_often_as_it_says(share):
    draw = random.Random(1)
    rate = covered(share, lambda: sum(draw.random() < share for _ in range(30)), lambda k: wilson(k, 30))
    assert 0.92 < rate < 0.99


@pytest.mark.parametrize("weights", [(60, 15, 5, 20), (70, 20, 0, 10), (25, 25, 25, 25), (90, 4, 4, 2)])
def test_a_paired_difference_holds_the_truth_about_as_often_as_it_says(weights):
    """Of trials that both, the first, the second, or neither passes."""
    draw = random.Random(2)
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    truth = (weights[2] - weights[1]) / sum(weights)

    def interval(pairs):
        before, after = zip(*pairs, strict=True)
        return paired_difference(before, after)[1]

    rate = covered(truth, lambda: draw.choices(kinds, weights, k=40), interval)
    assert 0.92 < rate <= 1.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_difference_is_what_it_says_and_turns_with_its_sign(pairs):
    before, after = zip(*pairs, strict=True)
    value, (low, high) = paired_difference(before, after)
    assert value == pytest.approx((sum(after) - sum(before)) / len(pairs))
    assert -1 - 1e-9 <= low <= value <= high <= 1 + 1e-9
    other, (down, up) = paired_difference(after, before)
    assert (other, down, up) == pytest.approx((-value, -high, -low))


def test_pairs_that_agree_tell_more_than_trials_that_do_not():
    before = [True] * 20 + [False] * 10
    same = paired_difference(before, [*before[:-1], True])[1]
    mixed = paired_difference(before, [*before[10:], *[True] * 11][:30])[1]
    assert same[1] - same[0] < 0.6 * (mixed[1] - mixed[0])


def test_few_pairs_that_all_agree_prove_nothing():
    _, (low, high) = paired_difference([True, True, False, False], [True, True, False, False])
    assert low < -0.3
    assert high > 0.3


def test_mean_and_its_error():
    assert mean_and_error([3.0]) == (3.0, None)
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3 / 4))
