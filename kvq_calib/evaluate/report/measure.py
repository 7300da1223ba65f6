"""The measurements of a report: per layer, on a little text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.data import DEFAULT_FIELD, TokenWindows, load_windows
from kvq_calib.errors import DataError
from kvq_calib.evaluate.report.levels import LevelUse, level_uses
from kvq_calib.evaluate.report.outliers import TokenOutliers, count_outliers
from kvq_calib.evaluate.report.sensitivity import Sensitivity, measure_sensitivity
from kvq_calib.progress import Progress
from kvq_calib.schema.results import fact_of
from kvq_calib.schema.spec import Kind

if TYPE_CHECKING:
    from kvq_calib.model.load import LoadedModel

__all__ = ["Measured", "measure"]

#: Tokens of calibration text for the distributions, in whole windows.
FIT_TOKENS = 8192
#: Largest number of calibration tokens to cut again for comparing hashes, because an artifact may claim any number.
_MOST_TOKENS = 1 << 26


@dataclass(frozen=True)
class Measured:
    """Measurements for the report, by the artifacts' names.

    Attributes:
        text: windows for sensitivity and outliers.
        fit_text: windows for the distributions.
        calibrated_on: artifacts that were calibrated on the first windows of ``fit_text``.
        sensitivity, outliers, levels: see the modules of these names.
    """

    text: TokenWindows
    fit_text: Mapping[str, TokenWindows]
    calibrated_on: frozenset[str]
    sensitivity: Mapping[str, Sensitivity]
    outliers: Mapping[str, TokenOutliers]
    levels: Mapping[str, Mapping[Kind, Sequence[LevelUse]]]


def measure(
    loaded: LoadedModel,
    artifacts: Mapping[str, KVArtifact],
    windows: TokenWindows,
    calibration_dataset: str,
    progress: Progress | None = None,
) -> Measured:
    """Run the model for all per-layer results of the report.

    Args:
        loaded: the model that the artifacts are for.
        artifacts: artifacts by name.
        windows: windows for sensitivity and outliers.
        calibration_dataset: text for the distributions. If it yields the windows that an artifact was calibrated on,
            the first of those are used, else ``windows``.
        progress: called after every step.

    Raises:
        NotFiniteError: predictions are not finite.
    """
    model = loaded.model
    fit_text: dict[str, TokenWindows] = {}
    calibrated_on = set()
    known: dict[str, TokenWindows | None] = {}
    for name, artifact in artifacts.items():
        record = json.dumps(artifact.calibration.get("data"), sort_keys=True)
        if record not in known:
            known[record] = _calibration_windows(loaded, artifact, calibration_dataset)
        found = known[record]
        fit_text[name] = windows if found is None else found
        if found is not None:
            calibrated_on.add(name)
    levels: dict[str, dict[Kind, list[LevelUse]]] = {}
    for shared in {id(each): each for each in fit_text.values()}.values():
        same = {name: artifacts[name] for name, each in fit_text.items() if each is shared}
        levels |= level_uses(model, same, shared.ids, progress)
    return Measured(
        windows,
        fit_text,
        frozenset(calibrated_on),
        measure_sensitivity(model, artifacts, windows.ids, progress),
        count_outliers(model, artifacts, windows.ids),
        levels,
    )


def _calibration_windows(loaded: LoadedModel, artifact: KVArtifact, dataset: str) -> TokenWindows | None:
    """The first windows that an artifact was calibrated on, if ``dataset`` yields them."""
    data = artifact.calibration.get("data")
    samples, seqlen, digest = (fact_of(data, key) for key in ("requested", "seqlen", "sha256"))
    field = fact_of(data, "text_field") or DEFAULT_FIELD
    seed = fact_of(artifact.calibration, "settings", "seed")
    if not all(isinstance(n, int) and 0 <= n < 1 << 20 for n in (samples, seqlen, seed)):
        return None
    if samples * seqlen > _MOST_TOKENS:
        return None
    try:
        found = load_windows(
            dataset,
            loaded.tokenizer,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            split="calibration",
            text_field=str(field),
        )
    except DataError:
        return None
    if found.source["sha256"] != digest:
        return None
    return TokenWindows(found.ids[: max(1, FIT_TOKENS // seqlen)], found.source)
