"""What a command writes: checked before the work, and a file that will be replaced is named."""

from __future__ import annotations

import logging
import os
import re

import click

from kvq_calib.files import check_writable

__all__ = ["announce", "check_fields", "check_output"]

_log = logging.getLogger(__name__)


def check_output(file: str | os.PathLike[str] | None) -> None:
    """Fail before the work rather than after where ``file`` cannot be written, and say so where it will be replaced.

    Raises:
        WriteError: it cannot be written.
    """
    if file is not None:
        check_writable(file)
        announce(file)


def announce(file: str | os.PathLike[str]) -> None:
    """Say that ``file`` will be replaced, if there is one."""
    if os.path.isfile(file):
        _log.warning("%s is there already, and will be replaced", os.fspath(file))


def check_fields(output: str, field: str) -> None:
    """Refuse a file name with a field in braces other than ``field``, as after a slip of the pen.

    Raises:
        UsageError: names it.
    """
    for found in re.findall(r"\{\w*\}", output):
        if found != f"{{{field}}}":
            raise click.UsageError(
                f"{found} in the output means nothing; write {{{field}}}, or a name without braces"
            )
