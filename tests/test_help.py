"""Help of the commands: sections, examples that work, metavars, defaults."""

import shlex

import click
import pytest

from kvq_calib.cli.artifact import artifact_group
from kvq_calib.cli.calibrate import calibrate_command
from kvq_calib.cli.evaluate.group import eval_group
from kvq_calib.cli.help import Command, sections_of


def leaves():
    """Every command that does something, by its whole name."""
    yield "kvq-calibrate", calibrate_command
    for group in (eval_group, artifact_group):
        for name, command in group.commands.items():
            yield f"{group.name} {name}", command


COMMANDS = dict(leaves())
every_command = pytest.mark.parametrize("name", COMMANDS)


@every_command
def test_examples_are_lines_that_the_command_takes(name):
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert command.examples
    for example in command.examples:
        words = shlex.split(example)
        own = shlex.split(name)
        assert words[: len(own)] == own
        command.make_context(name, words[len(own) :])


@every_command
def test_options_stand_in_sections_and_say_what_they_take(name):
    command = COMMANDS[name]
    sections = sections_of(command, click.Context(command))
    assert [option.opts[-1] in ("--debug", "--help", "-h") for option in sections.pop("Other")] == [
        True,
        True,
    ]
    for title, options in sections.items():
        assert len(title) < 40
        for option in options:
            assert option.help, option.name
            takes_anything = not (option.is_flag or isinstance(option.type, click.Choice))
            assert not takes_anything or option.metavar, option.name


@every_command
def test_the_help_has_the_examples_as_they_are(name):
    command = COMMANDS[name]
    text = command.get_help(click.Context(command, info_name=name, terminal_width=60))
    for example in command.examples:
        assert f"  {example}\n" in f"{text}\n"
    assert text.index("Other:") < text.index("Examples:")


def test_an_example_that_the_command_does_not_take_would_be_noticed():
    with pytest.raises(click.UsageError):
        calibrate_command.make_context("kvq-calibrate", ["MODEL", "--no-such-option"])
