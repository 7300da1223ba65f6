"""The entry points: run a command, and end with the right exit status and one line on what was wrong.

Exit status: 0 on success, 2 on a usage error, 1 on anything else. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

import click

from kvq_calib.cli.artifact import artifact_group
from kvq_calib.cli.calibrate import calibrate_command
from kvq_calib.cli.evaluate.group import eval_group
from kvq_calib.cli.options import Invocation
from kvq_calib.errors import KVQError

__all__ = ["artifact", "calibrate", "evaluate", "run_command"]


def calibrate() -> None:
    """Entry point of ``kvq-calibrate``."""
    run_command(calibrate_command)


def evaluate() -> None:
    """Entry point of ``kvq-eval``."""
    run_command(eval_group)


def artifact() -> None:
    """Entry point of ``kvq-artifact``."""
    run_command(artifact_group)


def run_command(command: click.Command) -> None:
    """Run a command; turn every failure into one line and the right exit status."""
    invocation = Invocation()
    # A terminated job cleans up, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = command.main(standalone_mode=False, obj=invocation)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except SystemExit:
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that the message is printed completely
        expected = isinstance(error, KeyboardInterrupt | click.Abort | click.ClickException)
        if invocation.debug and not expected:
            traceback.print_exc()
        if _is_ours_to_report():
            _report(error)
        sys.exit(2 if isinstance(error, click.UsageError) else 1)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: BaseException) -> None:
    """Print one line on stderr, and for wrong usage the correct one."""
    text = " ".join(str(error).split())
    # click raises this in place of KeyboardInterrupt
    notes = getattr(error.__cause__ or error if isinstance(error, click.Abort) else error, "__notes__", [])
    if isinstance(error, click.ClickException):
        error.show()
        return
    if isinstance(error, KeyboardInterrupt | click.Abort):
        parts = ["interrupted", "nothing half written is left"]
    elif isinstance(error, KVQError):
        parts = [text]
    else:
        parts = [f"{type(error).__name__}: {text[:500]}", "run with --debug for the traceback"]
    click.echo(f"error: {'; '.join([*parts, *notes])}", err=True)


def _is_ours_to_report() -> bool:
    """Whether this process reports the failure. In a distributed run only one rank does."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from kvq_calib.calibrate.distributed import first_to_report

    return first_to_report()
