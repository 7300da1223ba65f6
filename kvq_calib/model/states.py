"""States: all that layers of a model keep beside keys and values, such as states of linear attention and convolutions.

They are cache layers of transformers, in one cache with layers that compute attention. Most states have a fixed size:
they include tokens as they come, and few can remove one again. Some states, such as the keys of an indexer, have an
entry for each token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.cache_layer import AttendingLayer
from kvq_calib.model.compat import (
    can_crop,
    fill_state,
    keeps_more,
    keeps_state,
    own_layers,
    register_state,
    state_alone,
    state_flags,
    state_tensors,
    stop_recording,
)
from kvq_calib.model.own_cache import OwnState, caches_in, join, own_class, own_state
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["States", "cache_layers", "cache_with", "held_bytes", "record_states", "with_state"]


def cache_with(model: Any, layers: list[Any], batch: int = 1) -> Cache:
    """A cache of these layers for a model and a number of sequences, with states if the model's own class has some."""
    cache, state = Cache(layers=layers), own_state(model, batch)
    return cache if state is None else join(cache, state)


def cache_layers(model: Any, geometry: KVGeometry, attending: Sequence[AttendingLayer]) -> list[Any]:
    """The layers of a cache for a model: those that compute attention, and transformers' cache layers for the others.

    Args:
        model: the model.
        geometry: geometry of the model.
        attending: one layer for each of ``geometry.layers``. For a layer with keys, values and a state, it gets both.
    """
    layers = own_layers(model.config)
    for number, layer in zip(geometry.numbers, attending, strict=True):
        if number == len(layers):
            layers.append(layer)
        else:
            layers[number] = with_state(layer, layers[number])
    if own_class(model) is not None:
        for number in set(range(len(layers))).difference(geometry.numbers):
            layers[number] = _LikeAttention(attending[0])
    return layers


class _LikeAttention:
    """Stands for a layer without keys and values, and answers what a mask is made from as a layer with them does.

    Args:
        layer: the layer that knows the answers.
    """

    def __init__(self, layer: AttendingLayer) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        if name == "layer" or name.startswith("__"):  # does not exist yet during a copy
            raise AttributeError(name)
        return getattr(self.layer, name)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise an error, because at calibration the layer cached nothing."""
        raise RuntimeMismatchError(
            "a layer that had no keys and values at calibration has some now; calibrate the model anew"
        )


@cache
def _kind_with_state(kind: Any, is_common: bool) -> Any:
    """A subclass that takes further attributes from its ``state``.

    Args:
        kind: class of a layer.
        is_common: whether the state is of linear attention or of convolutions; caches check for this.
    """

    def attribute(layer: Any, name: str) -> Any:
        if name == "state" or name.startswith("__"):  # does not exist yet during a copy
            raise AttributeError(name)
        return getattr(layer.state, name)

    def assign(layer: Any, name: str, value: Any) -> None:
        state = layer.__dict__.get("state")
        its_own = name in layer.__dict__ or state is None or not hasattr(state, name)
        object.__setattr__(layer if its_own else state, name, value)

    # For transformers, the state decides whether the layer can be cropped.
    croppable = property(lambda layer: layer.state.is_croppable)
    attributes = {"__getattr__": attribute, "__setattr__": assign, "is_croppable": croppable}
    made = type(f"{kind.__name__}WithState", (kind,), attributes)
    if is_common:
        register_state(made)
    return made


def with_state(layer: AttendingLayer, own: Any) -> AttendingLayer:
    """The layer with a state, if transformers' cache layer has one; otherwise the layer unchanged."""
    if not (keeps_state(own) or keeps_more(own)):
        return layer
    kind: Any = type(layer)
    made: AttendingLayer = object.__new__(_kind_with_state(kind, keeps_state(own)))
    made.__dict__.update(layer.__dict__, state=state_alone(own))
    return made


def _state_of(layer: Any) -> Any:
    """The state of a cache layer, or ``None``."""
    if "state" in vars(layer):
        return layer.state
    return (
        layer if keeps_state(layer) or (keeps_more(layer) and not isinstance(layer, AttendingLayer)) else None
    )


def held_bytes(cache: Any) -> int:
    """Bytes of all states in a cache."""
    states = [state for state in map(_state_of, cache.layers) if state is not None]
    return sum(tensor.nbytes for state in states for tensor in state_tensors(state).values())


@dataclass(frozen=True)
class _Copies:
    """Copies of states: by number of the layer, and those of a cache of the model's own class."""

    held: dict[int, Any]
    own: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        tensors = [tensor for state in self.held.values() for tensor in state_tensors(state).values()]
        return sum(tensor.nbytes for tensor in (*tensors, *self.own.values()))


class States:
    """The states in a cache.

    Args:
        config: configuration of the model.
        layers: layers of the cache. Layers that are only a state are replaced when the cache is reset.
        own: states in a cache of the model's own class, if it has one.

    Attributes:
        spoiled: whether a forward pass failed midway, so that states include tokens that keys and values do not.
    """

    def __init__(self, config: Any, layers: list[Any], own: OwnState | None = None) -> None:
        self.config = config
        self.layers = layers
        self.own = own
        self.spoiled = False
        self._recording = False
        #: States from which tokens cannot be removed, as they were when a pass began, by number of tokens.
        self._before: dict[int, _Copies] = {}

    def _held(self) -> Iterator[tuple[int, Any]]:
        """The states, by number of the layer."""
        for number, layer in enumerate(self.layers):
            if (state := _state_of(layer)) is not None:
                yield number, state

    def __bool__(self) -> bool:
        """Whether the model has layers that keep a state."""
        return self.own is not None or any(True for _ in self._held())

    def reset(self) -> None:
        """Drop everything. The next tokens may have another number of sequences."""
        self.spoiled = False
        self._before.clear()
        if self.own is not None:
            self.own.start(1)
        numbers = [number for number, _ in self._held()]
        if not numbers:
            return
        fresh = own_layers(self.config)
        for number in numbers:
            self._replace(number, state_alone(fresh[number]))
        if self._recording:
            self.record()

    def _replace(self, number: int, state: Any) -> None:
        if isinstance(self.layers[number], AttendingLayer):
            self.layers[number].state = state
        else:
            self.layers[number] = state

    def record(self) -> None:
        """Record from now on what is needed to remove tokens."""
        self._recording = True
        for _, state in self._held():
            if hasattr(state, "activate_past_recording"):
                state.activate_past_recording()

    def _fixed(self, kept: int = 0, removed: int = 0) -> dict[int, Any]:
        """The states from which this number of tokens cannot be removed, by number of the layer."""
        return {number: state for number, state in self._held() if not can_crop(state, kept, removed)}

    def before_pass(self, length: int) -> None:
        """Copy the states from which tokens cannot be removed, if this is to be recorded.

        Args:
            length: number of tokens before the pass.
        """
        if not self._recording or not length or length in self._before:
            return
        fixed = self._fixed()
        if not fixed and self.own is None:
            return
        for state in fixed.values():
            stop_recording(state)
        own = {} if self.own is None else self.own.tensors()
        self._before[length] = _Copies(
            copy.deepcopy(fixed), {name: tensor.clone() for name, tensor in own.items()}
        )

    def select(self, rows: Tensor) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``."""
        self._before.clear()
        for _, state in self._held():
            state.reorder_cache(rows)
        if self.own is not None:
            self.own.select(rows)

    def crop(self, kept: int, removed: int) -> None:
        """Remove the newest tokens from every state.

        Args:
            kept: number of tokens to keep.
            removed: number of tokens to remove.

        Raises:
            RuntimeMismatchError: a state does not support it, and no recorded pass began there; then no state is
                changed.
        """
        fixed, copies = self._fixed(kept, removed), self._before.get(kept)
        layers = [str(number) for number in fixed if copies is None or number not in copies.held]
        if self.own is not None and copies is None:
            layers.append(self.own.layer)
        if layers:
            raise RuntimeMismatchError(
                f"layer {layers[0]} keeps a state from which tokens cannot be removed: after "
                "activate_past_recording(), it can return to where a forward pass began; or reset() the cache and pass "
                "the text again"
            )
        for number, state in self._held():
            if number not in fixed:
                state.crop(-removed)
        if copies is not None:
            self._restore(copies)
        self._before.clear()

    def _restore(self, copies: _Copies) -> None:
        for number, state in copies.held.items():
            self._replace(number, state)
        if self.own is not None:
            self.own.start(self.own.batch)
            self.own.fill(copies.own)

    def settle(self) -> None:
        """Drop tensors that the next pass does not need."""
        self._before.clear()
        if self._recording:
            for _, state in self._held():
                if keeps_state(state) and can_crop(state):
                    state.crop(0)

    def check(self) -> None:
        """Refuse to continue after a pass that failed midway.

        Raises:
            RuntimeMismatchError: a pass failed midway.
        """
        if self.spoiled:
            raise RuntimeMismatchError(
                "a forward pass failed midway, and states of layers include part of its tokens; reset() the cache and "
                "pass the text again"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the number of the layer and a name: ``3.conv.0``, ``3.indexer_keys``."""
        found = {
            f"{number}.{name}": tensor
            for number, state in self._held()
            for name, tensor in {**state_tensors(state), **state_flags(state)}.items()
        }
        return found if self.own is None else {**found, **self.own.tensors()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill empty states with the result of :meth:`tensors`.

        Raises:
            RuntimeMismatchError: the model has no such state.
        """
        rest = dict(tensors)
        for number, state in self._held():
            prefix = f"{number}."
            own = [name for name in rest if name.startswith(prefix)]
            try:
                fill_state(state, {name.removeprefix(prefix): rest.pop(name) for name in own})
            except (KeyError, ValueError, AttributeError, RuntimeError) as error:
                raise RuntimeMismatchError(
                    f"what layer {number} kept ({', '.join(own)}) does not fit this model"
                ) from error
        if self.own is not None:
            self.own.fill(rest)
        elif rest:
            raise RuntimeMismatchError(f"this model has no layer for the state {sorted(rest)[0]}")

    @property
    def nbytes(self) -> int:
        """Number of bytes, with what is recorded."""
        held = sum(tensor.nbytes for _, state in self._held() for tensor in state_tensors(state).values())
        recorded = sum(copies.nbytes for copies in self._before.values())
        return held + recorded + (0 if self.own is None else self.own.nbytes)


def record_states(model: nn.Module) -> RemovableHandle:
    """A hook: before a pass, states in its cache are copied if they are to be recorded."""
    return model.register_forward_pre_hook(_record, with_kwargs=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for given in caches_in(args, kwargs):
        states = vars(given).get("states")
        if isinstance(states, States):
            states.before_pass(given.get_seq_length())
