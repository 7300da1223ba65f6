"""Two ranks that divide key-value heads, and two replicas that divide requests, give the result of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import GIB, engine, generated, save
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


@pytest.fixture(scope="module")
def artifact(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("artifact") / "tiny.kvq.safetensors"
    artifact_for(model, RECIPE).save(file)
    return file


def options(artifact: Path, **more: Any) -> dict[str, Any]:
    """Of an engine for the tiny model."""
    packed = {"attention_backend": "CUSTOM", "additional_config": {"kvq_artifact": str(artifact)}}
    return {**packed, "skip_tokenizer_init": True, "max_model_len": 512, **more}


def likelihoods(folder: Path, artifact: Path, ranks: int) -> Iterator[tuple[list[int], float]]:
    """Of what is generated after each prompt."""
    with engine(folder, None, **options(artifact, tensor_parallel_size=ranks)) as llm:
        for ids, nll, _ in generated(llm, PROMPTS, 40):
            yield ids, nll


async def from_replicas(folder: Path, artifact: Path, replicas: int) -> list[list[int]]:
    """What is generated after each prompt, in turns by one replica and another."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    known = options(artifact, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=GIB // 4)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(folder), data_parallel_size=replicas, **known))
    asked = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)

    async def generate(number: int) -> list[int]:
        given = {"prompt_token_ids": PROMPTS[number]}
        place = {"request_id": str(number), "data_parallel_rank": number % replicas}
        found: list[int] = []
        async for output in llm.generate(given, asked, **place):
            found = list(output.outputs[0].token_ids)
        return found

    try:
        return await asyncio.gather(*map(generate, range(len(PROMPTS))))
    finally:
        llm.shutdown()


def test_two_ranks_and_two_replicas_generate_what_one_process_generates(folder, artifact):
    one, two = (list(likelihoods(folder, artifact, ranks)) for ranks in (1, 2))
    for (ids, nll), (same_ids, same_nll) in zip(one, two, strict=True):
        assert ids == same_ids
        assert abs(nll - same_nll) < 1e-4
    assert asyncio.run(from_replicas(folder, artifact, 2)) == [ids for ids, _ in one]
