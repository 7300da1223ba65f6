"""Interception where a model passes keys and values to its cache.

Some models do not call transformers' attention interface with what they cache: they have custom attention code, change
keys or values on the way, or expand them (multi-head latent attention). But every model that can generate calls
`update` of its cache. So each pass gets a cache that keeps nothing and observes these calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from kvq_calib.errors import ModelError
from kvq_calib.model.cache_layer import AttendingLayer
from kvq_calib.model.compat import keeps_keys, own_layers, with_cache
from kvq_calib.model.intercept import (
    AttentionCall,
    Handler,
    Hold,
    attention_modules,
    call_argument,
    parameters_of,
    running,
)
from kvq_calib.model.own_cache import batch_of
from kvq_calib.model.states import cache_with, with_state

__all__ = ["intercept_updates", "update_call"]


def update_call(layer: int, keys: Tensor, values: Tensor, window: int | None = None) -> AttentionCall:
    """A layer's update of its cache in the form of an attention call, without queries.

    Args:
        layer: number of the layer.
        keys, values: the two tensors, in the model's order.
        window: number of tokens that a query sees, or ``None`` for all.

    Raises:
        ModelError: no module of the layer is held.
    """
    found = running(layer)
    if found is None:
        raise ModelError(f"layer {layer} hands keys and values to a cache from outside its attention module")
    mask = found.mask if isinstance(found.mask, Tensor) and found.mask.ndim in (2, 4) else None
    options = {"attention_mask": mask, "position_ids": found.positions, "sliding_window": window}
    return AttentionCall(
        found.module, keys, keys, values, found.embeddings, _no_function, (), options, number=layer
    )


def _no_function(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("this model computes attention itself")


class _SeenLayer(AttendingLayer):
    """Passes updates to a handler, returns its result, and keeps nothing."""

    def __init__(self, number: int, sliding_window: int | None, handler: Handler) -> None:
        super().__init__(sliding_window)
        self.number, self.handler = number, handler

    @property
    def length(self) -> int:
        """0, because nothing is kept."""
        return 0

    def attend(self, call: AttentionCall) -> Tensor:
        """Never called, because no keys are marked."""
        raise NotImplementedError

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values to the handler."""
        call = update_call(self.number, key_states, value_states, self.sliding_window)
        return self.handler(call) or (key_states, value_states)


def _seen_layers(config: Any, handler: Handler) -> list[Any]:
    layers = own_layers(config)
    for number, own in enumerate(layers):
        if not keeps_keys(own):
            continue
        seen = _SeenLayer(number, getattr(own, "sliding_window", None), handler)
        layers[number] = with_state(seen, own)
    return layers


@contextmanager
def intercept_updates(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Pass all cache updates of `model` in this thread to `handler`, which may return other keys and values.

    Call the model without a cache: each pass gets one that keeps nothing.
    """
    whole: Any = model
    ((name, _),) = with_cache(None).items()

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if call_argument(module, name, args, kwargs) is not None:
            return None
        layers = _seen_layers(whole.config, handler)
        given: dict[str, Any] = {
            name: cache_with(whole, layers, batch_of(module, args, kwargs)),
            "use_cache": True,
        }
        parameters = parameters_of(type(module).forward)[: len(args)]
        args = (
            tuple(given.pop(parameter, value) for parameter, value in zip(parameters, args, strict=False))
            + args[len(parameters) :]
        )
        return args, {**kwargs, **given}

    holds = [Hold(module) for module in attention_modules(model, unnumbered=True)]
    with ExitStack() as stack:
        for module in {whole, whole.base_model}:
            stack.callback(module.register_forward_pre_hook(give, with_kwargs=True).remove)
        for hold in holds:
            stack.callback(hold.close)
        yield
