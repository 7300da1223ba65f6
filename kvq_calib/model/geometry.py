"""From a model's attention layers, as found at the attention interface, to the artifact's geometry."""

from __future__ import annotations

from typing import Any

from kvq_calib.model.intercept import ModelGeometry, inspect_model
from kvq_calib.model.rope import RopeLayout
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec


def model_geometry(model: Any) -> KVGeometry:
    """The geometry an artifact for ``model`` states.

    Raises:
        ModelError: the model cannot be captured.
    """
    return kv_geometry(inspect_model(model))


def kv_geometry(found: ModelGeometry) -> KVGeometry:
    """Convert what :func:`kvq_calib.model.intercept.inspect_model` found.

    A rotary embedding whose frequencies depend on the length of the text has no table that always holds; its
    :class:`RopeSpec` has no pairs and says ``length_dependent``.
    """
    ropes = [_rope_spec(layout) for layout in found.ropes]
    if any(layer.has_rope and layer.rope is None for layer in found.layers):
        ropes.append(RopeSpec(pairs=(), inv_freq=(), length_dependent=True))
    return KVGeometry(
        layers=tuple(
            LayerGeometry(
                num_query_heads=layer.num_query_heads,
                num_kv_heads=layer.num_kv_heads,
                head_dim=layer.head_dim,
                sliding_window=layer.sliding_window,
                rope=(len(ropes) - 1 if layer.rope is None else layer.rope) if layer.has_rope else None,
            )
            for layer in found.layers
        ),
        ropes=tuple(ropes),
    )


def _rope_spec(layout: RopeLayout) -> RopeSpec:
    return RopeSpec(
        pairs=tuple((int(first), int(second)) for first, second in layout.pairs.tolist()),
        inv_freq=tuple(float(frequency) for frequency in layout.inv_freq.tolist()),
        attention_scaling=float(layout.attention_scaling),
    )
