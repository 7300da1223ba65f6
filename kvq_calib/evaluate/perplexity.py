"""Perplexity, KL divergence and agreement of a quantized cache beside the unquantized model, in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import TokenWindows
from kvq_calib.errors import KVQError
from kvq_calib.evaluate.prefill import OutlierCounts, quantized_prefill
from kvq_calib.model.placement import input_device
from kvq_calib.schema.recipe import EvalConfig

Progress = Callable[[str, int, int], None]
Finished = Callable[[Sequence["PerplexityResult"]], None]
"""Told after every window what the windows up to it gave."""

#: Tokens whose distributions over the vocabulary are compared at one time.
_CHUNK = 256


@dataclass(frozen=True)
class PerplexityResult:
    """What one artifact costs.

    Attributes:
        name: of the artifact.
        bits_per_element: everything stored at the configured context, with the outliers counted in this run.
        perplexity, baseline_perplexity: ``exp`` of the mean negative log likelihood of the same tokens.
        kl_mean: KL divergence from the unquantized to the quantized prediction, nats per predicted token.
        kl_p99: its 99th percentile over tokens.
        kl_windows: its mean over each window, in the order of the text. Results on the same windows can be compared in pairs:
            windows differ from each other by more than caches do.
        top1_agreement: share of tokens where both predict the same most likely token.
        tokens: predicted tokens.
        seconds: wall time of this artifact's passes.
    """

    name: str
    bits_per_element: float
    perplexity: float
    baseline_perplexity: float
    kl_mean: float
    kl_p99: float
    kl_windows: tuple[float, ...]
    top1_agreement: float
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The entry of the JSON report."""
        return asdict(self)


class Comparison:
    """Collects a quantized model's predictions against the baseline's, token by token."""

    def __init__(self) -> None:
        self.nll = 0.0
        self.baseline_nll = 0.0
        #: Of the predicted tokens of each window.
        self.divergences: list[Tensor] = []
        self.agreed = 0
        self.tokens = 0
        self.seconds = 0.0

    def add(self, baseline: Tensor, quantized: Tensor, ids: Tensor) -> None:
        """Compare logits ``[T, V]`` of a window ``ids [T]``; the last token predicts nothing."""
        divergences = []
        for start in range(0, len(ids) - 1, _CHUNK):
            stop = min(start + _CHUNK, len(ids) - 1)
            target = ids[start + 1 : stop + 1, None]
            p = baseline[start:stop].float().log_softmax(-1)
            q = quantized[start:stop].float().log_softmax(-1)
            self.baseline_nll -= float(p.gather(1, target).double().sum())
            self.nll -= float(q.gather(1, target).double().sum())
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            divergences.append((p.exp() * (p - q)).sum(-1).clamp(min=0).cpu())
            self.tokens += stop - start
        self.divergences.append(torch.cat(divergences).double())

    def result(self, name: str, bits: float) -> PerplexityResult:
        """Sum up."""
        divergence = torch.cat(self.divergences)
        return PerplexityResult(
            name=name,
            bits_per_element=bits,
            perplexity=math.exp(min(self.nll / self.tokens, 700.0)),
            baseline_perplexity=math.exp(self.baseline_nll / self.tokens),
            kl_mean=float(divergence.mean()),
            kl_p99=float(divergence.quantile(0.99)),
            kl_windows=tuple(float(window.mean()) for window in self.divergences),
            top1_agreement=self.agreed / self.tokens,
            tokens=self.tokens,
            seconds=self.seconds,
        )


class Contender(Protocol):
    """A quantized cache that can be measured."""

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids`` (int64 ``[B, T]``) with the cache quantized; the model is left as it was."""

    def bits_per_element(self, context: int) -> float:
        """Everything stored at ``context`` tokens, in bits over the numbers it stands for; asked after some logits."""


class ArtifactContender:
    """An artifact in one of the two modes; counts the outliers that it meets in prefill mode."""

    def __init__(self, artifact: KVArtifact, config: EvalConfig) -> None:
        self.artifact = artifact
        self.config = config
        self._counts: OutlierCounts | None = None

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """As :class:`Contender` says."""
        if self.config.mode == "decode":
            from kvq_calib.evaluate.decode import decode_logits

            return decode_logits(model, self.artifact, ids, chunk=self.config.chunk)
        with quantized_prefill(model, self.artifact) as counts:
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
        self._counts = counts if self._counts is None else self._counts.plus(counts)
        return logits

    def bits_per_element(self, context: int) -> float:
        """With the outliers counted, where any were; else with those of the calibration."""
        rates = None if self._counts is None else self._counts.per_token()
        return self.artifact.bits_per_element(context, outliers_per_token=rates)


def measure_perplexity(
    model: Any,
    artifacts: Mapping[str, KVArtifact],
    windows: TokenWindows,
    config: EvalConfig,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> list[PerplexityResult]:
    """Measure several artifacts on the same windows; the baseline runs once.

    Args:
        model: the unquantized causal language model.
        artifacts: by name, in the order of the report. They must fit the model (checked by the caller).
        windows: token ids int64 ``[N, T]``.
        config: mode, and the context at which bits are stated.
        progress: told after every forward pass.
        finished: told after every window.

    Raises:
        KVQError: the model's predictions are not finite.
    """
    contenders = {name: ArtifactContender(artifact, config) for name, artifact in artifacts.items()}
    return measure(model, contenders, windows, config.context, progress, finished)


@torch.no_grad()
def measure(
    model: Any,
    contenders: Mapping[str, Contender],
    windows: TokenWindows,
    context: int,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> list[PerplexityResult]:
    """Measure anything that quantizes a cache on the same windows, against one baseline pass each.

    Args:
        model: the unquantized causal language model.
        contenders: by name, in the order of the report.
        windows: token ids int64 ``[N, T]``.
        context: tokens at which bits are stated.
        progress: told after every forward pass.
        finished: told after every window.

    Raises:
        KVQError: the model's predictions are not finite.
    """
    comparisons = {name: Comparison() for name in contenders}
    total = len(windows.ids) * (len(contenders) + 1)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("forward passes", done, total)

    def results() -> list[PerplexityResult]:
        return [
            comparisons[name].result(name, contender.bits_per_element(context))
            for name, contender in contenders.items()
        ]

    for index in range(len(windows.ids)):
        ids = windows.ids[index : index + 1].to(input_device(model))
        baseline = model(input_ids=ids, use_cache=False).logits[0]
        if not bool(torch.isfinite(baseline.sum())):
            raise KVQError("the unquantized model's predictions are not finite; try --dtype float32")
        step()
        for name, contender in contenders.items():
            started = time.monotonic()
            comparisons[name].add(baseline, contender.logits(model, ids)[0], ids[0])
            comparisons[name].seconds += time.monotonic() - started
            step()
        if finished is not None:
            finished(results())
    return results()
