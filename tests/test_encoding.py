"""Encoding of the trellis codec: error compensation within a head, and token weighting."""

from dataclasses import replace

import pytest
import torch
from artifact_factory import random_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.codec.computed_levels import store_levels
from kvq_calib.codec.error_compensation import (
    Compensation,
    error_weight_matrix,
    matrix_of_entries,
    triangular_factor,
)
from kvq_calib.codec.token_weighting import SIZE_CLASSES, size_classes, squared_size
from kvq_calib.codec.trellis import TrellisQuantizer, nearest_boundaries
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.schema.geometry import HeadShape
from kvq_calib.schema.spec import ErrorCompensationSpec, TrellisSpec

HEADS, DIM = 2, 8
SHAPE = HeadShape(HEADS, DIM)
CHANNELS = SHAPE.channels


def even(bits, states, scale):
    """Numbers of a quantizer whose channels all have the same evenly spaced levels."""
    spec, widths = TrellisSpec(max_bits=bits, states=states), torch.full((CHANNELS,), bits, dtype=torch.uint8)
    exact = torch.tensor([0.0, scale, 0.0, 0.0, 0.0, 0.0]).expand(CHANNELS, 6)
    return TrellisParams(widths).with_levels(store_levels(spec, widths, exact))


# ------------------------------------------------------------------------------------------------ error compensation


def compensated(bits, passes, seed):
    """A quantizer with a large matrix of error compensation."""
    generator = torch.Generator().manual_seed(seed)
    spec = TrellisSpec(
        max_bits=bits,
        states=1,
        error_compensation=ErrorCompensationSpec(refinement_passes=passes),
    )
    plain = random_quantizer(TrellisSpec(max_bits=bits, states=1), SHAPE, seed=seed)
    entries = torch.randint(-127, 128, (HEADS, DIM * (DIM - 1) // 2), generator=generator).to(torch.int8)
    params = replace(
        plain.params,
        compensation=entries,
        compensation_scale=torch.full((HEADS,), 4.0 / (127 * DIM)),
        error_weight=torch.rand(HEADS, DIM, generator=generator).half() if passes else None,
    )
    return TrellisQuantizer(spec, params, SHAPE)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 2), st.integers(0, 1000))
def test_error_compensation_follows_its_formula_token_by_token(bits, passes, seed):
    quantizer = compensated(bits, passes, seed)
    params = quantizer.params
    x = torch.randn(2, HEADS, 3, DIM, generator=torch.Generator().manual_seed(seed))
    codes = quantizer.quantize(x).codes.unflatten(-1, (HEADS, DIM))
    levels = quantizer.levels.unflatten(0, (HEADS, DIM))
    boundaries = nearest_boundaries(quantizer.levels, params.bits).unflatten(0, (HEADS, DIM))
    for head in range(HEADS):
        y, errors, found = x[1, head, 2], torch.zeros(DIM), [0] * DIM
        unit = torch.eye(DIM, dtype=torch.float64)
        for i in range(DIM):
            for j in range(i):
                entry = int(params.compensation[head, i * (i - 1) // 2 + j])
                unit[i, j] = float(params.compensation_scale[head] * entry)
        weight = torch.ones(DIM) if params.error_weight is None else params.error_weight[head]
        cost = unit.T @ torch.diag(weight.double()) @ unit
        for number in range(passes + 1):
            for i in range(DIM):
                share = (unit[i] if number == 0 else cost[i] / cost[i, i]).float()
                later = torch.zeros(())
                for j in range(i + 1, DIM if number else 0):
                    later = later + share[j] * errors[j]
                t = y[i] + later
                for j in range(i):
                    t = t + share[j] * errors[j]
                found[i] = int((t > boundaries[head, i]).sum())
                errors[i] = y[i] - levels[head, i, found[i]]
        assert found == codes[1, 2, head].tolist()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(0, 1000))
def test_a_factor_gives_the_matrices_of_the_weight_it_stands_for(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randint(-127, 128, (HEADS, DIM * rank), generator=generator).to(torch.int8)
    step = torch.full((HEADS,), 0.9 / rank**0.5 / 127)
    weight = (0.01 + torch.rand(HEADS, DIM, generator=generator)).half()
    found = Compensation.of(entries, step, weight, rank=rank, refinement_passes=1, size=DIM)
    for head in range(HEADS):
        factor = step[head].double() * entries[head].double().view(DIM, rank)
        root = weight[head].double().sqrt()
        cost = torch.empty(DIM, DIM, dtype=torch.float64)
        for i in range(DIM):
            for j in range(DIM):
                cost[i, j] = root[i] * root[j] * (1 if i == j else factor[i] @ factor[j])
        unit = torch.eye(DIM, dtype=torch.float64) + found.shares[head].double()
        assert not bool(found.shares[head].triu().any())
        pivots = torch.linalg.inv(unit.T) @ cost @ torch.linalg.inv(unit)
        assert torch.allclose(pivots, torch.diag(pivots.diagonal()), atol=1e-6)
        shares = cost / cost.diagonal()[:, None]
        shares.fill_diagonal_(0.0)
        assert torch.allclose(found.refinement_shares[head].double(), shares, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_a_weight_is_the_product_of_its_factors(seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS, DIM, 3 * DIM, generator=generator, dtype=torch.float64)
    weight = mix @ mix.mT
    unit, pivots = triangular_factor(weight)
    assert not bool(unit.triu(1).any())
    assert torch.allclose(unit.diagonal(dim1=1, dim2=2), torch.ones(HEADS, DIM, dtype=torch.float64))
    assert bool((pivots > 0).all())
    torch.testing.assert_close(unit.mT @ torch.diag_embed(pivots) @ unit, weight)


def test_entries_stand_below_the_diagonal_row_by_row():
    matrix = matrix_of_entries(torch.arange(1, 7, dtype=torch.int8)[None], torch.tensor([0.5]), 4)
    assert matrix.tolist() == [[[0, 0, 0, 0], [0.5, 0, 0, 0], [1, 1.5, 0, 0], [2, 2.5, 3, 0]]]


def stored_for(weight, rank):
    """What is stored for the weight ``[D, D]`` of errors, all heads alike: of a factor ``weight`` is ``[D, rank]``."""
    if rank:
        entries, costs = weight.double(), torch.ones(DIM)
    else:
        (unit,), (costs,) = triangular_factor(weight.double()[None])
        row, column = torch.tril_indices(DIM, DIM, -1)
        entries = unit[row, column]
    step = entries.abs().max() / 127
    rounded = (entries / step).round().to(torch.int8).flatten()
    return {
        "compensation": rounded.expand(HEADS, -1),
        "compensation_scale": step.float().expand(HEADS),
        "error_weight": (costs / costs.max()).half().expand(HEADS, -1),
    }


def cost_of(weight, states=1, compensation=None, stored=None):
    """What the errors of a quantizer with 3 bits cost by ``weight``."""
    x = 0.5 * torch.randn(1, HEADS, 500, DIM, generator=torch.Generator().manual_seed(1))
    spec = TrellisSpec(max_bits=3, states=states, error_compensation=compensation)
    error = TrellisQuantizer(spec, replace(even(3, states, 2.0), **(stored or {})), SHAPE)(x) - x
    return float(torch.einsum("bhti,ij,bhtj->", error, weight, error))


ANGLES = 3.2 * torch.rand(DIM, generator=torch.Generator().manual_seed(0))
#: Two directions in which errors cost much, in the first more than in the second.
FACTOR = torch.stack((0.95 * ANGLES.cos(), 0.7 * ANGLES.sin()), dim=1)
WEIGHT = FACTOR @ FACTOR.T
WEIGHT.fill_diagonal_(1.0)


@pytest.mark.parametrize("states", [1, 4])
def test_error_compensation_lowers_the_error_that_its_matrix_was_made_for(states):
    weight = torch.full((DIM, DIM), 0.9) + 0.1 * torch.eye(DIM)  # errors of equal sign cost most
    stored = stored_for(weight, 0)
    del stored["error_weight"]
    assert cost_of(weight, states, {}, stored) < 0.5 * cost_of(weight, states)


def test_a_factor_of_enough_columns_is_as_good_as_the_matrix():
    whole = cost_of(WEIGHT, 1, {"refinement_passes": 1}, stored_for(WEIGHT, 0))
    two = cost_of(WEIGHT, 1, {"rank": 2, "refinement_passes": 1}, stored_for(FACTOR, 2))
    one = cost_of(WEIGHT, 1, {"rank": 1, "refinement_passes": 1}, stored_for(FACTOR[:, :1], 1))
    assert two < 1.05 * whole
    assert two < one < cost_of(WEIGHT)
    made = stored_for(FACTOR, 2)
    names = ("compensation", "compensation_scale", "error_weight")
    assert torch.allclose(error_weight_matrix(*(made[n] for n in names), 2)[0].float(), WEIGHT, atol=0.01)


def test_refinement_passes_lower_it_further():
    factor = torch.randn(DIM, 2, generator=torch.Generator().manual_seed(0))
    weight = factor @ factor.T + 0.2 * torch.eye(DIM)
    stored = stored_for(weight, 0)
    costs = [cost_of(weight, 1, {"refinement_passes": passes}, stored) for passes in range(4)]
    assert costs[1] < 0.95 * costs[0]
    assert costs[3] <= costs[2] <= costs[1]


def test_a_weight_of_nothing_refines_nothing():
    quantizer = compensated(3, 1, 0)
    params = replace(quantizer.params, error_weight=torch.zeros(HEADS, DIM).half())
    found = TrellisQuantizer(quantizer.spec, params, SHAPE).compensation
    assert not bool(found.refinement_shares.any())
    assert bool(found.shares.any())


@pytest.mark.parametrize("passes", [0, 2])
def test_the_matrices_are_counted_as_held(passes, monkeypatch):
    monkeypatch.setenv("KVQ_CALIB_OPS", "torch")  # what the native encoder holds is counted in its own tests
    quantizer = compensated(3, passes, 0)
    matrices = 1 if passes == 0 else 2
    assert [tuple(tensor.shape) for tensor in quantizer.derived()] == [(HEADS, DIM, DIM)] * matrices
    assert random_quantizer(TrellisSpec(max_bits=3), SHAPE).derived() == []


# ------------------------------------------------------------------------------------------------- token weighting


def weighing(token_weight=None, bits=2):
    """A quantizer whose classes of tokens have these weights, by default all 1."""
    weights = torch.ones(HEADS, SIZE_CLASSES) if token_weight is None else token_weight
    params = replace(
        even(bits, 4, 3.0), token_weight=weights.half(), token_size_unit=torch.full((HEADS,), float(DIM))
    )
    return TrellisQuantizer(TrellisSpec(max_bits=bits, token_weighting=True), params, SHAPE)


@settings(deadline=None, max_examples=30)
@given(st.integers(-14, 12), st.integers(0, HEADS - 1))
def test_classes_of_tokens_are_half_octaves_of_the_squared_size(octaves, head):
    quantizer = weighing(torch.arange(HEADS * 32).view(HEADS, 32))
    for within, past in ((0.05, 0), (0.55, 1)):
        y = torch.zeros(1, 1, HEADS, DIM)
        y[0, 0, head, 1] = (DIM * 2.0 ** (octaves + within)) ** 0.5
        found = int(quantizer.token_weights(y.flatten(2))[0, 0, head])
        assert found == 32 * head + min(max(2 * (octaves + 10) + past + 1, 0), 31)


def test_a_size_at_an_edge_belongs_to_the_class_below():
    unit = torch.tensor([8.0, 0.5])
    size = torch.stack((unit, unit * 2**-10, unit * 0), dim=0)
    assert size_classes(unit, size).tolist() == [[20, 20], [0, 0], [0, 0]]
    assert size_classes(unit, size * 1.001).tolist() == [[21, 21], [1, 1], [0, 0]]


def test_the_squared_size_of_a_head_is_that_of_its_coordinates():
    y = torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(0))
    found = squared_size(y, HEADS)
    torch.testing.assert_close(found, y.view(2, 5, HEADS, DIM).square().sum(-1))
    assert torch.equal(
        found[:, :, 1], squared_size(y[..., DIM:], 1)[..., 0]
    )  # a head's own, wherever it stands


def test_a_token_that_counts_more_gets_less_of_the_error():
    x = torch.randn(4, HEADS, 64, DIM, generator=torch.Generator().manual_seed(3))
    x[:, :, ::16] *= 0.05
    weights = torch.ones(HEADS, SIZE_CLASSES)
    weights[:, :8] = 100.0
    alike, weighed = weighing(), weighing(weights)
    unweighted = TrellisQuantizer(TrellisSpec(max_bits=2), even(2, 4, 3.0), SHAPE)
    assert unweighted.token_weights(unweighted.transform(x)) is None
    assert torch.equal(alike.quantize(x).codes, unweighted.quantize(x).codes)
    before, after = ((q(x) - x).square().sum((0, 1, 3)) for q in (alike, weighed))
    assert float(after[::16].sum()) < 0.85 * float(before[::16].sum())
    assert float(after.sum()) > float(before.sum())


def test_weights_of_tokens_and_error_compensation_work_together():
    """A coordinate's path is found with the weights, and what it leaves is passed on to the coordinates after it."""
    x = torch.randn(1, HEADS, 40, DIM, generator=torch.Generator().manual_seed(5))
    x[:, :, ::8] *= 0.05
    weights = torch.ones(HEADS, SIZE_CLASSES)
    weights[:, :8] = 100.0
    stored = stored_for(WEIGHT, 0)
    del stored["error_weight"]
    plain = weighing(weights)
    spec = TrellisSpec(max_bits=2, token_weighting=True, error_compensation={})
    quantizer = TrellisQuantizer(spec, replace(plain.params, **stored), SHAPE)
    y, codes = quantizer.transform(x), quantizer.quantize(x).codes
    error = (y - quantizer.decode(codes)).unflatten(-1, SHAPE)
    fed = y.unflatten(-1, SHAPE).clone()
    for i in range(DIM):
        found = plain.encode(fed.flatten(2), quantizer.token_weights(y)).unflatten(-1, SHAPE)
        assert torch.equal(found[..., i], codes.unflatten(-1, SHAPE)[..., i])
        for j in range(i + 1, DIM):
            fed[..., j] += quantizer.compensation.shares[:, j, i] * error[..., i]
