"""Find the smallest budget of bits whose KL divergence on held-out text is at most a target.

KL divergence falls with bits about as fast as the squared error, by a factor of four per bit. So its logarithm is
interpolated between budgets on both sides of the target. A few fits are enough, and all use the same statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.errors import CalibrationError
from kvq_calib.schema.recipe import BUDGETS, CalibrationConfig, budget_recipe

__all__ = ["BudgetSearch", "find_budget", "planned_recipes"]

#: Budgets are multiples of this, in bits per element.
STEP = 0.05
_LOWEST, _HIGHEST = (round(bits / STEP) for bits in BUDGETS)
#: The first budget, and the assumed change of the logarithm per bit until two budgets are measured.
_FIRST = round(3.4 / STEP)
_SLOPE = -math.log(4)
#: The search ends at a KL divergence between this share of the target and the target.
_CLOSE = 0.95
#: After this number of measurements, the middle is tried, because interpolation may approach from one side only.
_INTERPOLATIONS = 4


@dataclass(frozen=True)
class BudgetSearch:
    """A search for a budget.

    Attributes:
        target: target of the KL divergence, in nats per predicted token.
        config: returns the settings of the recipe for a budget in bits per element.
        measure: returns the KL divergence of an artifact on held-out text.
        held_out: source of that text, for the artifact's record.
        say: called with one line per measurement.
    """

    target: float
    config: Callable[[float], CalibrationConfig]
    measure: Callable[[KVArtifact], float]
    held_out: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None

    def run(self, fit: Callable[[str, CalibrationConfig], KVArtifact]) -> tuple[KVArtifact, dict[str, Any]]:
        """Find the budget.

        Args:
            fit: makes the artifact of a recipe, given its name and settings.

        Returns:
            The artifact of the budget, and the measurements for its record.

        Raises:
            CalibrationError: no budget reaches the target. The message names a target that can be reached.
        """
        made: dict[float, KVArtifact] = {}

        def measured(bits: float) -> float:
            made[bits] = fit(budget_recipe(bits), self.config(bits))
            divergence = self.measure(made[bits])
            self.say(
                f"{bits:g} bits: KL divergence {divergence:.5f} on held-out text, target {self.target:g}"
            )
            return divergence

        found, tried = find_budget(self.target, measured)
        self.say(f"the budget is {found:g} bits: the same as --bits {found:g}")
        facts = {
            "target_kl": self.target,
            "kl": tried[found],
            "measured": [[bits, kl] for bits, kl in sorted(tried.items())],
            "held_out": dict(self.held_out),
        }
        return made[found], facts


def planned_recipes(config: Callable[[float], CalibrationConfig]) -> dict[str, CalibrationConfig]:
    """Recipes that together request all statistics for any budget. ``config`` is as for :class:`BudgetSearch`."""
    return {budget_recipe(bits): config(bits) for bits in (BUDGETS[0], round(_FIRST * STEP, 2), BUDGETS[1])}


def find_budget(target: float, measured: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Find the smallest budget with a KL divergence of at most ``target``, assuming that KL divergence falls with bits.

    Args:
        target: target in nats.
        measured: returns the KL divergence of a budget in bits per element. It is called once per budget.

    Returns:
        A budget that meets the target. Either the next smaller one does not, or its KL divergence is close to the
        target. Then all measurements, by budget.

    Raises:
        CalibrationError: the largest budget does not meet the target.
    """
    tried: dict[int, float] = {}
    below, above = _LOWEST - 1, _HIGHEST + 1  # largest budget that fails, and smallest that is enough
    place = _FIRST
    while True:
        tried[place] = measured(round(place * STEP, 2))
        if tried[place] <= target:
            above = place
            if tried[place] >= _CLOSE * target:
                break
        else:
            below = place
        if below == _HIGHEST:
            raise CalibrationError(
                f"no budget up to {BUDGETS[1]:g} bits reaches a KL divergence of {target:g}: {BUDGETS[1]:g} bits have "
                f"{tried[_HIGHEST]:.3g}; use --target-kl {_rounded_up(tried[_HIGHEST])} or more"
            )
        if above - below == 1:
            break
        place = _next(target, tried, below, above)
    return round(above * STEP, 2), {round(at * STEP, 2): kl for at, kl in tried.items()}


def _next(target: float, tried: Mapping[int, float], below: int, above: int) -> int:
    """The next place to measure, between two places."""
    distance = {place: math.log(max(kl, 1e-12) / target) for place, kl in tried.items()}
    if below in tried and above in tried:
        if len(tried) > _INTERPOLATIONS:
            guess = (below + above) / 2
        else:
            low, high = distance[below], distance[above]
            guess = below + (above - below) * low / (low - high)
    else:  # all are on one side of the target: increasing steps from the nearest
        nearest = below if below in tried else above
        guess = nearest - len(tried) * distance[nearest] / (_SLOPE * STEP)
    return min(max(math.ceil(guess), below + 1), above - 1)


def _rounded_up(value: float) -> str:
    """The value rounded up to two digits."""
    power = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / power) * power:.2g}"
