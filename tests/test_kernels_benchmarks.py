"""The GPU benchmarks, as far as they run without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from models_zoo import tiny_model
from shim.host import HostLauncher, compiler

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.model.compat import with_cache

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a script by its file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return by_name


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_the_check_before_timing(load, monkeypatch) -> None:
    kernels = load("kernels_gpu")

    monkeypatch.setattr(kernels, "SHAPES", {"small": kernels.Shape(32, 8, 64)})
    chosen = {name: kernels.RECIPES[name] for name in ("nuq3-1p", "kvq3")}
    monkeypatch.setattr(kernels, "RECIPES", chosen)
    launcher = HostLauncher()
    kernels.check(launcher, torch.device("cpu"))
    assert "decode_attention" in launcher.launches


@pytest.mark.model
@pytest.mark.parametrize("recipe", ["nuq3-1p", "kvq4"])
def test_the_caches_that_are_compared(load, recipe) -> None:
    from kvq_calib.runtime import KVQCache

    generate_gpu = load("generate_gpu")
    model = tiny_model("llama")
    artifact = KVArtifact.from_bytes(
        generate_gpu.build_artifact(model, generate_gpu.RECIPES[recipe]).to_bytes()
    )
    cache = KVQCache(artifact, model)
    generate_gpu.fill(cache, model, 300, torch.device("cpu"))
    assert cache.get_seq_length() == 300
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64), **with_cache(cache))


@pytest.mark.parametrize("name", ["kernels_gpu", "generate_gpu"])
def test_without_a_gpu_nothing_is_claimed(name, load, monkeypatch, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    module = load(name)
    monkeypatch.setattr(sys, "argv", [name])
    assert module.main() == 1
    assert "nothing was measured" in capsys.readouterr().err
