"""The model card of a repository of artifacts: their size, their accuracy, and how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kvq_calib.artifact.command import calibration_command
from kvq_calib.artifact.described import Described
from kvq_calib.schema.results import Result, Results, fact_of

__all__ = ["CardEntry", "is_card", "model_card"]

_LIBRARY = "kvq-calib"
_CONTEXTS = (4096, 32768)


@dataclass(frozen=True, eq=False)
class CardEntry:
    """One artifact in a card.

    Attributes:
        file: its name in the repository.
        artifact: its content.
        measured: results of evaluations.
    """

    file: str
    artifact: Described
    measured: Sequence[tuple[Results, Result]] = ()


def is_card(text: str) -> bool:
    """Whether a README is a card of this module, which may be replaced."""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0]:
        return False
    try:
        return bool(fact_of(yaml.safe_load(parts[1]), "library_name") == _LIBRARY)
    except yaml.YAMLError:
        return False


def model_card(repository: str, entries: Sequence[CardEntry]) -> str:
    """A README in Markdown, beginning with the metadata that the hub reads.

    Args:
        repository: hub id or folder, as ``KVArtifact.from_pretrained`` takes it.
        entries: at least one artifact.
    """
    models = list(dict.fromkeys(_cell(entry.artifact.model.get("id", "unknown")) for entry in entries))
    facts: dict[str, Any] = {"library_name": _LIBRARY, "tags": ["kv-cache", "quantization", _LIBRARY]}
    if on_hub := [name for name in models if name.count("/") == 1]:
        facts.update(base_model=on_hub, base_model_relation="quantized")
    front = yaml.safe_dump(facts, sort_keys=True)
    parts = [
        f"---\n{front}---\n\n# Quantized key-value cache of {', '.join(models)}",
        "This repository has no weights. Its files tell kvq-calib how to store the model's keys and values in a few "
        "bits; they were calibrated for this model on a little text.",
        *_figures(entries),
        *_use(repository, entries),
        *_origin(entries),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(entries: Iterable[CardEntry]) -> list[str]:
    headings = ["file", "recipe", *(f"bits/element at {context:,} tokens" for context in _CONTEXTS)]
    rows = [
        [
            f"`{entry.file}`",
            _cell(entry.artifact.calibration.get("recipe", "")),
            *(f"{entry.artifact.bits_per_element(context):.3f}" for context in _CONTEXTS),
        ]
        for entry in entries
    ]
    parts = [
        "## Size",
        _table(headings, rows),
        "Bits count everything that is stored.",
        "## Accuracy",
    ]
    headings = ["file", "text", "tokens", "KL mean", "KL p99", "top-1", "perplexity", "unquantized", "mode"]
    rows = [
        [
            f"`{entry.file}`",
            _cell(results.fact("data", "dataset") or results.fact("dataset") or ""),
            _number(result.tokens, ",.0f"),
            _number(result.kl_mean, ".5f"),
            _number(result.kl_p99, ".4f"),
            _number(result.top1_agreement, ".4f"),
            _number(result.perplexity, ".3f"),
            _number(result.baseline_perplexity, ".3f"),
            _cell(result.mode or ""),
        ]
        for entry in entries
        for results, result in entry.measured
    ]
    if not rows:
        return [*parts, "Not measured yet; `kvq-eval perplexity` measures it."]
    return [
        *parts,
        _table(headings, rows),
        "KL divergence is from the unquantized model's predictions, in nats per predicted token. Top-1 is the share of "
        "tokens for which both models predict the same token.",
    ]


def _use(repository: str, entries: Sequence[CardEntry]) -> list[str]:
    name = f", filename={entries[0].file!r}" if len(entries) > 1 else ""
    code = (
        "from kvq_calib import KVArtifact, KVQCache\n\n"
        f"artifact = KVArtifact.from_pretrained({repository!r}{name})\n"
        "output = model.generate(**inputs, cache=KVQCache(artifact, model))"
        "  # past_key_values=... before transformers 5.24"
    )
    return [
        "## Use",
        f"```python\n{code}\n```",
        "An artifact works with the model it was calibrated for; any other model is refused.",
    ]


def _origin(entries: Iterable[CardEntry]) -> list[str]:
    parts = ["## How it was made"]
    for entry in entries:
        record = entry.artifact.calibration
        data = record.get("data")
        facts = {
            "calibration text": fact_of(data, "dataset"),
            "windows": fact_of(data, "windows"),
            "tokens per window": fact_of(data, "seqlen"),
            "SHA-256 of the token ids": fact_of(data, "sha256"),
            **{f"version of {name}": version for name, version in _mapping(record.get("versions")).items()},
        }
        rows = [[_cell(name), _cell(value)] for name, value in facts.items() if value is not None]
        parts += [f"`{entry.file}`:", _table(["", ""], rows)]
        made = calibration_command(_cell(entry.artifact.model.get("id", "MODEL")), entry.artifact, entry.file)
        if made is not None:
            parts.append(f"```sh\n{made.command}\n```")
        if made is not None and made.recipe:
            parts.append(f"with `{made.file}`:\n\n```yaml\n{made.recipe}```")
    return parts


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cell(value: Any) -> str:
    """Escape text so that it cannot leave its table cell."""
    return " ".join(str(value).replace("|", "\\|").replace("`", "'").split())


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
