"""From what fits gave to artifacts that say where their numbers come from."""

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
        recipe: that was fitted.
        fitted: what the fit gave.
        model: the artifact's record of the model.
        data: where the calibration text comes from.
        amax: of :func:`largest_magnitudes`; not recorded where it is empty.
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
    """Per kind the largest magnitude of each layer; empty where nothing looked at the calibration text.

    Args:
        keys: of keys and values of all layers, layers in order.
        totals: of all ranks.
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
