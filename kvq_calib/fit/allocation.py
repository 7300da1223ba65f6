"""How many bits every channel gets: rate and distortion measured for each, and one budget for all.

The weighted error of every channel is computed for every width (:func:`width_errors`), and bits go where one removes
most of it (:func:`allocate`, reverse water-filling on measured curves), until the whole takes what it may
(:func:`within_budget`). Everything is computed from weighted distributions, so it needs no activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvq_calib.errors import ConfigError
from kvq_calib.fit.density import weighted_error

PlaceLevels = Callable[[Tensor, Tensor, int], Tensor]
"""What places levels, called as :func:`kvq_calib.fit.density.lloyd` is."""

#: Halvings of the Lagrange multiplier's interval (in logarithms), after which nothing changes.
_MULTIPLIER_STEPS = 100
#: An allocation this far below the budget, in bits per element, is good enough.
_CLOSE_ENOUGH = 1e-3
#: Taken off the budget beside the excess, so that rounding cannot leave the same excess again.
_MARGIN = 1e-4


def width_errors(
    points: Tensor,
    weights: Tensor,
    place: PlaceLevels,
    level_counts: Sequence[int],
    coded_error: float = 1.0,
) -> Tensor:
    """Weighted squared error of every channel at every width, for one token.

    Args:
        points, weights: float64 ``[C, n]``, the weighted distribution of each channel, ``points`` sorted.
        place: places the levels.
        level_counts: number of levels by width, from width 0 on.
        coded_error: the error of what levels are used for over that of the nearest level, at every width but 0.

    Returns:
        float64 ``[C, widths]``.
    """
    errors = [weighted_error(place(points, weights, count), points, weights) for count in level_counts]
    distortion = torch.stack(errors, dim=1)
    distortion[:, 1:] *= coded_error
    # Levels are no global optimum: a wider code is never worse, since it could leave levels unused.
    return distortion.cummin(1).values


def allocate(
    distortion: Sequence[Tensor], floors: Sequence[int], tokens: Sequence[int], budget: float
) -> list[Tensor]:
    """Widths that minimise the summed distortion at a mean width of at most ``budget``.

    Each channel takes the width of least ``distortion + multiplier * bits stored``; the multiplier, found by
    bisection, is the same for all, so that the last stored bit of every channel is worth the same (reverse
    water-filling). A bit of width is stored for every token that is held: where a sliding window leaves few, it costs
    little.

    Args:
        distortion: one float64 ``[C, widths]`` for each layer and kind.
        floors: least width of the channels of each.
        tokens: that are held of each, in any unit.
        budget: bits per number held, on average over all.

    Returns:
        uint8 ``[C]`` for each.

    Raises:
        ConfigError: the budget is below the floors.
    """
    curves = [
        table.masked_fill(torch.arange(table.shape[1]) < floor, torch.inf)
        for table, floor in zip(distortion, floors, strict=True)
    ]
    held = sum(len(table) * count for table, count in zip(curves, tokens, strict=True))
    # In units of the mean, which is exact where all are equal.
    price = [count * sum(map(len, curves)) / held for count in tokens]
    least = sum(len(t) * count * floor for t, count, floor in zip(curves, tokens, floors, strict=True)) / held
    if budget < least:
        raise ConfigError(
            f"{budget:.3f} bits are left for codes, but the least widths take {least:.3f}; raise "
            "allocation.bits_per_element or lower allocation.min_key_bits and min_value_bits"
        )

    def widths(multiplier: float) -> list[Tensor]:
        return [
            (table + multiplier * each * torch.arange(table.shape[1], dtype=table.dtype)).argmin(1)
            for table, each in zip(curves, price, strict=True)
        ]

    def mean(chosen: list[Tensor]) -> float:
        return sum(int(table.sum()) * count for table, count in zip(chosen, tokens, strict=True)) / held

    finite = torch.cat([table[torch.isfinite(table)] for table in curves])
    high = max(float(finite.max()), 1e-300) * 2 / min(price)  # more than any bit can save
    low = high * 1e-30
    if mean(widths(low)) <= budget:
        high = low
    for _ in range(_MULTIPLIER_STEPS):
        if high == low:
            break
        middle = math.sqrt(low * high)
        if mean(widths(middle)) > budget:
            low = middle
        else:
            high = middle
    return [table.to(torch.uint8) for table in widths(high)]


def within_budget(
    target: float,
    widths_at: Callable[[float], list[Tensor]],
    stored_bits: Callable[[list[Tensor]], float],
    rounds: int = 8,
) -> list[Tensor]:
    """Widths whose artifact takes at most ``target`` bits per element, everything counted.

    What is stored beside the codes (scales, codebooks, sinks) depends on the widths in turn, so the budget
    for codes is corrected until the whole fits.

    Args:
        target: bits per element.
        widths_at: widths for a budget of code bits, :func:`allocate`.
        stored_bits: bits per element of an artifact with these widths.
        rounds: corrections to try.

    Raises:
        ConfigError: no budget for codes was found that fits.
    """
    budget, best = target, None
    for _ in range(rounds):
        widths = widths_at(budget)
        excess = stored_bits(widths) - target
        if excess <= 0:
            best = widths
            if excess > -_CLOSE_ENOUGH:
                break
        budget -= excess if excess <= 0 else excess + _MARGIN
    if best is None:
        raise ConfigError(
            f"no allocation fits into {target} bits per element; raise allocation.bits_per_element"
        )
    return best
