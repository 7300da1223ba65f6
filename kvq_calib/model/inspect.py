"""Finds what a model caches and how a packed cache can serve it. Results are kept per model object.

Most models call transformers' attention interface with the tensors that they cache. There keys and values are captured,
and a packed cache takes over attention. Other models have custom attention code, change keys or values on the way, or
need more than the result of attention. Their cache returns all keys and values dequantized (*materialized*, one layer
at a time), and keys and values are captured where they are passed to the cache.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvq_calib.errors import ModelError
from kvq_calib.model.compat import uncompiled, with_cache
from kvq_calib.model.intercept import intercept_calls
from kvq_calib.model.own_cache import own_state
from kvq_calib.model.probe import Serving, probe_serving
from kvq_calib.model.probe_geometry import Found, Interceptor, probe_geometry
from kvq_calib.model.updates import intercept_updates
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["check_generation", "inspect_model", "interceptor_of", "next_pass", "why_no_table"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Known:
    """The results for a model.

    Attributes:
        found: what it caches.
        serving: how a packed cache serves it, or why none can.
        intercept: where its keys and values are captured.
    """

    found: Found
    serving: Serving | str
    intercept: Interceptor


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def inspect_model(model: nn.Module) -> KVGeometry:
    """Verify with a few short forward passes that a model can be captured, and return its geometry.

    Every attention layer must occur exactly once per pass, with as many keys as values. Each attention module gets the
    same hidden state at every position. So keys that differ between positions were rotated, and must be equal after
    un-rotation. If they are not, positions are encoded in another way. The layer is then treated as one without rotary
    embedding, and its keys are quantized as they are. Results are kept per model object.

    A rotary embedding whose frequencies depend on the length of the text cannot be expressed as a table. Its `RopeSpec`
    has no pairs and is `length_dependent`, and `why_no_table` gives the reason.

    Raises:
        ModelError: the model cannot be captured; the message says why.
    """
    return _known(model).found.geometry


def why_no_table(model: nn.Module) -> str:
    """Why a rotary embedding of a model has no table, as part of a sentence; empty if all have one."""
    return _known(model).found.no_table


def interceptor_of(model: nn.Module) -> Interceptor:
    """The interception that passes a model's keys and values to a handler."""
    return _known(model).intercept


def check_generation(model: nn.Module, geometry: KVGeometry) -> Serving:
    """Refuse a model that a packed cache cannot serve.

    Args:
        model: a causal language model, or the model inside one; it is not changed.
        geometry: geometry of the cache.

    Returns:
        How a packed cache serves it.

    Raises:
        ModelError: the model's output would change, or it caches something else than the geometry says. The message
            says why in one line.
    """
    known = _known(model)
    if isinstance(known.serving, str):
        raise ModelError(
            f"{type(uncompiled(model)).__name__} cannot generate with a packed cache: {known.serving}"
        )
    if _shapes(known.found.geometry) != _shapes(geometry):
        raise ModelError(
            f"{type(uncompiled(model)).__name__} caches keys and values of other shapes than at calibration (another "
            "release of transformers can be the reason); calibrate it with this one"
        )
    return known.serving


def next_pass(model: nn.Module, ids: Tensor, cache: Any, start: int) -> dict[str, Any]:
    """Arguments of a model's forward to continue a text in a cache.

    Args:
        model: the model.
        ids: the next tokens, int64 ``[B, T]``.
        cache: the cache with the text, or ``None`` at the start, for the model's default cache.
        start: number of tokens in the cache.
    """
    if cache is None and (own := own_state(model, ids.shape[0])) is not None:  # not all make one unasked
        cache = own.cache
    arguments = {"input_ids": ids, **with_cache(cache)}
    try:
        serving = _known(model).serving
    except ModelError:  # it may still be measured with other caches
        return arguments
    if isinstance(serving, Serving):
        arguments |= serving.told(model, start, start + ids.shape[1])
    return arguments


def _shapes(geometry: KVGeometry) -> object:
    """The parts of a geometry that determine what is stored."""
    layers = [
        (layer.num_kv_heads, layer.head_dim, layer.value_head_dim, layer.swapped) for layer in geometry.layers
    ]
    return layers, geometry.attends_to


def _known(model: nn.Module) -> _Known:
    model = uncompiled(model)
    known = _KNOWN.get(model)
    if known is None:
        known = _KNOWN[model] = _look(model)
    return known


def _look(model: nn.Module) -> _Known:
    """Test attention over packed pages, then a materialized cache."""
    fast = refusal = None
    try:
        found = probe_geometry(model, intercept_calls)
        fast = _Known(found, probe_serving(model, found.geometry, materialized=False), intercept_calls)
        if isinstance(fast.serving, Serving):
            return fast
        reason = fast.serving
    except ModelError as error:
        reason, refusal = str(error), error
    try:
        found = probe_geometry(model, intercept_updates)
    except ModelError as error:
        if fast is not None:
            return fast
        raise error from refusal
    serving = probe_serving(model, found.geometry, materialized=True)
    if isinstance(serving, str):
        return fast or _Known(found, serving, intercept_updates)
    _log.warning(
        "for this model, a packed cache dequantizes all keys and values of a layer at every step: the cache is as small "
        "as for other models, but decoding is slower (%s)",
        reason,
    )
    return _Known(found, serving, intercept_updates)
