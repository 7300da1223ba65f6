"""Help of the commands: options in sections, and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

__all__ = ["Command", "section", "sections_of"]

_OTHER = "Other"
_NAME = "kvq_section"


def section(title: str, *options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorate a command with options that its help shows under one title, in this order."""

    def decorate(function: Any) -> Any:
        before = list(getattr(function, "__click_params__", []))
        for option in reversed(options):
            function = option(function)
        for parameter in function.__click_params__[len(before) :]:
            if not hasattr(parameter, _NAME):
                setattr(parameter, _NAME, title)
        return function

    return decorate


def sections_of(command: click.Command, context: click.Context) -> dict[str, list[click.Option]]:
    """The options of a command by title. Options without a title come last."""
    found: dict[str, list[click.Option]] = {}
    last: list[click.Option] = []
    for parameter in command.get_params(context):
        if not isinstance(parameter, click.Option) or parameter.hidden:
            continue
        title = getattr(parameter, _NAME, None)
        (last if title is None else found.setdefault(title, [])).append(parameter)
    return {**found, _OTHER: last}


class Command(click.Command):
    """A command whose help shows options in sections, then examples.

    Args:
        examples: command lines that work as they stand.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        for title, options in sections_of(self, ctx).items():
            records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples unwrapped, so that they can be copied."""
        super().format_epilog(ctx, formatter)
        if self.examples:
            formatter.write_paragraph()
            formatter.write("Examples:\n")
            for example in self.examples:
                formatter.write(f"  {example}\n")
