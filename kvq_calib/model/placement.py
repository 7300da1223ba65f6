"""Where a model that accelerate has spread over devices takes its input, and whether weights wait elsewhere.

accelerate leaves a description of what it did (``hf_device_map``) on the model. Weights that are offloaded to the CPU
or to disk are on the meta device between uses, so ``model.device`` may be a device that computes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["input_device", "is_offloaded"]


#: Where weights can wait that are computed with on another device.
_WAITING = ("cpu", "disk")


def _places(model: Any) -> tuple[list[Any], list[Any]]:
    """Devices of the model's parts in order, and those of them that compute; empty where accelerate did nothing."""
    places = list((getattr(model, "hf_device_map", None) or {}).values())
    return places, [place for place in places if str(place) not in _WAITING]


def input_device(model: Any) -> torch.device:
    """The device that token ids for ``model`` belong on: the first that computes."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    _, computing = _places(model)
    return torch.device(computing[0] if computing else "cpu")


def is_offloaded(model: Any) -> bool:
    """Whether weights are fetched when they are used, and let go afterwards."""
    places, computing = _places(model)
    on_disk = any(str(place) == "disk" for place in places)
    return on_disk or (bool(computing) and len(computing) < len(places))
