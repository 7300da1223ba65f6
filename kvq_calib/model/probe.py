"""Tests whether a model can use a cache that computes attention, with an exact cache and a few tokens.

A packed cache gives attention only the new keys and values, and takes over attention. A model could be calibrated and
then generate nonsense if it uses keys or values elsewhere, changes them on the way, or needs more than the result of
attention. So before any long work, the same few tokens go through the model twice: without a cache, and through a cache
of `ExactLayer`, which differs from a packed cache only in keeping everything exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kvq_calib.errors import told_by
from kvq_calib.model.cache_layer import AttendingLayer, unknown_options
from kvq_calib.model.compat import cache_of, decoding_hint, with_cache
from kvq_calib.model.intercept import AttentionCall, Hold, attention_modules, parameters_of
from kvq_calib.model.own_cache import own_state
from kvq_calib.model.placement import input_device
from kvq_calib.model.states import cache_layers, cache_with
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["ExactLayer", "Serving", "probe_serving"]

#: Numbers of tokens of the passes: several, several more, and single ones, which need no mask.
_PASSES = (6, 4, 1, 1, 1)
#: The same for models that continue a text only by single tokens.
_SINGLE_PASSES = (10, 1, 1, 1)


class ExactLayer(AttendingLayer):
    """Keeps keys and values exactly, and attends with the function that the model would have called.

    Args:
        sliding_window: as for the model's default cache.
    """

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__(sliding_window)
        self.stored: tuple[Tensor, Tensor] | None = None
        self.updates = 0
        self._handed: tuple[Tensor, Tensor] | None = None
        self._first = 0
        #: Whether attention got tensors other than those from ``update``.
        self.changed = False
        #: Names of tensor options of attention that a packed cache does not support.
        self.unknown: set[str] = set()

    @property
    def length(self) -> int:
        """Number of slots."""
        return 0 if self.stored is None else self.stored[0].shape[2]

    @property
    def waiting(self) -> bool:
        """Whether attention was never called for keys and values from ``update``."""
        return self._handed is not None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass the new keys and values on to attention."""
        self.updates += 1
        self._handed = super().update(key_states, value_states)
        return self._handed

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend to all tokens; see :class:`AttendingLayer`."""
        self.unknown |= unknown_options(call)
        new = (call.key, call.value)
        if self._handed is None:  # another layer attends to the same keys and values
            assert self.stored is not None
            result, _ = call.attend(*(x[:, :, self._first :] for x in self.stored))
            return result
        self.changed |= any(
            ours.data_ptr() != theirs.data_ptr() for ours, theirs in zip(self._handed, new, strict=True)
        )
        self._handed = None
        _, self._first = self.get_mask_sizes(call.key.shape[2])
        old = (call.key[:, :, :0], call.value[:, :, :0]) if self.stored is None else self.stored
        keys, values = (torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        self.stored = (keys, values)
        result, _ = call.attend(keys[:, :, self._first :], values[:, :, self._first :])
        return result


class _WholeLayer(ExactLayer):
    """Keeps keys and values exactly, and returns all that a query can see."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values, and return all."""
        self.updates += 1
        _, first = self.get_mask_sizes(key_states.shape[2])
        new = (key_states, value_states)
        old = tuple(x[:, :, :0] for x in new) if self.stored is None else self.stored
        keys, values = (torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        self.stored = (keys, values)
        return keys[:, :, first:], values[:, :, first:]


@dataclass(frozen=True)
class Serving:
    """How a packed cache serves a model.

    Attributes:
        materialized: the cache returns all keys and values of a layer, and the model computes attention.
        single_tokens: a text in the cache can only be continued by one token at a time. Some models need this with any
            cache: with more tokens they fail, or layers with a state start again.
        positions: the model needs the positions of the new tokens, which its ``generate`` passes. Without them it
            counts the tokens of each pass from 0.
    """

    materialized: bool = False
    single_tokens: bool = False
    positions: bool = False

    def told(self, model: nn.Module, start: int, stop: int) -> dict[str, Tensor]:
        """What a model must be told to continue a text, as arguments of its forward.

        Args:
            model: the model.
            start, stop: the first new token, and the one after the last.
        """
        if not self.positions:
            return {}
        positions = torch.arange(start, stop, device=input_device(model))
        named = {"position_ids": positions[None], "cache_position": positions}
        return {name: named[name] for name in _positions_of(model)}


def probe_serving(model: nn.Module, geometry: KVGeometry, *, materialized: bool) -> Serving | str:
    """Find out how a packed cache serves a model, or why it cannot.

    Args:
        model: a causal language model, or the model inside one; it is not changed.
        geometry: geometry of the model.
        materialized: whether to test a cache that returns all keys and values, instead of one that computes attention.
    """
    with torch.no_grad(), _evaluating(model):
        trial = _Trial(model, geometry, Serving(materialized))
        obstacle = trial.obstacle()
        if not obstacle or trial.faithful:
            return obstacle or trial.serving
        for single_tokens, positions in ((False, True), (True, False), (True, True)):
            serving = Serving(materialized, single_tokens, positions and bool(_positions_of(model)))
            obstacle = _Trial(model, geometry, serving).obstacle()
            if not obstacle:
                return serving
        return obstacle


def _positions_of(model: nn.Module) -> list[str]:
    """Names of a model's arguments for positions. The second has been leaving transformers since 5.3."""
    parameters = parameters_of(type(model).forward)
    return [name for name in ("position_ids", "cache_position") if name in parameters]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout, with which any two passes would differ."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Trial:
    """The passes of one model.

    Args:
        model, geometry: as for :func:`probe_serving`.
        serving: how it is tried.

    Attributes:
        faithful: whether the model with its default cache gives the same as without, as far as tested.
    """

    def __init__(self, model: Any, geometry: KVGeometry, serving: Serving) -> None:
        self.model, self.geometry, self.serving = model, geometry, serving
        passes: tuple[int, ...] = _SINGLE_PASSES if serving.single_tokens else _PASSES
        self.passes = passes
        self.faithful = True
        kind = _WholeLayer if serving.materialized else ExactLayer
        self.layers = [kind(layer.sliding_window) for layer in geometry.layers]
        vocabulary = int(
            getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or sum(passes) + 1
        )
        ids = torch.arange(1, sum(passes) + 1) % vocabulary
        self.ids = ids[None].to(input_device(model))
        #: The class of the model's default cache, once used.
        self.own_cache: type = DynamicCache

    def obstacle(self) -> str:
        """Why a packed cache cannot serve the model; empty if it can."""
        wanted = _scores(self._call(0, len(self.ids[0]), use_cache=False))
        got, failure = self._through_exact()
        known = not any(layer.unknown for layer in self.layers)
        if known and got is not None and self._close(got, wanted):
            return ""
        # These passes may differ from a single one by rounding, so the model's default cache makes the same passes.
        try:
            own = self._through(None)
        except Exception as error:
            self.faithful = False
            return f"it does not take the next tokens alone with its own cache{told_by(error)}"
        first = self.passes[0]
        if not self._alike(own[:, :first], wanted[:, :first]):
            if self._alike(_scores(self._call(0, first, use_cache=False)), wanted[:, :first]):
                self.faithful = False
                return "it gives other output with its own cache than without"
            return f"what it computes for a token depends on later tokens, so it is no causal model{decoding_hint(self.model.config)}"
        single = len(self.ids[0]) - self.passes.count(1)
        self.faithful = all(
            self._alike(own[:, part], wanted[:, part])
            for part in (slice(first, single), slice(single, None))
            if part.start != part.stop
        )
        if self.faithful and known and got is not None and self._close(got, own):
            return ""
        return self._reason(failure)

    def _reason(self, failure: Exception | None) -> str:
        """Why the exact cache did not work."""
        if self.own_cache is not DynamicCache:
            return f"it keeps what it caches in a class of its own ({self.own_cache.__name__})"
        detail = told_by(failure)
        if isinstance(failure, TypeError | AttributeError) and "None" in str(failure):
            return f"it uses the weights of attention, which are not computed{detail}"
        for index, layer in enumerate(self.layers):
            if not layer.updates:
                return f"it does not give the keys and values of layer {index} to the cache{detail}"
            if layer.waiting:
                return f"the keys that layer {index} gets back from the cache do not come to attention as they are"
            if layer.changed:
                return f"it changes the keys or values of layer {index} between the cache and attention"
        if not self.faithful:
            return "it gives other output with its own cache than without"
        if unknown := sorted({name for layer in self.layers for name in layer.unknown}):
            return f"it gives attention what a packed cache does not know ({', '.join(unknown)})"
        if self.serving.materialized:
            return f"it gives other output with a cache that keeps everything exactly{detail}"
        return (
            "it uses keys or values outside the attention call, where a packed cache has none of earlier tokens"
            f"{detail}"
        )

    def _through_exact(self) -> tuple[Tensor | None, Exception | None]:
        """The model's result with layers that compute attention, or how it failed."""
        holds = [Hold(module) for module in attention_modules(self.model, unnumbered=True)]
        try:
            layers = cache_layers(self.model, self.geometry, self.layers)
            return self._through(cache_with(self.model, layers)), None
        except Exception as error:  # a family's forward may raise anything
            return None, error
        finally:
            for hold in holds:
                hold.close()

    def _through(self, cache: Any) -> Tensor:
        """Scores ``[1, T, V]`` of all tokens, a few at a time through a cache; the default cache for ``None``."""
        scores, start = [], 0
        # Not all models make a cache of their own class without being asked.
        if cache is None and (own := own_state(self.model)) is not None:
            cache = own.cache
        for tokens in self.passes:
            output = self._call(start, start + tokens, use_cache=True, **with_cache(cache))
            if cache is None:
                cache = cache_of(output)
                self.own_cache = type(cache)
            scores.append(_scores(output))
            start += tokens
        return torch.cat(scores, dim=1)

    def _call(self, start: int, stop: int, **arguments: Any) -> Any:
        """Run tokens ``start`` to ``stop - 1``."""
        mask = torch.ones_like(self.ids[:, :stop])
        arguments |= self.serving.told(self.model, start, stop)
        return self.model(input_ids=self.ids[:, start:stop], attention_mask=mask, **arguments)

    def _rounding(self, scores: Tensor) -> float:
        """Tolerance for rounding, relative to the largest number."""
        dtypes = {scores.dtype, *(layer.stored[0].dtype for layer in self.layers if layer.stored is not None)}
        return max(1e-4, *(8 * float(torch.finfo(dtype).eps) for dtype in dtypes))

    def _close(self, got: Tensor, wanted: Tensor) -> bool:
        """Whether two results agree up to rounding, ignoring numbers that are not finite in both."""
        known = wanted.isfinite()
        if got.shape != wanted.shape or not bool((got.isfinite() == known).all()):
            return False
        error = (got - wanted).where(known, 0).abs().max()
        return bool(error <= self._rounding(wanted) * wanted.where(known, 0).abs().max())

    def _alike(self, got: Tensor, wanted: Tensor) -> bool:
        """Whether most tokens of ``[1, T, V]`` agree. One token may differ by a near tie between experts."""
        error, size = (got - wanted).abs().amax(-1), wanted.abs().amax(-1)
        return not bool((error / size).median() > 2 * self._rounding(wanted))


def _scores(output: Any) -> Tensor:
    """Logits ``[1, T, V]``, or the hidden states of a model without a head."""
    if isinstance(output, tuple):
        scores = output[0]
    else:
        scores = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert isinstance(scores, Tensor)
    return scores
