"""Perplexity, KL divergence and agreement of quantized caches against the unquantized model, in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import TokenWindows
from kvq_calib.evaluate.contenders import artifact_contenders
from kvq_calib.evaluate.text_pass import Contender, Mode, Score, text_pass
from kvq_calib.progress import Progress
from kvq_calib.schema.recipe import EvalConfig

__all__ = ["Finished", "PerplexityResult", "measure", "measure_perplexity", "result_of"]

#: Number of parts of a window in :attr:`PerplexityResult.kl_positions`.
POSITIONS = 16

Finished = Callable[[Sequence["PerplexityResult"]], None]
"""Called after every window with the results of all windows so far."""


@dataclass(frozen=True)
class PerplexityResult:
    """The result of one cache.

    Attributes:
        name: name of the artifact or rival.
        mode: how it was measured: ``prefill`` or ``decode``.
        bits_per_element: all stored bits per element at the configured context, with the outliers counted in this run.
        perplexity, baseline_perplexity: ``exp`` of the mean negative log likelihood of the same tokens.
        kl_mean: mean KL divergence from the unquantized to the quantized prediction, in nats per predicted token.
        kl_p99: 99th percentile of the KL divergence over tokens.
        kl_positions: mean KL divergence of 16 parts of a window over all windows: first and last predicting token of a
            part, counted from 0, and the mean. Shows an error that grows with the length of the text.
        kl_windows: mean KL divergence of each window, in the order of the text. Compare results on the same windows
            in pairs: windows differ more than caches do.
        top1_agreement: share of tokens for which both predict the same most likely token.
        tokens: number of predicted tokens.
        seconds: wall time of the passes with this cache.
    """

    name: str
    mode: Mode
    bits_per_element: float
    perplexity: float
    baseline_perplexity: float
    kl_mean: float
    kl_p99: float
    kl_positions: tuple[tuple[int, int, float], ...]
    kl_windows: tuple[float, ...]
    top1_agreement: float
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The entry of the JSON report."""
        return asdict(self)


def result_of(name: str, contender: Contender, score: Score, context: int) -> PerplexityResult:
    """Summarise the score of a text pass. Bits are stated at ``context`` tokens."""
    divergence = torch.cat(score.divergences)
    return PerplexityResult(
        name=name,
        mode=contender.mode,
        bits_per_element=contender.bits_per_element(context),
        perplexity=_perplexity(score.nll, score.tokens),
        baseline_perplexity=_perplexity(score.baseline_nll, score.tokens),
        kl_mean=score.kl_mean,
        kl_p99=float(divergence.quantile(0.99)),
        kl_positions=score.kl_positions(POSITIONS),
        kl_windows=tuple(float(window.mean()) for window in score.divergences),
        top1_agreement=score.agreed / score.tokens,
        tokens=score.tokens,
        seconds=score.seconds,
    )


def _perplexity(nll: float, tokens: int) -> float:
    return math.exp(min(nll / tokens, 700.0))  # the largest exponent in double precision


def measure_perplexity(
    model: Any,
    artifacts: Mapping[str, KVArtifact],
    windows: TokenWindows,
    config: EvalConfig,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> list[PerplexityResult]:
    """Measure several artifacts on the same windows. The baseline runs once.

    Args:
        model: the unquantized causal language model.
        artifacts: artifacts by name, in the order of the report. The caller checks that they fit the model.
        windows: token ids int64 ``[N, T]``.
        config: mode, and the context at which bits are stated. An artifact with a window of recent exact tokens is
            always measured in decode mode.
        progress: called after every pass over a window.
        finished: called after every window.

    Raises:
        NotFiniteError: predictions of the model, or of an artifact, are not finite.
        RuntimeMismatchError: an artifact to be measured in decode mode cannot be streamed.
    """
    contenders = artifact_contenders(model, artifacts, config)
    return measure(model, contenders, windows, config.context, progress, finished)


def measure(
    model: Any,
    contenders: Mapping[str, Contender],
    windows: TokenWindows,
    context: int,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> list[PerplexityResult]:
    """Measure contenders on the same windows, with one baseline pass per window.

    Args:
        model: the unquantized causal language model.
        contenders: contenders by name, in the order of the report.
        windows: token ids int64 ``[N, T]``.
        context: tokens at which bits are stated.
        progress: called after every pass over a window.
        finished: called after every window.

    Raises:
        NotFiniteError: predictions of the model, or of a contender, are not finite.
    """

    def results(scores: Mapping[str, Score]) -> list[PerplexityResult]:
        return [result_of(name, one, scores[name], context) for name, one in contenders.items()]

    told = None if finished is None else lambda scores: finished(results(scores))
    return results(text_pass(model, contenders, windows.ids, progress=progress, finished=told))
