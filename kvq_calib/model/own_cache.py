"""Caches of a class that a family's own code defines, as all hybrids had before transformers 5.5.

Such a cache keeps the states of all layers in attributes (`conv_states`, ...), beside lists of keys and values. `join`
makes another cache an instance of this class too. Then the family's code finds its states in that cache, and passes
keys and values to the layers of that cache.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvq_calib.errors import ModelError, RuntimeMismatchError, one_line
from kvq_calib.model.compat import count_layers
from kvq_calib.model.intercept import call_argument
from kvq_calib.model.placement import input_device

__all__ = [
    "OwnState",
    "batch_of",
    "caches_in",
    "join",
    "own_class",
    "own_state",
    "start_own_state",
    "whole_models",
]

#: Attributes of such caches with keys and values.
_KEYS_AND_VALUES = ("key_cache", "value_cache", "layers")
#: Methods of caches that are about keys and values.
_OF_LAYERS = ("update", "get_seq_length", "get_mask_sizes")
#: The attribute of a joined cache that refers to its states.
_STATE = "own_state"


def own_class(model: nn.Module) -> type | None:
    """The class of caches with keys and values that the code of a model's family defines, if any."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    return next((kind for name in names if (kind := _class_in(name)) is not None), None)


@functools.cache
def _class_in(name: str) -> type | None:
    """The first class of caches that a file of Python code defines."""
    for value in list(vars(sys.modules[name]).values()) if name in sys.modules else []:
        if not isinstance(value, type) or value.__module__ != name or issubclass(value, CacheLayerMixin):
            continue
        update = getattr(value, "update", None)
        if inspect.isfunction(update) and "key_states" in inspect.signature(update).parameters:
            return value
    return None


class OwnState:
    """The states in a cache of a family's own class.

    Args:
        kind: the class.
        config: configuration of the model.
        dtype: dtype of the states where the class asks for one.
        device: device of the states where the class asks for one.
        batch: number of sequences.

    Raises:
        ModelError: such a cache cannot be made, because its class has arguments that are not known.
    """

    def __init__(
        self, kind: type, config: Any, dtype: torch.dtype, device: torch.device, batch: int = 1
    ) -> None:
        self.kind, self.config, self.dtype, self.device = kind, config, dtype, device
        self._made(batch)
        self.start(batch)

    def start(self, batch: int) -> None:
        """Drop all states, and expect this number of sequences."""
        self.batch = batch
        self._cache: Any = None

    @property
    def cache(self) -> Any:
        """A cache of the class, in which keys and values stay empty. It is made when it is first used."""
        if self._cache is None:
            self._cache = self._made(self.batch)
        return self._cache

    def _made(self, batch: int) -> Any:
        known: dict[str, Any] = {
            "config": self.config.get_text_config(decoder=True),
            "batch_size": batch,
            "max_batch_size": batch,
            "dtype": self.dtype,
            "device": self.device,
        }
        parameters = inspect.signature(self.kind).parameters
        if "devices" in parameters:
            known["devices"] = [self.device] * count_layers(self.config)
        try:
            return self.kind(**{name: known[name] for name in parameters if name in known})
        except TypeError as error:
            raise ModelError(
                f"{self.config.model_type} keeps what it caches in a class of its own ({self.kind.__name__}), and what "
                f"makes one is not known ({one_line(error)})"
            ) from error

    def _entries(self) -> Iterator[tuple[str, Any, Any]]:
        """All tensors and numbers: a name, the attributes or the container, and the key in it."""
        for name, value in [] if self._cache is None else vars(self._cache).items():
            if name.startswith("_") or name in _KEYS_AND_VALUES:
                continue
            if isinstance(value, list | dict):
                pairs = enumerate(value) if isinstance(value, list) else value.items()
                yield from (
                    (f"{name}.{key}", value, key) for key, entry in pairs if isinstance(entry, Tensor)
                )
            elif isinstance(value, Tensor | int):
                yield name, vars(self._cache), name

    def tensors(self) -> dict[str, Tensor]:
        """All states by name (``conv_states.3``), and numbers as int64 tensors without dimensions."""
        return {
            name: entry if isinstance(entry := place[key], Tensor) else torch.tensor(int(entry))
            for name, place, key in self._entries()
        }

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Set the states to the result of :meth:`tensors` for another.

        Raises:
            RuntimeMismatchError: caches of this class have no such state.
        """
        for name, tensor in tensors.items():
            name, _, key = name.partition(".")
            place = vars(self.cache).get(name)
            if isinstance(place, list) and key.isdecimal():
                place += [None] * (int(key) + 1 - len(place))
                place[int(key)] = tensor
            elif isinstance(place, dict) and key.isdecimal():
                place[int(key)] = tensor
            elif isinstance(place, Tensor | int) and not key:
                setattr(self.cache, name, tensor if isinstance(place, Tensor) else type(place)(tensor.item()))
            else:
                raise RuntimeMismatchError(f"this model has no layer for the state {name}{_}{key}")

    def select(self, rows: Tensor) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``."""
        for _, place, key in list(self._entries()):
            if isinstance(tensor := place[key], Tensor) and tensor.ndim:
                place[key] = tensor.index_select(0, rows.to(tensor.device))

    @property
    def layer(self) -> str:
        """The number of the first layer with a state."""
        held = (
            key for _, place, key in self._entries() if isinstance(place[key], Tensor) and place[key].numel()
        )
        return str(next(held, 0))

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return sum(place[key].nbytes for _, place, key in self._entries() if isinstance(place[key], Tensor))


def own_state(model: Any, batch: int = 1) -> OwnState | None:
    """New states for a model whose caches are of a class of its own, else ``None``.

    Raises:
        ModelError: such a cache cannot be made.
    """
    kind = own_class(model)
    return None if kind is None else OwnState(kind, model.config, model.dtype, input_device(model), batch)


@functools.cache
def _joined(base: Any, kind: Any) -> type:
    """A subclass of both that reads and sets attributes of states where it has none of that name itself."""

    def attribute(cache: Any, name: str) -> Any:
        if name == _STATE or name.startswith("__"):  # does not exist yet during a copy
            raise AttributeError(name)
        return getattr(getattr(cache, _STATE).cache, name)

    def assign(cache: Any, name: str, value: Any) -> None:
        state = vars(cache).get(_STATE)
        is_states = state is not None and name not in vars(cache) and name in vars(state.cache)
        object.__setattr__(state.cache if is_states else cache, name, value)

    def of_states(name: str) -> property:
        return property(lambda cache: getattr(getattr(cache, _STATE).cache, name))

    members: dict[str, Any] = {name: getattr(base, name) for name in _OF_LAYERS}
    members |= {"__getattr__": attribute, "__setattr__": assign, "__len__": base.__len__}
    members |= {name: of_states(name) for name in dir(kind) if not hasattr(base, name)}
    if not hasattr(base, "__bool__"):
        members["__bool__"] = lambda cache: True
    bases = (kind,) if issubclass(kind, base) else (base, kind)
    return type(f"{base.__name__}With{kind.__name__}", bases, members)


def join(cache: Cache, state: OwnState) -> Cache:
    """The same cache, now also of a family's own class, with these states."""
    base: Any = type(cache)
    setattr(cache, _STATE, state)
    cache.__class__ = _joined(base, state.kind)
    return cache


def whole_models(model: nn.Module) -> list[nn.Module]:
    """A model of transformers and those inside it."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def start_own_state(model: nn.Module) -> RemovableHandle:
    """A hook: a pass with an empty joined cache starts the states for its number of sequences."""
    return model.register_forward_pre_hook(_start, with_kwargs=True)


def caches_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Cache]:
    """The caches among the arguments of a call."""
    return [given for given in (*args, *kwargs.values()) if isinstance(given, Cache)]


def batch_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Number of sequences in a call of a model."""
    given = (call_argument(module, name, args, kwargs) for name in ("input_ids", "inputs_embeds"))
    return next((int(tensor.shape[0]) for tensor in given if tensor is not None), 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for cache in caches_in(args, kwargs):
        state = getattr(cache, _STATE, None)
        if state is None or cache.get_seq_length():
            continue
        state.start(batch_of(module, args, kwargs))
