"""Compilation and the compile cache, with a stand-in for nvcc."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import types

import pytest
from shim.host import SHIM, compiler

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda import build
from kvq_calib.runtime.cuda.decode import DecodeVariant

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


def test_without_a_compiler_a_filled_cache_serves(toolchain) -> None:
    """Made on another machine, by any version; but of the same sources and options."""
    for version in ("13.0", "13.1"):
        nvcc = toolchain.install(version)
        made = build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc)
    assert len(list(toolchain.cache.iterdir())) == 2
    newest = max(toolchain.cache.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(b"newest")
    assert build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, "no-such-nvcc") == b"newest"
    assert build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc) in (made, b"newest")
    for other in ({"defines": ("A=1",)}, {"arch": "sm_80"}, {"fresh": True}, {"cache": None}):
        arguments = {"defines": (), "arch": "sm_90", "cache": toolchain.cache} | other
        with pytest.raises(RuntimeMismatchError, match="no nvcc on the PATH"):
            build.compile_cubin("append.cu", nvcc="no-such-nvcc", **arguments)
    with (toolchain.sources / "common.cuh").open("a") as file:
        file.write("// changed\n")
    with pytest.raises(RuntimeMismatchError, match="no nvcc on the PATH"):
        build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, "no-such-nvcc")


def test_nowhere_to_write(toolchain, monkeypatch) -> None:
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    nvcc = toolchain.install()
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", nowhere)
    with pytest.raises(RuntimeMismatchError, match=r"No usable temporary directory found.*set TMPDIR"):
        build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc)


def test_a_folder_that_cannot_be_read_or_written_costs_time_only(toolchain, caplog) -> None:
    nvcc = toolchain.install()
    toolchain.cache.write_text("a file where the folder should be")
    build._say_not_kept.cache_clear()
    for runs in (1, 2):
        assert build.compile_cubin("append.cu", (), "sm_90", toolchain.cache, nvcc)
        assert toolchain.runs() == runs
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiled again in every process" in caplog.text
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
@pytest.mark.parametrize("source", ["append.cu", "dequantize.cu", "step.cu"])
def test_nvcc_takes_the_sources(source, tmp_path) -> None:
    assert build.compile_cubin(source, (), "sm_90", tmp_path).startswith(b"\x7fELF")


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("bits", "outliers"), [(2, True), (3, True), (4, True), (4, False), (0, False)])
def test_recipes_have_twelve_warps_on_a_multiprocessor(bits: int, outliers: bool, tmp_path) -> None:
    """Where it has 228 KiB of shared memory, with heads of 128 channels and up to four query heads for each."""
    unit = tmp_path / "unit.cpp"
    unit.write_text('#include "decode_params.cuh"\nstatic_assert(kWarps * kResidentBlocks == 12, "warps");\n')
    variant = DecodeVariant(128, 4, bits, bits, outliers, bits == 0, bits == 0)
    options = ["-std=c++17", "-fsyntax-only", f"-I{build.kernel_folder()}", f"-I{SHIM}"]
    command = [compiler(), *options, *(f"-D{define}" for define in variant.defines), str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
