"""vLLM with the packed cache gives the results of ``KVQCache``: on whole prompts, in chunks, with many requests at
once, with shared prefixes, and after preemption.

Single tokens are not compared. Recipes with error compensation amplify rounding: a change of 1e-6 in the input changes
the log likelihood of single tokens by a tenth. Means over a text hardly change. A start takes most of the time, so all
tests of an artifact use one engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from engine import Own, engine, free_pages, preemptions, prompt_nll, texts, tokens_in_a_step
from server import options_of, post, server

from kvq_calib.data.python_docs import python_docs
from kvq_calib.native.loader import library

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default"),  # of vLLM and what it imports
]
#: By which means may differ.
SLACK = 0.01


@pytest.fixture(scope="module")
def own(folder: Path) -> Own:
    return Own(folder)


@pytest.fixture(scope="module")
def nuq4(real_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with scales of tokens and without outliers."""
    file = tmp_path_factory.mktemp("nuq4") / "nuq4.kvq.safetensors"
    run = "from kvq_calib.cli.main import calibrate; calibrate()"
    options = ["--config", "nuq4", "--dataset", "python-docs", "--samples", "4", "--seqlen", "512"]
    subprocess.run([sys.executable, "-c", run, real_model, "-o", str(file), *options], check=True)
    return file


class Served(NamedTuple):
    """An artifact, and vLLM with it."""

    artifact: Path
    llm: Any


@pytest.fixture(scope="module", params=["kvq3", "nuq4"])
def served(folder: Path, committed: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    artifact = committed / "kvq3.kvq.safetensors"
    if request.param == "nuq4":
        artifact = request.getfixturevalue("nuq4")
    from forced import Forced

    with engine(folder, artifact, logits_processors=[Forced]) as llm:
        yield Served(artifact, llm)


@pytest.fixture(autouse=True)
def _no_prefixes(served: Served) -> None:
    """Nothing is found in the prefix cache that another test put there."""
    assert served.llm.reset_prefix_cache()


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("tokens", [2048, 100])
def test_likelihoods_of_prompts_are_those_of_kvqcache(own, served, tokens):
    prompts = texts(own.tokenizer)
    with tokens_in_a_step(served.llm, tokens):
        found = mean(prompt_nll(served.llm, prompts))
    wanted = mean(own.nll(served.artifact, prompts, tokens))
    print("NLL of texts", served.artifact.name, "in steps of", tokens, found, wanted)
    assert abs(found - wanted) < SLACK


def check(own: Own, artifact: Path, given: list[list[int]], first: int, found: list[float]) -> None:
    wanted = mean(own.nll(artifact, given, 1, first))
    print("NLL of tokens one at a time", artifact.name, mean(found), wanted)
    assert abs(mean(found) - wanted) < SLACK


def test_eight_at_once(own, served):
    from forced import forced

    given = texts(own.tokenizer)
    others = [ids[60:500] for ids in given[:3]]
    found = forced(served.llm, [*(ids[:440] for ids in given), *others], 200)
    check(own, served.artifact, [ids[:440] for ids in given], 200, [nll for nll, _ in found[:5]])


def test_preempted_sequences_go_on(own, served):
    from forced import forced

    given, before = [ids[:440] for ids in texts(own.tokenizer)], preemptions(served.llm)
    with free_pages(served.llm, 2 * len(given)):  # too few as soon as a sequence has 256 tokens
        found = forced(served.llm, given, 200)
    assert preemptions(served.llm) > before
    check(own, served.artifact, given, 200, [nll for nll, _ in found])


def test_shared_prefixes(own, served):
    from forced import forced

    given = texts(own.tokenizer)
    prompt_nll(served.llm, [ids[:260] for ids in given])  # their first page is kept
    found = forced(served.llm, given, 360)
    assert [cached for _, cached in found] == [256] * 5
    check(own, served.artifact, given, 360, [nll for nll, _ in found])


def test_decode_steps_take_the_native_kernels(served):
    modules = served.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    native = [module.impl._layer._native is not None for module in modules]
    assert len(native) == 30
    assert all(native) == any(native) == (library() is not None)


@pytest.mark.parametrize("served", ["kvq3"], indirect=True)
def test_a_completion_over_http_is_the_one_offline(folder, served, tmp_path):
    from vllm import SamplingParams

    prompt, tokens, log = "\n\n".join(python_docs("evaluation"))[:1500], 48, tmp_path / "server.log"
    with server(folder, options_of(served.artifact), log) as address:
        body = {"model": str(folder), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        answer = post(f"{address}/v1/completions", body)
    (choice,) = answer["choices"]
    assert answer["usage"]["prompt_tokens"] > 256, json.dumps(answer)  # more than a page is packed
    assert choice["text"].strip()
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    (output,) = served.llm.generate([prompt], sampling, use_tqdm=False)
    assert choice["text"] == output.outputs[0].text
