"""The Pareto frontier: the results that no other beats in both size and KL divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["beats", "frontier"]

T = TypeVar("T")


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether ``one`` is at least as good in both numbers (lower is better), and better in one."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def frontier(results: Sequence[T], at: Callable[[T], tuple[float, float]]) -> list[T]:
    """The results that no other beats, sorted by the first number of ``at`` and then by the second."""
    best = [one for one in results if not any(beats(at(other), at(one)) for other in results)]
    return sorted(best, key=at)
