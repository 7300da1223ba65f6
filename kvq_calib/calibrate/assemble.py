"""Makes artifacts from the results of fits, with a record of how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import torch

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.fitter import Fitted, Recipe
from kvq_calib.calibrate.plan import MagnitudeKey, Table
from kvq_calib.schema.spec import KINDS, Kind

__all__ = ["assemble", "largest_magnitudes"]


def assemble(
    recipe: Recipe,
    fitted: Fitted,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    amax: Mapping[Kind, list[float]],
) -> KVArtifact:
    """The artifact of one recipe.

    Args:
        recipe: the recipe that was fitted.
        fitted: result of the fit.
        model: the artifact's record of the model.
        data: the artifact's record of the calibration text.
        amax: result of :func:`largest_magnitudes`; not recorded if empty.
    """
    return KVArtifact(
        spec=fitted.spec,
        geometry=recipe.geometry,
        layers=fitted.layers,
        model=model,
        calibration={
            "recipe": recipe.name,
            "settings": recipe.config.record(),
            "data": dict(data),
            **({"amax": dict(amax)} if amax else {}),
            **fitted.facts,
            "versions": {
                "kvq-calib": _version("kvq-calib"),
                "torch": torch.__version__,
                "transformers": _version("transformers"),
            },
        },
        outliers_per_token={kind: fitted.outlier_rates(kind) for kind in KINDS},
    )


def largest_magnitudes(keys: Iterable[MagnitudeKey], totals: Table) -> dict[Kind, list[float]]:
    """The largest magnitude of each layer, by kind; empty if no pass read the calibration text.

    Args:
        keys: keys of these statistics, for keys and values of all layers in order.
        totals: statistics of all ranks.
    """
    found: dict[Kind, list[float]] = {}
    for key in keys:
        if key in totals:
            found.setdefault(key.view.tensor.kind, []).append(float(totals.get(key).largest))
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
