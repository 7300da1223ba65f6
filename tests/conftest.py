"""Settings for all tests: no network, one thread, quiet libraries."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import pytest
import torch
from models_zoo import tiny_tokenizer
from native_factory import libraries  # noqa: F401  a fixture
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from kvq_calib.native.loader import library

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that adds no beginning-of-sequence token."""
    return tiny_tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer, adding a beginning-of-sequence token."""
    return tiny_tokenizer(bos=True)


@pytest.fixture(scope="module")
def importable_benchmarks() -> Iterator[None]:
    """Scripts of benchmarks/ import each other by name, as they do when they run."""
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(params=["native", "torch"])
def each_cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What caches on the CPU use: the native kernels, and the operations of torch."""
    if request.param == "native" and library() is None:
        pytest.skip("no native library is there")
    monkeypatch.setenv("KVQ_CALIB_OPS", request.param)
    backend: str = request.param
    return backend
