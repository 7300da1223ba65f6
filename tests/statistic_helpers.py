"""Samples, and addition of statistics in one process as between ranks."""

from __future__ import annotations

from functools import reduce

import torch

from kvq_calib.calibrate.statistics import Statistics

REDUCTIONS = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}


class _Widest:
    """The elementwise maximum of what every part has under the name of a tensor."""

    def __init__(self, parts: list[Statistics]) -> None:
        self.parts = parts

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        name = next(name for part in self.parts for name, own in part.state().items() if own is tensor)
        return reduce(torch.maximum, [part.state()[name] for part in self.parts])


def added(*parts: Statistics) -> Statistics:
    """What all parts together have seen; the parts stay as they are."""
    parts = [part.copied() for part in parts]
    for part in parts:
        part.align(_Widest(parts))
    total = parts[0].copied()
    total.load(
        {
            name: reduce(REDUCTIONS[reduction], [part.state()[name] for part in parts])
            for name, reduction in total.reductions.items()
        }
    )
    return total


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Samples of a unit normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
