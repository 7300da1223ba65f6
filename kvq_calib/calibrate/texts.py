"""The windows of text that statistics use, by source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvq_calib.calibrate.self_generated import SelfGeneratedText
from kvq_calib.calibrate.vocabulary_samples import with_vocabulary_samples
from kvq_calib.data import TokenWindows
from kvq_calib.model.load import vocabulary_of


class Source(Enum):
    """Where a window comes from. Passes use sources in this order."""

    CALIBRATION = "calibration"
    SELF_GENERATED = "self-generated"
    SELF_GENERATED_REPEATING = "self-generated, with repeats"
    #: The calibration text with every second token replaced by a vocabulary sample.
    VOCABULARY_SAMPLES = "vocabulary samples"


@dataclass(frozen=True)
class Text:
    """A set of windows: a number of first windows of each source.

    Attributes:
        parts: pairs of source and count, with sources in order and positive counts; made by :func:`text_of`.
    """

    parts: tuple[tuple[Source, int], ...]

    def takes(self, window: Window) -> bool:
        """Whether a window is in the set."""
        return any(window.source is source and window.number < count for source, count in self.parts)

    def count(self, source: Source) -> int:
        """Number of windows of this source."""
        return dict(self.parts).get(source, 0)


@dataclass(frozen=True, eq=False)
class Window:
    """One window.

    Attributes:
        source: where it comes from.
        number: number of the window within its source.
        ids: int64 ``[1, T]``.
    """

    source: Source
    number: int
    ids: Tensor


def first_quarter(text: Text) -> Text:
    """The first quarter of the windows of each source, rounded up."""
    return Text(tuple((source, -(-count // 4)) for source, count in text.parts))


def text_of(counts: Mapping[Source, int]) -> Text:
    """A text with the given number of windows of each source. Sources without windows are left out."""
    return Text(tuple((source, counts[source]) for source in Source if counts.get(source)))


def united(texts: Iterable[Text]) -> Text:
    """The union of texts."""
    every = list(texts)
    return text_of({source: max((text.count(source) for text in every), default=0) for source in Source})


class TextLibrary:
    """The windows of a run.

    Args:
        windows: windows of the calibration text.
        model: the model whose vocabulary is sampled.
        seed: seed of the samples.

    Attributes:
        generated: the self-generated text, once it exists.
    """

    def __init__(self, windows: TokenWindows, model: Any, seed: int) -> None:
        self.calibration = windows.ids
        self.source = windows.source
        self.seed = seed
        self.generated: SelfGeneratedText | None = None
        self._model = model

    @cached_property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return vocabulary_of(self._model)

    @cached_property
    def _sampled(self) -> Tensor:
        return with_vocabulary_samples(self.calibration, self.vocabulary, self.seed)

    def rows(self, text: Text) -> Tensor:
        """The windows of a text, int64 ``[N, T]``.

        Raises:
            ValueError: the text has self-generated windows, which do not exist yet.
        """
        return torch.cat([self.calibration[:0], *(self._rows(source, count) for source, count in text.parts)])

    def windows(self, text: Text) -> list[Window]:
        """The same, one by one."""
        return [
            Window(source, number, row[None])
            for source, count in text.parts
            for number, row in enumerate(self._rows(source, count))
        ]

    def _rows(self, source: Source, count: int) -> Tensor:
        if source is Source.CALIBRATION:
            return self.calibration[:count]
        if source is Source.VOCABULARY_SAMPLES:
            return self._sampled[:count]
        if self.generated is None:
            raise ValueError("the model has not written its text yet")
        return self.generated.windows(count, repeats=source is Source.SELF_GENERATED_REPEATING)
