"""Tests inside vLLM: an engine in this process, which starts in seconds. ``make test-vllm`` runs them."""

from __future__ import annotations

import os

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else the process is tied to cores that others may use
os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "3"  # processes of ranks wait for as long
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over what the tests say

from pathlib import Path

import pytest
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
