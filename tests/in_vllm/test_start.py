"""How many tokens fit, and what is refused when vLLM starts. The weights do not matter here, so they are not loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from engine import engine

from kvq_calib.errors import KVQError

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]


def tokens_that_fit(folder: Path, artifact: Path | None, longest: int) -> int:
    """The number in vLLM's line about the size of its cache."""
    with engine(folder, artifact, dtype="bfloat16", max_model_len=longest, load_format="dummy") as llm:
        return int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)


def test_more_tokens_fit(folder, committed):
    auto = tokens_that_fit(folder, None, 2048)
    found = {
        (name, longest): tokens_that_fit(folder, committed / f"{name}.kvq.safetensors", longest) / auto
        for name, longest in (("kvq3", 2048), ("kvq2", 2048), ("kvq3", 8192))
    }
    print("tokens that fit, against bfloat16:", found)
    assert found["kvq3", 2048] >= 4.1
    assert found["kvq2", 2048] >= 5.5
    assert found["kvq3", 8192] > found["kvq3", 2048]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nuq4-1p", {}, "keeps outliers"),
        ("kvq3", {"block_size": 16}, "--block-size is 16"),
        ("kvq3", {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype is 'fp8"),
        ("kvq3", {"additional_config": {}}, "needs an artifact"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(folder, committed, name, options, words):
    known: dict[str, Any] = {
        "attention_backend": "CUSTOM",
        "additional_config": {"kvq_artifact": str(committed / f"{name}.kvq.safetensors")},
    }
    with pytest.raises(KVQError, match=re.escape(words)), engine(folder, None, **{**known, **options}):
        pass
