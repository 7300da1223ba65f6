"""``kvq-lm-eval``: the command of lm-evaluation-harness, with the model ``kvq`` registered.

The harness finds models in a registry inside its process and loads no plug-ins (``--include_path`` is for tasks). So
this command registers the model and then calls the harness with all arguments.
"""

from __future__ import annotations

import importlib
import sys

import click

from kvq_calib.cli.main import run_command
from kvq_calib.cli.options import debug_option, require_extra

__all__ = ["main"]


@click.command("kvq-lm-eval", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@debug_option
def _command(arguments: tuple[str, ...]) -> None:
    require_extra("kvq-lm-eval", "lm-eval", "lm_eval")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    importlib.import_module("lm_eval.models")  # the harness does so only if no model is registered
    if "kvq" not in model_registry:  # by name, so that --help loads no torch
        model_registry.register("kvq", target="kvq_calib.integrations.lm_eval:KVQuantLM")
    sys.argv = [sys.argv[0], *arguments]  # the harness reads sys.argv; --debug is not one of its options
    cli_evaluate()


def main() -> None:
    """Entry point of ``kvq-lm-eval``."""
    run_command(_command)
