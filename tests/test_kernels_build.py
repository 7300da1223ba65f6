"""Compilation, the compile cache and the launcher, with stand-ins for nvcc, pycuda and the GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import sys
import types

import pytest
import torch

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda import build, launcher
from kvq_calib.runtime.cuda.launcher import PyCudaLauncher, launcher_for
from kvq_calib.runtime.cuda.ops import make_cuda_ops

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "release {version}"; exit 0; fi
echo run >> "{log}"
while [ "$1" != -o ]; do last="$1"; shift; done
printf '%s' "$(cat "$last" | wc -c)" > "$2"
{tail}
"""


@pytest.fixture
def toolchain(tmp_path, monkeypatch):
    """A compiler that logs its runs, and a copy of the sources."""
    sources = tmp_path / "kernels"
    shutil.copytree(build.kernel_folder(), sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "kernel_folder", lambda: sources)
    log = tmp_path / "log"

    def install(version: str = "13.0", tail: str = "") -> str:
        script = tmp_path / "nvcc"
        script.write_text(NVCC.format(version=version, log=log, tail=tail))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return str(script)

    def runs() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    return types.SimpleNamespace(install=install, runs=runs, sources=sources, cache=tmp_path / "cache")


def test_the_cache_key_is_all_that_changes_the_result(toolchain) -> None:
    nvcc = toolchain.install()

    def compiled(source="append.cu", defines=(), arch="sm_90"):
        return build.compile_cubin(source, defines, arch, toolchain.cache, nvcc)

    first = compiled()
    assert compiled() == first
    assert toolchain.runs() == 1
    compiled(defines=("A=1",))
    compiled(defines=("A=2",))
    compiled(arch="sm_80")
    compiled("dequantize.cu")
    assert toolchain.runs() == 5
    toolchain.install(version="13.1")
    compiled()
    assert toolchain.runs() == 6
    with (toolchain.sources / "common.cuh").open("a") as file:
        file.write("// changed\n")
    compiled()
    assert toolchain.runs() == 7
    compiled()
    assert toolchain.runs() == 7


def test_a_failed_compilation_leaves_nothing_behind(toolchain) -> None:
    nvcc = toolchain.install(tail='echo "append.cu(3): error: no such thing" >&2; exit 2')
    with pytest.raises(RuntimeMismatchError, match=r"append.cu for sm_90: append.cu\(3\): error") as caught:
        build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc)
    assert "\n" not in str(caught.value)
    assert not toolchain.cache.exists()
    build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, toolchain.install())
    assert toolchain.runs() == 2


def test_half_a_file_is_never_loaded(toolchain) -> None:
    """A compiler that is killed has written half of its output, but never to where the cache looks."""
    nvcc = toolchain.install(tail="kill -9 $$")
    with pytest.raises(RuntimeMismatchError):
        build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc)
    assert not list(toolchain.cache.glob("*.cubin"))
    code = build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, toolchain.install())
    assert code == str(os.path.getsize(toolchain.sources / "append.cu")).encode()


def test_no_compiler(toolchain) -> None:
    with pytest.raises(RuntimeMismatchError, match="no nvcc on the PATH"):
        build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, "no-such-nvcc")


def test_a_folder_that_cannot_be_read_or_written_costs_time_only(toolchain, caplog) -> None:
    nvcc = toolchain.install()
    toolchain.cache.write_text("a file where the folder should be")
    build._say_not_kept.cache_clear()
    for runs in (1, 2):
        assert build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc)
        assert toolchain.runs() == runs
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiled anew in every process" in caplog.text
    assert build.compile_cubin("append.cu", (), "sm_90", None, nvcc)
    assert toolchain.runs() == 3


def test_what_the_cache_has_can_be_compiled_afresh(toolchain) -> None:
    nvcc = toolchain.install()
    first = build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc)
    (file,) = toolchain.cache.iterdir()
    file.write_bytes(b"damaged")
    assert build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc) == b"damaged"
    assert build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc, fresh=True) == first
    assert file.read_bytes() == first


def test_a_compiler_that_cannot_run(toolchain, tmp_path) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/no/such/shell\n")
    script.chmod(0o755)
    with pytest.raises(RuntimeMismatchError, match="broken cannot be run"):
        build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, str(script))


def test_the_cache_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KVQ_CALIB_CACHE", str(tmp_path / "own"))
    assert build.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("KVQ_CALIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "kvq-calib" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", homeless)
    assert build.cache_folder() is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", ["append.cu", "dequantize.cu"])
def test_nvcc_takes_the_sources(source, tmp_path) -> None:
    assert build.compile_cubin(source, (), "sm_90", tmp_path).startswith(b"\x7fELF")


# ---- the launcher, with a pycuda that only takes notes -------------------------------------------------------


class FakeStream:
    handle = 77


@pytest.fixture
def gpu(monkeypatch):
    """A GPU and a pycuda that note what is asked of them."""
    notes: list[tuple] = []

    class Function:
        def prepare(self, types):
            notes.append(("prepare", types))

        def set_attribute(self, attribute, value):
            notes.append(("attribute", attribute, value))

        def prepared_async_call(self, grid, block, stream, data, shared_size):
            notes.append(("launch", grid, block, stream, len(data), shared_size))

    class Module:
        def get_function(self, name):
            return Function()

    class Context:
        def push(self):
            notes.append(("push",))

        def pop(self):
            notes.append(("pop",))

    driver = types.ModuleType("pycuda.driver")
    driver.Error = type("Error", (Exception,), {})
    driver.init = lambda: None
    driver.Device = lambda index: types.SimpleNamespace(retain_primary_context=Context)
    driver.Stream = FakeStream
    driver.module_from_buffer = lambda code: notes.append(("load", code)) or Module()
    driver.function_attribute = types.SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES="most shared")
    package = types.ModuleType("pycuda")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)

    class Stream:
        def __init__(self, handle, device=None):
            self.cuda_stream = handle

        def wait_stream(self, other):
            notes.append(("wait", self.cuda_stream, other.cuda_stream))

    class Nothing:
        def __init__(self, device):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    state = types.SimpleNamespace(
        notes=notes, stream=Stream(0), Stream=Stream, driver=driver, capability=(9, 0)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "device", Nothing)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: None)

    def compile_cubin(*arguments, fresh=False):
        notes.append(("compile", fresh))
        return b"fresh code" if fresh else b"code"

    monkeypatch.setattr(launcher, "compile_cubin", compile_cubin)
    monkeypatch.setattr(launcher, "_launchers", {})
    return state


def test_the_default_stream_is_shared(gpu) -> None:
    runs = PyCudaLauncher(torch.device("cuda", 0))
    assert runs.arch == "sm_90"
    params = ctypes.c_int64(5)
    for _ in range(2):
        runs.launch("append.cu", (), "append_blocks", (1, 2, 3), 64, 100, params)
    launch = ("launch", (1, 2, 3), (64, 1, 1), None, 8, 100)
    assert [note for note in gpu.notes if note[0] in ("launch", "wait")] == [launch, launch]
    assert gpu.notes[:4] == [("compile", False), ("push",), ("load", b"code"), ("pop",)]
    assert sum(note[0] == "load" for note in gpu.notes) == 1
    assert ("prepare", ["8s"]) in gpu.notes
    assert not any(note[0] == "attribute" for note in gpu.notes)


def test_another_current_stream_is_waited_for_and_waits(gpu) -> None:
    runs = PyCudaLauncher(torch.device("cuda", 0))
    gpu.stream = gpu.Stream(5)
    runs.launch("append.cu", (), "append_blocks", (1, 1, 1), 64, 60 * 1024, ctypes.c_int64(5))
    order = [note for note in gpu.notes if note[0] in ("launch", "wait", "attribute")]
    assert [note[0] for note in order] == ["attribute", "wait", "launch", "wait"]
    assert order[0] == ("attribute", "most shared", 60 * 1024)
    assert order[1] == ("wait", 77, 5)
    assert isinstance(order[2][3], FakeStream)
    assert order[3] == ("wait", 5, 77)


def test_an_old_gpu(gpu) -> None:
    gpu.capability = (7, 5)
    with pytest.raises(RuntimeMismatchError, match="this GPU is sm_75; the kernels need sm_80 or newer"):
        PyCudaLauncher(torch.device("cuda", 0))


def test_a_driver_that_refuses(gpu) -> None:
    def refuse():
        raise gpu.driver.Error("cuInit failed: no device")

    gpu.driver.init = refuse
    with pytest.raises(RuntimeMismatchError, match="the CUDA driver refuses: cuInit failed"):
        PyCudaLauncher(torch.device("cuda", 0))


def test_a_launch_that_fails(gpu) -> None:
    runs = PyCudaLauncher(torch.device("cuda", 0))
    runs.launch("append.cu", (), "append_blocks", (1, 1, 1), 64, 0, ctypes.c_int64(5))

    def refuse(*arguments, **options):
        raise gpu.driver.Error("too many resources requested for launch")

    for function in runs._functions.values():
        function.prepared_async_call = refuse
    with pytest.raises(RuntimeMismatchError, match="append_blocks could not be launched: too many resources"):
        runs.launch("append.cu", (), "append_blocks", (1, 1, 1), 64, 0, ctypes.c_int64(5))


def test_a_damaged_file_is_compiled_anew(gpu) -> None:
    load = gpu.driver.module_from_buffer

    def refuse_the_first(code):
        if code == b"code":
            raise gpu.driver.Error("cuModuleLoadDataEx failed: device kernel image is invalid")
        return load(code)

    gpu.driver.module_from_buffer = refuse_the_first
    PyCudaLauncher(torch.device("cuda", 0)).prepare("append.cu")
    assert [note for note in gpu.notes if note[0] in ("compile", "load")] == [
        ("compile", False),
        ("compile", True),
        ("load", b"fresh code"),
    ]
    assert [note[0] for note in gpu.notes].count("push") == [note[0] for note in gpu.notes].count("pop")


def test_a_driver_older_than_the_toolkit(gpu) -> None:
    def refuse(code):
        raise gpu.driver.Error("cuModuleLoadDataEx failed: device kernel image is invalid\nand its log")

    gpu.driver.module_from_buffer = refuse
    with pytest.raises(RuntimeMismatchError, match=r"is invalid\); install a newer driver") as caught:
        PyCudaLauncher(torch.device("cuda", 0)).prepare("append.cu")
    assert "\n" not in str(caught.value)


def test_a_process_has_one_launcher_for_each_device(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    first, second = launcher_for(torch.device("cuda", 0)), launcher_for(torch.device("cuda"))
    assert launcher_for(torch.device("cuda", 0)) is first
    assert launcher_for(torch.device("cuda", 1)) is second is not first
    assert (first.device.index, second.device.index) == (0, 1)


def test_no_pycuda(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(RuntimeMismatchError, match="pip install pycuda"):
        PyCudaLauncher(torch.device("cuda", 0))


def test_no_gpu() -> None:
    with pytest.raises(RuntimeMismatchError, match="there is no CUDA device"):
        make_cuda_ops([], torch.device("cpu"))
