"""The benchmarks of vLLM run on a tiny model, so that they cannot rot. The soak is a whole one, of 500 requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import save
from models_zoo import tiny_model

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
from artifact_factory import artifact_for, recipe, trellis

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]


BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model with as many tokens as the benchmarks draw, and an artifact."""
    model = tiny_model("llama", vocab_size=40960, head_dim=64)
    folder = tmp_path_factory.mktemp("tiny")
    save(model, folder)
    file = tmp_path_factory.mktemp("artifact") / "tiny.kvq.safetensors"
    artifact_for(model, recipe(key=trellis(4), value=trellis(4))).save(file)
    return str(folder), str(file)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(name: str, monkeypatch: pytest.MonkeyPatch, output: Path, *words: str) -> dict[str, Any]:
    module = __import__(name)
    monkeypatch.setattr(sys, "argv", [name, *words, "--json", str(output)])
    assert not module.main()
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_soak(tiny, tmp_path):
    """In a process of its own: it judges the growth of memory."""
    output = tmp_path / "soak.json"
    words = [tiny[0], "--artifact", tiny[1], "--requests", "500", "--json", str(output)]
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / "vllm_soak.py", *words], capture_output=True, text=True
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    found = json.loads(output.read_text())
    assert found["finished"] + found["cancelled"] == 500
    assert found["free_pages"] == found["pages"]
    assert found["from prefixes"] > 50
    assert min(found["cancelled"], found["preemptions"]) > 5


def test_attention(tiny, monkeypatch, tmp_path):
    words = ["--artifact", tiny[1], "--requests", "2", "--tokens", "300", "--steps", "2"]
    found = run("vllm_attention", monkeypatch, tmp_path / "attention.json", *words)
    assert list(found["rows"]) == ["tiny", "vLLM's own, bfloat16", "vLLM's own, float32"]
    assert all(0 < row["mean_ms"] <= row["longest_ms"] for row in found["rows"].values())


def test_serving(tiny, monkeypatch, tmp_path):
    import vllm_serving

    monkeypatch.setattr(
        vllm_serving, "run", lambda row: {**vllm_serving.known(row), **vllm_serving.measure(row)}
    )
    words = [
        *(tiny[0], "--artifact", tiny[1], "--memory", "0.1"),
        *("--requests", "2", "--tokens", "300", "--new", "2"),
    ]
    words += ["--pressed", "0.01", "2", "16", "300"]
    found = run("vllm_serving", monkeypatch, tmp_path / "serving.json", *words)
    assert [(row["name"], row["scenario"]) for row in found["rows"]] == [
        (name, scenario) for scenario in ("decode", "pressed") for name in ("auto", "tiny")
    ]
    again = run("vllm_serving", monkeypatch, tmp_path / "serving.json", *words)
    assert again == found
