"""Token weighting: the statistics, the weights, and their place in an artifact."""

from __future__ import annotations

import pytest
import torch
from models_zoo import tiny_model, token_ids
from statistic_helpers import added

from kvq_calib.calibrate.run import calibrate
from kvq_calib.calibrate.token_weighting import TokenCosts
from kvq_calib.data import TokenWindows
from kvq_calib.schema.recipe import calibration_config

HEADS, DIM = 2, 4
UNIT = torch.full((HEADS,), float(DIM))


def tokens(count, seed=0):
    """Values of two sizes and gradients: those of the small quarter are ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.arange(count) % 4 == 0
    size = torch.where(small, 0.1, 1.0)[:, None]
    y = size * torch.randn(count, HEADS * DIM, generator=generator).sign()
    gradient = torch.where(small[:, None], 10.0, 1.0) * torch.randn(count, HEADS * DIM, generator=generator)
    return y, gradient


def test_small_tokens_with_large_gradients_count_more():
    found = TokenCosts(HEADS)
    y, gradient = tokens(8000)
    found.update(y, gradient, UNIT)
    weights = found.weights(0.0)
    assert weights.dtype == torch.float16
    used = found.sums[1] > 0
    assert used.sum(1).tolist() == [2, 2]
    for head in range(HEADS):
        few, many = weights[head][used[head]].tolist()
        assert few == pytest.approx(100 / 25.75, rel=0.1)
        assert many == pytest.approx(1 / 25.75, rel=0.3)  # with the mean of 20 tokens in it
    assert bool((weights[~used] == 1).all())
    halfway = found.weights(0.5)
    assert torch.allclose(halfway.float(), (weights.float() + 1) / 2, atol=2e-3)
    assert bool((found.weights(1.0) == 1).all())


def test_two_states_add():
    whole, first, second, resumed = (TokenCosts(HEADS) for _ in range(4))
    y, gradient = tokens(40)
    whole.update(y, gradient, UNIT)
    first.update(y[:15], gradient[:15], UNIT)
    second.update(y[15:], gradient[15:], UNIT)
    resumed.load(first.state())
    assert torch.allclose(added(resumed, second).sums, whole.sums)


def test_a_token_that_costs_as_much_as_millions_of_others_has_a_weight_that_can_be_stored():
    found = TokenCosts(HEADS)
    found.sums[:, :, 3] = 1.0
    found.sums[:, :, 20] = torch.tensor([0.0, 1e8])[:, None]
    assert float(found.weights(0.0).max()) == torch.finfo(torch.float16).max


def test_no_tokens_and_no_gradients_weigh_nothing_differently():
    found = TokenCosts(HEADS)
    assert bool((found.weights(0.25) == 1).all())
    found.update(torch.randn(5, HEADS * DIM), torch.zeros(5, HEADS * DIM), UNIT)
    assert bool(torch.isfinite(found.weights(0.25)).all())


@pytest.mark.model
def test_a_calibration_stores_the_weights_and_leaves_them_out_where_they_are_not_wanted():
    model = tiny_model("llama")
    windows = TokenWindows(token_ids(4, 24, 0), {"dataset": "random", "seqlen": 24})
    common = ("learn=null", "allocation.context=65536", "allocation.self_generated=0")
    configs = {
        "with": calibration_config("kvq3", assignments=common),
        "alone": calibration_config("kvq3", assignments=(*common, "cache.key.error_compensation=null")),
        "without": calibration_config(
            "kvq3",
            assignments=(
                *common,
                "cache.value.token_weighting=false",
                "cache.key.token_weighting=false",
                "cache.key.error_compensation.refinement_passes=0",
            ),
        ),
    }
    artifacts = calibrate(model, windows, configs, model_id="", model_config={}).artifacts
    for layer in artifacts["with"].layers:
        for params in (layer.key, layer.value):
            assert float(params.token_weight.float().std()) > 0
            assert bool((params.token_size_unit > 0).all())
        assert layer.key.error_weight is not None
        assert layer.value.error_weight is None
    for layer in artifacts["alone"].layers:
        assert layer.key.compensation is None
        assert float(layer.key.token_weight.float().std()) > 0
    for layer in artifacts["without"].layers:
        assert layer.key.token_weight is layer.value.token_weight is layer.key.error_weight is None
    for name, config in configs.items():
        alone = calibrate(model, windows, {name: config}, model_id="", model_config={}).artifacts
        assert alone[name].to_bytes() == artifacts[name].to_bytes()
