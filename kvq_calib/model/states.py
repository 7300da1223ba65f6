"""States: all that layers of a model keep beside keys and values, such as states of linear attention and convolutions.

They are cache layers of transformers, in one cache with layers that compute attention. Most states have a fixed size:
they include tokens as they come, and few can remove one again. Some states, such as the keys of an indexer, have an
entry for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor
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
)
from kvq_calib.model.own_cache import OwnState, join, own_class, own_state
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["States", "cache_layers", "cache_with", "held_bytes", "with_state"]


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
        if self.own is not None:
            self.own.start(1)
        numbers = [number for number, _ in self._held()]
        if not numbers:
            return
        fresh = own_layers(self.config)
        for number in numbers:
            if isinstance(self.layers[number], AttendingLayer):
                self.layers[number].state = state_alone(fresh[number])
            else:
                self.layers[number] = fresh[number]
        if self._recording:
            self.record()

    def record(self) -> None:
        """Record from now on what is needed to remove tokens, if states support that."""
        self._recording = True
        for _, state in self._held():
            if hasattr(state, "activate_past_recording"):
                state.activate_past_recording()

    def select(self, rows: Tensor) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``."""
        for _, state in self._held():
            state.reorder_cache(rows)
        if self.own is not None:
            self.own.select(rows)

    def crop(self, count: int) -> None:
        """Remove the newest ``count`` tokens from every state.

        Raises:
            RuntimeMismatchError: a state does not support it; then no state is changed.
        """
        held = list(self._held())
        fixed = [str(number) for number, state in held if not can_crop(state)]
        fixed += [] if self.own is None else [self.own.layer]
        if fixed:
            raise RuntimeMismatchError(
                f"layer {fixed[0]} keeps a state from which tokens cannot be removed (with newer transformers they can "
                "be from a convolution, after activate_past_recording()); reset() the cache and pass the text again"
            )
        for _, state in held:
            state.crop(-count)

    def settle(self) -> None:
        """Drop tensors that the next pass does not need."""
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
        """Number of bytes."""
        held = sum(tensor.nbytes for _, state in self._held() for tensor in state_tensors(state).values())
        return held if self.own is None else held + self.own.nbytes
