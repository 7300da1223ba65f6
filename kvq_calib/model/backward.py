"""Helpers for backward passes: body and head of a model separately, frozen parameters, recomputed layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer

from kvq_calib.errors import ModelError
from kvq_calib.model.intercept import carried
from kvq_calib.model.placement import input_device, is_offloaded

__all__ = ["activations_only", "head_logits", "is_splittable", "recomputed_layers"]

_SPLITTABLE: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def head_logits(model: nn.Module, output: Callable[..., Any], hidden: Tensor, ids: Tensor) -> Tensor:
    """Return the model's logits for final hidden states.

    The model's forward computes them, with its body replaced by a function that returns `hidden`. So everything that a
    family does to its logits is included (softcap, scale, bias).
    """
    body: Any = model.base_model
    with _instance_forward(body, lambda *args, **kwargs: output(last_hidden_state=hidden)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def _instance_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace `forward` of one module object."""
    previous = module.__dict__.get("forward")  # accelerate's hooks store theirs here
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def is_splittable(model: nn.Module) -> bool:
    """Whether body and head, called separately, give the model's logits; tested once per model on a few tokens."""
    known = _SPLITTABLE.get(model)
    if known is None:
        known = _SPLITTABLE[model] = _try_split(model)
    return known


def _try_split(model: nn.Module) -> bool:
    body: Any = model.base_model
    if body is model:
        return False
    ids = torch.arange(1, 8, device=input_device(model))[None]
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        try:
            output = body(input_ids=ids, use_cache=False)
            hidden = output.last_hidden_state
            pieces = [
                head_logits(model, type(output), hidden[:, s], ids[:, s]) for s in (slice(0, 3), slice(3, 7))
            ]
        except Exception:  # if anything fails, the plain loss is used
            return False
    got = torch.cat(pieces, dim=1)
    tolerance = max(1e-4, 8 * float(torch.finfo(want.dtype).eps)) * float(want.abs().max())
    return got.shape == want.shape and float((got - want).abs().max()) <= tolerance


@contextmanager
def activations_only(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters, and let gradients start at the embedded tokens."""

    def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A copy, because some families scale their input in place, which a leaf does not allow.
        return output.detach().requires_grad_().clone() if torch.is_grad_enabled() else output

    unfrozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(leaf)
    try:
        for parameter in unfrozen:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in unfrozen:
            parameter.requires_grad_(True)


@contextmanager
def recomputed_layers(model: nn.Module) -> Iterator[None]:
    """Checkpoint every decoder layer.

    transformers' switch for this works only in training mode, which would enable dropout. A layer is recomputed to its
    end, although its last product is not needed, because only then accelerate's hooks free offloaded weights.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers that can be recomputed; leave recompute off")

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            again = carried(forward)  # called by autograd, in another thread if the model is on a GPU
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    with ExitStack() as stack:
        if is_offloaded(model):
            stack.enter_context(set_checkpoint_early_stop(False))
        for layer in layers:
            stack.enter_context(_instance_forward(layer, checkpointed(layer.forward)))
        yield
