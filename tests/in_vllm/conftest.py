"""Tests inside vLLM: an engine in this process, which starts in seconds. ``make test-vllm`` runs them."""

from __future__ import annotations

import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else the process is tied to cores that others may use
os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "3"  # processes of ranks wait for as long
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over what the tests say

from pathlib import Path
from typing import Any

import pytest
from artifact_factory import artifact_for, recipe, trellis
from models_zoo import tiny_model
from transformers.utils import logging

logging.disable_progress_bar()


@pytest.fixture(scope="session")
def real_model() -> str:
    """What ``make test-vllm`` downloads, SmolLM2-135M."""
    found = os.environ.get("KVQ_TEST_MODEL", "")
    if not found:
        pytest.skip("KVQ_TEST_MODEL names no model; make test-vllm does")
    return found


@pytest.fixture(scope="session")
def committed() -> Path:
    """Folder of its artifacts."""
    return Path(__file__).parent.parent.parent / "benchmarks" / "artifacts" / "smollm2-135m-wikitext2"


@pytest.fixture(scope="session")
def folder(real_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as vLLM reads it."""
    from engine import folder_of

    made = tmp_path_factory.mktemp("model")
    folder_of(real_model, made)
    return made


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A model of random weights with eight query heads and four key-value heads."""
    return tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=128, head_dim=64)


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as vLLM reads it."""
    from engine import save

    made = tmp_path_factory.mktemp("tiny")
    save(tiny_llama, made)
    return made


@pytest.fixture(scope="session")
def tiny_artifact(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for it. Thresholds are of channels, so a rank quantizes its heads as the whole does
    (``artifact/shard.py``). Nothing compensates errors: rounding moves a code now and then, and nothing else.
    """
    file = tmp_path_factory.mktemp("artifact") / "tiny.kvq.safetensors"
    spec = recipe(key=trellis(4, pair_rotation=True), value=trellis(4))
    artifact_for(tiny_llama, spec).save(file)
    return file
