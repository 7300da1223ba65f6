"""Greedy continuations with packed caches, compared with those of the unquantized model.

The output of the unquantized model is the reference, right or wrong, because quantization should change nothing. A
continuation ends with the first end-of-text token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.evaluate.decode import read_into
from kvq_calib.evaluate.generate_prompts import GenerateConfig, make_prompts
from kvq_calib.evaluate.intervals import mean_and_error
from kvq_calib.model.load import check_length, check_tokens
from kvq_calib.model.placement import input_device
from kvq_calib.progress import Progress
from kvq_calib.runtime import KVQCache, attached

__all__ = ["Deviation", "GenerateCell", "continuations", "deviation", "edit_distance", "measure_generate"]


@dataclass(frozen=True)
class Deviation:
    """The difference of a continuation from the reference.

    Attributes:
        agreement: share of the reference's tokens that are the same at the same place.
        first_difference: number of tokens before the first difference, or all if there is none.
        edit_distance: insertions, deletions and replacements of tokens, divided by the length of the longer one.
        same: whether they are equal.
        length: number of tokens in the reference.
    """

    agreement: float
    first_difference: int
    edit_distance: float
    same: bool
    length: int


@dataclass
class GenerateCell:
    """Results of an artifact for the texts of one task.

    Attributes:
        task: name of the task, or ``"all"``.
        name: name of the artifact.
        deviations: one per text.
    """

    task: str
    name: str
    deviations: list[Deviation] = field(default_factory=list)

    def mean(self, figure: str) -> tuple[float, float | None]:
        """Mean of a field of :class:`Deviation` over texts, and its standard error."""
        return mean_and_error([float(getattr(one, figure)) for one in self.deviations])

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        figures = ("agreement", "first_difference", "edit_distance", "same", "length")
        means = {figure: self.mean(figure) for figure in figures}
        return {
            "task": self.task,
            "name": self.name,
            "texts": len(self.deviations),
            **{figure: {"mean": mean, "standard_error": error} for figure, (mean, error) in means.items()},
            "each": [vars(one) for one in self.deviations],
        }


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn ``a`` into ``b``."""
    other, places = np.asarray(b), np.arange(len(b) + 1)
    row = places
    for number, token in enumerate(a, start=1):
        kept_or_replaced = row[:-1] + (other != token)
        best = np.concatenate(([number], np.minimum(kept_or_replaced, row[1:] + 1)))
        row = (
            np.minimum.accumulate(best - places) + places
        )  # insertions, from any earlier place, each costs one
    return int(row[-1])


def deviation(reference: Sequence[int], said: Sequence[int]) -> Deviation:
    """Compare two continuations that are not empty."""
    same = [a == b for a, b in zip(reference, said, strict=False)]
    return Deviation(
        agreement=sum(same) / len(reference),
        first_difference=same.index(False) if False in same else len(same),
        edit_distance=edit_distance(reference, said) / max(len(reference), len(said)),
        same=list(reference) == list(said),
        length=len(reference),
    )


@torch.no_grad()
def continuations(
    model: Any, cache: Any, prompts: Tensor, config: GenerateConfig, ends: frozenset[int]
) -> list[list[int]]:
    """Continue ``prompts`` (int64 ``[B, T]``) greedily with ``cache``, which must be empty.

    Returns:
        The tokens of each continuation, up to and including the first one in ``ends``.
    """
    said = read_into(model, cache, prompts.to(input_device(model)), config.chunk).argmax(-1)
    steps = [said.tolist()]
    ended = [token in ends for token in steps[0]]
    while len(steps) < config.tokens and not all(ended):
        said = read_into(model, cache, said[:, None], 1).argmax(-1)
        steps.append(said.tolist())
        ended = [before or token in ends for before, token in zip(ended, steps[-1], strict=True)]
    return [_up_to(tokens, ends) for tokens in zip(*steps, strict=True)]


def _up_to(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    stop = next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))
    return list(tokens[:stop])


def _ends(model: Any) -> frozenset[int]:
    """The end-of-text tokens of ``generate``."""
    found = model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, Iterable) else [found])


def measure_generate(
    model: Any,
    tokenizer: Any,
    artifacts: Mapping[str, KVArtifact],
    config: GenerateConfig,
    progress: Progress | None = None,
    finished: Callable[[list[GenerateCell]], None] | None = None,
) -> list[GenerateCell]:
    """Continue generated texts with the unquantized and the packed caches.

    Args:
        model: the unquantized causal language model. It is not changed.
        tokenizer: its tokenizer.
        artifacts: artifacts by name.
        config: settings of texts and continuations.
        progress: called after every batch and cache.
        finished: called after every batch, with the results so far.

    Returns:
        A cell per task and artifact. With several tasks, also one per artifact over all tasks.

    Raises:
        ConfigError: no module of the standard library is long enough.
        ModelError: more tokens than the model was trained for, or tokens that it does not know.
        RuntimeMismatchError: an artifact cannot be used with a packed cache.
    """
    check_length(model, config.length + config.tokens)
    batches: list[tuple[str, Tensor]] = []
    for task in config.tasks:
        prompts = make_prompts(tokenizer, task, config)
        check_tokens(model, prompts)
        batches += [(task, part) for part in torch.split(prompts, config.batch)]
    cells = {
        (task, name): GenerateCell(task, name)
        for task in (*config.tasks, *_together(config))
        for name in artifacts
    }
    ends, done, total = _ends(model), 0, len(batches) * (len(artifacts) + 1)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("continuations", done, total)

    with attached(model):
        caches = {name: KVQCache(artifact, model) for name, artifact in artifacts.items()}
        for task, prompts in batches:
            references = continuations(model, DynamicCache(config=model.config), prompts, config, ends)
            step()
            for name, cache in caches.items():
                said = continuations(model, cache, prompts, config, ends)
                cache.reset()
                for place in (task, *_together(config)):
                    cells[place, name].deviations += map(deviation, references, said)
                step()
            if finished is not None:
                finished([cell for cell in cells.values() if cell.deviations])
    return list(cells.values())


def _together(config: GenerateConfig) -> tuple[str, ...]:
    """The name for the results of all tasks together, if there are several tasks."""
    return ("all",) if len(config.tasks) > 1 else ()
