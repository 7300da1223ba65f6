"""Names for what a cache holds: the keys or the values of one layer."""

from __future__ import annotations

from typing import NamedTuple

from kvq_calib.schema.spec import KINDS, Kind


class CachedTensor(NamedTuple):
    """The keys or the values of one layer.

    Attributes:
        layer: its number.
        kind: keys or values.
    """

    layer: int
    kind: Kind


def cached_tensors(layers: int) -> list[CachedTensor]:
    """Keys and values of so many layers, in order."""
    return [CachedTensor(layer, kind) for layer in range(layers) for kind in KINDS]
