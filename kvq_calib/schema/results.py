"""Reading the JSON files that ``kvq-eval perplexity`` and ``kvq-eval compare`` write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvq_calib.errors import KVQError
from kvq_calib.schema.problem import first_problem

__all__ = ["ReportError", "Result", "Results", "eval_command", "fact_of", "read_results"]


class ReportError(KVQError):
    """A report whose data is missing or unreadable; the message says what to run first."""


class Result(BaseModel):
    """What one evaluation measured for one artifact or rival.

    Attributes:
        name, bits_per_element, kl_mean: always there; a chart needs them.
        kl_positions: first and last token of each part of a window, and the mean KL divergence there.
        perplexity, baseline_perplexity, kl_p99, top1_agreement, tokens: shown where they are given.
        origin, source, settings, mode: what a rival is, and how it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)

    name: str
    bits_per_element: float = Field(gt=0)
    kl_mean: float = Field(ge=0)
    kl_positions: list[list[float]] | None = None
    perplexity: float | None = None
    baseline_perplexity: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    tokens: int | None = None
    origin: str | None = None
    source: str | None = None
    settings: str | None = None
    mode: str | None = None


class Results(BaseModel):
    """A JSON file of ``kvq-eval perplexity`` or ``kvq-eval compare``.

    Attributes:
        file: path of the file.
        artifacts: results of artifacts, measured side by side on one text.
        rivals: results of other ways to quantize a cache, measured in the same run; ``None`` where the file has no such
            list.
        config: settings, and what else is needed to repeat it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    file: str
    artifacts: list[Result] = Field(min_length=1)
    rivals: list[Result] | None = None
    config: dict[str, Any] = {}

    def fact(self, *path: str) -> Any:
        """A value of the settings, ``None`` where there is none."""
        return fact_of(self.config, *path)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that must be equal for two results to be shown in one chart."""
        text = self.fact("data", "sha256") or [self.fact(n) for n in ("dataset", "seqlen", "windows", "seed")]
        facts = (self.fact("model"), text, self.fact("mode"), self.fact("context"))
        return tuple(json.dumps(fact, sort_keys=True) for fact in facts)


def read_results(files: Sequence[str]) -> list[Results]:
    """Read result files.

    Raises:
        ReportError: a file cannot be read, or is not the JSON of an evaluation.
    """
    found = []
    for file in files:
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ReportError(
                f"cannot read results {file}: {error.strerror or error}; write them with kvq-eval perplexity "
                f"MODEL --artifact ARTIFACT --json {file}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ReportError(
                f"{file} is not JSON; name a file that kvq-eval perplexity --json wrote"
            ) from error
        try:
            found.append(
                Results.model_validate({**content, "file": file} if isinstance(content, dict) else {})
            )
        except ValidationError as error:
            raise ReportError(
                f"{file} holds no results of an evaluation ({first_problem(error)}); name a file that "
                "kvq-eval perplexity --json wrote"
            ) from error
    return found


def fact_of(content: Any, *path: str) -> Any:
    """A value deep in untyped JSON, ``None`` where there is none."""
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def eval_command(name: str, model: str, files: Sequence[str], *options: str) -> list[str]:
    """The words of a ``kvq-eval`` command line for the given artifact files."""
    named = [part for file in files for part in ("--artifact", file)]
    return ["kvq-eval", name, model, *named, *options]
