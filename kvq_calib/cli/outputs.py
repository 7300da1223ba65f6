"""Checks of output files before the work: they can be written, and files that will be replaced are named."""

from __future__ import annotations

import logging
import os
import re

import click

from kvq_calib.files import check_writable

__all__ = ["announce", "check_fields", "check_output"]

_log = logging.getLogger(__name__)


def check_output(file: str | os.PathLike[str] | None) -> None:
    """Check before the work that ``file`` can be written, and log it if it will be replaced.

    Raises:
        WriteError: the file cannot be written.
    """
    if file is not None:
        check_writable(file)
        announce(file)


def announce(file: str | os.PathLike[str]) -> None:
    """Log that ``file`` will be replaced, if it exists."""
    if os.path.isfile(file):
        _log.warning("%s is there already, and will be replaced", os.fspath(file))


def check_fields(output: str, field: str) -> None:
    """Refuse a file name with a field in braces other than ``field``, such as a misspelled one.

    Raises:
        UsageError: there is such a field; the message names it.
    """
    for found in re.findall(r"\{\w*\}", output):
        if found != f"{{{field}}}":
            raise click.UsageError(
                f"{found} in the output means nothing; write {{{field}}}, or a name without braces"
            )
