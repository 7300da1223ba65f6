"""Vocabulary samples: tokens that the calibration text does not have."""

from __future__ import annotations

import pytest
import torch
from models_zoo import tiny_model

from kvq_calib.calibrate.distribution import WeightedHistogram
from kvq_calib.calibrate.run import calibrate
from kvq_calib.calibrate.vocabulary_samples import sampled_positions, with_vocabulary_samples
from kvq_calib.data import TokenWindows
from kvq_calib.schema.recipe import calibration_config

OUTLYING = 90


def test_every_other_token_is_drawn_and_common_ones_more_often():
    ids = torch.full((8, 512), 60_000)
    text = with_vocabulary_samples(ids, 50_000, seed=0)
    drawn = text[:, 1::2]
    assert drawn.shape == (8, 256)
    assert int(drawn.max()) < 50_000
    assert torch.equal(text[:, 0::2], ids[:, 0::2])
    assert bool((ids == 60_000).all())  # the text itself is left alone
    # By Zipf's law from 1,000 on, half of the mass lies below sqrt(1,000 * 51,000) - 1,000 = 6,141.
    assert float((drawn < 6_141).double().mean()) == pytest.approx(0.5, abs=0.04)
    assert torch.equal(with_vocabulary_samples(ids, 50_000, seed=0), text)
    assert not torch.equal(with_vocabulary_samples(ids, 50_000, seed=1), text)


@pytest.mark.parametrize("sinks", range(5))
def test_drawn_tokens_are_found_behind_the_sinks(sinks):
    ids = torch.full((1, 33), 60_000)
    text = with_vocabulary_samples(ids, 50_000, seed=0)
    drawn = (text[0] < 50_000).nonzero().flatten()
    found = torch.arange(33)[sampled_positions(sinks)]
    assert torch.equal(found, drawn[drawn >= sinks])


def test_windows_without_a_place_are_left_alone():
    ids = torch.arange(8).view(8, 1)
    assert torch.equal(with_vocabulary_samples(ids, 100, seed=0), ids)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_values_of_drawn_tokens_take_their_share_of_what_follows_no_weights(share):
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(4000, 2, generator=generator)
    drawn_values = 5 + torch.randn(1000, 2, generator=generator)
    mean, deviation = own.double().mean(0), own.double().std(0)
    text, vocabulary = WeightedHistogram(2), WeightedHistogram(2)
    text.update(own, torch.full_like(own, 3.0), mean, deviation)
    vocabulary.update(drawn_values, torch.ones_like(drawn_values), mean, deviation)
    _, before = text.distribution(mean, deviation, 0.4)
    points, weights = text.distribution(mean, deviation, 0.4, vocabulary, share)
    torch.testing.assert_close(weights.sum(1), before.sum(1))
    centre = (weights * points).sum(1) / weights.sum(1)
    expected = own.double().mean(0) * (1 - 0.4 * share) + drawn_values.double().mean(0) * 0.4 * share
    torch.testing.assert_close(centre, expected)


def model_with_an_outlying_token():
    model = tiny_model("llama")
    with torch.no_grad():
        embedding, attention = model.get_input_embeddings().weight, model.model.layers[0].self_attn
        # Normalisation hides a token's length, so it has a coordinate of its own, and that one counts more.
        embedding[:, 0] = 0.0
        embedding[OUTLYING] = 0.01 * embedding[OUTLYING]
        embedding[OUTLYING, 0] = 1.0
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight[:, 0] *= 4
    return model


def windows_without_it() -> TokenWindows:
    ids = torch.randint(0, OUTLYING, (6, 64), generator=torch.Generator().manual_seed(0))
    return TokenWindows(ids, {"dataset": "random", "seqlen": 64})


def error_of_the_token(model, *assignments: str) -> float:
    """Squared error of the first layer's keys and values of a token that the text does not have."""
    settings = calibration_config(
        "kvq3",
        assignments=("learn=null", "allocation.context=65536", "allocation.self_generated=0", *assignments),
    )
    done = calibrate(model, windows_without_it(), {"r": settings}, model_id="", model_config={})
    quantizers = done.artifacts["r"].quantizers("cpu")[0]
    layer = model.model.layers[0]
    error = 0.0
    with torch.no_grad():
        hidden = layer.input_layernorm(model.get_input_embeddings().weight[OUTLYING]).expand(1, 32, -1)
        for kind, weight in (("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj)):
            x = weight(hidden).unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
            error += float((quantizers[kind](x) - x).square().sum() / x.square().sum())
    return error


def test_levels_of_the_first_layer_reach_tokens_that_the_text_does_not_have():
    model = model_with_an_outlying_token()
    without = error_of_the_token(model, "allocation.vocabulary_samples=0", "allocation.first_layer_weight=1")
    with_them = error_of_the_token(model, "allocation.first_layer_weight=1")
    assert with_them < 0.6 * without


def test_the_first_layer_gets_more_of_the_budget():
    model = model_with_an_outlying_token()

    def bits(factor: float) -> float:
        budget = (
            "allocation.bits_per_element=2.4"  # at 3.4, all channels of the layer reach the largest width
        )
        settings = calibration_config(
            "kvq3",
            assignments=(
                *("learn=null", "allocation.context=65536", budget),
                f"allocation.first_layer_weight={factor}",
            ),
        )
        done = calibrate(model, windows_without_it(), {"r": settings}, model_id="", model_config={})
        params = done.artifacts["r"].layers[0]
        return float(torch.cat([params.key.bits, params.value.bits]).float().mean())

    assert bits(4) > bits(1) + 0.3


def test_sinks_of_one_recipe_move_nothing_in_another():
    model = model_with_an_outlying_token()
    configs = {
        str(sinks): calibration_config(
            "kvq3", assignments=("learn=null", "allocation.context=65536", f"cache.sink_tokens={sinks}")
        )
        for sinks in (0, 1, 4)
    }
    run = {"model_id": "", "model_config": {}}
    together = calibrate(model, windows_without_it(), configs, **run).artifacts
    for name, config in configs.items():
        alone = calibrate(model, windows_without_it(), {name: config}, **run).artifacts
        assert alone[name].to_bytes() == together[name].to_bytes(), name
