"""The launcher over PyCUDA and over cuda-bindings, with pretended ones (``pretended/``)."""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Iterator

import pytest
import torch
from artifact_factory import RECIPES
from pretended.device import State, Stream, pretended_cuda
from pretended.drivers import Machine, installed, write_nvcc
from shim.host import compiler
from test_kernels import Layer, assert_same_pages, geometry

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda import build
from kvq_calib.runtime.cuda import launcher as launchers
from kvq_calib.runtime.cuda.append import append_blocks
from kvq_calib.runtime.cuda.decode import DecodeVariant
from kvq_calib.runtime.cuda.launcher import GpuLauncher, launcher_for
from kvq_calib.runtime.cuda.ops import make_cuda_ops
from kvq_calib.runtime.cuda.structs import DequantizeParams
from kvq_calib.runtime.storage import LayerStorage

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

GPU = torch.device("cuda", 0)
PACKAGES = ["pycuda", "cuda-bindings"]


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[types.SimpleNamespace]:
    """A GPU, nvcc and a cache folder; no Python package that speaks to the driver."""
    write_nvcc(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("KVQ_CALIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launchers, "_launchers", {})
    machine = Machine()
    with pretended_cuda():
        yield types.SimpleNamespace(machine=machine, folder=tmp_path, cache=tmp_path / "cache")


def started(gpu, *packages: str) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(installed(gpu.machine, *packages))
    return stack


@pytest.mark.parametrize("package", PACKAGES)
def test_kernels_run(gpu, package) -> None:
    """Blocks are packed on the pretended GPU, and are those of torch."""
    with started(gpu, package):
        runs = GpuLauncher(GPU)
        assert runs.driver.name.startswith(package)
        assert (runs.arch, runs.multiprocessors, runs.shared_limit) == ("sm_90", 132, 232_448)
        layer = Layer(
            types.SimpleNamespace(launcher=runs, device=GPU), RECIPES["nuq4-1p"], geometry(64, 2, 1)
        )
        ours, theirs = (LayerStorage(layer.key, layer.value, 1, 0, GPU) for _ in range(2))
        for _ in range(2):
            tokens = [layer.tokens(kind, 1, 64) for kind in ("key", "value")]
            append_blocks(runs, *layer.tables, ours, *tokens)
            layer.torch.pack(theirs, *tokens)
        assert_same_pages(ours.key, theirs.key)
        assert_same_pages(ours.value, theirs.value)
    notes = gpu.machine.notes
    assert notes.count(("load",)) == 1
    assert {note[-1] for note in notes if note[0] == "launch"} == {0}
    assert gpu.machine.pushed == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_constants_and_shared_memory(gpu, package) -> None:
    defines = DecodeVariant(64, 4, 3, 3, outliers=False).defines
    with started(gpu, package):
        runs = GpuLauncher(GPU)
        assert runs.constant("decode.cu", defines, "decode_shared_bytes") > 10_000
        kernel = runs.kernel("dequantize.cu", (), "dequantize_blocks", DequantizeParams)
        assert runs.kernel("dequantize.cu", (), "dequantize_blocks", DequantizeParams) is kernel
        params = DequantizeParams(pages=1)
        with pytest.raises(RuntimeMismatchError, match=r"dequantize_blocks could not be launched: .*INVALID"):
            kernel((0, 1, 1), 128, 60 << 10, params)
        with pytest.raises(RuntimeMismatchError, match="could not be launched"):
            kernel((0, 1, 1), 128, 60 << 10, params)
    allowed = [note for note in gpu.machine.notes if note[0] == "allow"]
    assert allowed == [("allow", "dequantize_blocks", 60 << 10)]  # once is enough


def launched_on(gpu, package: str, monkeypatch) -> list[object]:
    """What happens to streams around a launch on a stream that is not the default."""
    order: list[object] = []
    monkeypatch.setattr(State, "stream", Stream(5))
    monkeypatch.setattr(
        Stream, "wait_stream", lambda self, other: order.append((self.cuda_stream, other.cuda_stream))
    )
    with started(gpu, package):
        runs = GpuLauncher(GPU)
        kernel = runs.kernel("dequantize.cu", (), "dequantize_blocks", DequantizeParams)
        monkeypatch.setattr(gpu.machine, "launch", lambda *call: order.append(call[-1]))
        kernel((1, 1, 1), 128, 0, DequantizeParams())
    return order


def test_pycuda_launches_between_events_of_the_current_stream(gpu, monkeypatch) -> None:
    assert launched_on(gpu, "pycuda", monkeypatch) == [(77, 5), 77, (5, 77)]


def test_cuda_bindings_launch_on_the_current_stream(gpu, monkeypatch) -> None:
    assert launched_on(gpu, "cuda-bindings", monkeypatch) == [5]


def test_pycuda_is_the_first(gpu) -> None:
    with started(gpu, *PACKAGES):
        assert GpuLauncher(GPU).driver.name == "pycuda 2026.1"


def test_no_package_speaks_to_the_driver(gpu) -> None:
    with started(gpu), pytest.raises(RuntimeMismatchError, match="pip install cuda-bindings") as caught:
        GpuLauncher(GPU)
    assert "\n" not in str(caught.value)


def test_an_old_gpu(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with (
        started(gpu, "pycuda"),
        pytest.raises(RuntimeMismatchError, match=r"this GPU is sm_75; .* need sm_80"),
    ):
        GpuLauncher(GPU)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_damaged_file_is_compiled_anew(gpu, package) -> None:
    with started(gpu, package):
        GpuLauncher(GPU).prepare("append.cu")
        (file,) = gpu.cache.iterdir()
        good = file.read_bytes()
        file.write_bytes(b"damaged")
        GpuLauncher(GPU).prepare("append.cu")
        assert file.read_bytes() == good
    assert gpu.machine.pushed == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_a_driver_older_than_the_toolkit(gpu, package, monkeypatch) -> None:
    with started(gpu, package):
        runs = GpuLauncher(GPU)
        runs.prepare("append.cu")
        (file,) = gpu.cache.iterdir()
        gpu.machine.refuses.add(file.read_bytes())
        with pytest.raises(RuntimeMismatchError, match=r"UNSUPPORTED.*install a newer driver") as caught:
            GpuLauncher(GPU).prepare("append.cu")
        assert "\n" not in str(caught.value)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
        with pytest.raises(RuntimeMismatchError, match=r"UNSUPPORTED.*, and no nvcc on the PATH"):
            GpuLauncher(GPU).prepare("append.cu")


def test_a_process_has_one_launcher_for_each_device(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with started(gpu, "pycuda"):
        first, second = launcher_for(torch.device("cuda", 0)), launcher_for(torch.device("cuda"))
        assert launcher_for(torch.device("cuda", 0)) is first
        assert launcher_for(torch.device("cuda", 1)) is second is not first
        assert (first.device.index, second.device.index) == (0, 1)
    assert [note for note in gpu.machine.notes if note[0] == "device"] == [("device", 0), ("device", 1)]


def test_no_gpu() -> None:
    with pytest.raises(RuntimeMismatchError, match="there is no CUDA device"):
        make_cuda_ops([], torch.device("cpu"))


def test_the_real_cuda_bindings_have_the_functions() -> None:
    """By their names: without a driver none can be called."""
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in (
        *("cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"),
        *("cuCtxPopCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuModuleGetGlobal", "cuMemcpyDtoH"),
        *("cuFuncSetAttribute", "cuLaunchKernel"),
    ):
        assert callable(getattr(driver, name))
    assert ctypes.sizeof(ctypes.c_void_p) == 8
