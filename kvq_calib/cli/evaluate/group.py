"""``kvq-eval``: what an artifact costs and saves."""

from __future__ import annotations

import click

from kvq_calib.cli.evaluate.compare import compare_command
from kvq_calib.cli.evaluate.generate import generate_command
from kvq_calib.cli.evaluate.memory import memory_command
from kvq_calib.cli.evaluate.perplexity import perplexity_command
from kvq_calib.cli.evaluate.recall import passkey_command, recall_command
from kvq_calib.cli.evaluate.report import report_command
from kvq_calib.cli.options import SETTINGS, debug_option

__all__ = ["eval_group"]


@click.group("kvq-eval", context_settings=SETTINGS)
@debug_option
def eval_group() -> None:
    """Measure what an artifact costs and saves."""


for command in (
    perplexity_command,
    compare_command,
    recall_command,
    passkey_command,
    generate_command,
    memory_command,
    report_command,
):
    eval_group.add_command(command)
