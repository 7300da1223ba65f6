"""One self-contained HTML page about artifacts of a model: their cost, layer by layer, and how to repeat it.

Results per layer are measured for the page, on a little text (:mod:`kvq_calib.evaluate.report.measure`). KL divergence
and bits of whole artifacts come from the JSON files of ``kvq-eval perplexity`` and ``kvq-eval compare``. The page
contains its style and charts, and loads nothing. All text from outside is escaped, by Jinja or when charts become SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvq_calib.artifact.command import calibration_command, shell_lines
from kvq_calib.evaluate.report.commands import evaluation_command
from kvq_calib.evaluate.report.figures import (
    file_size,
    frontier_figures,
    level_figures,
    memory_figures,
    outlier_figures,
    plural,
    same_outliers,
    sensitivity_figures,
)
from kvq_calib.evaluate.report.measure import Measured
from kvq_calib.evaluate.report.subjects import Subject
from kvq_calib.evaluate.tables import describe, run_facts
from kvq_calib.schema.results import Results, fact_of
from kvq_calib.schema.spec import KINDS

if TYPE_CHECKING:
    from kvq_calib.model.load import LoadedModel

__all__ = ["render"]


def render(
    loaded: LoadedModel,
    model: str,
    chosen: Sequence[Subject],
    results: Sequence[Results],
    measured: Measured,
    *,
    context: int,
    command: Sequence[str],
) -> str:
    """Render the page.

    Args:
        loaded: the model.
        model: as the user named it.
        chosen: the artifacts.
        results: all results, including those of rivals.
        measured: see :func:`~kvq_calib.evaluate.report.measure.measure`.
        context: tokens of context at which bits and parts of the memory are stated.
        command: words of the command that makes this report.
    """
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    geometry = chosen[0].artifact.geometry
    environment = Environment(
        loader=PackageLoader("kvq_calib.evaluate", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        model=loaded.name,
        facts=run_facts(loaded, {subject.name: subject.file for subject in chosen}, measured.text),
        layers=len(geometry.layers),
        heads=geometry.layers[0].num_kv_heads,
        head_dim=geometry.layers[0].head_dim,
        context=context,
        cards=[
            {
                "name": subject.name,
                "colour": subject.colour,
                "result": subject.results[0][1],
                "smaller": 16 / subject.results[0][1].bits_per_element,
            }
            for subject in chosen
        ],
        frontiers=frontier_figures(chosen, results),
        subjects=[
            {
                "name": subject.name,
                "colour": subject.colour,
                "sensitivity": sensitivity_figures(subject, measured, context),
                "levels": level_figures(subject, measured),
                "provenance": _provenance(subject),
                "made": calibration_command(model, subject.artifact, subject.file),
            }
            for subject in chosen
        ],
        outliers=[
            {"subjects": same, "found": outlier_figures(same[0], measured, loaded.tokenizer)}
            for same in same_outliers(chosen, measured)
        ],
        memory=memory_figures(chosen, limit if isinstance(limit, int) else None, context),
        evaluations=list(dict.fromkeys(evaluation_command(model, chosen, each) for each in results)),
        command=shell_lines(command),
        text=measured.text.source,
        windows=len(measured.text.ids),
    )


def _provenance(subject: Subject) -> list[tuple[str, str]]:
    artifact = subject.artifact
    record = artifact.calibration
    settings, data = fact_of(record, "settings"), fact_of(record, "data")
    learning = fact_of(record, "learning")
    rows: list[tuple[str, Any]] = [
        ("file", f"{subject.file} ({file_size(subject.size)})"),
        ("sha256 of the file", subject.sha256),
        ("model", artifact.model.get("id")),
        ("sha256 of the model's configuration", fact_of(artifact.model, "config", "sha256")),
        ("recipe", record.get("recipe")),
        ("description of the recipe", fact_of(settings, "description")),
        *((plural(kind), describe(artifact, kind)) for kind in KINDS),
        (
            "tokens kept exact",
            f"first {artifact.spec.sink_tokens}, last {artifact.spec.recent_tokens}, in {artifact.spec.storage_dtype}",
        ),
        (
            "calibration text",
            f"{fact_of(data, 'dataset')}, {fact_of(data, 'windows')} windows of {fact_of(data, 'seqlen')} tokens "
            f"({fact_of(data, 'split')}, {fact_of(data, 'convention')})"
            if data
            else None,
        ),
        ("sha256 of the text's tokens", fact_of(data, "sha256")),
        ("seed", fact_of(settings, "seed")),
        ("weights and solver of the fit", _join(fact_of(settings, "fit"))),
        ("budget", _join(fact_of(settings, "allocation"))),
        ("training", _join(fact_of(settings, "learn"))),
        (
            "KL before and after training",
            f"{_figure(fact_of(learning, 'kl_before'))} and {_figure(fact_of(learning, 'kl_after'))}"
            if learning
            else None,
        ),
        ("made with", _join(fact_of(record, "versions"))),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _figure(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, int | float) else str(value)


def _join(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return None if content is None else str(content)
    return ", ".join(f"{key} {value}" for key, value in content.items())
