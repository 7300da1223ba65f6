"""Texts with hidden facts, similar to RULER (Hsieh et al. 2024), generated from a seed.

A text contains the facts of all tasks, so a long text is read only once:

- ``passkey``: a number that the text says to remember.
- ``key-value``: several numbers, each with a name.
- ``variables``: chains of assignments, ``VAR b = 48213. VAR a = VAR b.``. The questions ask for the value after no, one
  and more steps of a chain.
- ``common-words``: words of the day, one of them far more frequent than the others.

Between the facts, the text repeats unrelated sentences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvq_calib.data.tokens import bos_token_id
from kvq_calib.errors import ConfigError

__all__ = ["TASKS", "Question", "RecallConfig", "RecallText", "make_text"]

_FILLER = (
    "The river runs past the mill and the old stone bridge. Farmers bring apples and bread to the market. "
    "In the evening the lamps are lit and people walk home along the water. "
)
_NAMES = (
    "amber basil cedar coral daisy ember fern ginger hazel indigo ivory jasmine lemon linen maple marble olive opal "
    "pearl pepper quartz rose saffron silver thyme umber velvet violet willow yarrow"
)
_WORDS = (
    "anchor basket bottle candle desert engine finger garden guitar hammer island jacket kettle ladder mirror needle "
    "orange pencil rabbit saddle table ticket tunnel valley violin window"
)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True)
class RecallConfig:
    """Settings of the texts.

    Attributes:
        tasks: names from :data:`TASKS`.
        lengths: numbers of tokens in a text and its longest question.
        texts: number of texts of each length.
        needles: number of facts of ``key-value``.
        hops: number of steps in a chain of ``variables``.
        seed: random seed.
        chunk: number of tokens per call.
    """

    tasks: Sequence[str] = ("passkey", "key-value", "variables", "common-words")
    lengths: Sequence[int] = (512, 1024, 2048)
    texts: int = 5
    needles: int = 8
    hops: int = 2
    seed: int = 0
    chunk: int = 256


@dataclass(frozen=True)
class _Asked:
    """A question as text. ``needle`` is the index of the sentence with the answer."""

    question: str
    answer: str
    kind: str
    needle: int | None = None


@dataclass
class _Hidden:
    """The sentences that a task hides, in order, and its questions."""

    needles: list[str] = field(default_factory=list)
    asked: list[_Asked] = field(default_factory=list)


def _number(draw: random.Random) -> str:
    return str(draw.randint(10_000, 99_999))


def _passkey(draw: random.Random, config: RecallConfig) -> _Hidden:
    key = _number(draw)
    needle = f"Remember this: the pass key is {key}. The pass key is {key}, do not forget it. "
    question = "What is the pass key that you were told to remember? The pass key is"
    return _Hidden([needle], [_Asked(question, f" {key}", "passkey", 0)])


def _key_value(draw: random.Random, config: RecallConfig) -> _Hidden:
    facts = [(name, _number(draw)) for name in draw.sample(_NAMES.split(), config.needles)]
    return _Hidden(
        [f"The code of {name} is {number}. " for name, number in facts],
        [
            _Asked(f"What is the code of {name}? The code of {name} is", f" {number}", "key-value", place)
            for place, (name, number) in enumerate(facts)
        ],
    )


def _variables(draw: random.Random, config: RecallConfig) -> _Hidden:
    """Two chains, with alternating statements."""
    names = draw.sample([a + b for a in _LETTERS for b in _LETTERS], 2 * (config.hops + 1))
    chains = [(names[: config.hops + 1], _number(draw)), (names[config.hops + 1 :], _number(draw))]
    hidden = _Hidden()
    for step in range(config.hops + 1):
        for chain, value in chains:
            source = f"VAR {chain[step - 1]}" if step else value
            kind = f"variables, {step} hop{'' if step == 1 else 's'}"
            hidden.asked.append(_Asked(f"VAR {chain[step]} =", f" {value}", kind, len(hidden.needles)))
            hidden.needles.append(f"VAR {chain[step]} = {source}. ")
    return hidden


def _common_words(draw: random.Random, config: RecallConfig) -> _Hidden:
    """One word eight times, and eight others once or twice."""
    common, *others = draw.sample(_WORDS.split(), 9)
    said = [common] * 8 + others + others[:4]
    draw.shuffle(said)
    needles = [f"The word of the day is {word}. " for word in said]
    question = "On most days the word of the day is"
    return _Hidden(needles, [_Asked(question, f" {common}", "common-words")])


TASKS: dict[str, Callable[[random.Random, RecallConfig], _Hidden]] = {
    "passkey": _passkey,
    "key-value": _key_value,
    "variables": _variables,
    "common-words": _common_words,
}
"""Functions that draw the sentences and questions of each task."""


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        kind: the task, or a part of it.
        depth: place of the answer, from 0 (beginning) to 1 (end); ``None`` if it is not in one place.
        prompt: int64 ``[1, Q]``.
        answer: int64 ``[1, A]``.
    """

    kind: str
    depth: float | None
    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True)
class RecallText:
    """A text and its questions.

    Attributes:
        ids: int64 ``[1, T]``, without a question.
        questions: the questions, each to be asked separately after the text.
    """

    ids: Tensor
    questions: tuple[Question, ...]


def make_text(tokenizer: Any, length: int, number: int, config: RecallConfig) -> RecallText:
    """Make a text that has exactly ``length`` tokens together with its longest question.

    Each sentence of a task is at a random place in one of as many equal parts of the text. A single sentence is at a
    different depth in each text.

    Args:
        tokenizer: tokenizer of the model.
        length: number of tokens.
        number: index of the text among those of this length.
        config: settings of the texts.

    Raises:
        ConfigError: the length is too small for the sentences.
    """
    draw = random.Random(f"{config.seed} {length} {number}")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    placed: list[tuple[float, list[int]]] = []
    questions: list[Question] = []
    for task in config.tasks:
        hidden = TASKS[task](draw, config)
        count = len(hidden.needles)
        places = [(place + draw.random()) / count for place in range(count)]
        if count == 1:
            places = [(number + 0.5) / config.texts]
        placed += [(place, ids(needle)) for place, needle in zip(places, hidden.needles, strict=True)]
        for asked in hidden.asked:
            depth = None if asked.needle is None else places[asked.needle]
            prompt, answer = torch.tensor([ids(asked.question)]), torch.tensor([ids(asked.answer)])
            questions.append(Question(asked.kind, depth, prompt, answer))
    bos = bos_token_id(tokenizer)
    start = [] if bos is None else [bos]
    taken = len(start) + sum(len(needle) for _, needle in placed)
    room = length - taken - max(question.prompt.shape[1] for question in questions)
    if room < 0:
        raise ConfigError(
            f"{length} tokens are too few for {' and '.join(config.tasks)}; use --length {length - room} or more, "
            "or fewer tasks"
        )
    return RecallText(torch.tensor([start + _between(placed, ids(_FILLER), room)]), tuple(questions))


def _between(placed: Sequence[tuple[float, list[int]]], filler: list[int], room: int) -> list[int]:
    """Insert sentences at their places in ``room`` tokens of filler."""
    rest = (filler * (room // len(filler) + 1))[:room]
    made: list[int] = []
    used = 0
    for place, needle in sorted(placed, key=lambda each: each[0]):
        at = round(place * room)
        made += rest[used:at] + needle
        used = at
    return made + rest[used:]
