"""Trellis-coded quantization: the path is optimal, and reading needs only the codes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvq_calib.codec import paths
from kvq_calib.codec.paths import Subsets, best_path, level_index


def path_of(
    levels: torch.Tensor, bits: torch.Tensor, u: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes of the best path, after a look at the indices that come with them."""
    codes, index = best_path(Subsets.of(levels, bits), u, weight)
    assert codes.dtype == torch.uint8
    assert torch.equal(index, level_index(codes.to(torch.int64)))
    return codes


def error_of(
    levels: torch.Tensor, codes: torch.Tensor, u: torch.Tensor, weight: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Weighted squared error of codes, all ``[C, B, T]``, summed over the tokens."""
    index = level_index(codes).to(torch.int64)
    return (weight * (u - levels.gather(1, index.flatten(1)).view(u.shape)).square()).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("width", "tokens"), [(1, 8), (2, 5), (3, 3)])
def test_no_path_is_better(width: int, tokens: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    levels = torch.randn(6, 2 << width, generator=generator).sort(1).values
    u = torch.randn(6, 2, tokens, generator=generator)
    weight = torch.randn(6, 2, tokens, generator=generator).exp() if weighted else torch.ones_like(u)
    path = path_of(levels, torch.full((6,), width), u, weight if weighted else None)
    found = error_of(levels, path, u, weight)
    least = torch.full_like(found, torch.inf)
    for codes in itertools.product(range(1 << width), repeat=tokens):
        least = torch.minimum(least, error_of(levels, torch.tensor(codes).expand(u.shape), u, weight))
    torch.testing.assert_close(found, least)


def test_reading_follows_the_formula_and_starts_anew_with_every_block() -> None:
    codes = torch.randint(0, 8, (3, 100), generator=torch.Generator().manual_seed(0))
    index = level_index(codes)
    for row, t in itertools.product(range(3), range(100)):

        def free(back: int, row: int = row, t: int = t) -> int:
            return int(codes[row, t - back]) & 1 if t % 32 >= back else 0

        assert index[row, t] == 4 * (int(codes[row, t]) >> 1) + 2 * (free(0) ^ free(2)) + free(1)


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 70))
def test_blocks_and_sequences_do_not_depend_on_each_other(seed: int, width: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(2, 2 << width, generator=generator).sort(1).values
    bits = torch.full((2,), width)
    u = torch.randn(2, 3, tokens, generator=generator)
    codes = path_of(levels, bits, u)
    assert int(codes.max()) < 1 << width
    for first in range(0, tokens, 32):
        part = slice(first, first + 32)
        assert torch.equal(codes[:, 1:2, part], path_of(levels, bits, u[:, 1:2, part]))


def test_twice_the_levels_lower_the_error_by_more_than_a_decibel() -> None:
    """Normal samples, 3 bits: the optimal scalar quantizer has 14.62 dB."""
    levels = torch.erfinv((2 * torch.arange(16) + 1) / 16 - 1) * 2**0.5 * 1.25
    u = torch.randn(1, 500, 32, generator=torch.Generator().manual_seed(0))
    error = error_of(levels[None], path_of(levels[None], torch.tensor([3]), u), u).sum() / u.numel()
    assert -10 * error.log10() > 15.5


def test_all_channels_may_have_width_zero() -> None:
    codes = path_of(torch.zeros(2, 2), torch.zeros(2, dtype=torch.uint8), torch.randn(2, 1, 40))
    assert not codes.any()


def test_a_first_call_in_inference_mode_leaves_nothing_that_gradients_trip_over() -> None:
    paths._pair_tables.cache_clear()
    levels, bits, u = torch.linspace(-1, 1, 16)[None], torch.tensor([3]), torch.randn(1, 1, 40)
    with torch.inference_mode():
        codes = path_of(levels, bits, u)
    assert torch.equal(path_of(levels, bits, u.clone().requires_grad_()), codes)


@given(st.integers(0, 2**31))
def test_subsets_in_parts_are_subsets_of_the_parts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 4, (6,), generator=generator)
    levels = torch.randn(6, 16, generator=generator).sort(1).values
    u = torch.randn(6, 1, 40, generator=generator)
    whole = path_of(levels, bits, u)
    parts = Subsets.of(levels, bits).split(2)
    assert len(parts) == 3
    for part, own, mine in zip(parts, u.split(2), whole.split(2), strict=True):
        assert torch.equal(best_path(part, own)[0], mine)
