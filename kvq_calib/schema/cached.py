"""A name for one tensor of a cache: the keys or the values of one layer."""

from __future__ import annotations

from typing import NamedTuple

from kvq_calib.schema.geometry import KINDS, HeadShape, Kind, KVGeometry, RopeSpec


class CachedTensor(NamedTuple):
    """The keys or the values of one layer.

    Attributes:
        layer: its number.
        kind: keys or values.
    """

    layer: int
    kind: Kind

    def shape_in(self, geometry: KVGeometry) -> HeadShape:
        """Heads and head size in a model of this geometry."""
        return geometry.layers[self.layer].shape(self.kind)

    def rope_in(self, geometry: KVGeometry) -> RopeSpec | None:
        """The rotary embedding of keys; ``None`` for values, and where the layer has none."""
        return geometry.rope_of(self.layer) if self.kind == "key" else None


def cached_tensors(layers: int) -> list[CachedTensor]:
    """The keys and values of the given number of layers, in order."""
    return [CachedTensor(layer, kind) for layer in range(layers) for kind in KINDS]
