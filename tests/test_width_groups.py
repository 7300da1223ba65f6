"""Groups of channels that share a width: their members, and their possible widths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistic_helpers import normal

from kvq_calib.fit.allocation import allocate
from kvq_calib.fit.width_groups import WidthGroups, channel_groups, pair_groups
from kvq_calib.schema.geometry import RopeSpec, channel_pairs

QUARTERING = 4.0 ** -torch.arange(6, dtype=torch.float64)


def errors_of(heads: int, size: int, seed: int = 0) -> torch.Tensor:
    return QUARTERING * (2 * normal(heads * size, 1, seed=seed).double()).exp()


def widths_of(groups: WidthGroups, errors: torch.Tensor, budget: float) -> torch.Tensor:
    return groups.widths(allocate([groups.options(errors, 1)], budget)[0])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    size=st.sampled_from([2, 6, 8, 20, 32, 64]),
    floor=st.integers(0, 2),
    budget=st.floats(2.0, 5.0),
)
def test_every_channel_is_in_one_group_of_its_head(
    seed: int, heads: int, size: int, floor: int, budget: float
) -> None:
    errors = errors_of(heads, size, seed)
    pairs = channel_pairs(None, size)
    for groups in (channel_groups(errors, heads, floor), pair_groups(errors, heads, pairs, floor)):
        members = groups.members.flatten(1)
        assert sorted(members.flatten().tolist()) == list(range(heads * size))
        assert bool((members // size == members[:, :1] // size).all())
        widths = widths_of(groups, errors, budget)
        assert floor <= int(widths.min()) <= int(widths.max()) <= 5
        assert float(widths.double().mean()) <= budget
        of_parts = widths[groups.members]
        assert bool((of_parts == of_parts[..., :1]).all())


def test_costs_and_bits_are_sums_over_the_members() -> None:
    errors = errors_of(2, 16)
    groups = pair_groups(errors, 2, channel_pairs(None, 16), 1)
    options = groups.options(errors, 7)
    assert (options.channels, options.tokens) == (32, 7)
    for group, members in enumerate(groups.members):
        for choice, widths in enumerate(groups.choices.tolist()):
            own = [(int(c), w) for part, w in zip(members, widths, strict=True) for c in part]
            cost = sum(float(errors[c, w]) for c, w in own)
            torch.testing.assert_close(float(options.cost[group, choice]), cost)
            assert int(options.bits[choice]) == sum(w for _, w in own)


def test_channels_that_want_the_same_go_together() -> None:
    error = (
        torch.tensor([1.0, 256.0]).repeat(8)[:, None] * QUARTERING
    )  # every other channel wants 4 bits more
    assert widths_of(channel_groups(error, 1, 0), error, 2.0).tolist() == [0, 4] * 8


def test_of_a_pair_either_channel_can_be_the_wider_one() -> None:
    wide = torch.tensor([1.0, 4.0, 4.0, 1.0] * 4)
    error = wide[:, None] * QUARTERING
    groups = pair_groups(error, 1, channel_pairs(None, 16), 0)
    assert widths_of(groups, error, 1.5).tolist() == [1, 2, 2, 1] * 4
    assert {(b - a).item() for a, b in groups.choices if a > 0} == {0, 1}


def test_of_a_pair_one_channel_may_have_no_bits_whatever_the_other_has() -> None:
    wanted = torch.tensor([4, 0, 3, 3] * 4)
    error = torch.where(wanted > 0, 4.0**wanted, 1e-9)[:, None] * QUARTERING
    groups = pair_groups(error, 1, [(i, i + 1) for i in range(0, 16, 2)], 0)
    for _ in range(2):
        widths = widths_of(groups, error, 2.5)
        groups = groups.regrouped(widths, error)
    assert widths.tolist() == wanted.tolist()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    size=st.sampled_from([8, 20, 64]),
    pairs=st.booleans(),
)
def test_regrouping_keeps_widths_and_lowers_the_error(seed: int, heads: int, size: int, pairs: bool) -> None:
    errors = errors_of(heads, size, seed)
    groups = (
        pair_groups(errors, heads, channel_pairs(None, size), 0)
        if pairs
        else channel_groups(errors, heads, 0)
    )
    widths = widths_of(groups, errors, 2.5)
    found = groups.regrouped(widths, errors)
    assert sorted(found.members.flatten().tolist()) == list(range(heads * size))
    assert bool((found.members.flatten(1) // size == groups.members.flatten(1) // size).all())
    together = {tuple(own) for own in groups.members.mT.flatten(0, 1).tolist()}
    assert {tuple(own) for own in found.members.mT.flatten(0, 1).tolist()} == together
    places = widths[groups.members[..., 0]].to(torch.int64)  # the widths that each group keeps

    def error(members: torch.Tensor) -> float:
        return float(errors[members, places[..., None].expand_as(members)].sum())

    assert error(found.members) <= error(groups.members) * (1 + 1e-6)  # costs are compared in float32
    again = widths_of(found, errors, 2.5)
    assert float(again.double().mean()) <= 2.5


def test_pairs_are_those_of_rope_then_the_others() -> None:
    rope = RopeSpec(pairs=((0, 2), (1, 3)), inv_freq=(1.0, 0.1))
    assert channel_pairs(rope, 8) == [(0, 2), (1, 3), (4, 5), (6, 7)]
    assert channel_pairs(None, 5) == [(0, 1), (2, 3)]
