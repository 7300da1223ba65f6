"""The input device of a model that accelerate has spread over devices, and whether weights are offloaded.

accelerate stores a description on the model (``hf_device_map``). Weights that are offloaded to the CPU or to disk are
on the meta device between uses, so ``model.device`` may not be a device that computes.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["input_device", "is_offloaded"]


#: Places of offloaded weights, which are used on another device.
_WAITING = ("cpu", "disk")


def _places(model: Any) -> tuple[list[Any], list[Any]]:
    """Devices of the model's parts in order, and those that compute; empty without accelerate."""
    places = list((getattr(model, "hf_device_map", None) or {}).values())
    return places, [place for place in places if str(place) not in _WAITING]


def input_device(model: Any) -> torch.device:
    """The device for token ids of ``model``: the first one that computes."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    _, computing = _places(model)
    return torch.device(computing[0] if computing else "cpu")


def is_offloaded(model: Any) -> bool:
    """Whether weights are loaded when they are used, and freed afterwards."""
    places, computing = _places(model)
    on_disk = any(str(place) == "disk" for place in places)
    return on_disk or (bool(computing) and len(computing) < len(places))
