"""Error feedback: the factors of the weight, what is left of it, and statistics that add."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.calibrate.feedback import GradientCovariance, error_feedback
from kvq_calib.config import CalibrationConfig

HEADS, DIM = 3, 6


def weight(seed, dim=DIM, samples=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS, dim, dim, generator=generator, dtype=torch.float64)
    g = torch.randn(HEADS, samples, dim, generator=generator, dtype=torch.float64) @ mix
    return g.mT @ g


def matrix(feedback, scale, dim=DIM):
    full = torch.eye(dim, dtype=torch.float64).repeat(HEADS, 1, 1)
    row, column = torch.tril_indices(dim, dim, -1)
    full[:, row, column] = feedback.double() * scale.double()[:, None]
    return full


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_the_factors_give_the_weight_back(seed):
    w = weight(seed)
    feedback, scale, _, left = error_feedback(w)
    unit = matrix(feedback, scale)
    rest = left * w.diagonal(dim1=-2, dim2=-1)
    rebuilt = unit.mT @ torch.diag_embed(rest) @ unit
    # Damping adds 3% to the diagonal, eight bits round the entries.
    tolerance = (
        0.1 * w.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] * unit.abs().amax().clamp(min=1) ** 2
    )
    assert bool(((rebuilt - w).abs() <= tolerance).all())
    assert bool((left > 0).all())
    assert bool((left <= 1 + 1e-9).all())


def test_the_stored_weights_are_the_pivots_of_each_head():
    w = weight(3)
    _, _, share, left = error_feedback(w)
    pivots = left * w.diagonal(dim1=-2, dim2=-1)
    expected = (pivots / pivots.amax(-1, keepdim=True)).half()
    assert torch.allclose(share, expected, rtol=2e-3)
    assert bool((share.amax(-1) == 1).all())


def test_the_last_coordinate_has_nobody_to_make_good_for_it():
    left = error_feedback(weight(0)).left
    assert torch.allclose(left[:, -1], torch.ones(HEADS, dtype=torch.float64))
    assert bool((left[:, 0] < 0.9).all())


def test_independent_gradients_ask_for_no_feedback():
    feedback, scale, _, left = error_feedback(
        torch.diag_embed(torch.rand(HEADS, DIM, dtype=torch.float64) + 0.1)
    )
    assert not bool((feedback.double() * scale.double()[:, None]).any())
    assert torch.allclose(left, torch.ones_like(left))


@pytest.mark.parametrize("dim", [1, 2])
def test_no_gradients_at_all_and_tiny_heads(dim):
    feedback, scale, share, left = error_feedback(torch.zeros(HEADS, dim, dim, dtype=torch.float64))
    assert feedback.shape == (HEADS, dim * (dim - 1) // 2)
    assert bool(torch.isfinite(scale).all())
    assert bool(torch.isfinite(share).all())
    assert torch.allclose(left, torch.ones_like(left))


def test_two_states_add():
    gradients = torch.randn(40, HEADS * DIM, generator=torch.Generator().manual_seed(0))
    whole, first, second = (GradientCovariance(HEADS, DIM) for _ in range(3))
    whole.update(gradients)
    first.update(gradients[:15])
    second.update(gradients[15:])
    resumed = GradientCovariance(HEADS, DIM)
    resumed.load(first.state())
    resumed.merge(second)
    assert torch.allclose(resumed.sums, whole.sums)
    head = gradients[:, DIM : 2 * DIM].double()
    assert torch.allclose(whole.sums[1], head.T @ head)


def test_feedback_needs_gradients_and_an_allocation():
    cache = {
        "key": {"bits": 4, "variable_bits": True, "feedback": True},
        "value": {"bits": 4, "variable_bits": True},
    }
    CalibrationConfig.model_validate({"cache": cache, "allocation": {}})
    with pytest.raises(ValueError, match="feedback needs fit"):
        CalibrationConfig.model_validate({"cache": cache, "allocation": {}, "fit": {"weights": "uniform"}})
    weighed = {
        "key": {"bits": 4, "variable_bits": True, "trellis": True, "importance": True},
        "value": {"bits": 4, "variable_bits": True},
    }
    with pytest.raises(ValueError, match="importance needs fit"):
        CalibrationConfig.model_validate({"cache": weighed, "allocation": {}, "fit": {"weights": "uniform"}})
    plain = {"key": {"bits": 4, "feedback": True}, "value": {"bits": 4}}
    with pytest.raises(ValueError, match="need an allocation"):
        CalibrationConfig.model_validate({"cache": plain})
