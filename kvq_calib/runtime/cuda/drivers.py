"""The CUDA driver, called through PyCUDA, or else through cuda-bindings."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from kvq_calib.errors import RuntimeMismatchError

__all__ = ["BindingsDriver", "Driver", "DriverError", "PyCudaDriver", "make_driver"]

Grid = tuple[int, int, int]


class DriverError(Exception):
    """The driver refused a call; the message is one line."""


class Driver(Protocol):
    """A device, in the primary context that torch uses. Every method may raise :class:`DriverError`."""

    @property
    def name(self) -> str:
        """Name of the package, and its version if known."""

    @property
    def shared_limit(self) -> int:
        """Largest shared memory of a thread block, in bytes."""

    def load(self, code: bytes) -> Any:
        """Load a module from machine code."""

    def function(self, module: Any, name: str, params_size: int) -> Any:
        """Get a kernel that takes one structure of ``params_size`` bytes."""

    def integer(self, module: Any, name: str) -> int:
        """Read an ``int`` that a module declares."""

    def allow_shared(self, function: Any, shared_bytes: int) -> None:
        """Allow a kernel more shared memory than the default limit."""

    def launch(
        self,
        function: Any,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
        stream: int,
    ) -> None:
        """Enqueue a kernel on torch's current stream, whose handle is ``stream``.

        It runs after earlier work of this stream and before later work.
        """


class PyCudaDriver:
    """The driver through PyCUDA.

    A process keeps one object per device, because freeing it releases the primary context. PyCUDA cannot adopt a
    stream of torch, but torch can adopt one of PyCUDA. So kernels run on a stream of PyCUDA, between events of torch's
    stream. If torch's stream is the legacy default stream, which is the same for both, they run there.

    Args:
        device: a CUDA device with an index. Torch must have created its context.

    Raises:
        ImportError: PyCUDA is not installed, or does not work with this driver.
        DriverError: a call of the driver fails.
    """

    def __init__(self, device: torch.device) -> None:
        import pycuda
        import pycuda.driver as driver

        self.device, self._driver = device, driver
        self.name = f"pycuda {getattr(pycuda, 'VERSION_TEXT', '')}".strip()
        self._side: tuple[Any, torch.cuda.Stream] | None = None
        with self._translated():
            driver.init()
            own = driver.Device(device.index)
            self._context = own.retain_primary_context()
            self.shared_limit = int(
                own.get_attribute(driver.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._driver.Error as error:
            raise DriverError(_line(str(error))) from error

    @contextmanager
    def _current(self) -> Iterator[None]:
        with self._translated():
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()

    def load(self, code: bytes) -> Any:
        """See :class:`Driver`."""
        with self._current():
            return self._driver.module_from_buffer(code)

    def function(self, module: Any, name: str, params_size: int) -> Any:
        """See :class:`Driver`."""
        with self._current():
            function = module.get_function(name)
            function.prepare([f"{params_size}s"])
            return function

    def integer(self, module: Any, name: str) -> int:
        """See :class:`Driver`."""
        value = bytearray(4)
        with self._current():
            self._driver.memcpy_dtoh(value, module.get_global(name)[0])
        return int.from_bytes(value, "little", signed=True)

    def allow_shared(self, function: Any, shared_bytes: int) -> None:
        """See :class:`Driver`."""
        with self._current():
            function.set_attribute(
                self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes
            )

    def launch(
        self,
        function: Any,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
        stream: int,
    ) -> None:
        """See :class:`Driver`."""
        block = (threads, 1, 1)
        with self._translated():
            if stream == 0:
                function.prepared_async_call(grid, block, None, bytes(params), shared_size=shared_bytes)
                return
            current = torch.cuda.current_stream(self.device)
            own, seen_by_torch = self._side_stream()
            seen_by_torch.wait_stream(current)
            function.prepared_async_call(grid, block, own, bytes(params), shared_size=shared_bytes)
            current.wait_stream(seen_by_torch)

    def _side_stream(self) -> tuple[Any, torch.cuda.Stream]:
        """A stream of PyCUDA, and torch's object for it."""
        if self._side is None:
            with self._current():
                own = self._driver.Stream()
            self._side = own, torch.cuda.ExternalStream(own.handle, device=self.device)
        return self._side


class BindingsDriver:
    """The driver through NVIDIA's cuda-bindings. It launches directly on torch's streams.

    Args:
        device: a CUDA device with an index. Torch must have created its context.

    Raises:
        ImportError: cuda-bindings 12.6 or newer is not installed.
        DriverError: a call of the driver fails.
    """

    def __init__(self, device: torch.device) -> None:
        import cuda.bindings
        from cuda.bindings import driver

        self.name = f"cuda-bindings {getattr(cuda.bindings, '__version__', '')}".strip()
        self._driver = driver
        self._call(driver.cuInit, 0)
        number = self._call(driver.cuDeviceGet, device.index)
        self._context = self._call(driver.cuDevicePrimaryCtxRetain, number)
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.shared_limit = int(self._call(driver.cuDeviceGetAttribute, attribute, number))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the driver. Returns its results without the status."""
        try:
            status, *results = function(*arguments)
        except RuntimeError as error:  # the library or one of its functions is missing
            raise DriverError(_line(str(error))) from error
        if int(status) != 0:
            raise DriverError(f"{function.__name__}: {getattr(status, 'name', status)}")
        return results[0] if len(results) == 1 else results

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._call(self._driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            self._call(self._driver.cuCtxPopCurrent)

    def load(self, code: bytes) -> Any:
        """See :class:`Driver`."""
        with self._current():
            return self._call(self._driver.cuModuleLoadData, code)

    def function(self, module: Any, name: str, params_size: int) -> Any:
        """See :class:`Driver`."""
        with self._current():
            return self._call(self._driver.cuModuleGetFunction, module, name.encode())

    def integer(self, module: Any, name: str) -> int:
        """See :class:`Driver`."""
        value = ctypes.c_int32()
        with self._current():
            address, _ = self._call(self._driver.cuModuleGetGlobal, module, name.encode())
            self._call(self._driver.cuMemcpyDtoH, ctypes.addressof(value), address, 4)
        return value.value

    def allow_shared(self, function: Any, shared_bytes: int) -> None:
        """See :class:`Driver`."""
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._current():
            self._call(self._driver.cuFuncSetAttribute, function, attribute, shared_bytes)

    def launch(
        self,
        function: Any,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
        stream: int,
    ) -> None:
        """See :class:`Driver`."""
        # The driver copies the parameters before it returns.
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._call(
            self._driver.cuLaunchKernel,
            function,
            *grid,
            *(threads, 1, 1),
            shared_bytes,
            stream,
            ctypes.addressof(pointers),
            0,
        )


#: In the order in which they are tried.
_DRIVERS: tuple[Callable[[torch.device], Driver], ...] = (PyCudaDriver, BindingsDriver)


def make_driver(device: torch.device) -> Driver:
    """Make the first driver that works.

    Args:
        device: a CUDA device with an index. Torch must have created its context.

    Raises:
        RuntimeMismatchError: none works. The message has the reasons, and what to install.
    """
    reasons = []
    for make in _DRIVERS:
        try:
            return make(device)
        except (ImportError, DriverError) as error:
            reasons.append(_line(str(error)))
    raise RuntimeMismatchError(
        f"neither PyCUDA ({reasons[0]}) nor cuda-bindings ({reasons[1]}) can use the CUDA driver; "
        "pip install cuda-bindings"
    )


def _line(message: str) -> str:
    """The first line of a message. The driver may append its log."""
    return (message.strip() or "no reason given").splitlines()[0]
