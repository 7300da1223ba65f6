"""Captures pre-RoPE keys, values and their gradients while a model runs, without storing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from kvq_calib.model.compat import in_backward
from kvq_calib.model.inspect import inspect_model, interceptor_of
from kvq_calib.model.intercept import AttentionCall
from kvq_calib.model.rope import Rotation
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["LayerKV", "OnBackward", "OnForward", "Transform", "capture", "intercept"]


@dataclass(frozen=True, eq=False)
class LayerKV:
    """Keys and values of one layer in one forward pass.

    Attributes:
        layer: number of the layer in the geometry.
        rotated_keys: keys that the model passed to attention, [B, Hkv, T, D], in the model's dtype.
        values: [B, Hkv, T, Dv].
        rotation: the layer's RoPE at the positions of these tokens.
        module: the attention module.
        scaling: factor on the attention scores, if the model passes it.
        sliding_window: width in tokens, None if the layer sees all tokens.
    """

    layer: int
    rotated_keys: Tensor
    values: Tensor
    rotation: Rotation
    module: nn.Module
    scaling: float | None = None
    sliding_window: int | None = None

    @cached_property
    def keys(self) -> Tensor:
        """Pre-RoPE keys [B, Hkv, T, D], at least float32 if un-rotated; computed on first use."""
        return self.rotation.unrotate(self.rotated_keys)

    def detach(self) -> LayerKV:
        """Return a copy that is detached from the autograd graph."""
        return replace(
            self,
            rotated_keys=self.rotated_keys.detach(),
            values=self.values.detach(),
        )


def _layer_kv(call: AttentionCall, layer: int, has_rope: bool) -> LayerKV:
    return LayerKV(
        layer,
        call.key,
        call.value,
        call.rotation() if has_rope else Rotation(),
        call.module,
        call.kwargs.get("scaling"),
        call.kwargs.get("sliding_window"),
    )


Transform = Callable[[LayerKV], "tuple[Tensor, Tensor] | None"]
"""Returns new (pre-RoPE keys, values) for a layer, or None to leave it unchanged."""


@contextmanager
def intercept(model: nn.Module, transform: Transform) -> Iterator[KVGeometry]:
    """Pass the pre-RoPE keys and values of every layer to `transform`, which may replace them.

    Replaced keys are rotated by the model's function before attention gets them. Gradients pass through. Call the model
    with `use_cache=False`, because keys of earlier calls cannot be un-rotated with the angles of this call.

    Yields:
        The model's geometry, from `inspect_model`.

    Raises:
        ModelError: the model cannot be captured (see `inspect_model`), or was called with a filled cache.
    """
    geometry = inspect_model(model)
    #: Replaced keys and values, for layers that attend to those of another layer.
    replaced: dict[int, tuple[Tensor, Tensor] | None] = {}

    def handler(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        index = geometry.index_of(call.layer)
        assert index is not None
        if call.layer != geometry.numbers[index]:
            return replaced[index]
        changed = own(call, index)
        if geometry.is_shared(index):
            replaced[index] = changed
        return changed

    def own(call: AttentionCall, index: int) -> tuple[Tensor, Tensor] | None:
        swapped = geometry.layers[index].swapped
        call = call.swap() if swapped else call
        kv = _layer_kv(call, index, geometry.layers[index].rope is not None)
        changed = transform(kv)
        if changed is None:
            return None
        keys, values = kv.rotation.rotate(changed[0]).to(call.key.dtype), changed[1].to(call.value.dtype)
        return (values, keys) if swapped else (keys, values)

    with interceptor_of(model)(model, handler):
        yield geometry


OnForward = Callable[[LayerKV], None]
"""Gets one layer, detached, during the forward pass."""

OnBackward = Callable[[LayerKV, Tensor, Tensor], None]
"""Gets one layer, detached, with gradients of its pre-RoPE keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]."""


@contextmanager
def capture(
    model: nn.Module,
    on_forward: OnForward | None = None,
    on_backward: OnBackward | None = None,
    *,
    recompute: bool = False,
) -> Iterator[KVGeometry]:
    """Pass every layer's keys and values, and their gradients, to callbacks, without changing them.

    Inside the context, call the model with `use_cache=False`. `on_forward` is called once per layer and
    forward pass. `on_backward` is called once per layer during `loss.backward()`, in the order of the backward pass, as
    soon as both gradients of the layer exist. The gradients are then freed. Both also work with recomputed layers
    (activation checkpointing). Callbacks run without autograd and must not change the tensors.

    Args:
        model: the model to watch.
        on_forward: gets each layer in the forward pass.
        on_backward: gets each layer in the backward pass.
        recompute: take the tensors for `on_backward` from the recomputation, so that none is held in between. All
            layers must be checkpointed, and every forward pass followed by its backward pass.

    Yields:
        The model's geometry.

    Raises:
        ModelError: the model cannot be captured.
    """
    awaiting: dict[int, list[LayerKV]] = {}

    def observe(kv: LayerKV) -> None:
        # A layer is recomputed during the backward pass; it was reported before.
        recomputed = in_backward()
        if on_forward is not None and not recomputed:
            with torch.no_grad():
                on_forward(kv.detach())
        if on_backward is None or not (kv.rotated_keys.requires_grad and kv.values.requires_grad):
            return
        if recomputed and kv.layer in awaiting:
            awaiting.pop(kv.layer).append(kv.detach())
        elif recompute and not recomputed:
            awaiting[kv.layer] = []
            _report_gradients(kv, awaiting[kv.layer], on_backward)
        else:
            _report_gradients(kv, [kv.detach()], on_backward)

    with intercept(model, observe) as geometry:
        yield geometry


def _report_gradients(kv: LayerKV, held: list[LayerKV], on_backward: OnBackward) -> None:
    """Call `on_backward` with the layer in `held` when both gradients of `kv` have been computed."""
    gradients: dict[str, Tensor] = {}

    def arrive(name: str, grad: Tensor) -> None:
        gradients[name] = grad
        if len(gradients) < 2:
            return
        with torch.no_grad():
            layer = held.pop()
            grad_values = gradients.pop("values")
            on_backward(layer, layer.rotation.adjoint(gradients.pop("keys")), grad_values)

    kv.rotated_keys.register_hook(lambda grad: arrive("keys", grad))
    kv.values.register_hook(lambda grad: arrive("values", grad))
