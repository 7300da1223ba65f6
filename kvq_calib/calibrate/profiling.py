"""Tables of the time and memory of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvq_calib.calibrate.clock import peak_resident_bytes
from kvq_calib.calibrate.run import Calibrated

__all__ = ["profile_lines"]

_GIB = 2**30


def profile_lines(model: Any, before: Mapping[str, float], result: Calibrated) -> list[str]:
    """The tables as lines of text. With several ranks they are for this rank.

    Args:
        model: the calibrated model.
        before: seconds of the steps before calibration, by name.
        result: result of the calibration.
    """
    rows: list[tuple[str, float]] = list(before.items())
    for part, seconds in result.seconds.items():
        own = result.statistics_seconds.get(part)
        if own is None:
            rows.append((part, seconds))
        else:
            rows += [(f"{part}, the model", seconds - own), (f"{part}, statistics", own)]
    whole = sum(seconds for _, seconds in rows) or 1.0
    parameters = list(model.parameters())
    weights = {
        "weights in memory": sum(p.nbytes for p in parameters if p.device.type != "meta"),
        "weights fetched when used": sum(p.nbytes for p in parameters if p.device.type == "meta"),
    }
    memory = [
        *((name, size) for name, size in weights.items() if size),
        ("statistics", result.statistics_bytes),
        *((f"peak resident up to {part}", size) for part, size in result.peak_bytes.items()),
        ("peak resident memory", peak_resident_bytes()),
    ]
    if torch.cuda.is_available():
        memory += [
            (f"peak on cuda:{number}", torch.cuda.max_memory_allocated(number))
            for number in range(torch.cuda.device_count())
        ]
    width = max(len(name) for name, _ in (*rows, *memory))
    return [
        "time:",
        *(f"  {name:<{width}} {seconds:10.1f} s   {seconds / whole:4.0%}" for name, seconds in rows),
        "memory:",
        *(f"  {name:<{width}} {size / _GIB:10.2f} GiB" for name, size in memory),
    ]
