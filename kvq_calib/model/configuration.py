"""The geometry of a model from its configuration, without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_calib.errors import ModelError, one_line
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["geometry_of_configuration"]


def geometry_of_configuration(model: str) -> tuple[KVGeometry, dict[str, Any]]:
    """Geometry and fingerprint from a model's configuration, without reading weights.

    One layer is built with random weights and observed at the attention interface. This describes all layers if they
    are equal, as in the families that KVQuant's code supports.

    Args:
        model: hub id or folder.

    Raises:
        ModelError: there is no such configuration, or layers differ.
    """
    try:
        config: Any = AutoConfig.from_pretrained(model)
        small: Any = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the configuration of {model!r}: {one_line(error)}") from error
    layers = int(config.num_hidden_layers)
    if len(set(getattr(config, "layer_types", None) or [""])) > 1:
        raise ModelError(
            f"the layers of {model!r} differ, so its configuration alone does not tell its geometry; "
            "calibrate it instead"
        )
    small.update({"num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 8, "pad_token_id": None})
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    found = inspect_model(AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval())
    fingerprint = model_fingerprint(_Configured(config))
    return KVGeometry(layers=found.layers * layers, ropes=found.ropes), fingerprint


class _Configured(torch.nn.Module):
    """A stand-in for a model that only has a configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
