"""The order in which the decode kernel takes channels, and its numbers for computed levels."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from artifact_factory import random_quantizer
from hypothesis import given
from hypothesis import strategies as st

from kvq_calib.runtime.cuda import kinds
from kvq_calib.runtime.cuda.build import kernel_folder
from kvq_calib.runtime.cuda.decode_tables import DecodeTables, KernelTables
from kvq_calib.runtime.cuda.kinds import KEY_KINDS, KIND_ROOM, VALUE_KINDS, arrange_pairs, arrange_values
from kvq_calib.schema.geometry import HeadShape, RopeSpec
from kvq_calib.schema.spec import TrellisSpec

MOST = {kinds.NARROW: 3, kinds.MEDIUM: 5, kinds.ANY: 8}


def heads(multiple: int):
    """Widths of a head: few different ones, or many."""
    return st.integers(1, 4).flatmap(
        lambda n: st.sampled_from([2, 3, 5, 8]).flatmap(
            lambda most: st.lists(st.integers(0, most), min_size=n * multiple, max_size=n * multiple)
        )
    )


def check(made: kinds.Arrangement, widths: list[int], names: tuple[kinds.Widths, ...], run: int) -> None:
    assert sorted(made.order) == list(range(len(widths)))
    assert list(made.ends) == sorted(made.ends)
    assert len(made.ends) == len(names) <= KIND_ROOM
    size = len(widths) // made.ends[-1]
    before = 0
    for name, end in zip(names, made.ends, strict=True):
        for place in range(before * size, end * size):
            own, found = widths[made.order[place]], name[place // run % 2]
            assert made.widths[place] == found
            assert own == found if found >= 0 else own <= MOST[found]
        before = end


@given(heads(16))
def test_pairs_stay_together_and_go_where_the_kernel_has_code_for_them(widths: list[int]) -> None:
    half = len(widths) // 2
    pairs = [(i, i + half) for i in range(half)]
    made = arrange_pairs(widths, pairs)
    check(made, widths, KEY_KINDS, 1)
    assert len(widths) == 8 * made.ends[-1]
    found = list(zip(made.order[::2], made.order[1::2], strict=True))
    assert sorted(tuple(sorted(pair)) for pair in found) == pairs
    whole = sum(widths[first] == widths[second] == 3 for first, second in pairs) // 4
    place = KEY_KINDS.index((3, 3))
    assert made.ends[place] - made.ends[place - 1] == whole


@given(heads(16))
def test_values_go_where_the_kernel_has_code_for_them(widths: list[int]) -> None:
    made = arrange_values(widths)
    check(made, widths, VALUE_KINDS, 8)
    assert len(widths) == 16 * made.ends[-1]
    place = VALUE_KINDS.index((4, 4))
    assert made.ends[place] - made.ends[place - 1] == widths.count(4) // 16


@pytest.mark.parametrize(("name", "expected"), [("KEY", KEY_KINDS), ("VALUE", VALUE_KINDS)])
def test_the_kernel_lists_the_same_kinds(name: str, expected: tuple[kinds.Widths, ...]) -> None:
    source = (kernel_folder() / "decode_params.cuh").read_text()
    found = re.search(rf"#define KVQ_{name}_KINDS((?:.*\\\n)+.*)", source)
    assert found is not None
    numbers = [int(number) for number in found[1].replace("\\\n", "").split(",")]
    assert tuple(zip(numbers[::2], numbers[1::2], strict=True)) == expected
    room = re.search(r"constexpr int kKinds = (\d+);", source)
    assert room is not None
    assert int(room[1]) == KIND_ROOM


SHAPE = HeadShape(2, 64)
ROPE = RopeSpec(
    pairs=tuple((i, i + 32) for i in range(32)), inv_freq=tuple(10000.0 ** (-i / 32) for i in range(32))
)


def seen_by_the_kernel(
    made: DecodeTables, head: int, place: int, width: int, index: torch.Tensor
) -> torch.Tensor:
    """Levels of a channel from the kernel's numbers, in float64, before what was divided out."""
    halves = made.levels[head, place].view(torch.float16).double()
    top = 2.0 * index / (1 << (width + int(made.paths) if width else 0)) - 1
    return sum((c * top**k for k, c in enumerate(halves[::2][:6])), torch.zeros_like(top))


@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("most", [2, 6])
def test_numbers_give_the_levels(kind: str, states: int, most: int) -> None:
    """Coefficients about the lower end of a level's cell, or tables; with what was divided out of them."""
    spec = TrellisSpec(max_bits=most, states=states)
    quantizer = random_quantizer(spec, SHAPE, ROPE if kind == "key" else None, seed=1)
    tables = KernelTables(quantizer, kind)
    made, tabled, polynomial = tables.decode, 0, 0
    levels = quantizer.levels.double().view(2, 64, -1)
    kinds_of = arrange_pairs if kind == "key" else arrange_values
    for head in range(2):
        widths = quantizer.widths[64 * head : 64 * head + 64]
        arranged = kinds_of(widths, tables.rope_pairs[0]) if kind == "key" else kinds_of(widths)
        for place, (coordinate, own) in enumerate(zip(arranged.order, arranged.widths, strict=True)):
            width = widths[coordinate]
            count = quantizer.level_count(width)
            want = levels[head, coordinate, :count]
            index = torch.arange(count).double()
            if own > 0 and own + made.paths <= 3:
                planes = made.levels[head, place, :16].view(2, 8)
                found = planes.mT.contiguous().view(torch.float16).flatten()[:count].double()
                tabled += 1
            else:
                found = seen_by_the_kernel(made, head, place, width, index)
                polynomial += 1
            factor, offset = made.pair_scale[head, place // 2, 0].double(), torch.tensor(0.0)
            if kind == "value":
                factor, offset = made.affine[head, coordinate].double()
            assert (found * factor + offset - want).abs().max() <= 1e-3 * factor
            assert want.abs().max() <= 1.001 * factor + offset.abs()
    assert (tabled if most == 2 else polynomial) > 8


@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_power_of_two_in_the_coefficients_is_divided_out(kind: str) -> None:
    """So that coefficients of any size are safe in half precision."""
    quantizer = random_quantizer(TrellisSpec(max_bits=5), SHAPE, ROPE if kind == "key" else None)
    params = quantizer.params
    plain = KernelTables(quantizer, kind).decode
    for power in (2.0**40, 2.0**-40):
        scaled = replace(params, coefficients=quantizer.coefficients * power)
        made = KernelTables(quantizer.with_params(scaled), kind).decode
        assert torch.equal(made.levels, plain.levels)
        if kind == "key":
            assert torch.equal(made.pair_scale[..., 0], plain.pair_scale[..., 0] * power)
        else:
            assert torch.equal(made.affine[..., 1], plain.affine[..., 1] * power)
            several = quantizer.params.bits.view(2, 64) > 0
            assert torch.equal(made.affine[several], plain.affine[several] * power)


def test_channels_that_hold_nothing_are_zero() -> None:
    quantizer = random_quantizer(TrellisSpec(max_bits=4), SHAPE, ROPE)
    params = replace(quantizer.params, coefficients=torch.zeros_like(quantizer.coefficients))
    made = KernelTables(quantizer.with_params(params), "value").decode
    assert not made.levels.any()
    assert torch.equal(made.affine, torch.tensor([1.0, 0.0]).expand(2, 64, 2))
