"""What runs on the first GPU, rehearsed: the stages with a stand-in for Python, the benchmarks on a pretended GPU."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from pathlib import Path

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
