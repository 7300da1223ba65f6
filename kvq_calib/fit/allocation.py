"""Allocation of bits to channels under one budget, from the measured error of every channel at every width.

:func:`width_errors` computes the weighted error of every channel at every width. :func:`allocate` gives bits to the
channels where one bit removes most error (reverse water-filling on measured curves). :func:`within_budget` repeats this
until the whole artifact fits the budget. Channels of a group get their widths together
(:mod:`kvq_calib.fit.width_groups`). All of it uses weighted distributions, not activations.
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
"""A function that places levels, with the signature of :func:`kvq_calib.fit.density.lloyd`."""

#: Bisection steps for the logarithm of the Lagrange multiplier; more change nothing.
_MULTIPLIER_STEPS = 100
#: An allocation is accepted if it is at most this far below the budget, in bits per element.
_CLOSE_ENOUGH = 1e-3
#: Subtracted from the budget together with the excess, so that rounding cannot leave the same excess again.
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
        coded_error: error of the codec with these levels, divided by the error of the nearest level; for widths above
            0.

    Returns:
        float64 ``[C, widths]``.
    """
    errors = [weighted_error(place(points, weights, count), points, weights) for count in level_counts]
    distortion = torch.stack(errors, dim=1)
    distortion[:, 1:] *= coded_error
    # The levels may be a local optimum. A wider code is never worse, since it can leave levels unused.
    return distortion.cummin(1).values


@dataclass(frozen=True)
class Choices:
    """The possible widths of the rows of a table, which are channels or groups of channels.

    Attributes:
        cost: error of every choice, float64 ``[R, K]``.
        bits: bits of each choice, for one row and token, ``[K]``.
        channels: number of channels of all rows.
        tokens: number of tokens in the cache, in any unit.
    """

    cost: Tensor
    bits: Tensor
    channels: int
    tokens: int


def allocate(tables: Sequence[Choices], budget: float) -> list[Tensor]:
    """Find the choices with the least total error at a mean of at most ``budget`` bits.

    Each row takes the choice with the least ``cost + multiplier * bits``. The multiplier is the same for all rows and
    is found by bisection, so the last bit of every row removes about the same error (reverse water-filling). A bit is
    stored for every token in the cache, so it costs little in a layer with a short sliding window.

    Args:
        tables: one table for each layer and kind.
        budget: mean bits per number in the cache.

    Returns:
        The choice of every row, int64 ``[R]``, for each table.

    Raises:
        ConfigError: the budget is below the bits of the smallest choices.
    """
    held = sum(table.channels * table.tokens for table in tables)
    # In units of the mean, which is exact if all are equal.
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
    )  # more than any bit can save
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


def spend_the_rest(tables: Sequence[Choices], chosen: Sequence[Tensor], budget: float) -> list[Tensor]:
    """Spend what :func:`allocate` leaves of the budget, because its steps are whole rows.

    Again and again, the row that saves the most error per stored bit takes more bits, among those that the budget
    allows.

    Args:
        tables: one table for each layer and kind.
        chosen: the choice of every row, int64 ``[R]``, for each table.
        budget: mean bits per number in the cache.
    """
    found = [own.clone() for own in chosen]
    held = sum(table.channels * table.tokens for table in tables)
    stored = [table.bits[own].sum() * table.tokens for table, own in zip(tables, found, strict=True)]
    left = budget * held - float(sum(stored))

    def best(table: Choices, own: Tensor) -> tuple[float, int]:
        """The largest saving per bit, and its place in the table; a saving of 0 if nothing can be saved."""
        added = (table.bits - table.bits[own][:, None]) * table.tokens
        saved = table.cost.gather(1, own[:, None]) - table.cost
        rate = torch.where((added > 0) & (added <= left), saved / added, 0.0).flatten()
        at = int(rate.argmax())
        return float(rate[at]), at

    while True:
        candidates = [best(table, own) for table, own in zip(tables, found, strict=True)]
        number = max(range(len(candidates)), key=lambda n: candidates[n][0])
        rate, at = candidates[number]
        if rate <= 0:
            return found
        table, (row, choice) = tables[number], divmod(at, len(tables[number].bits))
        left -= float((table.bits[choice] - table.bits[found[number][row]]) * table.tokens)
        found[number][row] = choice


def within_budget(
    target: float,
    widths_at: Callable[[float], list[Tensor]],
    stored_bits: Callable[[list[Tensor]], float],
    rounds: int = 12,
) -> list[Tensor]:
    """Find widths with which the artifact takes at most ``target`` bits per element, everything counted.

    The size of coefficients and sinks depends on the widths, so the budget for codes is corrected until the whole fits.

    Args:
        target: budget in bits per element.
        widths_at: gives the widths for a budget of code bits; see :func:`allocate`.
        stored_bits: gives the bits per element of an artifact with these widths.
        rounds: largest number of corrections.

    Raises:
        ConfigError: no allocation fits the budget.
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
        # With few groups a small step may change nothing, so steps grow until an allocation fits.
        budget -= excess if excess <= 0 else (excess + _MARGIN) * (2**failures if best is None else 1)
        failures += best is None
        if best is not None and not fits < budget < exceeds:
            budget = (fits + exceeds) / 2
    if best is None:
        raise ConfigError(
            f"no allocation fits into {target} bits per element; raise allocation.bits_per_element"
        )
    return best
