"""Lets the attention modules of models use packed caches: :func:`attach`, :func:`attached` and :func:`detach`.

The attention calls of an attached module are intercepted (:class:`kvq_calib.model.intercept.Hold`). If a cache layer
marked the keys, that layer computes attention; all other calls go to the original function. So without a
:class:`~kvq_calib.runtime.cache.KVQCache`, an attached model works as before. Modules are attached, not models or
configurations. So a wrapper around a model and a model inside another are attached together with it, but a copy is not.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import attention_implementation
from kvq_calib.model.inspect import check_generation
from kvq_calib.model.intercept import AttentionCall, Hold, attention_modules, watch_pass
from kvq_calib.model.own_cache import start_own_state, whole_models
from kvq_calib.model.probe import Serving
from kvq_calib.model.states import record_states
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["attach", "attached", "detach", "is_attached", "readable_mask"]

#: Attention implementations whose masks are supported; others have block masks or none.
_SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")

_LOCK = threading.Lock()
_HOLDS: weakref.WeakKeyDictionary[nn.Module, Hold] = weakref.WeakKeyDictionary()
#: Hooks of whole models.
_HOOKS: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()


def is_attached(model: nn.Module) -> bool:
    """Whether all attention modules of a model are attached."""
    modules = attention_modules(model)
    return bool(modules) and all(module in _HOLDS for module in modules)


def attach(model: nn.Module, geometry: KVGeometry | None = None) -> Serving:
    """Let a model use packed caches. ``KVQCache(artifact, model)`` calls this. A second call changes nothing.

    Args:
        model: a model, a wrapper around one, or the model inside one.
        geometry: geometry of the model; if given, a few tokens are run as a test (:mod:`kvq_calib.model.probe`).

    Returns:
        The result of the test, if one was run.

    Raises:
        ModelError: a packed cache cannot serve the model.
        RuntimeMismatchError: the model uses an attention implementation whose masks are not supported.
    """
    modules = attention_modules(model, unnumbered=True)
    for module in modules:
        name = attention_implementation(getattr(module, "config", None))
        if name is not None and name not in _SUPPORTED:
            raise RuntimeMismatchError(
                f"the model uses the attention implementation {name!r}; choose another with "
                'model.set_attn_implementation("sdpa"), or load it with attn_implementation="sdpa" or "eager"'
            )
    serving = Serving() if geometry is None else check_generation(model, geometry)
    with _LOCK:
        for module in modules:
            if module not in _HOLDS:
                _HOLDS[module] = Hold(module)
        for whole in whole_models(model):
            if whole not in _HOOKS:
                _HOOKS[whole] = [*watch_pass(whole), start_own_state(whole), record_states(whole)]
    return serving


def readable_mask(call: AttentionCall) -> Tensor | None:
    """The mask of a call. The implementation may have changed since the model was attached.

    Raises:
        RuntimeMismatchError: the mask is not a tensor.
    """
    mask = call.mask
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise RuntimeMismatchError(
        f"attention masks of the type {type(mask).__name__} cannot be read; choose another implementation with "
        'model.set_attn_implementation("sdpa")'
    )


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`. Packed caches of this model cannot be used until it is attached again."""
    with _LOCK:
        for module in attention_modules(model, unnumbered=True):
            hold = _HOLDS.pop(module, None)
            if hold is not None:
                hold.close()
        for whole in whole_models(model):
            for hook in _HOOKS.pop(whole, []):
                hook.remove()


@contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """Attach a model, and detach it on leaving, unless it was attached before."""
    before = is_attached(model)
    attach(model)
    try:
        yield
    finally:
        if not before:
            detach(model)
