"""Progress on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Progress = Callable[[str, int, int], None]
"""Called with the name of the phase, the number of finished steps, and the number of all steps."""

#: Seconds between lines where stderr is not a terminal.
_LOG_SECONDS = 15.0
#: Seconds over which a bar averages its speed. A window of a large model takes minutes.
_AVERAGED_SECONDS = 3600.0


class ProgressReporter:
    """A callable ``(what, done, total)``, and a context manager that draws while it is open.

    The time left is that of the current phase. It is estimated from the steps that this process has timed, so it
    appears with the second step, and steps from before an interruption do not count.

    Args:
        quiet: print nothing; for all ranks but one of a distributed run.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar: Bars | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=_AVERAGED_SECONDS,
            )
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""
        self._started = self._spoke = time.monotonic()
        self._first = 0

    def __enter__(self) -> ProgressReporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps are finished; ``what`` names the phase."""
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        if what != self._phase:
            self._phase, self._started, self._spoke, self._first = what, now, now, done
        if done < total and now - self._spoke < _LOG_SECONDS:
            return
        self._spoke = now
        left = ""
        if done < total and done > self._first:
            seconds = (now - self._started) / (done - self._first) * (total - done)
            left = f", about {_clock(seconds)} left of this part"
        self._console.print(f"{what}: {done} of {total}{left}", highlight=False)

    def say(self, line: str) -> None:
        """Print one line on stderr."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
