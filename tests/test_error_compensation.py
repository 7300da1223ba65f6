"""Error compensation: factors of the error weight, the weight that remains, and statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_zoo import tiny_model, token_ids
from statistic_helpers import added

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.error_compensation import GradientCovariance, compensation_factors
from kvq_calib.calibrate.rate_distortion import spec_by_layer
from kvq_calib.calibrate.run import calibrate
from kvq_calib.codec.error_compensation import error_weight_matrix, triangular_factor
from kvq_calib.data import TokenWindows
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.runtime import KVQCache
from kvq_calib.schema.cached import CachedTensor
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.recipe import AllocationConfig, CalibrationConfig, calibration_config
from kvq_calib.schema.spec import ErrorCompensationSpec

HEADS, DIM = 3, 6


def weight(seed, dim=DIM, samples=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS, dim, dim, generator=generator, dtype=torch.float64)
    g = torch.randn(HEADS, samples, dim, generator=generator, dtype=torch.float64) @ mix
    return g.mT @ g


def matrix(entries, scale, dim=DIM):
    full = torch.eye(dim, dtype=torch.float64).repeat(HEADS, 1, 1)
    row, column = torch.tril_indices(dim, dim, -1)
    full[:, row, column] = entries.double() * scale.double()[:, None]
    return full


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_the_factors_give_the_weight_back(seed):
    w = weight(seed)
    entries, scale, _, left = compensation_factors(w)
    unit = matrix(entries, scale)
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
    _, _, share, left = compensation_factors(w)
    pivots = left * w.diagonal(dim1=-2, dim2=-1)
    expected = (pivots / pivots.amax(-1, keepdim=True)).half()
    assert torch.allclose(share, expected, rtol=2e-3)
    assert bool((share.amax(-1) == 1).all())


def test_the_errors_of_the_last_coordinate_cannot_be_compensated():
    left = compensation_factors(weight(0)).left
    assert torch.allclose(left[:, -1], torch.ones(HEADS, dtype=torch.float64))
    assert bool((left[:, 0] < 0.9).all())


def test_what_a_factor_leaves_is_what_its_rounding_errors_cost():
    w = weight(5, samples=40)
    found = compensation_factors(w, rank=2)
    assert found.entries.shape == (HEADS, 2 * DIM)
    assert bool((found.weight > 0).all())
    taken = error_weight_matrix(found.entries, found.scale, found.weight, 2)
    unit, _ = triangular_factor(taken)
    damped = w + 0.03 * torch.diag_embed(w.diagonal(dim1=-2, dim2=-1))
    for head in range(HEADS):
        for i in range(DIM):
            error = torch.linalg.solve(unit[head], torch.eye(DIM, dtype=torch.float64)[:, i])
            cost = error @ damped[head] @ error / damped[head, i, i]
            assert float(found.left[head, i]) == pytest.approx(float(cost), rel=1e-5)


def test_more_columns_save_more_and_all_as_much_as_the_matrix():
    common = torch.randn(HEADS, DIM, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = common @ common.mT + 0.3 * torch.eye(DIM, dtype=torch.float64)
    saved = [-float(compensation_factors(w, rank).left.log2().mean()) for rank in (1, 2, DIM + 2, 0)]
    assert 0 < saved[0] < saved[1]
    assert saved[1:3] == pytest.approx([saved[3]] * 2, rel=0.03)


def test_independent_gradients_ask_for_no_compensation():
    entries, scale, _, left = compensation_factors(
        torch.diag_embed(torch.rand(HEADS, DIM, dtype=torch.float64) + 0.1)
    )
    assert not bool((entries.double() * scale.double()[:, None]).any())
    assert torch.allclose(left, torch.ones_like(left))


@pytest.mark.parametrize("dim", [1, 2])
def test_no_gradients_at_all_and_tiny_heads(dim):
    entries, scale, share, left = compensation_factors(torch.zeros(HEADS, dim, dim, dtype=torch.float64))
    assert entries.shape == (HEADS, dim * (dim - 1) // 2)
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
    assert torch.allclose(added(resumed, second).sums, whole.sums)
    head = gradients[:, DIM : 2 * DIM].double()
    assert torch.allclose(whole.sums[1], head.T @ head)


def test_compensation_is_left_out_where_it_takes_more_than_it_saves():
    agreeing = GradientCovariance(HEADS, DIM)
    agreeing.sums += weight(0)
    stored = 8 * HEADS * (2 * DIM + 4 + 2 * DIM)
    # Half of it is counted on, and of that what is left on other text.
    saved = -0.7 * float(compensation_factors(weight(0), rank=2).left.log2().mean()) / 4 * HEADS * DIM
    enough = math.ceil(stored / saved)
    cache = calibration_config("kvq3", assignments=("cache.key.error_compensation.rank=2",)).cache
    for window, context, kept in (
        (None, enough, True),
        (None, enough - 1, False),
        (enough, 10 * enough, True),
        (enough - 1, 10 * enough, False),
    ):
        layers = [
            LayerGeometry(num_query_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM, sliding_window=each)
            for each in (None, window)
        ]
        found = spec_by_layer(
            cache,
            AllocationConfig(context=context),
            KVGeometry(layers=layers),
            {CachedTensor(1, "key"): agreeing},
        )
        first, second = found.resolved(2)
        assert first.key == cache.key  # nothing is known of it
        assert second.key.error_compensation == (cache.key.error_compensation if kept else None)
        assert second.value == cache.value
        assert (found is cache) == kept


def test_what_compensation_stores_follows_the_tokens_it_serves():
    size, generator = 64, torch.Generator().manual_seed(0)
    common = torch.randn(HEADS, size, 3, generator=generator, dtype=torch.float64)
    rest = torch.randn(HEADS, size, size, generator=generator, dtype=torch.float64) / 16
    gradients = GradientCovariance(HEADS, size)
    gradients.sums += common @ common.mT + rest @ rest.mT + torch.eye(size, dtype=torch.float64)
    shape = LayerGeometry(num_query_heads=HEADS, num_kv_heads=HEADS, head_dim=size)
    cache = calibration_config("kvq3").cache

    def stored(context):
        spec = spec_by_layer(
            cache,
            AllocationConfig(context=context),
            KVGeometry(layers=[shape]),
            {CachedTensor(0, "key"): gradients},
        )
        (layer,) = spec.resolved(1)
        return layer.key.error_compensation

    assert stored(16) is None
    assert stored(400) == ErrorCompensationSpec(rank=4, refinement_passes=2)  # three columns tell nearly all
    assert stored(1 << 20) == ErrorCompensationSpec(rank=0, refinement_passes=2)


@pytest.mark.model
def test_layers_with_a_small_window_are_calibrated_without_compensation():
    model = tiny_model("gemma3_text", max_position_embeddings=8192)
    windows = TokenWindows(token_ids(4, 48, 0), {"dataset": "random", "seqlen": 48})
    settings = (
        "learn.steps=2",
        "learn.seqlen=24",
        "allocation.self_generated=0",
        "allocation.bits_per_element=4.5",
    )
    config = calibration_config("kvq3", assignments=settings)
    (artifact,) = calibrate(
        model, windows, {"it": config}, model_id="", model_config=model_fingerprint(model)
    ).artifacts.values()
    assert [layer.key.compensation is not None for layer in artifact.layers] == [False, False, True]
    assert artifact.bits_per_element(4096) <= 4.5
    again = KVArtifact.from_bytes(artifact.to_bytes())
    assert again.spec == artifact.spec
    # A bit in a layer that holds few tokens is cheap.
    widths = [float(torch.cat([layer.key.bits, layer.value.bits]).float().mean()) for layer in again.layers]
    assert min(widths[:2]) > widths[2]
    cache = KVQCache(again, model)
    with torch.no_grad():
        model(token_ids(1, 299, 1), **with_cache(cache))
        logits = model(token_ids(1, 1, 2), **with_cache(cache)).logits
    assert bool(torch.isfinite(logits).all())
    held = cache.memory()
    del held["tables"]
    assert {kind: pytest.approx(size) for kind, size in again.storage(300).items()} == held


def test_compensation_and_token_weighting_need_gradients():
    for setting in ({"error_compensation": {}}, {"token_weighting": True}):
        cache = {kind: {"codec": "trellis", "max_bits": 4, **setting} for kind in ("key", "value")}
        CalibrationConfig.model_validate({"cache": cache, "allocation": {}})
        with pytest.raises(ValueError, match="they need --weights fisher"):
            CalibrationConfig.model_validate(
                {"cache": cache, "allocation": {}, "fit": {"weights": "uniform"}}
            )
