"""Launch kernels on a GPU. ``docs/reference/kernels.md`` describes streams and context."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import torch

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.build import cache_folder, compile_cubin
from kvq_calib.runtime.cuda.drivers import Driver, DriverError, make_driver

__all__ = ["GpuLauncher", "Kernel", "Launcher", "launcher_for"]

#: Oldest architecture that the kernels support.
MIN_CAPABILITY = (8, 0)
#: Default limit on the shared memory of a thread block.
_DEFAULT_SHARED = 48 * 1024

#: Enqueues a kernel on torch's current stream, given its grid, threads per block, shared bytes and parameters. It may
#: raise RuntimeMismatchError.
Kernel = Callable[[tuple[int, int, int], int, int, ctypes.Structure], None]


class Launcher(Protocol):
    """Runs kernels: on a GPU, or in tests on the host."""

    @property
    def multiprocessors(self) -> int:
        """Number of multiprocessors."""

    @property
    def shared_limit(self) -> int:
        """Largest shared memory of a thread block, in bytes."""

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        """An ``int`` that the compiled ``source`` declares."""

    def kernel(
        self, source: str, defines: tuple[str, ...], name: str, params: type[ctypes.Structure]
    ) -> Kernel:
        """Kernel ``name`` of ``kernels/cuda/<source>``, compiled with ``-D`` ``defines``. It takes ``params``."""


class GpuLauncher:
    """Runs kernels on a GPU, in the primary context that torch uses.

    A process has one per device (:func:`launcher_for`), so modules are loaded once.

    Args:
        device: a CUDA device.

    Raises:
        RuntimeMismatchError: the driver or a package to call it is missing, or the GPU is too old.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", _index(device))
        capability = torch.cuda.get_device_capability(self.device)
        if capability < MIN_CAPABILITY:
            raise RuntimeMismatchError(
                f"this GPU is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or newer"
            )
        self.arch = f"sm_{capability[0]}{capability[1]}"
        torch.empty(1, device=self.device)  # torch has to create the primary context
        self.driver: Driver = make_driver(self.device)
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._kernels: dict[tuple[str, tuple[str, ...], str], Kernel] = {}

    @cached_property
    def multiprocessors(self) -> int:
        """Number of multiprocessors of the device."""
        return int(torch.cuda.get_device_properties(self.device).multi_processor_count)

    @property
    def shared_limit(self) -> int:
        """Largest shared memory of a thread block on this device, in bytes."""
        return self.driver.shared_limit

    def _module(self, source: str, defines: tuple[str, ...]) -> Any:
        key = (source, defines)
        if key not in self._modules:
            self._modules[key] = self._load(source, defines)
        return self._modules[key]

    def _load(self, source: str, defines: tuple[str, ...]) -> Any:
        try:
            return self.driver.load(compile_cubin(source, defines, self.arch, cache_folder()))
        except DriverError as error:  # a damaged file in the cache gives this error too
            refused = error
        try:
            return self.driver.load(compile_cubin(source, defines, self.arch, cache_folder(), fresh=True))
        except DriverError as error:
            raise RuntimeMismatchError(
                f"the driver cannot load {source} as compiled by nvcc ({error}); "
                "install a newer driver, or an older CUDA toolkit"
            ) from error
        except RuntimeMismatchError as error:
            raise RuntimeMismatchError(
                f"the driver cannot load the compiled {source} ({refused}), and {error}"
            ) from error

    def prepare(self, source: str) -> None:
        """Compile and load a source that has no variants.

        Raises:
            RuntimeMismatchError: it cannot be compiled or loaded.
        """
        self._module(source, ())

    def constant(self, source: str, defines: tuple[str, ...], name: str) -> int:
        """See :class:`Launcher`."""
        try:
            return self.driver.integer(self._module(source, defines), name)
        except DriverError as error:
            raise RuntimeMismatchError(f"{source} has no {name} ({error})") from error

    def kernel(
        self, source: str, defines: tuple[str, ...], name: str, params: type[ctypes.Structure]
    ) -> Kernel:
        """See :class:`Launcher`."""
        key = (source, defines, name)
        if key not in self._kernels:
            try:
                function = self.driver.function(self._module(source, defines), name, ctypes.sizeof(params))
            except DriverError as error:
                raise RuntimeMismatchError(f"{source} has no {name} ({error})") from error
            self._kernels[key] = self._launching(name, function)
        return self._kernels[key]

    def _launching(self, name: str, function: Any) -> Kernel:
        allowed = _DEFAULT_SHARED
        driver, device = self.driver, self.device

        def launch(
            grid: tuple[int, int, int], threads: int, shared_bytes: int, params: ctypes.Structure
        ) -> None:
            nonlocal allowed
            try:
                with torch.cuda.device(device):
                    if shared_bytes > allowed:
                        driver.allow_shared(function, shared_bytes)
                        allowed = shared_bytes
                    stream = torch.cuda.current_stream(device).cuda_stream
                    driver.launch(function, grid, threads, shared_bytes, params, stream)
            except DriverError as error:
                raise RuntimeMismatchError(f"{name} could not be launched: {error}") from error

        return launch


_launchers: dict[int, GpuLauncher] = {}
_making = Lock()


def launcher_for(device: torch.device) -> GpuLauncher:
    """The launcher of a CUDA device, the same for the whole process.

    Raises:
        RuntimeMismatchError: the driver or a package to call it is missing, or the GPU is too old.
    """
    with _making:
        index = _index(device)
        if index not in _launchers:
            _launchers[index] = GpuLauncher(device)
        return _launchers[index]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
