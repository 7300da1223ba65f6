"""vLLM with the packed cache gives the results of ``KVQCache``, and more tokens fit.

Single tokens are not compared. Recipes with error compensation amplify rounding: a change of 1e-6 in the input changes
the log likelihood of single tokens by a tenth. Means over a text hardly change.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import Own, engine, generated, prompt_nll, texts

from kvq_calib.errors import KVQError
from kvq_calib.native.loader import library

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]
#: By which means may differ.
SLACK = 0.01


@pytest.fixture(scope="session")
def own(folder: Path) -> Own:
    return Own(folder)


@pytest.fixture(scope="session")
def nuq4(real_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with scales of tokens and without outliers."""
    file = tmp_path_factory.mktemp("nuq4") / "nuq4.kvq.safetensors"
    run = "from kvq_calib.cli.main import calibrate; calibrate()"
    options = ["--config", "nuq4", "--dataset", "python-docs", "--samples", "4", "--seqlen", "512"]
    subprocess.run([sys.executable, "-c", run, real_model, "-o", str(file), *options], check=True)
    return file


@pytest.fixture(params=["kvq3", "nuq4"])
def artifact(committed: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "nuq4":
        made: Path = request.getfixturevalue("nuq4")
        return made
    return committed / f"{request.param}.kvq.safetensors"


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize(("tokens", "sequences"), [(2048, 2), (100, 1)])
def test_likelihoods_of_prompts_are_those_of_kvqcache(folder, own, artifact, tokens, sequences):
    prompts = texts(own.tokenizer)
    with engine(folder, artifact, max_num_batched_tokens=tokens, max_num_seqs=sequences) as llm:
        found = prompt_nll(llm, prompts)
    wanted = [own.nll(artifact, ids, min(tokens, len(ids))) for ids in prompts]
    print("NLL", artifact.name, tokens, mean(found), mean(wanted))
    assert abs(mean(found) - mean(wanted)) < SLACK


def differences(
    own: Own, artifact: Path, prompts: list[list[int]], found: list[tuple[list[int], float, int]]
) -> float:
    wanted = [
        own.nll(artifact, [*ids, *new], 1, len(ids)) for ids, (new, _, _) in zip(prompts, found, strict=True)
    ]
    got = mean([nll for _, nll, _ in found])
    print("NLL of generated text", artifact.name, got, mean(wanted))
    return abs(got - mean(wanted))


def test_shared_prefixes_and_eight_at_once(folder, own, artifact):
    whole = texts(own.tokenizer, 2)
    prompts = [ids[: 560 + 30 * n] for ids in whole for n in range(4)]
    with engine(folder, artifact, enable_prefix_caching=True) as llm:
        first = generated(llm, prompts, 40)
        again = generated(llm, prompts, 40)
    assert all(cached == 512 for _, _, cached in again)
    assert differences(own, artifact, prompts, first) < SLACK
    assert differences(own, artifact, prompts, again) < SLACK


def test_preempted_sequences_go_on(folder, own, artifact):
    prompts = [ids[:200] for ids in texts(own.tokenizer, 4)]
    with engine(folder, artifact, num_gpu_blocks_override=10, max_model_len=768, max_num_seqs=4) as llm:
        found = generated(llm, prompts, 120)
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        modules = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        native = [module.impl._layer._native is not None for module in modules]
    assert counts["vllm:num_preemptions"] > 0
    assert len(native) == 30
    assert all(native) == any(native) == (library() is not None)
    assert differences(own, artifact, prompts, found) < SLACK


def test_more_tokens_fit(folder, committed):
    def tokens(name: str | None) -> int:
        file = None if name is None else committed / f"{name}.kvq.safetensors"
        with engine(folder, file, dtype="bfloat16") as llm:
            return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens

    auto = tokens(None)
    found = {name: tokens(name) / auto for name in ("kvq3", "kvq2")}
    print("tokens that fit, against bfloat16:", found)
    assert found["kvq3"] >= 4.1
    assert found["kvq2"] >= 5.5


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
