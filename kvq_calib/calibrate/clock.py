"""Measures the time and memory of the parts of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec

__all__ = ["Clock", "Progress", "peak_resident_bytes"]

P = ParamSpec("P")

Progress = Callable[[str, int, int], None]
"""Called as ``(part, steps done, steps in all)``."""


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    import resource  # not available on every system, and only calibration needs it

    # Linux gives kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Clock:
    """Wall time and memory of the parts of a run.

    Attributes:
        seconds: wall time of each part.
        statistics_seconds: the share of that for statistics, without the model's passes.
        peak_bytes: peak resident memory of the process up to the end of each part.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    statistics_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def finished(self, part: str, started: float) -> None:
        """Record the end of a part that began at ``started``, a value of :func:`time.monotonic`."""
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
        self.peak_bytes[part] = peak_resident_bytes()

    def timing(self, part: str, observe: Callable[P, None]) -> Callable[P, None]:
        """Wrap ``observe`` to count its time as that of statistics. It ends on the CPU, so this waits for GPUs."""

        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            started = time.monotonic()
            observe(*args, **kwargs)
            spent = time.monotonic() - started
            self.statistics_seconds[part] = self.statistics_seconds.get(part, 0.0) + spent

        return run
