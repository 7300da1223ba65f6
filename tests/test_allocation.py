"""Widths from one budget, against brute force and closed forms, and recipes that have one."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_zoo import tiny_model
from statistic_helpers import normal

from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.errors import ConfigError
from kvq_calib.fit.allocation import Choices, allocate, spend_the_rest, width_errors, within_budget
from kvq_calib.fit.density import lloyd
from kvq_calib.fit.width_groups import channel_groups
from kvq_calib.schema.recipe import CalibrationConfig


def gaussian_errors(deviations: list[float], max_bits: int = 6) -> torch.Tensor:
    grid = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    points = torch.tensor(deviations, dtype=torch.float64)[:, None] * grid
    weights = torch.exp(-grid.square() / 2).expand_as(points).contiguous()
    levels = [1 << bits for bits in range(max_bits + 1)]
    return width_errors(points, weights / weights.sum(1, keepdim=True), lloyd, levels)


def alone(errors: torch.Tensor, floor: int = 0, tokens: int = 1) -> Choices:
    """Every channel chooses for itself."""
    widths = torch.arange(floor, errors.shape[1])
    return Choices(errors[:, floor:], widths, len(errors), tokens)


def test_curves_of_a_normal_channel_follow_the_published_quantizer() -> None:
    # Max (1960), table of minimum mean squared errors for a unit normal.
    errors = gaussian_errors([1.0, 3.0], max_bits=5)
    published = torch.tensor([1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499], dtype=torch.float64)
    torch.testing.assert_close(errors[0], published, rtol=0.02, atol=0)
    torch.testing.assert_close(errors[1], 9 * errors[0], rtol=0.01, atol=0)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    floor=st.integers(0, 1),
    budget=st.sampled_from([1.0, 1.25, 1.5, 2.0, 2.75]),
    tokens=st.sampled_from([(1, 1), (4096, 4096), (512, 4096), (7, 3)]),
)
def test_allocation_is_optimal_for_what_it_spends(
    seed: int, floor: int, budget: float, tokens: tuple[int, int]
) -> None:
    halving = 4.0 ** -torch.arange(4, dtype=torch.float64)
    tables = [halving * normal(2, 1, seed=seed + part).double().exp() for part in range(2)]
    choices = [alone(table, floor, each) for table, each in zip(tables, tokens, strict=True)]
    chosen = (torch.cat(allocate(choices, budget)) + floor).tolist()
    price = [tokens[0]] * 2 + [tokens[1]] * 2

    def stored(option: Sequence[int]) -> int:
        return sum(width * each for width, each in zip(option, price, strict=True))

    spent = stored(chosen)
    assert spent <= budget * sum(price)
    assert min(chosen) >= floor
    error = torch.cat(tables)
    best = min(
        sum(float(error[channel, width]) for channel, width in enumerate(option))
        for option in itertools.product(range(floor, 4), repeat=4)
        if stored(option) <= spent
    )
    assert sum(float(error[channel, width]) for channel, width in enumerate(chosen)) <= best * (1 + 1e-9)


def test_allocation_follows_reverse_water_filling() -> None:
    errors = gaussian_errors([0.001, 1.0, 2.0, 4.0])
    (widths,) = allocate([alone(errors)], 2.25)
    assert widths.tolist() == [0, 2, 3, 4]  # one bit for every factor of two
    with pytest.raises(ConfigError, match="min_key_bits"):
        allocate([alone(errors, 3)], 2.25)


def test_budget_counts_what_is_stored_beside_the_codes() -> None:
    errors = gaussian_errors([1.0, 2.0, 4.0, 8.0] * 8)

    def stored(widths: list[torch.Tensor]) -> float:
        return float(widths[0].float().mean()) + 0.01 * float(widths[0].max()) + 0.1

    widths = within_budget(3.0, lambda b: allocate([alone(errors)], b), stored)
    assert 2.5 < stored(widths) <= 3.0
    with pytest.raises(ConfigError, match="bits_per_element"):
        within_budget(0.05, lambda b: allocate([alone(errors)], max(b, 0.0)), stored)


def test_a_budget_is_found_where_choices_are_coarse() -> None:
    """Two groups, and what is stored beside the codes is more than they take at the nearest choices below."""
    errors = gaussian_errors([1.0] * 8 + [2.0] * 8)
    groups = channel_groups(errors, 1, 0)

    def stored(widths: list[torch.Tensor]) -> float:
        return float(widths[0].double().mean()) + 0.003

    def widths_at(budget: float) -> list[torch.Tensor]:
        return [groups.widths(allocate([groups.options(errors, 1)], budget)[0])]

    assert stored(widths_at(3.0)) == 3.003 > 3.0
    assert stored(within_budget(3.0, widths_at, stored)) == 2.503
    assert stored(within_budget(3.6, widths_at, stored)) == 3.503


def recipe(**changes: object) -> CalibrationConfig:
    settings: dict[str, object] = {
        "cache": {
            "key": {"codec": "trellis", "max_bits": 4, "states": 1, "pair_rotation": True},
            "value": {"codec": "trellis", "max_bits": 4, "states": 1},
        },
        "allocation": {"bits_per_element": 3.0, "context": 65536},
    }
    return CalibrationConfig.model_validate({**settings, **changes})


def tiny_windows() -> TokenWindows:
    ids = torch.randint(3, 128, (3, 48), generator=torch.Generator().manual_seed(0))
    return TokenWindows(ids=ids, source={"name": "random"})


@pytest.mark.model
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "smollm3"])
def test_recipe_keeps_its_budget_on_every_kind_of_rope(family: str) -> None:
    model = tiny_model(family)
    run = calibrate(model, tiny_windows(), {"r": recipe()}, model_id="tiny", model_config={})
    artifact = run.artifacts["r"]
    assert 2.9 < artifact.bits_per_element(65536) <= 3.0
    again = calibrate(model, tiny_windows(), {"r": recipe()}, model_id="tiny", model_config={})
    assert again.artifacts["r"].to_bytes() == artifact.to_bytes()  # writing checks every rule of the format
    widths = torch.cat([params.key.bits for params in artifact.layers])
    assert len(widths.unique()) > 1
    assert int(widths.min()) >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocation": None}, "allocation: the trellis codec needs this section"),
        ({"cache": {"key": {"bits": 4}, "value": {"bits": 4}}}, "allocation is for the trellis codec"),
        ({"cache": {"key": {"codec": "trellis", "max_bits": 4}, "value": {"bits": 4}}}, "one codec for the keys"),
        (
            {"cache": {"key": {"codec": "trellis", "max_bits": 4, "outliers": {"fraction": 0.01}},
                       "value": {"codec": "trellis", "max_bits": 4}}},
            "outliers",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    budget=st.floats(1.0, 2.9),
    tokens=st.sampled_from([(1, 1), (512, 4096), (7, 3)]),
)
def test_the_rest_of_a_budget_is_spent_where_it_saves_most(
    seed: int, budget: float, tokens: tuple[int, int]
) -> None:
    halving = 4.0 ** -torch.arange(4, dtype=torch.float64)
    tables = [halving * normal(5, 1, seed=seed + part).double().exp() for part in range(2)]
    choices = [alone(table, 0, each) for table, each in zip(tables, tokens, strict=True)]
    first = allocate(choices, budget)
    whole = spend_the_rest(choices, first, budget)

    def spent(chosen: Sequence[torch.Tensor]) -> int:
        return sum(int(own.sum()) * each for own, each in zip(chosen, tokens, strict=True))

    left = budget * 5 * sum(tokens) - spent(whole)
    assert left >= 0
    for before, after, each in zip(first, whole, tokens, strict=True):
        assert bool((after >= before).all())
        assert int(after.min()) == 3 or each > left  # no row can be widened
    if spent(whole) == spent(first):
        assert all(torch.equal(a, b) for a, b in zip(first, whole, strict=True))


def test_the_rest_goes_to_the_row_that_saves_most_per_bit() -> None:
    cost = torch.tensor([[9.0, 5.0, 4.0], [9.0, 4.0, 1.0]], dtype=torch.float64)
    both = [Choices(cost, torch.tensor([0, 1, 4]), 2, 1)]
    none = [torch.tensor([0, 0])]
    assert spend_the_rest(both, none, 0.25)[0].tolist() == [0, 0]
    assert spend_the_rest(both, none, 0.5)[0].tolist() == [0, 1]
    assert spend_the_rest(both, none, 1.9)[0].tolist() == [1, 1]
    assert spend_the_rest(both, none, 2.5)[0].tolist() == [1, 2]
