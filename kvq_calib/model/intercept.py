"""Interception of attention calls at transformers' attention interface, for all models and purposes.

Current models pass rotated keys, and values, before heads are repeated, to a function that they look up under the name
in their configuration. During an interception, a thin wrapper replaces every such function. Its first argument is the
attention module. It calls the original function directly unless that module is held (a `Hold`). For held modules there
are two cases:

* The keys were marked by a cache layer (`mark`), which stores them and computes attention.
* This thread is inside `intercept_calls` for the module: a handler sees the call and may replace keys and values.

No configuration is changed. So masks, copies and everything else made from a configuration stay the same, and another
implementation can be chosen at any time. When the last hold ends, the wrappers are removed.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvq_calib.errors import ModelError, RuntimeMismatchError
from kvq_calib.model.compat import attention_entries
from kvq_calib.model.rope import Rotation, find_apply_rotary

__all__ = [
    "Attends",
    "AttentionCall",
    "Handler",
    "Hold",
    "Running",
    "attention_modules",
    "call_argument",
    "carried",
    "intercept_calls",
    "layer_of",
    "mark",
    "parameters_of",
    "running",
    "watch_pass",
    "without_gradient",
]

_MARK = "_kvq_cache_layer"

AttentionFunction = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of the attention function by one layer.

    Attributes:
        module: the attention module.
        query: rotated queries [B, Hq, T, D].
        key: rotated keys [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        position_embeddings: the module's argument of that name (cos, sin), or None.
        function: the attention function that the model would have called.
        args: further positional arguments.
        kwargs: further keyword arguments (scaling, sliding_window, softcap, s_aux, ...).
        swapped: whether key and value are in the opposite order to the model's.
        number: number of the layer whose cache got the keys, if it differs from the module's: a module can run for
            several layers.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    position_embeddings: Any
    function: AttentionFunction
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    swapped: bool = False
    number: int | None = None

    def swap(self) -> AttentionCall:
        """The same call with key and value exchanged."""
        query = self.value if self.query is self.key else self.query
        return replace(self, query=query, key=self.value, value=self.key, swapped=not self.swapped)

    @property
    def layer(self) -> int:
        """The number of the layer: that of its cache, else `layer_idx` of the attention module."""
        return layer_of(self.module) if self.number is None else self.number

    @property
    def mask(self) -> Any:
        """The attention mask that the model prepared, or None."""
        return self.args[0] if self.args else self.kwargs.get("attention_mask")

    def rotation(self) -> Rotation:
        """The rotation that the model applied to these keys.

        Raises:
            ModelError: some keys are from earlier calls, and their angles are not known.
        """
        cos, sin = self.position_embeddings
        if cos.shape[-2] != self.key.shape[-2]:
            raise ModelError("keys of earlier calls are in the cache; call the model with use_cache=False")
        return Rotation(find_apply_rotary(self.module), cos, sin)

    def attend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Any]:
        """The result of the model's attention function with other keys and values."""
        return self.function(self.module, self.query, key, value, *self.args, **self.kwargs)


Handler = Callable[[AttentionCall], "tuple[Tensor, Tensor] | None"]
"""Returns other (rotated keys, values), or None to leave them unchanged."""


class Attends(Protocol):
    """A cache layer that computes attention; keys are marked with it."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Store the new keys and values, and attend to all tokens: [B, T, Hq, Dv]. Called without autograd."""
        ...


def mark(keys: Tensor, layer: Attends) -> Tensor:
    """A new tensor object with the data of `keys`, marked with `layer`."""
    marked = keys.view_as(keys)
    setattr(marked, _MARK, layer)
    return marked


def _number(module: Any) -> Any:
    """The number of a module's layer, under either of the names that families use."""
    return (
        getattr(module, "layer_idx", None)
        if hasattr(module, "layer_idx")
        else getattr(module, "layer_id", None)
    )


def layer_of(module: nn.Module) -> int:
    """The number of the layer that an attention module belongs to; -1 for one that is told when it is called."""
    number = _number(module)
    return number if isinstance(number, int) else -1


def attention_modules(model: nn.Module, *, unnumbered: bool = False) -> list[nn.Module]:
    """All modules with a layer number, which include the attention modules.

    Args:
        model: the model.
        unnumbered: also include modules whose layer number is None; they get it when they are called.
    """
    return [
        module
        for module in model.modules()
        if isinstance(_number(module), int)
        or (unnumbered and (hasattr(module, "layer_idx") or hasattr(module, "layer_id")))
    ]


@functools.lru_cache(maxsize=64)
def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's parameters after `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


def call_argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the argument `name` of a call of `module.forward`, by position or by name; None if not given."""
    if name in kwargs:
        return kwargs[name]
    parameters = parameters_of(type(module).forward)
    if name in parameters and parameters.index(name) < len(args):
        return args[parameters.index(name)]
    return None


# ------------------------------------------------------------------ state of a thread


@dataclass(frozen=True, eq=False)
class _Interception:
    """A handler, and the modules whose calls it gets."""

    modules: frozenset[nn.Module]
    handler: Handler


@dataclass(frozen=True, eq=False)
class Running:
    """An attention module whose forward runs, and its arguments.

    Attributes:
        module: the module.
        embeddings: its position embeddings (cos, sin), or None.
        mask: its attention mask, or None.
        positions: its position ids, or None.
    """

    module: nn.Module
    embeddings: Any = None
    mask: Any = None
    positions: Any = None


class _Thread(threading.local):
    """The state of one thread.

    Attributes:
        interceptions: active interceptions, outermost first.
        embeddings: position embeddings by `id` of the module whose forward runs.
        attending: `id` of modules whose call is being handled.
    """

    def __init__(self) -> None:
        self.interceptions: tuple[_Interception, ...] = ()
        self.embeddings: dict[int, Any] = {}
        self.attending: set[int] = set()
        #: Held modules whose forward runs, outermost first.
        self.running: list[Running] = []
        #: Watched models whose forward runs, outermost first, and the positions they were given.
        self.passes: list[tuple[nn.Module, Tensor]] = []

    def handlers(self, module: nn.Module) -> list[Handler]:
        """The handlers for a module's call, innermost first."""
        return [each.handler for each in reversed(self.interceptions) if module in each.modules]


_THREAD = _Thread()


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that in another thread it runs under the current interceptions of this thread.

    This is needed because a backward pass recomputes layers in autograd's threads.
    """
    interceptions = _THREAD.interceptions

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        own, _THREAD.interceptions = _THREAD.interceptions, interceptions
        try:
            return function(*args, **kwargs)
        finally:
            _THREAD.interceptions = own

    return run


@contextmanager
def intercept_calls(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Pass every attention call of `model` in this thread to `handler`, which may return other keys and values.

    Contexts can be nested: the outer handler gets the result of the inner one. Calls with a cache layer that computes
    attention are left out. Keys are not un-rotated and nothing is checked; `kvq_calib.model.capture` does both.
    """
    modules = attention_modules(model)
    holds = [Hold(module) for module in modules]
    before = _THREAD.interceptions
    _THREAD.interceptions = (*before, _Interception(frozenset(modules), handler))
    try:
        yield
    finally:
        _THREAD.interceptions = before
        for hold in holds:
            hold.close()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-forward hook of every held module. A copy of a held module has the hook, too, but is not held."""
    if id(module) not in _HELD:
        return
    names = ("position_embeddings", "attention_mask", "position_ids")
    found = Running(module, *(call_argument(module, name, args, kwargs) for name in names))
    _THREAD.embeddings[id(module)] = found.embeddings
    _THREAD.running.append(found)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forget(module: nn.Module, *_: Any) -> None:
    """Hook after the forward of every held module, also if it fails: drops what was stored."""
    _THREAD.running[:] = [each for each in _THREAD.running if each.module is not module]


def running(layer: int) -> Running | None:
    """The held module whose forward runs in this thread and hands keys and values to the cache of a layer, if any does.

    Submodules of an attention module may also have the layer's number, but get fewer arguments. A module that runs for
    several layers knows one of them at most; then it is the innermost.
    """
    among = [each for each in _THREAD.running if layer_of(each.module) == layer] or _THREAD.running
    if not among:
        return None
    found = next((each for each in reversed(among) if each.embeddings is not None), among[-1])
    if found.positions is None and _THREAD.passes:  # the model turned them into embeddings
        model, positions = _THREAD.passes[-1]
        if any(module is found.module for module in model.modules()):  # not those of a pass that was torn off
            found = replace(found, positions=positions)
    return found


def watch_pass(model: nn.Module) -> list[RemovableHandle]:
    """Hooks that remember the positions which a model gets, for attention modules that get none."""
    return [
        model.register_forward_pre_hook(_enter, with_kwargs=True),
        model.register_forward_hook(_leave, always_call=True),
    ]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _leave(module)  # a pass that was interrupted did not
    positions = call_argument(module, "position_ids", args, kwargs)
    if isinstance(positions, Tensor):
        _THREAD.passes.append((module, positions))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _leave(module: nn.Module, *_: Any) -> None:
    _THREAD.passes[:] = [each for each in _THREAD.passes if each[0] is not module]


# ------------------------------------------------------------------ state of the process


class Hold:
    """Watches an attention module's calls until `close`, or until the object is garbage-collected."""

    def __init__(self, module: nn.Module) -> None:
        hooks = (
            module.register_forward_pre_hook(_remember, with_kwargs=True),
            module.register_forward_hook(_forget, always_call=True),
        )
        token = object()
        _begin(token, module)
        self._end = weakref.finalize(self, _finish, token, hooks)
        self._end.atexit = False

    def close(self) -> None:
        """Stop watching. A second call does nothing."""
        self._end()


@dataclass(eq=False)
class _Entry:
    """One place where attention functions are looked up, and the holds that need a wrapper there.

    Attributes:
        namespace, name: the dictionary and the key.
        tokens: tokens of the holds.
        original, wrapper: the original function and its wrapper.
    """

    namespace: dict[str, Any]
    name: str
    tokens: set[object]
    original: Any = None
    wrapper: Any = None

    def wrap(self) -> None:
        """Replace the function by a wrapper."""
        present = self.namespace.get(self.name)
        if present is not None and present is not self.wrapper:
            self.original, self.wrapper = present, _wrapper(present)
            self.namespace[self.name] = self.wrapper

    def unwrap(self) -> None:
        """Restore the original function, unless another function has replaced the wrapper."""
        if self.namespace.get(self.name) is self.wrapper is not None:
            self.namespace[self.name] = self.original


# Garbage collection can end a hold at any moment, even while this thread has the lock. So the lock is reentrant, tokens
# are recorded before anything is done about them, and every step may be repeated.
_LOCK = threading.RLock()
_ENTRIES: dict[tuple[int, str], _Entry] = {}
#: Tokens by `id` of a held module.
_HELD: dict[int, set[object]] = {}


def _begin(token: object, module: nn.Module) -> None:
    with _LOCK:
        tokens = _HELD.get(id(module), set())
        tokens.add(token)
        _HELD[id(module)] = tokens
        for namespace, name in attention_entries(module):
            key = (id(namespace), name)
            entry = _ENTRIES.get(key) or _Entry(namespace, name, set())
            entry.tokens.add(token)
            _ENTRIES[key] = entry
            entry.wrap()


def _finish(token: object, hooks: tuple[RemovableHandle, ...]) -> None:
    for hook in hooks:
        hook.remove()
    with _LOCK:
        for number, tokens in list(_HELD.items()):
            tokens.discard(token)
            if not tokens:
                _HELD.pop(number, None)
        for key, entry in list(_ENTRIES.items()):
            entry.tokens.discard(token)
            if not entry.tokens:
                entry.unwrap()
                _ENTRIES.pop(key, None)


def _wrapper(function: AttentionFunction) -> AttentionFunction:
    """An attention function that calls `function`, except for modules that are held."""

    @functools.wraps(function)
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if id(module) not in _HELD:
            return function(module, query, key, value, *args, **kwargs)
        result: tuple[Tensor, Any] = _divert(function, module, query, key, value, *args, **kwargs)
        return result

    return attention


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _divert(
    function: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Pass a call of a held module to its cache layer or handlers."""
    embeddings = _THREAD.embeddings.pop(id(module), None)
    layer: Attends | None = getattr(key, _MARK, None)
    handlers = _THREAD.handlers(module) if layer is None else []
    # One implementation may look up another; then the call was handled already.
    if id(module) in _THREAD.attending or (layer is None and not handlers):
        return function(module, query, key, value, *args, **kwargs)
    call = AttentionCall(module, query, key, value, embeddings, function, args, kwargs)
    _THREAD.attending.add(id(module))
    try:
        if layer is not None:
            return _without_gradient(layer, call), None
        for handler in handlers:
            key, value = handler(call) or (call.key, call.value)
            call = replace(call, key=key, value=value)
        return call.attend(call.key, call.value)
    finally:
        _THREAD.attending.discard(id(module))


def _without_gradient(layer: Attends, call: AttentionCall) -> Tensor:
    """A call for a cache layer, with contiguous tensors that are detached from autograd."""
    inputs = (call.query, call.key, call.value)
    query, key, value = (tensor.detach() for tensor in inputs)
    with torch.no_grad():
        result = layer.attend(replace(call, query=query, key=key, value=value)).contiguous()
    return without_gradient(result, inputs)


def without_gradient(result: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """Mark `result`, which has no autograd graph, so that a backward pass through it to `inputs` fails."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        marked: Tensor = _NoGradient.apply(result, *inputs)  # type: ignore[no-untyped-call]
        return marked
    return result


class _NoGradient(torch.autograd.Function):
    """Raises an error in a backward pass, which would otherwise silently leave out attention."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        """Return `result`, made dependent on `inputs`."""
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raise an error."""
        raise RuntimeMismatchError(
            "a packed cache has no gradients; call the model without it where gradients are wanted"
        )
