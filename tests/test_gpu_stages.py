"""What runs on the first GPU, rehearsed: the stages with a stand-in for Python, the benchmarks on a pretended GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pretended.device import pretended_cuda
from pretended.drivers import Machine, installed, write_nvcc
from shim.host import compiler

from kvq_calib.runtime.cuda import launcher as launchers

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
#: In the place of Python: writes the file that a step is to write, fails in one step and hangs in another.
STAND_IN = """#!/bin/sh
case "$*" in
  *kernels_gpu.py*--check-only*) echo "off by 1"; exit 1;;
  *generate_gpu.py*) sleep 60;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    --json) echo '{}' > "$2";;
    --junitxml=*) echo '<x/>' > "${1#--junitxml=}";;
    *launcher.json) echo '{}' > "$1";;
  esac
  shift
done
echo done
"""


@pytest.fixture
def load(monkeypatch):
    """Import a script of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return by_name


def test_stages_write_what_they_have(load, monkeypatch, tmp_path) -> None:
    """A step that fails or hangs does not stop those behind it, and is named."""
    stages = load("gpu_stages")
    script, out = tmp_path / "stand-in", tmp_path / "out"
    script.write_text(STAND_IN)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    steps_of = stages.steps_of

    def hurried(stage, arguments):
        return [
            stages.dataclasses.replace(step, seconds=0.5 if step.name == "generate" else step.seconds)
            for step in steps_of(stage, arguments)
        ]

    monkeypatch.setattr(stages, "steps_of", hurried)
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    monkeypatch.setattr(stages, "BUNDLE", tmp_path / "bundle")
    command = ["gpu_stages.py", "1", "2", "--out", str(out), "--interpreter", str(script)]
    monkeypatch.setattr(sys, "argv", command)
    assert stages.main() == 1
    first, second = (json.loads((out / f"stage-{stage}.json").read_text()) for stage in (1, 2))
    assert [(step["step"], step["status"]) for step in first["steps"] + second["steps"]] == [
        ("launcher", "passed"),
        ("tests", "passed"),
        ("check", "failed: exit status 1"),
        ("headline", "passed"),
        ("memcheck", "left out: no compute-sanitizer"),
        ("racecheck", "left out: no compute-sanitizer"),
        ("sweep", "passed"),
        ("generate", "stopped after 0 seconds"),
        ("profile-nuq3-1p", "left out: no ncu"),
        ("profile-kvq3", "left out: no ncu"),
    ]
    assert first["steps"][2]["last_lines"] == ["off by 1"]
    assert {"launcher.json", "tests.xml", "tests.log", "headline.json", "sweep.json"} <= {
        file.name for file in out.iterdir()
    }


def test_stages_fit_into_their_time(load, tmp_path) -> None:
    stages = load("gpu_stages")
    arguments = stages.argparse.Namespace(interpreter="python", out=tmp_path, tests=["tests"], small=False)
    for stage, minutes in ((1, 8), (2, 5)):
        assert sum(step.seconds for step in stages.steps_of(stage, arguments)) <= 60 * minutes


def test_wheels_of_missing_packages_are_unpacked(load, tmp_path) -> None:
    """Without a network. Packages that are there stay as they are."""
    stages = load("gpu_stages")
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name in ("kvq_missing", "pytest"):
        with zipfile.ZipFile(wheels / f"{name}-99-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(
                f"{name}-99.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n"
            )
            tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{name}-99.dist-info/WHEEL", tags)
            wheel.writestr(f"{name}-99.dist-info/RECORD", "")
    assert stages.install_wheels(wheels, site) == ["kvq_missing-99-py3-none-any.whl"]
    assert (site / "kvq_missing.py").exists()
    assert not (site / "pytest.py").exists()
    assert str(site) in stages.surroundings(site)["PYTHONPATH"]


@pytest.mark.skipif(not os.environ.get("KVQ_REHEARSAL"), reason="takes minutes; make gpu-rehearsal")
@pytest.mark.timeout(1800)
def test_the_stages_as_they_will_run(tmp_path) -> None:
    """Every step as a process of its own on the pretended GPU, and what is in the files that it writes."""
    tests = [
        f"tests/test_{name}[cuda]"
        for name in ("kernels.py::test_nothing_visible_is_zero", "kernels_steps.py::test_steps_with_a_window")
    ]
    command = [sys.executable, str(BENCHMARKS / "gpu_stages.py"), "1", "2", "--small", "--out", str(tmp_path)]
    command += ["--interpreter", f"{sys.executable} -m pretended", "--tests", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    def read(name: str):
        return json.loads((tmp_path / f"{name}.json").read_text())

    for stage in (1, 2):
        for step in read(f"stage-{stage}")["steps"]:
            assert step["status"] == "passed" or step["status"].startswith("left out: no "), step
    launcher = read("launcher")
    assert (launcher["gpu"], launcher["driver_package"]) == ("pretended GPU", "cuda-bindings 13.0")
    results = ElementTree.parse(tmp_path / "tests.xml").getroot().find("testsuite")
    assert results is not None
    assert [results.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["2", "0", "0", "0"]
    for name in ("headline", "sweep"):
        found = read(name)
        assert found["complete"]
        assert [row["tokens"] for row in found["rows"]] == [512]
        for recipe in ("nuq3-1p", "kvq3"):
            assert found["rows"][0][recipe]["speedup"] > 0
    generated = read("generate")
    assert generated["complete"]
    assert [row["cache"] for row in generated["rows"]] == ["float16", "nuq3-1p", "kvq3"]
    for row in generated["rows"]:
        assert row["tokens_per_second"] > 0
        assert row["captured_tokens_per_second"] > 0


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    write_nvcc(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("KVQ_CALIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launchers, "_launchers", {})
    machine = Machine()
    with installed(machine, "cuda-bindings"), pretended_cuda():
        yield machine


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_kernels_gpu_writes_a_row_at_a_time(load, monkeypatch, tmp_path, gpu) -> None:
    timing, kernels = load("gpu_timing"), load("kernels_gpu")
    monkeypatch.setattr(timing, "REPEATS", 1)
    monkeypatch.setattr(timing, "WARM_UP", 1)
    small = kernels.Shape(8, 2, 64)
    monkeypatch.setattr(kernels, "SHAPES", {"small": small})
    result = tmp_path / "out" / "kernels.json"
    options = [
        "--models",
        "small",
        "--lengths",
        "256",
        "512",
        "--batches",
        "2",
        "--recipes",
        "nuq3-1p",
        "kvq3",
    ]
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py", "--json", str(result), *options])
    assert kernels.main() == 0
    found = json.loads(result.read_text())
    assert found["complete"]
    assert (found["gpu"], found["driver"]) == ("pretended GPU", "cuda-bindings 13.0")
    assert [row["tokens"] for row in found["rows"]] == [256, 512]
    for row in found["rows"]:
        assert row["float16"]["fastest"] in row["float16"]
        assert set(row["float16"]) == {*timing.BACKENDS, "matvec", "fastest"}
        for recipe in ("nuq3-1p", "kvq3"):
            assert row[recipe]["seconds"] > 0
            assert row[recipe]["append_seconds_per_token"] > 0
            assert 0 < row[recipe]["bytes"] < small.cache_bytes(row["tokens"], 2, 16)
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py", "--json", str(result), "--budget", "-1", *options])
    assert kernels.main() == 0
    found = json.loads(result.read_text())
    assert (found["complete"], found["rows"]) == (False, [])


@pytest.mark.model
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_generate_gpu_writes_a_row_at_a_time(load, monkeypatch, tmp_path, gpu) -> None:
    generate = load("generate_gpu")
    monkeypatch.setattr(generate, "WARM_UP", 1)
    monkeypatch.setattr(generate, "TOKENS", 2)
    result = tmp_path / "out" / "generate.json"
    options = ["--model", "tiny", "--lengths", "96", "64", "--recipes", "nuq3-1p"]
    monkeypatch.setattr(sys, "argv", ["generate_gpu.py", "--json", str(result), *options])
    assert generate.main() == 0
    found = json.loads(result.read_text())
    assert found["complete"]
    assert [(row["cache"], row["tokens"]) for row in found["rows"]] == [
        ("float16", 96),
        ("nuq3-1p", 96),
        ("float16", 64),
        ("nuq3-1p", 64),
    ]
    for row in found["rows"]:
        assert row["tokens_per_second"] > 0
        assert row["captured_tokens_per_second"] > 0
    assert [row.get("backend") for row in found["rows"]] == [None, "cuda", None, "cuda"]
