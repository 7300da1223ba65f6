"""Texts that a model can continue, generated from a seed: sums, a list to copy, patterns, and Python code."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvq_calib.data.tokens import bos_token_id, encode
from kvq_calib.errors import ConfigError

__all__ = ["TASKS", "GenerateConfig", "make_prompts"]

_WORDS = (
    "anchor basket bottle candle desert engine finger garden guitar hammer island jacket kettle ladder mirror needle "
    "orange pencil rabbit saddle table ticket tunnel valley violin window"
)
#: Long modules of the standard library that are written in Python.
_MODULES = (
    "argparse ast bdb calendar cmd configparser csv datetime difflib doctest ftplib gettext gzip heapq imaplib locale "
    "mailbox netrc optparse pickletools plistlib poplib pprint profile pydoc queue random sched shelve shlex smtplib "
    "socketserver statistics tabnanny tarfile textwrap timeit trace uuid wave zipapp"
)


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of texts and continuations.

    Attributes:
        tasks: names from :data:`TASKS`.
        texts: number of texts of each task.
        length: number of tokens in a text.
        tokens: largest number of tokens in a continuation.
        batch: number of texts per batch.
        seed: random seed.
        chunk: number of tokens per call while a text is read.
    """

    tasks: Sequence[str] = ("arithmetic", "copying", "patterns", "code")
    texts: int = 4
    length: int = 512
    tokens: int = 256
    batch: int = 4
    seed: int = 0
    chunk: int = 256


def _arithmetic(draw: random.Random, enough: Callable[[str], bool]) -> str:
    """Sums, differences and products, one per line."""

    def lines() -> Iterator[str]:
        while True:
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            yield draw.choice((f"{a} + {b} = {a + b}\n", f"{a + b} - {a} = {b}\n", f"{a} * 3 = {3 * a}\n"))

    return _until(enough, "", lines())


def _copying(draw: random.Random, enough: Callable[[str], bool]) -> str:
    """A list of words and numbers, and the beginning of its copy."""

    def items() -> Iterator[str]:
        while True:
            yield f"{draw.choice(_WORDS.split())} {draw.randint(10, 99)}, "

    intro, again = "A list: ", "\nThe same list again: "
    listed = _until(lambda text: enough(text + again + text[:60]), intro, items())
    return listed + again + listed.removeprefix(intro)


def _patterns(draw: random.Random, enough: Callable[[str], bool]) -> str:
    """Days with a word and a colour, which repeat with different periods."""
    things = draw.sample(_WORDS.split(), draw.choice((3, 4, 5)))
    colours = draw.sample(["red", "blue", "green", "black", "white"], draw.choice((2, 3)))
    first, step = draw.randint(1, 40), draw.choice((1, 2, 3))

    def days() -> Iterator[str]:
        for number in count():
            thing, colour = things[number % len(things)], colours[number % len(colours)]
            yield f"Day {first + step * number}: a {colour} {thing}.\n"

    return _until(enough, "", days())


def _code(draw: random.Random, enough: Callable[[str], bool]) -> str:
    """Source text of a module of the standard library, from a line in its first half."""
    names = _MODULES.split()
    draw.shuffle(names)
    for name in names:
        spec = find_spec(name)
        if spec is None or not (spec.origin or "").endswith(".py"):
            continue
        lines = Path(str(spec.origin)).read_text(encoding="utf-8").splitlines(keepends=True)
        text = "".join(lines[draw.randrange(len(lines) // 2) :])
        if enough(text):
            return text
    raise ConfigError("no module of the standard library is long enough; use a smaller --length")


def _until(enough: Callable[[str], bool], start: str, pieces: Iterator[str]) -> str:
    """Append pieces to ``start`` until the text is long enough. This is checked whenever it has grown by a tenth."""
    text, asked = start, 0
    while True:
        text += next(pieces)
        if len(text) > 1.1 * asked:
            if enough(text):
                return text
            asked = len(text)


TASKS: dict[str, Callable[[random.Random, Callable[[str], bool]], str]] = {
    "arithmetic": _arithmetic,
    "copying": _copying,
    "patterns": _patterns,
    "code": _code,
}
"""Functions that make a text of each task, given a random generator and a test of its length."""


def make_prompts(tokenizer: Any, task: str, config: GenerateConfig) -> Tensor:
    """Make the texts of one task, int64 ``[texts, length]``.

    Raises:
        ConfigError: no module of the standard library is long enough.
    """
    bos = bos_token_id(tokenizer)
    start = [] if bos is None else [bos]
    body = config.length - len(start)
    rows = []
    for number in range(config.texts):
        draw = random.Random(f"{config.seed} {task} {number}")
        text = TASKS[task](draw, lambda text: len(encode(tokenizer, text)) >= body)
        rows.append(start + encode(tokenizer, text)[:body].tolist())
    return torch.tensor(rows)
