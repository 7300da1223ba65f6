"""torch's CUDA device, pretended."""

from __future__ import annotations

import contextlib
import functools
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")

#: Reads of numbers by the host, which waits for the device.
_READS = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero", "equal"),
    *("masked_select", "unique", "allclose", "is_nonzero", "isclose_", "numpy", "cpu", "__array__"),
}
#: What torch allows to take tensors of the CPU along with those of the device.
_MIXES = {"copy_", "__getitem__", "__setitem__", "__set__", "to", "type_as"}
#: What changes the tensor object itself.
_OF_OBJECT = {"requires_grad_", "__set__", "detach_", "retain_grad"}


class OnDevice(Tensor):
    """A tensor that says it is on ``cuda:0``."""

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"OnDevice({self.as_subclass(Tensor)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = memo[id(self)] = _placed(self.as_subclass(Tensor).detach().clone())
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


#: Names of functions by which the host read numbers from the device, since :func:`watched`.
waits: list[str] = []
#: While a graph is captured: how to do again what was done since.
capturing: list[Callable[[], None]] | None = None
#: What functions in place have written since, and what stood there.
_written: list[tuple[Tensor, Tensor]] = []


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, torch.dtype) and torch.device(device).type == "cuda"


def _names_cuda(args: tuple[Any, ...]) -> bool:
    return any(isinstance(each, str) and _is_cuda(each) for each in args)


def _placed(x: Any) -> Any:
    return x.as_subclass(OnDevice) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _wanted(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    if name == "cuda":
        return CUDA
    if name == "cpu":
        return CPU
    device = kwargs.get("device")
    if device is None and name == "to":
        named = [each for each in args[1:2] if isinstance(each, torch.device | str)]
        named += [each.device for each in args[1:2] if isinstance(each, Tensor)]
        device = named[0] if named else None
    return None if device is None else torch.device(device)


def run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of torch, on memory of the host, with the rules of a device; captured, where a graph is."""
    if capturing is None:
        return _run(func, args, kwargs)
    name = getattr(func, "__name__", "")
    target = kwargs.get("out", args[0] if args and _in_place(name) else None)
    if isinstance(target, OnDevice):
        with torch._C.DisableTorchFunctionSubclass():
            _written.append((target.as_subclass(Tensor), target.as_subclass(Tensor).clone()))
    result = _run(func, args, kwargs)
    if target is not None or any(isinstance(x, OnDevice) for x in tree_flatten(result)[0]):
        capturing.append(functools.partial(_again, func, args, kwargs, result))
    return result


def _in_place(name: str) -> bool:
    own = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return own or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _again(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], before: Any) -> None:
    """Run a captured function once more; what it makes comes to the memory that it was given then."""
    after = tree_flatten(_run(func, args, kwargs))[0]
    with torch._C.DisableTorchFunctionSubclass():
        for old, new in zip(tree_flatten(before)[0], after, strict=True):
            if isinstance(old, OnDevice) and old.data_ptr() != new.data_ptr() and old.numel():
                old.as_subclass(Tensor).copy_(new.as_subclass(Tensor))


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if name == "pin_memory":
        return args[0]
    if func is torch.device or name == "_parse_to":
        return func(*args, **kwargs)
    if name == "_has_compatible_shallow_copy_type":
        return type(args[0]) is type(args[1])
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    others = [x for x in tensors if not isinstance(x, OnDevice)]
    wanted = _wanted(name, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if ours and any(x.ndim > 0 for x in others) and name not in _MIXES:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
            )
        generator = kwargs.get("generator")
        if generator is not None and (_is_cuda(wanted) or ours):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if capturing is not None and (
            (name in ("to", "cuda", "tensor", "as_tensor") and not ours and _is_cuda(wanted))
            or (name in ("__getitem__", "__setitem__") and ours and any(x.ndim for x in others))
        ):
            raise RuntimeError(f"operation not permitted when stream is capturing ({name})")
        _note(name, args, kwargs, ours, wanted)
        if ours and name in _OF_OBJECT:
            return func(*args, **kwargs)
        if ours and name == "__get__":  # of the object itself: an alias would have a history
            return _placed(func(*args, **kwargs))
        plain: dict[int, Tensor] = {id(x): x.as_subclass(Tensor) for x in ours}

        def unplaced(x: Any) -> Any:
            if isinstance(x, OnDevice):
                return plain[id(x)]
            return CPU if isinstance(x, torch.device) and x.type == "cuda" else x

        call_args, call_kwargs = tree_map(unplaced, args), tree_map(unplaced, kwargs)
        if _is_cuda(call_kwargs.get("device")):
            call_kwargs["device"] = CPU
        if name == "to" and _names_cuda(call_args[1:2]):
            call_args = (call_args[0], CPU, *call_args[2:])
        if name == "cuda":
            result = call_args[0]
        elif wanted is not None and tensors and (wanted.type == "cuda") != bool(ours):
            # A change of device copies, even where dtype and memory would do.
            result = func(*call_args, **call_kwargs)
            if name in ("to", "cpu"):
                result = result.clone()
        else:
            result = func(*call_args, **call_kwargs)
        back = {id(inner): outer for inner, outer in ((plain[id(x)], x) for x in ours)}
        placed = (
            wanted.type == "cuda"
            if wanted is not None
            else isinstance(args[0], OnDevice)
            if name in _MIXES
            else bool(ours)
        )

        def replaced(x: Any) -> Any:
            if isinstance(x, Tensor) and id(x) in back:
                return back[id(x)]
            return _placed(x) if placed else x

        return tree_map(replaced, result)


def _note(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], ours: list[Tensor], wanted: torch.device | None
) -> None:
    """Write down what makes the host wait."""
    if not ours:
        return
    by_mask = False
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        by_mask = any(
            isinstance(each, OnDevice) and each.dtype in (torch.bool, torch.uint8) for each in index
        )
    waiting = kwargs.get("non_blocking") is not True and name in ("to", "copy_")
    to_host = name == "to" and wanted is not None and wanted.type == "cpu"
    to_host |= name == "copy_" and waiting and not isinstance(args[0], OnDevice)
    from_host = (
        name == "copy_" and waiting and isinstance(args[0], OnDevice) and not isinstance(args[1], OnDevice)
    )
    if capturing is not None and (name in _READS or by_mask or to_host or from_host):
        raise RuntimeError(f"operation not permitted when stream is capturing ({name})")
    if name in _READS or by_mask or to_host:
        waits.append(name)


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Stream:
    """As torch's: a handle."""

    def __init__(self, handle: int = 0, device: Any = None) -> None:
        self.cuda_stream, self.device = handle, CUDA

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class SideStream(Stream):
    """One that is not the default."""

    def __init__(self, device: Any = None) -> None:
        super().__init__(44)


class Event:
    """As torch's, on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return (other.time - self.time) * 1e3


class CUDAGraph:
    """As torch's: what was captured is not run then, but whenever it is replayed."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        for each in self.work:
            each()


@contextlib.contextmanager
def graph(made: CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture into a graph. Functions of torch do run, for what they return; what they wrote is put back."""
    global capturing
    before, capturing = capturing, made.work
    stream, State.stream = State.stream, Stream(55)
    try:
        yield
    finally:
        capturing, State.stream = before, stream
        with torch._C.DisableTorchFunctionSubclass():
            while _written:
                x, value = _written.pop()
                x.copy_(value)


@contextlib.contextmanager
def stream(other: Stream) -> Iterator[None]:
    """As torch's."""
    before, State.stream = State.stream, other
    try:
        yield
    finally:
        State.stream = before


class State:
    """What the driver asks of torch: whether its context is current, and the stream."""

    current = 0
    stream = Stream(0)


class _Device:
    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> None:
        State.current += 1

    def __exit__(self, *error: Any) -> None:
        State.current -= 1


PROPERTIES = types.SimpleNamespace(
    name="pretended GPU", major=9, minor=0, multi_processor_count=132, total_memory=2 << 30
)
_CUDA_FUNCTIONS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "current_stream": lambda device=None: State.stream,
    "Stream": SideStream,
    "stream": stream,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "ExternalStream": lambda handle, device=None: Stream(handle),
    "device": _Device,
    "Event": Event,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "manual_seed_all": lambda seed: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "_sleep": lambda cycles: None,
    "mem_get_info": lambda device=None: (2 << 30, 2 << 30),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "max_memory_allocated": lambda device=None: 0,
}


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within it, torch has a CUDA device."""
    with contextlib.ExitStack() as stack:
        for name, value in _CUDA_FUNCTIONS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # Parameters that move are made anew: in place they could not change their class.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        stack.enter_context(_Mode())
        yield


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """The waits of the host within it."""
    waits.clear()
    yield waits
