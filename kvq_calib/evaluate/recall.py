"""Retrieval from long texts: does a packed cache find what the unquantized cache finds?

A question is answered if greedy decoding gives the whole answer. All caches answer the same questions, so results can
be compared in pairs. Only questions that the unquantized model answers can show a loss by quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.errors import ConfigError
from kvq_calib.evaluate.decode import logits_through, read_into
from kvq_calib.evaluate.intervals import Interval, paired_difference, wilson
from kvq_calib.evaluate.recall_texts import RecallConfig, RecallText, make_text
from kvq_calib.model.load import check_tokens
from kvq_calib.model.placement import input_device
from kvq_calib.progress import Progress
from kvq_calib.runtime import KVQCache, attached

__all__ = ["RecallCell", "answered", "measure_recall"]


@dataclass
class RecallCell:
    """Results for questions of one kind and texts of one length.

    Attributes:
        kind: the task, or a part of it.
        length: number of tokens in a text and its longest question.
        depths: place of each answer in its text, from 0 to 1; ``None`` if it is not in one place.
        baseline: whether the unquantized model answers each question.
        found: the same for each artifact, by name.
    """

    kind: str
    length: int
    depths: list[float | None] = field(default_factory=list)
    baseline: list[bool] = field(default_factory=list)
    found: dict[str, list[bool]] = field(default_factory=dict)

    def share(self, name: str | None = None) -> tuple[float, Interval]:
        """Share of answered questions and its 95% interval. Without a name, for the unquantized model."""
        answers = self.baseline if name is None else self.found[name]
        return sum(answers) / len(answers), wilson(sum(answers), len(answers))

    def changes(self, name: str) -> tuple[int, int]:
        """Numbers of questions that only the unquantized model answers, and that only the artifact answers."""
        pairs = list(zip(self.baseline, self.found[name], strict=True))
        return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)

    def difference(self, name: str) -> tuple[float, Interval]:
        """Share of an artifact minus that of the unquantized model for the same questions, and its 95% interval."""
        return paired_difference(self.baseline, self.found[name])

    def to_json(self) -> dict[str, object]:
        """Plain data."""

        def share(name: str | None) -> dict[str, object]:
            value, interval = self.share(name)
            return {"share": value, "interval": interval}

        def beside(name: str) -> dict[str, object]:
            value, interval = self.difference(name)
            lost, gained = self.changes(name)
            return {"lost": lost, "gained": gained, "difference": value, "difference_interval": interval}

        return {
            "kind": self.kind,
            "length": self.length,
            "questions": len(self.baseline),
            "depths": self.depths,
            "unquantized": {"answered": self.baseline, **share(None)},
            "artifacts": {
                name: {"answered": found, **share(name), **beside(name)} for name, found in self.found.items()
            },
        }


@torch.no_grad()
def answered(model: Any, cache: Any, text: RecallText, chunk: int) -> list[bool]:
    """Which questions of a text are answered by greedy decoding with ``cache``, which must be empty.

    The text is read once, ``chunk`` tokens per call, and each question uses a copy of the cache. The expected answer is
    given as input. Greedy decoding would produce it if and only if each of its tokens is the most likely one.
    """
    device = input_device(model)
    read_into(model, cache, text.ids.to(device), chunk)
    found = []
    for question in text.questions:
        fed = torch.cat((question.prompt, question.answer[:, :-1]), dim=1).to(device)
        said = logits_through(model, copy.deepcopy(cache), fed, chunk)[
            :, question.prompt.shape[1] - 1 :
        ].argmax(-1)
        found.append(bool((said.cpu() == question.answer).all()))
    return found


def measure_recall(
    model: Any,
    tokenizer: Any,
    artifacts: Mapping[str, KVArtifact],
    config: RecallConfig,
    progress: Progress | None = None,
    finished: Callable[[list[RecallCell]], None] | None = None,
) -> list[RecallCell]:
    """Measure retrieval from texts with the unquantized and the packed caches.

    Args:
        model: the unquantized causal language model. It is not changed.
        tokenizer: its tokenizer.
        artifacts: artifacts by name. All of them run on every text.
        config: settings of the texts.
        progress: called after every text and cache.
        finished: called after every text, with the results so far.

    Returns:
        One cell per length and kind of question, ordered by length.

    Raises:
        ConfigError: a length is too short, or longer than the model allows.
        ModelError: the tokenizer gives tokens that the model does not know.
        RuntimeMismatchError: an artifact cannot be used with a packed cache.
    """
    texts = [(length, each) for length in config.lengths for each in _texts(model, tokenizer, length, config)]
    cells: dict[tuple[int, str], RecallCell] = {}
    total, done = len(texts) * (len(artifacts) + 1), 0
    with attached(model):
        caches = {name: KVQCache(artifact, model) for name, artifact in artifacts.items()}
        for length, text in texts:
            answers: dict[str | None, list[bool]] = {}
            for name, cache in ((None, DynamicCache(config=model.config)), *caches.items()):
                answers[name] = answered(model, cache, text, config.chunk)
                if name is not None:
                    cache.reset()
                done += 1
                if progress is not None:
                    progress("texts", done, total)
            for place, question in enumerate(text.questions):
                cell = cells.setdefault((length, question.kind), RecallCell(question.kind, length))
                cell.depths.append(question.depth)
                cell.baseline.append(answers[None][place])
                for name in caches:
                    cell.found.setdefault(name, []).append(answers[name][place])
            if finished is not None:
                finished(list(cells.values()))
    return list(cells.values())


def _texts(model: Any, tokenizer: Any, length: int, config: RecallConfig) -> list[RecallText]:
    """Make the texts of a length, and check that the model can read them."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    texts = [make_text(tokenizer, length, number, config) for number in range(config.texts)]
    for text in texts:
        for question in text.questions:
            check_tokens(model, torch.cat((text.ids, question.prompt, question.answer), dim=1))
    longest = max(question.answer.shape[1] for text in texts for question in text.questions)
    if limit is not None and length + longest > limit:
        raise ConfigError(
            f"{length} tokens and the answer are more than the model's {limit}; use a shorter --length"
        )
    return texts
