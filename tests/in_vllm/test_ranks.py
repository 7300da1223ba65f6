"""Two ranks that divide key-value heads, and two replicas that divide requests, give the result of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import GIB, engine, generated
from models_zoo import token_ids

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]
PROMPTS = [token_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (300, 37, 260)]


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


def test_two_ranks_and_two_replicas_generate_what_one_process_generates(tiny_folder, tiny_artifact):
    one, two = (list(likelihoods(tiny_folder, tiny_artifact, ranks)) for ranks in (1, 2))
    for (ids, nll), (same_ids, same_nll) in zip(one, two, strict=True):
        assert ids == same_ids
        assert abs(nll - same_nll) < 1e-4
    assert asyncio.run(from_replicas(tiny_folder, tiny_artifact, 2)) == [ids for ids, _ in one]
