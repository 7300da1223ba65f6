"""The fingerprint that ties an artifact to a model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from kvq_calib.model.compat import count_layers, layer_attribute

__all__ = ["model_fingerprint"]

_ROPE_FIELDS = (
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "truncate",
)


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return the configuration fields that determine what a model caches, and their digest.

    Defaults are filled in and spellings unified, so that a checkpoint has the same fingerprint in every supported
    release of transformers. Weights are not included.

    Returns:
        JSON-able fields `model_type`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`,
        `head_dim`, `hidden_size`, `vocab_size`, `layer_types`, `sliding_window`, `rope`, `no_rope_layers`,
        `value_head_dim` if it differs from `head_dim`, and `sha256` (hex) over the others as canonical JSON.
    """
    whole: Any = model.config
    layers = count_layers(whole)
    config = whole.get_text_config(decoder=True)
    heads = _numbers(layer_attribute(config, "num_attention_heads"))
    head_dim = _numbers(layer_attribute(config, "head_dim"))
    if not head_dim and isinstance(heads, int):
        head_dim = int(config.hidden_size) // heads
    value_head_dim = _numbers(layer_attribute(config, "v_head_dim"))
    window = _numbers(layer_attribute(config, "sliding_window"))
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    without_rope = getattr(config, "no_rope_layers", None)
    fields: dict[str, Any] = {
        "model_type": str(config.model_type),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _numbers(layer_attribute(config, "num_key_value_heads")) or heads,
        "head_dim": head_dim,
        "hidden_size": int(config.hidden_size),
        "vocab_size": int(config.vocab_size),
        "layer_types": list(kinds),
        "sliding_window": window if window and "sliding_attention" in kinds else None,
        "rope": _rope_fields(getattr(config, "rope_parameters", None) or {}, kinds),
        # 1 means that a layer has RoPE, despite the name
        "no_rope_layers": [int(flag) for flag in without_rope] if without_rope else None,
    }
    if value_head_dim and value_head_dim != head_dim:
        fields["value_head_dim"] = value_head_dim
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return {**fields, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def _numbers(value: Any) -> Any:
    """An integer, or a list of integers if layers differ; `None` if there is none."""
    if isinstance(value, list | tuple):
        return [None if number is None else int(number) for number in value]
    return None if value is None else int(value)


def _rope_fields(parameters: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Normalise `rope_parameters`. Kinds of layers are listed separately if their parameters differ."""
    nested = {kind: value for kind, value in parameters.items() if isinstance(value, dict)}
    if nested:
        each = {kind: _rope_fields(nested[kind], []) for kind in sorted(set(kinds) & set(nested))}
        distinct = list(each.values())
        return distinct[0] if distinct and all(one == distinct[0] for one in distinct) else each
    fields: dict[str, Any] = {}
    for key in _ROPE_FIELDS:
        value = parameters.get(key)
        if value is None or (key == "partial_rotary_factor" and value == 1.0):
            continue
        if isinstance(value, list | tuple):
            value = [float(x) for x in value]
        elif not isinstance(value, bool | str):
            value = float(value)
        fields[key] = value
    return fields
