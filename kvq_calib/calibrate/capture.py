"""Capture of pre-RoPE keys, values and their gradients while a model runs; nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvq_calib.model.intercept import LayerGeometry, LayerKV, ModelGeometry, inspect_model, intercept
from kvq_calib.model.rope import RopeLayout

__all__ = [
    "LayerGeometry",
    "LayerKV",
    "ModelGeometry",
    "OnBackward",
    "OnForward",
    "RopeLayout",
    "capture",
    "check_capturable",
]

OnForward = Callable[[LayerKV], None]
"""Sees one layer, detached, during the forward pass."""

OnBackward = Callable[[LayerKV, Tensor, Tensor], None]
"""Sees one layer, detached, with the gradients of its pre-RoPE keys and of its values, each [B, Hkv, T,
D]."""


def check_capturable(model: nn.Module) -> ModelGeometry:
    """Return the geometry of a model after checking that its keys and values can be captured.

    Raises:
        ModelError: they cannot, in one line that says why (see `kvq_calib.model.intercept.inspect_model`).
    """
    return inspect_model(model)


@contextmanager
def capture(
    model: nn.Module,
    on_forward: OnForward | None = None,
    on_backward: OnBackward | None = None,
    *,
    recompute: bool = False,
) -> Iterator[ModelGeometry]:
    """Report every layer's keys and values, and their gradients, to callbacks; change nothing.

    Inside the context, call the model with `use_cache=False`. `on_forward` is called once per layer and
    forward pass. `on_backward` is called during `loss.backward()`, in the order of the backward pass, once
    per layer, as soon as both gradients of the layer exist; they are then let go. Both hold where layers are
    recomputed (activation checkpointing) too. Callbacks run without autograd and must not change the tensors
    they see.

    Args:
        model: the model to watch.
        on_forward: sees each layer in the forward pass.
        on_backward: sees each layer in the backward pass.
        recompute: all layers are checkpointed, and one forward pass is followed by its backward pass: take
            the tensors for `on_backward` from the recomputation, so that none is held in between.

    Yields:
        The model's geometry.

    Raises:
        ModelError: the model cannot be captured.
    """
    awaiting: dict[int, list[LayerKV]] = {}

    def observe(kv: LayerKV) -> None:
        # While a layer is recomputed the backward pass is running; the layer was reported before that.
        recomputed = torch._C._current_graph_task_id() != -1
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
    """Call `on_backward` with the layer in `held` once both gradients of `kv` have been computed."""
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
