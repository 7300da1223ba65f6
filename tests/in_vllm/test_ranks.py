"""Two ranks that divide key-value heads give the result of one, in an engine with two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import engine, generated, save
from models_zoo import tiny_model, token_ids

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
from artifact_factory import artifact_for, recipe, trellis

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]
#: Thresholds of channels: a rank quantizes its heads as the whole does (``artifact/shard.py``). Nothing compensates
#: errors, so that rounding moves a code now and then and nothing else.
RECIPE = recipe(key=trellis(4, pair_rotation=True), value=trellis(4))
PROMPTS = [token_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (300, 37, 260)]


@pytest.fixture(scope="module")
def model() -> Any:
    """Eight query heads and four key-value heads."""
    return tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=128)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    save(model, made)
    return made


def likelihoods(folder: Path, artifact: Path, ranks: int) -> Iterator[tuple[list[int], float]]:
    """Of what is generated after each prompt."""
    options = {"skip_tokenizer_init": True, "tensor_parallel_size": ranks, "max_model_len": 512}
    with engine(folder, artifact, **options) as llm:
        for ids, nll, _ in generated(llm, PROMPTS, 40):
            yield ids, nll


def test_two_ranks_generate_what_one_generates(model, folder, tmp_path):
    artifact = tmp_path / "tiny.kvq.safetensors"
    artifact_for(model, RECIPE).save(artifact)
    one, two = (list(likelihoods(folder, artifact, ranks)) for ranks in (1, 2))
    for (ids, nll), (same_ids, same_nll) in zip(one, two, strict=True):
        assert ids == same_ids
        assert abs(nll - same_nll) < 1e-4
