"""What layers of a model keep beside keys and values: states of linear attention and of convolutions.

They are transformers' own cache layers, as it makes them for the model, in one cache with layers that attend
themselves. A state has no tokens: it takes them up as they come, and seldom can one be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.cache_layer import AttendingLayer
from kvq_calib.model.compat import (
    can_crop,
    fill_state,
    keeps_state,
    own_layers,
    register_state,
    state_alone,
    state_tensors,
)
from kvq_calib.schema.geometry import KVGeometry

__all__ = ["States", "cache_layers", "held_bytes", "with_state"]


def cache_layers(config: Any, geometry: KVGeometry, attending: Sequence[AttendingLayer]) -> list[Any]:
    """The layers of a cache for a model: those that attend themselves, and transformers' own for all others.

    Args:
        config: of the model.
        geometry: of the model.
        attending: one for each of ``geometry.layers``; a layer that keeps a state beside keys and values becomes one
            that has both.
    """
    layers = own_layers(config)
    for number, layer in zip(geometry.numbers, attending, strict=True):
        if number == len(layers):
            layers.append(layer)
        elif keeps_state(layers[number]):
            layers[number] = with_state(layer, layers[number])
        else:
            layers[number] = layer
    return layers


@cache
def _kind_with_state(kind: Any) -> Any:
    """A subclass whose further attributes are those of its ``state``."""

    def attribute(layer: Any, name: str) -> Any:
        if name == "state" or name.startswith("__"):  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(layer.state, name)

    # To transformers, what can be cropped is what the state says.
    croppable = property(lambda layer: layer.state.is_croppable)
    made = type(f"{kind.__name__}WithState", (kind,), {"__getattr__": attribute, "is_croppable": croppable})
    register_state(made)
    return made


def with_state(layer: AttendingLayer, own: Any) -> AttendingLayer:
    """The same layer with a state beside it, as one of transformers' own has it."""
    kind: Any = type(layer)
    made: AttendingLayer = object.__new__(_kind_with_state(kind))
    made.__dict__.update(layer.__dict__, state=state_alone(own))
    return made


def held_bytes(cache: Any) -> int:
    """Bytes of all states in a cache."""
    states = [getattr(layer, "state", layer) for layer in cache.layers if keeps_state(layer)]
    return sum(tensor.nbytes for state in states for tensor in state_tensors(state).values())


class States:
    """The states in a cache.

    Args:
        config: of the model.
        layers: of the cache; layers that are only a state are replaced in it when it is emptied.

    Attributes:
        spoiled: whether a forward pass failed midway, so that states have taken up what keys and values have not.
    """

    def __init__(self, config: Any, layers: list[Any]) -> None:
        self.config = config
        self.layers = layers
        self.spoiled = False
        self._recording = False

    def _held(self) -> Iterator[tuple[int, Any]]:
        """The state of each layer that has one, by its number."""
        for number, layer in enumerate(self.layers):
            if keeps_state(layer):
                yield number, getattr(layer, "state", layer)

    def __bool__(self) -> bool:
        """Whether the model has layers that keep a state."""
        return any(True for _ in self._held())

    def reset(self) -> None:
        """Forget everything; the next tokens may be those of another number of sequences."""
        self.spoiled = False
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
        """Keep from now on what it takes to take tokens back, where a state has that."""
        self._recording = True
        for _, state in self._held():
            if hasattr(state, "activate_past_recording"):
                state.activate_past_recording()

    def select(self, rows: Tensor) -> None:
        """Let sequence ``i`` become what sequence ``rows[i]`` is."""
        for _, state in self._held():
            state.reorder_cache(rows)

    def crop(self, count: int) -> None:
        """Take the newest ``count`` tokens from every state.

        Raises:
            RuntimeMismatchError: one cannot give them back; none has then.
        """
        held = list(self._held())
        for number, state in held:
            if not can_crop(state):
                raise RuntimeMismatchError(
                    f"layer {number} keeps a state that tokens cannot be taken from again (convolutions can, after "
                    "activate_past_recording()); reset() the cache and give it the text anew"
                )
        for _, state in held:
            state.crop(-count)

    def settle(self) -> None:
        """Keep no more of the past than the next pass needs."""
        if self._recording:
            for _, state in self._held():
                if can_crop(state):
                    state.crop(0)

    def check(self) -> None:
        """Refuse to go on after a pass that failed midway.

        Raises:
            RuntimeMismatchError: one has.
        """
        if self.spoiled:
            raise RuntimeMismatchError(
                "a forward pass failed midway, and what the states of other layers had taken up of it cannot be taken "
                "back; reset() the cache and give it the text anew"
            )

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by the number of the layer, kind and number of the state: ``3.conv.0``."""
        return {
            f"{number}.{name}": tensor
            for number, state in self._held()
            for name, tensor in state_tensors(state).items()
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`tensors` gave; the states are empty."""
        for number, state in self._held():
            prefix = f"{number}."
            fill_state(state, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors().values())
