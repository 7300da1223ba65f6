"""Where the time and memory of a run go, and who is told how far it has come."""

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
    """Most memory that this process has had resident so far."""
    import resource  # not on every system, and only calibration asks

    # Linux counts kibibytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Clock:
    """Wall time and memory of the parts of a run.

    Attributes:
        seconds: by part.
        statistics_seconds: of those, what statistics took beside the model's passes.
        peak_bytes: peak resident memory of the process up to the end of each part.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    statistics_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def finished(self, part: str, started: float) -> None:
        """Note that a part ended that began at ``started`` of :func:`time.monotonic`."""
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
        self.peak_bytes[part] = peak_resident_bytes()

    def timing(self, part: str, observe: Callable[P, None]) -> Callable[P, None]:
        """``observe``, with its time counted as that of statistics; they end on the CPU, so GPUs are waited for."""

        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            started = time.monotonic()
            observe(*args, **kwargs)
            spent = time.monotonic() - started
            self.statistics_seconds[part] = self.statistics_seconds.get(part, 0.0) + spent

        return run
