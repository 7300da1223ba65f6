"""How many bits every channel gets: rate and distortion measured for each, and one budget for all.

The weighted error of every channel is computed for every width (:func:`width_errors`), and bits go where one removes
most of it (:func:`allocate`, reverse water-filling on measured curves), until the whole takes what it may
(:func:`within_budget`). Channels of a group choose together (:mod:`kvq_calib.fit.width_groups`). Everything is computed
from weighted distributions, so it needs no activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Choices:
    """What the rows of a table (channels, or groups of them) may choose between.

    Attributes:
        cost: error of every choice, float64 ``[R, K]``.
        bits: stored by each choice, of one row and token, ``[K]``.
        channels: of all rows together.
        tokens: that are held of them, in any unit.
    """

    cost: Tensor
    bits: Tensor
    channels: int
    tokens: int


def allocate(tables: Sequence[Choices], budget: float) -> list[Tensor]:
    """Choices that minimise the summed error at a mean of at most ``budget`` bits.

    Each row makes the choice of least ``cost + multiplier * bits``; the multiplier, found by bisection, is the same for
    all, so that the last stored bit of every row is worth the same (reverse water-filling). A bit is stored for every
    token that is held: where a sliding window leaves few, it costs little.

    Args:
        tables: one for each layer and kind.
        budget: bits per number held, on average over all.

    Returns:
        the choice of every row, int64 ``[R]``, for each table.

    Raises:
        ConfigError: the budget is below what the least choices take.
    """
    held = sum(table.channels * table.tokens for table in tables)
    # In units of the mean, which is exact where all are equal.
    channels = sum(table.channels for table in tables)
    price = [table.tokens * channels / held for table in tables]

    def mean(chosen: Sequence[Tensor]) -> float:
        stored = (
            int(table.bits[own].sum()) * table.tokens for table, own in zip(tables, chosen, strict=True)
        )
        return sum(stored) / held

    least = mean([table.bits.argmin().expand(len(table.cost)) for table in tables])
    if budget < least:
        raise ConfigError(
            f"{budget:.3f} bits are left for codes, but the least widths take {least:.3f}; raise "
            "allocation.bits_per_element or lower allocation.min_key_bits and min_value_bits"
        )

    def chosen(multiplier: float) -> list[Tensor]:
        return [
            (table.cost + multiplier * each * table.bits).argmin(1)
            for table, each in zip(tables, price, strict=True)
        ]

    high = (
        max(max(float(table.cost.max()) for table in tables), 1e-300) * 2 / min(price)
    )  # more than a bit can save
    low = high * 1e-30
    if mean(chosen(low)) <= budget:
        high = low
    for _ in range(_MULTIPLIER_STEPS):
        if high == low:
            break
        middle = math.sqrt(low * high)
        if mean(chosen(middle)) > budget:
            low = middle
        else:
            high = middle
    return chosen(high)


def within_budget(
    target: float,
    widths_at: Callable[[float], list[Tensor]],
    stored_bits: Callable[[list[Tensor]], float],
    rounds: int = 12,
) -> list[Tensor]:
    """Widths whose artifact takes at most ``target`` bits per element, everything counted.

    What is stored beside the codes (coefficients, sinks) depends on the widths in turn, so the budget
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
    fits, exceeds, failures = -math.inf, math.inf, 0
    for _ in range(rounds):
        widths = widths_at(budget)
        excess = stored_bits(widths) - target
        if excess <= 0:
            best, fits = widths, budget
            if excess > -_CLOSE_ENOUGH:
                break
        else:
            exceeds = budget
        # Few groups choose coarsely, so that a small step may change nothing: steps grow until something fits.
        budget -= excess if excess <= 0 else (excess + _MARGIN) * (2**failures if best is None else 1)
        failures += best is None
        if best is not None and not fits < budget < exceeds:
            budget = (fits + exceeds) / 2
    if best is None:
        raise ConfigError(
            f"no allocation fits into {target} bits per element; raise allocation.bits_per_element"
        )
    return best
