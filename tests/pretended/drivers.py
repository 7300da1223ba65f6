"""The CUDA driver as PyCUDA and cuda-bindings show it, pretended: kernels run as C++, at once.

Machine code is what the pretended nvcc writes: which source it would have compiled, with which options.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import json
import stat
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shim import host

from pretended import device
from pretended.device import State

NVCC = """#!{python}
import json, sys
if "--version" in sys.argv:
    print("pretended nvcc, release 13.0")
    sys.exit()
given = sys.argv[1:]
source = next(each for each in given if each.endswith(".cu"))
defines = [each[2:] for each in given if each.startswith("-D")]
open(given[given.index("-o") + 1], "w").write(json.dumps([source.rsplit("/", 1)[-1], defines]))
"""
SHARED_LIMIT, DEFAULT_SHARED, MOST_GRID, MOST_THREADS = 232_448, 48 << 10, 65_535, 1024


def write_nvcc(folder: Path) -> Path:
    """A compiler in ``folder``."""
    file = folder / "nvcc"
    file.write_text(NVCC.format(python=sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


class Refused(Exception):
    """What the driver answers with an error."""


class Machine:
    """The driver's side: contexts, modules, functions; and notes on what was asked."""

    def __init__(self) -> None:
        self.notes: list[tuple[Any, ...]] = []
        self.pushed = 0
        #: Machine code that is refused.
        self.refuses: set[bytes] = set()

    def need_context(self) -> None:
        if not self.pushed and not State.current:
            raise Refused("CUDA_ERROR_INVALID_CONTEXT")

    def load(self, code: bytes) -> Module:
        self.need_context()
        if device.capturing is not None:
            raise Refused("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self.notes.append(("load",))
        try:
            source, defines = json.loads(bytes(code))
        except ValueError:
            raise Refused("CUDA_ERROR_INVALID_IMAGE") from None
        if bytes(code) in self.refuses:
            raise Refused("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
        return Module(self, source, tuple(defines))

    def launch(
        self, function: Function, grid: tuple[int, ...], threads: int, shared: int, params: bytes, stream: int
    ) -> None:
        self.need_context()
        if shared > function.shared or threads > MOST_THREADS or max(grid[1:]) > MOST_GRID or min(grid) < 1:
            raise Refused("CUDA_ERROR_INVALID_VALUE")
        if len(params) != function.size:
            raise Refused(f"{len(params)} bytes of parameters where {function.name} takes {function.size}")
        self.notes.append(("launch", function.name, grid, threads, shared, stream))
        run = functools.partial(function.run, ctypes.c_char_p(params), *grid, threads, shared)
        if device.capturing is None:
            run()
            return
        if stream == 0:
            raise Refused("CUDA_ERROR_STREAM_CAPTURE_IMPLICIT")
        device.capturing.append(run)


class Module:
    def __init__(self, machine: Machine, source: str, defines: tuple[str, ...]) -> None:
        self.machine, self.library = machine, host.build(source, defines)
        self.kernels = host.KERNELS[source]

    def function(self, name: str) -> Function:
        if name not in self.kernels:
            raise Refused("CUDA_ERROR_NOT_FOUND")
        return Function(self, name)

    def address(self, name: str) -> int:
        return ctypes.addressof(ctypes.c_int.in_dll(self.library, name))


class Function:
    def __init__(self, module: Module, name: str) -> None:
        self.machine, self.name, self.shared = module.machine, name, DEFAULT_SHARED
        self.run = getattr(module.library, f"launch_{name}")
        self.size = getattr(module.library, f"size_{name}")()

    def allow(self, shared: int) -> None:
        if shared > SHARED_LIMIT:
            raise Refused("CUDA_ERROR_INVALID_VALUE")
        self.machine.notes.append(("allow", self.name, shared))
        self.shared = shared


# ---- PyCUDA ----------------------------------------------------------------------------------------------------------


def pycuda_modules(machine: Machine) -> dict[str, types.ModuleType]:
    """``pycuda`` and ``pycuda.driver``."""

    class Context:
        def push(self) -> None:
            machine.pushed += 1

        def pop(self) -> None:
            machine.pushed -= 1

    class Device:
        def __init__(self, index: int) -> None:
            machine.notes.append(("device", index))

        def retain_primary_context(self) -> Context:
            return Context()

        def get_attribute(self, attribute: str) -> int:
            return {"shared": SHARED_LIMIT}[attribute]

    class PyFunction:
        def __init__(self, function: Function) -> None:
            self._function = function

        def prepare(self, formats: list[str]) -> None:
            assert formats == [f"{self._function.size}s"]

        def set_attribute(self, attribute: str, value: int) -> None:
            assert attribute == "most shared"
            self._function.allow(value)

        def prepared_async_call(
            self, grid: Any, block: Any, stream: Any, data: bytes, shared_size: int = 0
        ) -> None:
            assert block[1:] == (1, 1)
            handle = 0 if stream is None else stream.handle
            machine.launch(self._function, grid, block[0], shared_size, data, handle)

    class PyModule:
        def __init__(self, module: Module) -> None:
            self._module = module

        def get_function(self, name: str) -> PyFunction:
            return PyFunction(self._module.function(name))

        def get_global(self, name: str) -> tuple[int, int]:
            return self._module.address(name), 4

    class PyStream:
        handle = 77

    def memcpy_dtoh(target: bytearray, address: int) -> None:
        machine.need_context()
        target[:] = ctypes.string_at(address, len(target))

    driver: Any = types.ModuleType("pycuda.driver")
    driver.Error = Refused
    driver.init = lambda: None
    driver.Device, driver.Stream, driver.memcpy_dtoh = Device, PyStream, memcpy_dtoh
    driver.module_from_buffer = lambda code: PyModule(machine.load(code))
    driver.function_attribute = types.SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES="most shared")
    driver.device_attribute = types.SimpleNamespace(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared")
    package: Any = types.ModuleType("pycuda")
    package.driver, package.VERSION_TEXT = driver, "2026.1"
    return {"pycuda": package, "pycuda.driver": driver}


# ---- cuda-bindings ---------------------------------------------------------------------------------------------------


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_UNKNOWN = 999


def bindings_modules(machine: Machine) -> dict[str, types.ModuleType]:
    """``cuda``, ``cuda.bindings`` and ``cuda.bindings.driver``."""

    def call(name: str, body: Any) -> Any:
        def function(*arguments: Any) -> tuple[Any, ...]:
            try:
                result = body(*arguments)
            except Refused as error:
                return (CUresult.__members__.get(str(error), CUresult.CUDA_ERROR_UNKNOWN), None)
            results = () if result is None else result if isinstance(result, tuple) else (result,)
            return (CUresult.CUDA_SUCCESS, *results)

        function.__name__ = name
        return function

    def push(context: str) -> None:
        machine.pushed += 1

    def pop() -> str:
        machine.pushed -= 1
        return "context"

    def copy(target: int, address: int, count: int) -> None:
        machine.need_context()
        ctypes.memmove(target, address, count)

    def set_attribute(function: Function, attribute: str, value: int) -> None:
        assert attribute == "most shared"
        function.allow(value)

    def launch(function: Function, x, y, z, tx, ty, tz, shared, stream, params, extra) -> None:
        assert (ty, tz, extra) == (1, 1, 0)
        first = ctypes.c_void_p.from_address(params).value
        machine.launch(function, (x, y, z), tx, shared, ctypes.string_at(first, function.size), int(stream))

    driver: Any = types.ModuleType("cuda.bindings.driver")
    for name, body in {
        "cuInit": lambda flags: None,
        "cuDeviceGet": lambda index: machine.notes.append(("device", index)) or f"device {index}",
        "cuDeviceGetAttribute": lambda attribute, device: {"shared": SHARED_LIMIT}[attribute],
        "cuDevicePrimaryCtxRetain": lambda device: "context",
        "cuCtxPushCurrent": push,
        "cuCtxPopCurrent": pop,
        "cuModuleLoadData": machine.load,
        "cuModuleGetFunction": lambda module, name: module.function(name.decode()),
        "cuModuleGetGlobal": lambda module, name: (module.address(name.decode()), 4),
        "cuMemcpyDtoH": copy,
        "cuFuncSetAttribute": set_attribute,
        "cuLaunchKernel": launch,
    }.items():
        setattr(driver, name, call(name, body))
    driver.CUfunction_attribute = types.SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most shared"
    )
    driver.CUdevice_attribute = types.SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared"
    )
    cuda: Any = types.ModuleType("cuda")
    bindings: Any = types.ModuleType("cuda.bindings")
    cuda.bindings, bindings.driver, bindings.__version__ = bindings, driver, "13.0"
    return {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.driver": driver}


NOTHING: dict[str, None] = {
    "pycuda": None,
    "pycuda.driver": None,
    "cuda": None,
    "cuda.bindings": None,
    "cuda.bindings.driver": None,
}


@contextlib.contextmanager
def installed(machine: Machine, *packages: str) -> Iterator[None]:
    """Let these packages be the only ones that can be imported: of ``"pycuda"`` and ``"cuda-bindings"``."""
    modules: dict[str, Any] = dict(NOTHING)
    if "pycuda" in packages:
        modules.update(pycuda_modules(machine))
    if "cuda-bindings" in packages:
        modules.update(bindings_modules(machine))
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)
