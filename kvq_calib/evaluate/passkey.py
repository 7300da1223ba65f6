"""Passkey retrieval: a number is hidden in a long text and asked for at its end.

A trial passes if the model's greedy continuation is the number. Artifacts are only tested on trials that the
unquantized model passes, because other failures are not due to quantization.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.errors import ConfigError
from kvq_calib.model.inspect import next_pass
from kvq_calib.model.load import check_tokens
from kvq_calib.model.placement import input_device
from kvq_calib.progress import Progress
from kvq_calib.runtime import KVQCache, attached

__all__ = ["PasskeyCell", "PasskeyConfig", "Trial", "make_trial", "measure_passkey"]

_FILLER = (
    "The river runs past the mill and the old stone bridge. Farmers bring apples and bread to the market. "
    "In the evening the lamps are lit and people walk home along the water. "
)
_NEEDLE = "Remember this: the pass key is {key}. The pass key is {key}, do not forget it. "
_QUESTION = "What is the pass key that you were told to remember? The pass key is"


@dataclass(frozen=True)
class PasskeyConfig:
    """The texts to try.

    Attributes:
        lengths: tokens of the prompt.
        depths: position of the number, 0 (beginning) to 1 (end).
        trials: texts per length and depth, each with a different five-digit number.
        seed: seed of the numbers.
        chunk: tokens per call.
    """

    lengths: Sequence[int] = (512, 1024, 2048)
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 5
    seed: int = 0
    chunk: int = 256


@dataclass(frozen=True)
class Trial:
    """One text and its answer.

    Attributes:
        prompt: int64 ``[1, T]``.
        answer: int64 ``[1, A]``, the tokens of the number.
    """

    prompt: Tensor
    answer: Tensor


@dataclass
class PasskeyCell:
    """Results at one length and depth.

    Attributes:
        length: tokens of the prompt.
        depth: position of the number, 0 (beginning) to 1 (end).
        trials: number of texts.
        baseline: number of trials that the unquantized model passes.
        passed: number of those that pass with each artifact.
    """

    length: int
    depth: float
    trials: int
    baseline: int = 0
    passed: dict[str, int] = field(default_factory=dict)

    def rate(self, name: str) -> float | None:
        """Share of the unquantized model's passed trials that the artifact passes; ``None`` if there are none."""
        return self.passed[name] / self.baseline if self.baseline else None

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {**vars(self), "rates": {name: self.rate(name) for name in self.passed}}


def make_trial(tokenizer: Any, length: int, depth: float, key: int) -> Trial:
    """A text of exactly ``length`` tokens with ``key`` hidden at ``depth``.

    Raises:
        ConfigError: the length leaves no room for the key and the question, or the depth is not in [0, 1].
    """
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(f"depth {depth} is not between 0 and 1")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    needle, question = ids(_NEEDLE.format(key=key)), ids(_QUESTION)
    whole = list(tokenizer(_QUESTION)["input_ids"])  # with the tokens that the tokenizer puts before a text
    special = whole[: next(i for i in range(len(whole)) if whole[i : i + len(question)] == question)]
    room = length - len(special) - len(needle) - len(question)
    if room < 0:
        raise ConfigError(f"{length} tokens are too few for a passkey text; use {length - room} or more")
    filler = ids(_FILLER)
    repeated = (filler * (room // len(filler) + 1))[:room]
    before = round(depth * room)
    prompt = special + repeated[:before] + needle + repeated[before:] + question
    return Trial(torch.tensor([prompt]), torch.tensor([ids(f" {key}")]))


@torch.no_grad()
def passes(model: Any, cache: Any, trial: Trial, chunk: int) -> bool:
    """Whether greedy decoding with ``cache`` gives the answer.

    The prompt is fed in calls of ``chunk`` tokens. Then the answer is fed in one call: greedy decoding gives it exactly
    if each of its tokens is the most likely one.
    """
    device = input_device(model)
    alone = getattr(cache, "single_tokens", False)
    chunk = 1 if alone else chunk
    prompt = trial.prompt[:, :-1].to(device)
    length = prompt.shape[1]
    for at in range(0, length, chunk):
        model(**next_pass(model, prompt[:, at : at + chunk], cache, at), logits_to_keep=1)
    last = torch.cat((trial.prompt[:, -1:], trial.answer[:, :-1]), dim=1).to(device)
    parts = last.split(1 if alone else last.shape[1], dim=1)
    said = [
        model(**next_pass(model, part, cache, length + at)).logits.argmax(-1) for at, part in enumerate(parts)
    ]
    return bool((torch.cat(said, dim=1).cpu() == trial.answer).all())


def measure_passkey(
    model: Any,
    tokenizer: Any,
    artifacts: Mapping[str, KVArtifact],
    config: PasskeyConfig,
    progress: Progress | None = None,
) -> list[PasskeyCell]:
    """Test retrieval over lengths and depths, through the packed cache.

    Args:
        model: the unquantized causal language model; left as it was.
        tokenizer: its tokenizer.
        artifacts: artifacts by name.
        config: the texts.
        progress: called after every text and cache.

    Returns:
        One cell per length and depth, sorted by length. An artifact runs only on trials that the unquantized model
        passes.

    Raises:
        ConfigError: a length is too short, or longer than the model's context.
        ModelError: the tokenizer gives tokens outside the model's vocabulary.
        RuntimeMismatchError: an artifact cannot be streamed.
    """
    planned = _plan(model, tokenizer, artifacts, config)
    total, done = len(planned) * config.trials * (len(artifacts) + 1), 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, total)

    with attached(model):
        caches = {name: KVQCache(artifact, model) for name, artifact in artifacts.items()}
        for cell, texts in planned:
            for trial in texts:
                known = passes(model, DynamicCache(), trial, config.chunk)
                cell.baseline += known
                step("baseline")
                for name, cache in caches.items():
                    if known:
                        cell.passed[name] += passes(model, cache, trial, config.chunk)
                        cache.reset()
                    step(name)
    return [cell for cell, _ in planned]


def _plan(
    model: Any, tokenizer: Any, artifacts: Mapping[str, KVArtifact], config: PasskeyConfig
) -> list[tuple[PasskeyCell, list[Trial]]]:
    """Empty cells, each with its texts."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    numbers = random.Random(config.seed)
    planned = []
    for length in config.lengths:
        for depth in config.depths:
            keys = [numbers.randint(10_000, 99_999) for _ in range(config.trials)]
            texts = [make_trial(tokenizer, length, depth, key) for key in keys]
            for text in texts:
                check_tokens(model, torch.cat((text.prompt, text.answer), dim=1))
            if limit is not None and length + texts[0].answer.shape[1] > limit:
                raise ConfigError(
                    f"{length} tokens and the answer are more than the model's {limit}; use a shorter --length"
                )
            cell = PasskeyCell(length, depth, config.trials, 0, dict.fromkeys(artifacts, 0))
            planned.append((cell, texts))
    return planned
