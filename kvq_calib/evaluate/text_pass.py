"""One pass over a text: for each window, the unquantized model once, and then any number of quantized caches.

All comparisons of predictions (perplexity, rivals, sensitivity of layers) use :func:`text_pass`, so negative log
likelihood, KL divergence and agreement are computed in one place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from kvq_calib.errors import KVQError
from kvq_calib.fit.divergence import chunks, kl_divergence
from kvq_calib.model.placement import input_device
from kvq_calib.progress import Progress

__all__ = ["Baseline", "Contender", "Hooks", "Mode", "NotFiniteError", "Score", "text_pass"]

Mode = Literal["prefill", "decode"]
Name = TypeVar("Name", bound=Hashable)


class NotFiniteError(KVQError):
    """Predictions contain infinity or NaN, so no result can be computed."""


class Hooks(Protocol):
    """Hooks on the model that a contender needs. They do not change other passes of the model."""

    def in_place(self) -> AbstractContextManager[None]:
        """Put the hooks on the model, and remove them on leaving."""


class Contender(Protocol):
    """A quantized cache of one model that can be measured."""

    @property
    def mode(self) -> Mode:
        """How it is measured: ``prefill``, inside one forward pass, or ``decode``, through a cache step by step."""

    @property
    def hooks(self) -> Hooks | None:
        """The hooks for :meth:`logits`. Contenders with the same object share them."""

    @property
    def remedy(self) -> str:
        """What to try if its predictions are not finite; the end of a message."""

    def logits(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids`` (int64 ``[B, T]``) with the cache quantized. The model is left unchanged."""

    def bits_per_element(self, context: int) -> float:
        """All bits stored at ``context`` tokens, per element. It is called after :meth:`logits`."""


class Baseline:
    """The unquantized model's predictions of one window.

    Args:
        logits: ``[T, V]``. Float32 logits are overwritten with log probabilities, so that these are computed only once.
        ids: int64 ``[T]``; the last token predicts nothing.

    Attributes:
        nll: negative log likelihood of the predicted tokens, summed, in nats.

    Raises:
        NotFiniteError: the predictions are not finite.
    """

    def __init__(self, logits: Tensor, ids: Tensor) -> None:
        self.ids = ids
        self.tokens = len(ids) - 1
        self._logits = logits
        self._normalised = logits.dtype == torch.float32
        self.nll = 0.0
        for part in chunks(self.tokens):
            if self._normalised:
                logits[part] = logits[part].log_softmax(-1)
            self.nll += negative_log_likelihood(self.log_probabilities(part), self.targets(part))
        if not math.isfinite(self.nll):
            raise NotFiniteError("the unquantized model's predictions are not finite; try --dtype float32")

    def log_probabilities(self, part: slice) -> Tensor:
        """Log probabilities of the tokens after those at ``part``: float32 ``[n, V]``."""
        logits = self._logits[part]
        return logits if self._normalised else logits.float().log_softmax(-1)

    def targets(self, part: slice) -> Tensor:
        """The tokens after those at ``part``: int64 ``[n, 1]``."""
        return self.ids[part.start + 1 : part.stop + 1, None]


def negative_log_likelihood(log_probabilities: Tensor, targets: Tensor) -> float:
    """Sum over tokens in nats, in float64, from log probabilities float32 ``[n, V]`` and ids int64 ``[n, 1]``."""
    return -float(log_probabilities.gather(1, targets).double().sum())


class Score:
    """A contender's predictions compared with the baseline's, summed over windows.

    Attributes:
        nll, baseline_nll: negative log likelihoods, summed over tokens, in nats.
        divergences: KL divergence from the baseline for each predicted token, float64, one tensor per window.
        agreed: number of tokens for which both predict the same most likely token.
        tokens: number of predicted tokens.
        seconds: wall time of the contender's passes and of their comparison.
    """

    def __init__(self) -> None:
        self.nll = 0.0
        self.baseline_nll = 0.0
        self.divergences: list[Tensor] = []
        self.agreed = 0
        self.tokens = 0
        self.seconds = 0.0

    def add(self, baseline: Baseline, logits: Tensor) -> None:
        """Add a window: logits ``[T, V]`` of the contender.

        Raises:
            NotFiniteError: the logits are not finite; the message is a part of a sentence.
        """
        nll, found = 0.0, []
        for part in chunks(baseline.tokens):
            p, q = baseline.log_probabilities(part), logits[part].float().log_softmax(-1)
            nll += negative_log_likelihood(q, baseline.targets(part))
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            found.append(kl_divergence(p, q).clamp(min=0).cpu())
        divergence = torch.cat(found).double()
        if not (math.isfinite(nll) and bool(torch.isfinite(divergence).all())):
            raise NotFiniteError("predictions that are not finite")
        self.nll += nll
        self.baseline_nll += baseline.nll
        self.divergences.append(divergence)
        self.tokens += baseline.tokens

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence, nats per predicted token."""
        return float(torch.cat(self.divergences).mean())

    def kl_positions(self, parts: int) -> tuple[tuple[int, int, float], ...]:
        """Mean KL divergence along the windows, which are equally long, in so many parts or as many as tokens.

        Returns:
            First and last predicting token of each part, counted from 0, and the mean.
        """
        along = torch.stack(self.divergences).mean(0)
        ends = [len(along) * number // parts for number in range(parts + 1)]
        return tuple((a, b - 1, float(along[a:b].mean())) for a, b in pairwise(ends) if a < b)


class _Switch:
    """Keeps the last contender's hooks on the model until a contender with other hooks runs."""

    def __init__(self, stack: ExitStack) -> None:
        self._current: Hooks | None = None
        self._stack = stack

    def to(self, hooks: Hooks | None) -> None:
        if hooks is self._current:
            return
        self._stack.close()
        self._current = hooks
        if hooks is not None:
            self._stack.enter_context(hooks.in_place())


@torch.no_grad()
def text_pass(
    model: Any,
    contenders: Mapping[Name, Contender],
    windows: Tensor,
    *,
    progress: Progress | None = None,
    label: str = "forward passes",
    finished: Callable[[Mapping[Name, Score]], None] | None = None,
) -> dict[Name, Score]:
    """Measure contenders on the same windows, with one pass of the unquantized model per window.

    Args:
        model: the unquantized causal language model; it is left unchanged.
        contenders: contenders by name.
        windows: token ids int64 ``[N, T]``.
        progress: called after every pass over a window.
        label: name of the phase in the progress.
        finished: called after every window with the results of all windows so far.

    Raises:
        NotFiniteError: predictions of the model or of a contender are not finite.
    """
    scores = {name: Score() for name in contenders}
    total, done = len(windows) * (len(contenders) + 1), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(label, done, total)

    with ExitStack() as stack:
        switch = _Switch(stack)
        for index in range(len(windows)):
            ids = windows[index : index + 1].to(input_device(model))
            baseline = Baseline(model(input_ids=ids, use_cache=False).logits[0], ids[0])
            step()
            for name, contender in contenders.items():
                started = time.monotonic()
                switch.to(contender.hooks)
                try:
                    scores[name].add(baseline, contender.logits(ids)[0])
                except NotFiniteError as error:
                    raise NotFiniteError(f"{name} gives {error}; {contender.remedy}") from error
                scores[name].seconds += time.monotonic() - started
                step()
            if finished is not None:
                finished(scores)
    return scores
