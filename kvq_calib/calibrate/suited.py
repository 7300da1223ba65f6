"""Checks, before time is spent, that a model can have what a recipe asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvq_calib.calibrate.fitter import Recipe
from kvq_calib.calibrate.passes import observe_window
from kvq_calib.calibrate.plan import magnitude_keys
from kvq_calib.calibrate.texts import Source, Window
from kvq_calib.errors import ConfigError
from kvq_calib.model.inspect import why_no_table
from kvq_calib.schema.spec import Kind

__all__ = ["suited", "warn_of_range"]

_log = logging.getLogger(__name__)

#: Number of tokens that are checked for large numbers. The largest occur at the beginning of a text.
_TOKENS = 128
_LARGEST = torch.finfo(torch.float16).max


def suited(model: Any, recipes: Sequence[Recipe], ids: Tensor) -> list[Recipe]:
    """Adapt recipes to this model, or refuse them.

    If keys or values at the beginning of the text exceed half the range of float16, a recipe that stores exact numbers
    in float16 gets bfloat16, and a warning is logged.

    Args:
        model: a causal language model in eval mode.
        recipes: one or more recipes.
        ids: windows of the text, int64 ``[N, T]``.

    Raises:
        ConfigError: an override names a layer that does not exist, or keys should be quantized before a rotary
            embedding that cannot be expressed as a table; the message names the setting.
        CalibrationError: activations are not finite.
    """
    for recipe in recipes:
        _check_rotary(model, recipe)
    if not _in_float16(recipes):
        return list(recipes)
    geometry = recipes[0].geometry
    keys = magnitude_keys(len(geometry.layers), 1)
    found = observe_window(model, geometry, keys, Window(Source.CALIBRATION, 0, ids[:1, :_TOKENS]))
    largest, where = max(
        (float(found.get(key).largest), f"{key.view.tensor.kind}s of layer {key.view.tensor.layer}")
        for key in keys
    )
    if largest <= _LARGEST / 2:
        return list(recipes)
    _log.warning(
        "the %s reach %.3g, near or above what float16 holds: what stays exact is stored in bfloat16, as with "
        "--set cache.storage_dtype=bfloat16",
        *(where, largest),
    )
    return [_in_bfloat16(recipe) for recipe in recipes]


def _in_float16(recipes: Sequence[Recipe]) -> list[str]:
    return [recipe.name for recipe in recipes if recipe.config.cache.storage_dtype == "float16"]


def _in_bfloat16(recipe: Recipe) -> Recipe:
    cache = recipe.config.cache.model_copy(update={"storage_dtype": "bfloat16"})
    return replace(recipe, config=recipe.config.model_copy(update={"cache": cache}))


def _check_rotary(model: Any, recipe: Recipe) -> None:
    overridden = {number % len(recipe.specs) for number in recipe.config.cache.layers}
    paths, codecs = [], set()
    for number, layer in enumerate(recipe.specs):
        rope = recipe.geometry.rope_of(number)
        if rope is not None and rope.length_dependent and layer.key.pre_rope:
            paths.append(f"layers.{number}.key" if number in overridden else "key")
            codecs.add(layer.key.codec)
    if not paths:
        return
    settings = " ".join(f"--set cache.{path}.pre_rope=false" for path in dict.fromkeys(paths))
    if "trellis" in codecs:
        settings = f"the trellis codec cannot do otherwise, so take a nuq* recipe with {settings}"
    else:
        settings = f"quantize them after it, with {settings}"
    raise ConfigError(
        f"{recipe.name}: the keys of this model cannot be quantized before the rotary embedding: "
        f"{why_no_table(model)}; {settings}"
    )


def warn_of_range(recipes: Sequence[Recipe], largest: Mapping[Kind, Sequence[float]]) -> None:
    """Warn if the text had numbers outside the range of a recipe's storage dtype.

    Args:
        recipes: the calibrated recipes.
        largest: largest magnitude of the keys and of the values of each layer over the whole text.
    """
    names = _in_float16(recipes)
    beyond = [
        (kind, layer, value)
        for kind, values in largest.items()
        for layer, value in enumerate(values)
        if value > _LARGEST
    ]
    if names and beyond:
        kind, layer, value = max(beyond, key=lambda each: each[2])
        _log.warning(
            "%s: the %ss of layer %d reach %.3g, more than float16 holds, and packed caches will refuse such tokens; "
            "calibrate with --set cache.storage_dtype=bfloat16",
            *(", ".join(names), kind, layer, value),
        )
