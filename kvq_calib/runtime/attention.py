"""How a model comes to attend over packed storage: by the attention interface, with no per-model code.

:func:`attach` registers an attention implementation beside the one a model has and switches the model to it.
A cache layer marks the keys that its ``update`` returns; attention over marked keys is the layer's own, any
other call goes to the implementation that the model had, with the masks it had. So an attached model works
as before without a :class:`~kvq_calib.runtime.cache.KVQCache`. :func:`detach` puts everything back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.intercept import attention_configs, attention_function, call_argument

__all__ = ["attach", "attached", "detach", "is_attached", "mark"]

_PREFIX = "kvq_packed_"
_MARK = "_kvq_cache_layer"
#: Masks of these implementations are understood; others have block masks or none.
_SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")

_attachments: weakref.WeakKeyDictionary[nn.Module, ExitStack] = weakref.WeakKeyDictionary()
#: ``position_embeddings`` of the forward pass under way, by attention module.
_embeddings: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def mark(keys: Tensor, layer: Any) -> Tensor:
    """A new tensor object with the data of ``keys`` that leads attention to ``layer``."""
    marked = keys.view_as(keys)
    setattr(marked, _MARK, layer)
    return marked


def _remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = call_argument(module, "position_embeddings", args, kwargs)
    if found is not None:
        _embeddings[module] = found


def _register(original: str) -> str:
    """Register our implementation over ``original``; return its name."""
    name = _PREFIX + original  # what looks for "flash" in a name still finds it

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        embeddings = _embeddings.pop(module, None)
        layer = getattr(key, _MARK, None)
        if layer is None:
            return attention_function(module, original)(module, query, key, value, *args, **kwargs)
        mask = args[0] if args else kwargs.pop("attention_mask", None)
        return layer.attend(module, query, key, value, mask, embeddings, kwargs), None

    AttentionInterface.register(name, attention)
    masks = AttentionMaskInterface()
    if original in masks:
        AttentionMaskInterface.register(name, masks[original])
    return name


def is_attached(model: nn.Module) -> bool:
    """Whether :func:`attach` was called for this model object."""
    return model in _attachments


def attach(model: nn.Module) -> None:
    """Let a model use packed caches; done by ``KVQCache(artifact, model)``. A second call changes nothing.

    Raises:
        RuntimeMismatchError: the model uses an attention implementation whose masks cannot be read.
    """
    if model in _attachments:
        return
    configs = attention_configs(model)
    for config in configs:
        implementation = config._attn_implementation_internal
        if implementation not in _SUPPORTED:
            raise RuntimeMismatchError(
                f"the model uses the attention implementation {implementation!r}; "
                'load it with attn_implementation="sdpa" or "eager"'
            )
    stack = ExitStack()
    for config in configs:
        original = config._attn_implementation_internal
        # The private attribute, because the public one would also set every sub-configuration.
        stack.callback(setattr, config, "_attn_implementation_internal", original)
        config._attn_implementation_internal = _register(original)
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            stack.callback(module.register_forward_pre_hook(_remember, with_kwargs=True).remove)
    _attachments[model] = stack


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`; packed caches of this model cannot be used until it is attached again."""
    stack = _attachments.pop(model, None)
    if stack is not None:
        stack.close()


@contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """Attach a model for a while; one that was attached before stays so."""
    before = is_attached(model)
    attach(model)
    try:
        yield
    finally:
        if not before:
            detach(model)
