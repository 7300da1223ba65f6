"""Pickles of arrays and tensors, read as data.

A pickle is a program, and Python's unpickler runs it. This reader runs nothing. It interprets the opcodes that build
plain containers, and the calls in pickles of numpy arrays and torch tensors. It makes no object larger than the file,
whatever sizes the file declares.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvq_calib.errors import one_line

__all__ = ["PickleProblem", "read_pickle"]

#: Largest number of opcodes in a file. The quantizers of a model of 126 layers have about 50,000.
_MAX_OPCODES = 2_000_000
_NUMBERS = {f"{kind}{size}" for kind, sizes in (("f", "248"), ("i", "1248"), ("u", "1248")) for size in sizes}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
}
#: What a storage pickled by torch begins with.
_TORCH_MAGIC, _TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class PickleProblem(Exception):
    """A pickle that is refused. The message is one line that continues after the file's name."""


def read_pickle(data: bytes) -> Any:
    """Read a pickle of plain containers, numbers, text, numpy arrays and torch tensors.

    Arrays are converted in the outermost container and in two further levels of tuples and lists, which is where
    quantizers have them.

    Raises:
        PickleProblem: it is broken, needs anything else, or declares more data than it holds.
    """
    try:
        return _plain(_Program(_Limits(len(data)), _CALLS).result(io.BytesIO(data)), 3, {})
    except PickleProblem:
        raise
    except Exception as error:  # a broken or hostile program can fail anywhere
        raise PickleProblem(f"is not a readable pickle of quantizers: {one_line(error)}") from error


class _Limits:
    """Limits on the work and memory for one file.

    Args:
        size: size of the file in bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.opcodes = 0
        self._taken: Counter[str] = Counter()

    def step(self) -> None:
        """Count one more opcode."""
        self.opcodes += 1
        if self.opcodes > _MAX_OPCODES:
            raise PickleProblem("has too many parts to hold quantizers")

    def take(self, what: str, size: int) -> None:
        """Count the bytes of a copy. All copies of a kind together are no larger than the file."""
        self._taken[what] += size
        self.fits(self._taken[what])

    def fits(self, size: int) -> None:
        """Check the size that an object would have, in bytes."""
        if not 0 <= size <= self.size:
            raise PickleProblem("declares arrays that are larger than the file: refused")


class _Name:
    """The name of a function or class in a pickle; not the Python object itself."""

    __slots__ = ("name",)

    def __init__(self, name: tuple[str, str]) -> None:
        self.name = name


class _Dtype:
    """A dtype of numpy: a number, and later the order of its bytes."""

    __slots__ = ("number", "order")

    def __init__(self, number: str) -> None:
        self.number, self.order = number, "="

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.number).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """An array that is created first and gets its content later."""

    __slots__ = ("content",)

    def __init__(self, content: np.ndarray[Any, Any] | None = None) -> None:
        self.content = content


class _Mark:
    """Where the arguments of an opcode begin."""

    __slots__ = ()


_MARK = _Mark()
Call = Callable[..., Any]


class _Program:
    """The stack, the memo and the opcodes.

    Args:
        limits: limits for the file.
        calls: functions by their name in pickles; each gets the limits and the arguments.
        refer: resolves a reference to data outside the pickle; ``None`` refuses references.
    """

    def __init__(
        self,
        limits: _Limits,
        calls: dict[tuple[str, str], Call],
        refer: Callable[[Any], Any] | None = None,
    ) -> None:
        self.limits, self.calls, self.refer = limits, calls, refer
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def result(self, file: io.BytesIO) -> Any:
        """Read one pickle from the current position of ``file``, and stop right after it."""
        for opcode, value, _ in pickletools.genops(file):
            self.limits.step()
            name = opcode.name
            if name == "STOP":
                break
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _VALUES:
                self.stack.append(value)
            elif name in _MAKES:
                self.stack.append(_MAKES[name]())
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, value)
            elif name not in ("PROTO", "FRAME"):
                raise PickleProblem(f"has {name}, which no array and no tensor needs: refused")
        return self.pop()

    # The opcodes that work on the stack; `value` is the operand of the opcode.

    def pop(self, _: Any = None) -> Any:
        return self.stack.pop()

    def pop_to_mark(self, _: Any = None) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise PickleProblem("is not a readable pickle of quantizers: a mark is missing")
        found = self.stack[place + 1 :]
        del self.stack[place:]
        return found

    def get(self, value: Any) -> None:
        self.stack.append(self.memo[int(value)])

    def put(self, value: Any) -> None:
        self.memo[int(value)] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        if count > len(self.stack):
            raise PickleProblem("is not a readable pickle of quantizers: a tuple lacks its parts")
        found = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(found)

    def tuple_(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def list_(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def append(self, _: Any) -> None:
        self._extend([self.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self.pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        holder = self.stack[-1]
        if not isinstance(holder, list):
            raise PickleProblem(
                "is not a readable pickle of quantizers: it appends to something that is not a list"
            )
        holder.extend(items)

    def dict_(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self._update(items)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._update([key, value])

    def set_items(self, _: Any) -> None:
        self._update(self.pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        holder = self.stack[-1]
        if not isinstance(holder, dict):
            raise PickleProblem(
                "is not a readable pickle of quantizers: it names parts of something that has none"
            )
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):  # the hash of nested tuples can take forever
                raise PickleProblem(f"has a key that is not text but {type(key).__name__}: refused")
            holder[key] = value

    def named(self, value: str) -> None:
        module, _, name = value.partition(" ")
        self._name(module, name)

    def named_on_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or (module, name) not in self.calls:
            raise PickleProblem(
                f"names {str(module)[:80]}.{str(name)[:80]}, which is neither an array nor a tensor: refused, nothing "
                "of it was run"
            )
        self.stack.append(_Name((module, name)))

    def call(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise PickleProblem("calls something that is neither an array nor a tensor: refused")
        self.stack.append(self.calls[function.name](self.limits, *arguments))

    def build(self, _: Any) -> None:
        state, holder = self.pop(), self.stack[-1]
        if (
            isinstance(holder, _Dtype)
            and isinstance(state, tuple)
            and len(state) > 1
            and state[1] in ("<", ">", "=", "|")
        ):
            holder.order = state[1]
        elif isinstance(holder, _Array) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, columns_first, data = state
            holder.content = _array(self.limits, data, dtype, shape, "F" if columns_first is True else "C")
        else:
            raise PickleProblem("changes something that is neither an array nor a tensor: refused")

    def persistent(self, _: Any) -> None:
        if self.refer is None:
            raise PickleProblem("refers to data outside itself: refused")
        self.stack.append(self.refer(self.pop()))


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_MAKES: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_OPERATIONS: dict[str, Callable[[_Program, Any], Any]] = {
    "POP": _Program.pop,
    "POP_MARK": _Program.pop_to_mark,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Program.get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Program.put),
    "MEMOIZE": _Program.memoize,
    "TUPLE1": lambda program, _: program.tuple_of(1),
    "TUPLE2": lambda program, _: program.tuple_of(2),
    "TUPLE3": lambda program, _: program.tuple_of(3),
    "TUPLE": _Program.tuple_,
    "LIST": _Program.list_,
    "APPEND": _Program.append,
    "APPENDS": _Program.appends,
    "DICT": _Program.dict_,
    "SETITEM": _Program.set_item,
    "SETITEMS": _Program.set_items,
    "GLOBAL": _Program.named,
    "STACK_GLOBAL": _Program.named_on_stack,
    "REDUCE": _Program.call,
    "BUILD": _Program.build,
    "BINPERSID": _Program.persistent,
}


def _plain(value: Any, depth: int, known: dict[tuple[int, int], Any]) -> Any:
    """Replace the holders of arrays by the arrays, in ``depth`` levels of containers.

    Args:
        value: the outermost object.
        depth: number of levels to convert; deeper objects stay as they are.
        known: results by identity and depth, so that a shared object is converted once.
    """
    if isinstance(value, _Array):
        if value.content is None:
            raise PickleProblem("has an array without content")
        return value.content
    if isinstance(value, _Name | _Dtype | _Mark):
        raise PickleProblem("holds something that is neither an array nor a tensor")
    if not depth or not isinstance(value, dict | list | tuple):
        return value
    place = id(value), depth
    if place not in known:
        if isinstance(value, dict):
            known[place] = {key: _plain(inner, depth - 1, known) for key, inner in value.items()}
        else:
            known[place] = type(value)(_plain(inner, depth - 1, known) for inner in value)
    return known[place]


# ------------------------------------------------------------------------- functions in pickles of arrays


def _sizes(limits: _Limits, values: Any) -> tuple[int, ...]:
    """A shape or strides: a few numbers, none negative, none larger than any file."""
    fine = isinstance(values, tuple) and len(values) <= 8
    if not fine or any(type(size) is not int or not 0 <= size < 2**62 for size in values):
        raise PickleProblem("has an array with an impossible shape")
    return tuple(values)


def _array(limits: _Limits, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """An array that is a view of bytes of the file."""
    if not isinstance(dtype, _Dtype):
        raise PickleProblem("has an array of something that is not a number")
    shape = (shape,) if type(shape) is int else shape
    sizes, kind = _sizes(limits, shape), dtype.numpy()
    wanted = math.prod(sizes) * kind.itemsize
    limits.fits(wanted)
    if not isinstance(data, bytes | bytearray) or len(data) != wanted or order not in ("C", "F"):
        raise PickleProblem("has an array whose content does not fit its shape")
    return np.frombuffer(data, dtype=kind).reshape(sizes, order=order)


def _from_buffer(limits: _Limits, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    """An array as protocol 5 writes it. ``axes`` only matters for memory orders that are refused."""
    return _Array(_array(limits, data, dtype, shape, order))


def _reconstruct(limits: _Limits, kind: Any, shape: Any, code: Any) -> _Array:
    """An empty array as protocols before 5 write it; its content follows."""
    if not isinstance(kind, _Name) or kind.name != ("numpy", "ndarray"):
        raise PickleProblem("has an array of an unknown class")
    return _Array()


def _dtype(limits: _Limits, number: Any, align: Any = False, copy: Any = True) -> _Dtype:
    if not isinstance(number, str) or number not in _NUMBERS:
        raise PickleProblem(f"has an array of {str(number)[:40]!r}, which are not numbers")
    return _Dtype(number)


def _encoded(limits: _Limits, text: Any, encoding: Any = None) -> bytes:
    """Bytes as protocols before 3 write them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise PickleProblem("has bytes in an unknown encoding")
    limits.take("bytes", len(text))
    return text.encode("latin1")


def _hooks(limits: _Limits, *items: Any) -> dict[str, Any]:
    """The backward hooks of a tensor, of which there must be none."""
    if items not in ((), ([],)):
        raise PickleProblem("has a tensor with hooks: refused")
    return {}


def _ndarray(limits: _Limits, *arguments: Any) -> Any:
    raise PickleProblem("has an array without content: refused")


# ------------------------------------------------------------------------ functions in pickles of tensors


class _Declared:
    """A storage as its pickle declares it."""

    __slots__ = ("dtype", "key", "size")

    def __init__(self, dtype: torch.dtype, key: str, size: int) -> None:
        self.dtype, self.key, self.size = dtype, key, size


def _declared(described: Any) -> _Declared:
    """Resolve torch's reference to the storage in the pickle of a storage."""
    if not isinstance(described, tuple) or len(described) not in (5, 6) or described[5:] not in ((), (None,)):
        raise PickleProblem("has a tensor whose storage is of an unknown kind")
    what, kind, key, _, size = described[:5]
    if what != "storage" or not isinstance(kind, _Name) or not isinstance(key, str) or type(size) is not int:
        raise PickleProblem("has a tensor whose storage is of an unknown kind")
    return _Declared(_STORAGES[kind.name[1]], key, size)


def _storage(limits: _Limits, data: Any) -> Tensor:
    """The numbers of a tensor, in torch's file format before zip files."""
    if not isinstance(data, bytes | bytearray):
        raise PickleProblem("has a tensor without content")
    limits.take("storages", len(data))
    file = io.BytesIO(data)
    magic, protocol, system, declared, keys = (
        _Program(limits, _STORAGE_CALLS, _declared).result(file) for _ in range(5)
    )
    if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL or not isinstance(system, dict):
        raise PickleProblem("has a tensor whose storage is of an unknown kind")
    if (
        system.get("little_endian") is not True
        or not isinstance(declared, _Declared)
        or keys != [declared.key]
    ):
        raise PickleProblem("has a tensor whose storage is of an unknown kind")
    count, content = int.from_bytes(file.read(8), "little"), bytearray(file.read())
    if count != declared.size or len(content) != count * declared.dtype.itemsize:
        raise PickleProblem("has a tensor whose content does not fit its size")
    return (
        torch.frombuffer(content, dtype=declared.dtype) if content else torch.empty(0, dtype=declared.dtype)
    )


def _tensor(
    limits: _Limits, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any, *more: Any
) -> Tensor:
    """A view of a storage; ``more`` is metadata that is not needed."""
    if not isinstance(storage, Tensor) or storage.ndim != 1:
        raise PickleProblem("has a tensor without a storage")
    sizes, strides, (start,) = (_sizes(limits, values) for values in (size, stride, (offset,)))
    if len(sizes) != len(strides):
        raise PickleProblem("has a tensor whose strides do not fit its shape")
    limits.fits(math.prod(sizes) * storage.itemsize)
    last = start + sum((count - 1) * step for count, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= len(storage):
        raise PickleProblem("has a tensor that is larger than its storage")
    return torch.as_strided(storage, sizes, strides, start)


_CALLS: dict[tuple[str, str], Call] = {
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): _hooks,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _ndarray,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    # numpy 1 and 2 name it differently
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


def _not_called(limits: _Limits, *arguments: Any) -> Any:
    raise PickleProblem("calls a kind of storage: refused")


_STORAGE_CALLS: dict[tuple[str, str], Call] = {("torch", name): _not_called for name in _STORAGES}
