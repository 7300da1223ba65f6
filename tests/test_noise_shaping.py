"""Noise shaping: the path is the one that its definition gives, and errors of neighbours cancel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_factory import trellis_quantizer, variables
from torch import Tensor

from kvq_calib.calibrate.noise_shaping import NeighbourGradients
from kvq_calib.codec.noise_shaping import feedback_gains, shaped_path
from kvq_calib.codec.paths import Subsets, best_path, level_index
from kvq_calib.schema.spec import ErrorCompensationSpec, TrellisSpec


def defined(levels: list[float], u: Tensor, gain: Tensor, weight: Tensor) -> tuple[list[int], list[float]]:
    """Codes and levels of one block, a survivor at a time; tokens that are not there count nothing."""
    tokens = len(u)
    u, gain, weight = (torch.nn.functional.pad(x, (0, 32 - tokens)) for x in (u, gain, weight))
    survivors: dict[int, tuple[Tensor, Tensor, list[int], list[float]]] = {
        0: (torch.tensor(0.0), torch.tensor(0.0), [], [])
    }
    for t in range(32):
        best: dict[int, tuple[Tensor, Tensor, list[int], list[float]]] = {}
        for state, (cost, error, codes, seen) in sorted(survivors.items()):
            last, long_ago = state & 1, state >> 1
            target = u[t] + gain[t] * error
            for free in (0, 1):
                subset = levels[2 * (free ^ long_ago) + last :: 4]
                edges = (torch.tensor(subset[:-1]) + torch.tensor(subset[1:])) * 0.5
                place = int((target > edges).sum())
                made = target - subset[place]
                total, after = cost + made * made * weight[t], free + 2 * last
                if after not in best or total < best[after][0]:
                    best[after] = (total, made, [*codes, place << 1 | free], [*seen, subset[place]])
        survivors = best
    _, _, codes, seen = min((survivors[s] for s in sorted(survivors)), key=lambda found: float(found[0]))
    return codes[:tokens], seen[:tokens]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 4),
    tokens=st.integers(1, 40),
    step=st.sampled_from([0.0, 0.5]),
)
def test_the_path_is_the_one_that_is_defined(seed: int, bits: int, tokens: int, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(1, 2 << bits, generator=generator).sort().values
    u, gain = (torch.randn(1, 1, tokens, generator=generator) for _ in range(2))
    weight = torch.rand(1, 1, tokens, generator=generator)
    if step:  # many ties
        levels, u, gain, weight = ((x / step).round() * step for x in (levels, u, gain, weight))
    gain[..., ::32] = 0
    codes, index = shaped_path(Subsets.of(levels, torch.tensor([bits])), u, gain, weight)
    assert torch.equal(level_index(codes).to(index.dtype), index)
    for first in range(0, tokens, 32):
        here = slice(first, first + 32)
        expected, seen = defined(levels[0].tolist(), u[0, 0, here], gain[0, 0, here], weight[0, 0, here])
        assert codes[0, 0, here].tolist() == expected
        assert levels[0][index[0, 0, here]].tolist() == seen


def test_without_gains_it_is_the_best_path() -> None:
    generator = torch.Generator().manual_seed(1)
    levels = torch.randn(6, 16, generator=generator).sort().values
    u = torch.randn(6, 2, 70, generator=generator)
    subsets = Subsets.of(levels, torch.full((6,), 3))
    shaped = shaped_path(subsets, u, torch.zeros_like(u))
    # Sums in another order: equal but for near ties.
    assert (shaped[0] == best_path(subsets, u)[0]).float().mean() > 0.99


def test_gains_follow_the_weights_of_neighbours() -> None:
    weight = torch.tensor([[1.0, 4.0, 1.0, 0.0, 0.0, 2.0, 200.0, 2.0]])[..., None]
    gain = feedback_gains(torch.tensor([0.5]), weight, 1, 8)[0, :, 0]
    assert gain.tolist() == pytest.approx([0, 0.25, 1.0, 2.0, 2.0, 0.0, 0.05, 2.0])
    assert feedback_gains(torch.tensor([0.5, -0.25]), None, 1, 40)[0, [1, 31, 32, 33]].tolist() == [
        [0.5, -0.25],
        [0.5, -0.25],
        [0.0, 0.0],
        [0.5, -0.25],
    ]


@pytest.mark.parametrize("correlation", [0.4, -0.4])
def test_what_errors_cost_falls_as_predicted(correlation: float) -> None:
    """By the square of the correlation, for gradients correlated by its powers (a process of first order).

    Rounding errors grow a little on the way: four survivors are few.
    """
    levels = torch.linspace(-4, 4, 32).expand(64, -1).contiguous()
    u = torch.randn(64, 1, 1024, generator=torch.Generator().manual_seed(3))
    subsets = Subsets.of(levels, torch.full((64,), 4))
    place = torch.arange(32)
    covariance = correlation ** (place[:, None] - place).abs()

    def cost(gain: float) -> float:
        gains = feedback_gains(torch.full((64,), gain), None, 1, 1024).permute(2, 0, 1)
        error = u[:, 0] - levels.gather(1, shaped_path(subsets, u, gains)[1][:, 0])
        blocks = error.view(-1, 32)
        return float((blocks @ covariance * blocks).sum())

    saved, predicted = 1 - cost(correlation) / cost(0.0), correlation**2 * 31 / 32
    assert 0.75 * predicted < saved < 1.05 * predicted


def test_a_quantizer_codes_what_does_not_depend_on_the_calls() -> None:
    quantizer = trellis_quantizer(5, heads=2, size=8, max_bits=4, weighting=True, shaping=True)
    x = torch.randn(1, 2, 96, 8, generator=torch.Generator().manual_seed(0))
    whole = quantizer.quantize(x).codes
    parts = [quantizer.quantize(x[:, :, first : first + 32]).codes for first in (0, 32, 64)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    with variables(KVQ_CALIB_OPS="torch"):
        assert torch.equal(whole, quantizer.quantize(x).codes)


def test_it_needs_a_path_and_no_error_compensation() -> None:
    with pytest.raises(ValueError, match="states: 4"):
        TrellisSpec(max_bits=3, states=1, noise_shaping=True)
    with pytest.raises(ValueError, match="exclude each other"):
        TrellisSpec(max_bits=3, noise_shaping=True, error_compensation=ErrorCompensationSpec())


def test_feedback_is_the_correlation_of_neighbours() -> None:
    generator = torch.Generator().manual_seed(2)
    fresh = torch.randn(4001, 3, 8, generator=generator)
    gradient = torch.zeros_like(fresh)
    for t in range(1, len(fresh)):
        gradient[t] = torch.tensor([0.5, -0.3, 0.0])[:, None] * gradient[t - 1] + fresh[t]
    whole = NeighbourGradients(3)
    whole.update(gradient[1:].flatten(1))
    assert whole.feedback().dtype == torch.float16
    assert whole.feedback().tolist() == pytest.approx([0.5, -0.3, 0.0], abs=0.02)


def test_windows_have_no_neighbours_in_other_windows() -> None:
    statistics = NeighbourGradients(1)
    for sign in (1.0, -1.0):  # alike within a window, opposite across
        statistics.update(sign * torch.ones(2, 4))
    assert statistics.products.item() == statistics.squares.item() == 8.0
    assert statistics.feedback().item() == pytest.approx(0.9, abs=1e-3)  # the most there is


def test_no_gradients_give_no_feedback() -> None:
    statistics = NeighbourGradients(2)
    statistics.update(torch.zeros(5, 8))
    assert statistics.feedback().tolist() == [0.0, 0.0]
