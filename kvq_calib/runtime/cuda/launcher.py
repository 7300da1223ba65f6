"""Kernels on their way to a GPU. pycuda is imported here only, when a cache on a GPU asks for kernels.

``docs/kernels.md`` says how its streams and context go together with torch's.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import torch

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.build import cache_folder, compile_cubin

__all__ = ["Launcher", "PyCudaLauncher", "launcher_for"]

#: Oldest architecture the kernels run on.
MIN_CAPABILITY = (8, 0)
#: Shared memory of a thread block that need not be asked for.
_DEFAULT_SHARED = 48 * 1024


class Launcher(Protocol):
    """Runs kernels: on a GPU, or in tests on the host."""

    @property
    def multiprocessors(self) -> int:
        """How many thread blocks run side by side, about."""

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory a thread block can have."""

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        """An ``int`` that the compiled ``source`` declares."""

    def launch(
        self,
        source: str,
        defines: tuple[str, ...],
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
    ) -> None:
        """Run ``kernel`` of ``kernels/cuda/<source>``, compiled with ``-D`` ``defines``, after all work of torch's
        current stream and before what is enqueued there later."""


class PyCudaLauncher:
    """Runs kernels through pycuda, in the primary context that torch uses.

    It lets go of that context when it is freed, so a process keeps one for each device: :func:`launcher_for`.

    Args:
        device: a CUDA device.

    Raises:
        RuntimeMismatchError: no pycuda, no driver, or a GPU that is too old.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pycuda.driver as driver
        except ImportError as error:
            raise RuntimeMismatchError(f"pycuda cannot be imported ({error}); pip install pycuda") from error
        self._driver = driver
        self.device = torch.device("cuda", _index(device))
        capability = torch.cuda.get_device_capability(self.device)
        if capability < MIN_CAPABILITY:
            raise RuntimeMismatchError(
                f"this GPU is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or newer"
            )
        self.arch = f"sm_{capability[0]}{capability[1]}"
        torch.empty(1, device=self.device)  # torch makes the primary context first
        try:
            driver.init()
            self._context = driver.Device(self.device.index).retain_primary_context()
        except driver.Error as error:
            raise RuntimeMismatchError(f"the CUDA driver refuses: {_line(error)}") from error
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._functions: dict[tuple[str, tuple[str, ...], str], Any] = {}
        self._constants: dict[tuple[str, tuple[str, ...], str], int] = {}
        self._side: tuple[Any, torch.cuda.Stream] | None = None

    @cached_property
    def multiprocessors(self) -> int:
        """Of the device."""
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @cached_property
    def shared_limit(self) -> int:
        """Of the device, for blocks that ask for more than the default."""
        attribute = self._driver.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        return int(self._driver.Device(self.device.index).get_attribute(attribute))

    def _module(self, source: str, defines: tuple[str, ...]) -> Any:
        key = (source, defines)
        if key not in self._modules:
            self._modules[key] = self._load(source, defines)
        return self._modules[key]

    def _load(self, source: str, defines: tuple[str, ...]) -> Any:
        try:
            return self._load_code(compile_cubin(source, defines, self.arch, cache_folder()))
        except self._driver.Error:  # a damaged file in the cache would be refused likewise
            code = compile_cubin(source, defines, self.arch, cache_folder(), fresh=True)
        try:
            return self._load_code(code)
        except self._driver.Error as error:
            raise RuntimeMismatchError(
                f"the driver does not take what nvcc made of {source} ({_line(error)}); "
                "install a newer driver, or an older CUDA toolkit"
            ) from error

    def _load_code(self, code: bytes) -> Any:
        self._context.push()
        try:
            return self._driver.module_from_buffer(code)
        finally:
            self._context.pop()

    def prepare(self, source: str) -> None:
        """Compile and load a source that has no variants.

        Raises:
            RuntimeMismatchError: it cannot be compiled or loaded.
        """
        self._module(source, ())

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        """An ``int`` that the compiled ``source`` declares."""
        key = (source, defines, name)
        if key not in self._constants:
            module = self._module(source, defines)
            value = bytearray(4)
            self._context.push()
            try:
                self._driver.memcpy_dtoh(value, module.get_global(name)[0])
            finally:
                self._context.pop()
            self._constants[key] = int.from_bytes(value, "little", signed=True)
        return self._constants[key]

    def _function(self, source: str, defines: tuple[str, ...], kernel: str, size: int) -> Any:
        key = (source, defines, kernel)
        if key not in self._functions:
            function = self._module(source, defines).get_function(kernel)
            function.prepare([f"{size}s"])
            self._functions[key] = function
        return self._functions[key]

    def launch(
        self,
        source: str,
        defines: tuple[str, ...],
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
    ) -> None:
        """See :class:`Launcher`."""
        driver = self._driver
        with torch.cuda.device(self.device):
            function = self._function(source, defines, kernel, ctypes.sizeof(params))
            if shared_bytes > _DEFAULT_SHARED:
                function.set_attribute(driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            current = torch.cuda.current_stream(self.device)
            block = (threads, 1, 1)
            try:
                if current.cuda_stream == 0:
                    # The legacy default stream is the same for both libraries.
                    function.prepared_async_call(grid, block, None, bytes(params), shared_size=shared_bytes)
                    return
                own, seen_by_torch = self._side_stream()
                seen_by_torch.wait_stream(current)
                function.prepared_async_call(grid, block, own, bytes(params), shared_size=shared_bytes)
                current.wait_stream(seen_by_torch)
            except driver.Error as error:
                raise RuntimeMismatchError(f"{kernel} could not be launched: {_line(error)}") from error

    def _side_stream(self) -> tuple[Any, torch.cuda.Stream]:
        """A stream of pycuda's, and the same as torch sees it: pycuda cannot adopt torch's, but torch pycuda's."""
        if self._side is None:
            self._context.push()
            try:
                own = self._driver.Stream()
            finally:
                self._context.pop()
            self._side = own, torch.cuda.ExternalStream(own.handle, device=self.device)
        return self._side


_launchers: dict[int, PyCudaLauncher] = {}
_making = Lock()


def launcher_for(device: torch.device) -> PyCudaLauncher:
    """The launcher of a CUDA device: one for the process, so that modules are loaded once.

    Raises:
        RuntimeMismatchError: no pycuda, no driver, or a GPU that is too old.
    """
    with _making:
        index = _index(device)
        if index not in _launchers:
            _launchers[index] = PyCudaLauncher(device)
        return _launchers[index]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _line(error: Exception) -> str:
    """The first line of a message: the driver adds its log."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
