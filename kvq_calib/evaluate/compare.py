"""Measures artifacts and rivals on the same windows, in one run, against one baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import TokenWindows
from kvq_calib.errors import one_line
from kvq_calib.evaluate import pareto
from kvq_calib.evaluate.contenders import artifact_contenders
from kvq_calib.evaluate.perplexity import PerplexityResult, measure
from kvq_calib.evaluate.rivals import Rival
from kvq_calib.evaluate.text_pass import Contender, Mode
from kvq_calib.model.inspect import inspect_model
from kvq_calib.progress import Progress
from kvq_calib.schema.geometry import KVGeometry
from kvq_calib.schema.recipe import EvalConfig

__all__ = ["ComparedResult", "Comparison", "compare", "frontier", "runnable"]

#: Further contexts at which bits are recorded. At long contexts, exact windows, rotations and codebooks count less.
_CONTEXTS = (4096, 32768, 131072)
#: Enough tokens for a second call of a cache, which reads what the first call quantized.
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class ComparedResult:
    """The result of one artifact or rival.

    Attributes:
        result: the measured numbers.
        origin: ``artifact``, or a rival's ``library``, ``reference`` or ``in the style of``.
        source, settings: where it comes from, and how it is configured.
        bits_at: bits per element at other contexts.
        on_frontier: whether no other result of the run has lower KL divergence at as few bits.
    """

    result: PerplexityResult
    origin: str
    source: str
    settings: str
    bits_at: Mapping[int, float]
    on_frontier: bool

    def to_json(self) -> dict[str, Any]:
        """The entry of the JSON report: that of ``kvq-eval perplexity``, and the further fields here."""
        return {
            **self.result.to_json(),
            "origin": self.origin,
            "source": self.source,
            "settings": self.settings,
            "bits_at": {str(context): bits for context, bits in self.bits_at.items()},
            "on_frontier": self.on_frontier,
        }


@dataclass(frozen=True)
class Comparison:
    """Results of :func:`compare`.

    Attributes:
        artifacts, rivals: in the order given.
        context: tokens at which ``bits_per_element`` and the frontier are stated.
    """

    artifacts: tuple[ComparedResult, ...]
    rivals: tuple[ComparedResult, ...]
    context: int

    def verdicts(self) -> list[str]:
        """A line for every rival on the frontier, and for every artifact that a rival beats in bits and divergence."""
        lines = [
            f"{rival.result.name} ({rival.origin}) is on the frontier: nothing measured here diverges less in as few "
            "bits"
            for rival in self.rivals
            if rival.on_frontier
        ]
        for artifact in self.artifacts:
            better = [
                rival.result.name
                for rival in self.rivals
                if pareto.beats(_at(rival.result), _at(artifact.result))
            ]
            if better:
                lines.append(
                    f"{artifact.result.name} is beaten by {', '.join(better)}: fewer bits and less divergence"
                )
        return lines


def frontier(results: Sequence[PerplexityResult]) -> list[PerplexityResult]:
    """The results that no other beats in bits and mean KL divergence, by rising bits."""
    return pareto.frontier(results, _at)


def _at(result: PerplexityResult) -> tuple[float, float]:
    return result.bits_per_element, result.kl_mean


def runnable(
    rivals: Sequence[Rival], model: Any, has_text: bool
) -> tuple[list[Rival], list[tuple[str, str]]]:
    """Divide rivals into those that can run here and those that cannot.

    Args:
        rivals: rivals to check.
        model: the causal language model.
        has_text: whether there is calibration text.

    Returns:
        The rivals that can run, and the names of the others with the reasons.
    """
    geometry = inspect_model(model)
    reasons = [(rival, rival.obstacle(geometry, has_text) or _failure(rival, model)) for rival in rivals]
    return (
        [rival for rival, reason in reasons if reason is None],
        [(rival.name, reason) for rival, reason in reasons if reason is not None],
    )


def _failure(rival: Rival, model: Any) -> str | None:
    """Why a library does not work here. It is called once, so that it compiles now what it compiles at first use."""
    if rival.origin != "library":
        return None
    ids = torch.ones(1, _PROBE_TOKENS, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            rival.logits(model, ids)
    except Exception as error:  # code of other projects may raise anything
        return f"it fails here: {one_line(error)}"
    return None


class _RivalContender:
    """A rival as a contender of a text pass. It puts its hooks on the model for each text."""

    hooks = None
    remedy = "name the others with --rival to leave it out"

    def __init__(self, rival: Rival, model: Any, geometry: KVGeometry) -> None:
        self.rival, self.model, self.geometry = rival, model, geometry

    @property
    def mode(self) -> Mode:
        """``decode`` for a rival with a window of exact tokens, else ``prefill``."""
        return self.rival.mode

    def logits(self, ids: Tensor) -> Tensor:
        """As :class:`~kvq_calib.evaluate.text_pass.Contender` says."""
        return self.rival.logits(self.model, ids)

    def bits_per_element(self, context: int) -> float:
        """As :class:`~kvq_calib.evaluate.text_pass.Contender` says."""
        return self.rival.bits_per_element(self.geometry, context)


def compare(
    model: Any,
    artifacts: Mapping[str, KVArtifact],
    rivals: Sequence[Rival],
    windows: TokenWindows,
    config: EvalConfig,
    calibration: TokenWindows | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure artifacts and rivals on the same windows. The baseline runs once.

    Args:
        model: the unquantized causal language model.
        artifacts: artifacts by name. The caller checks that they fit the model.
        rivals: rivals that can run here, see :func:`runnable`.
        windows: token ids int64 ``[N, T]``.
        config: mode of the artifacts, and the context at which bits are stated; see
            :func:`~kvq_calib.evaluate.perplexity.measure_perplexity`.
        calibration: calibration text for rivals, int64 ``[N, T]``.
        progress: called after every pass over a window.

    Raises:
        NotFiniteError: predictions of the model, of an artifact or of a rival are not finite.
        RuntimeMismatchError: an artifact to be measured in decode mode cannot be streamed.
    """
    geometry = inspect_model(model)
    calibrated = [rival for rival in rivals if rival.calibrated]
    for done, rival in enumerate(calibrated, 1):
        rival.prepare(model, calibration)
        if progress is not None:
            progress("calibrated rivals", done, len(calibrated))
    ours = artifact_contenders(model, artifacts, config)
    theirs = {rival.name: _RivalContender(rival, model, geometry) for rival in rivals}
    # Prefixes distinguish an artifact and a rival of the same name.
    contenders: dict[str, Contender] = {f"artifact {name}": one for name, one in ours.items()}
    contenders |= {f"rival {name}": one for name, one in theirs.items()}
    measured = measure(model, contenders, windows, config.context, progress)
    best = {result.name for result in frontier(measured)}

    def compared(result: PerplexityResult, contender: Contender, name: str, **facts: str) -> ComparedResult:
        bits_at = {context: contender.bits_per_element(context) for context in _CONTEXTS}
        on_frontier = result.name in best
        return ComparedResult(replace(result, name=name), bits_at=bits_at, on_frontier=on_frontier, **facts)

    results = iter(measured)
    return Comparison(
        tuple(
            compared(
                next(results),
                one,
                name,
                origin="artifact",
                source="kvq-calib",
                settings=str(one.artifact.calibration.get("recipe", "")),
            )
            for name, one in ours.items()
        ),
        tuple(
            compared(
                next(results),
                theirs[rival.name],
                rival.name,
                origin=rival.origin,
                source=rival.source,
                settings=rival.settings,
            )
            for rival in rivals
        ),
        config.context,
    )
