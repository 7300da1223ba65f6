"""A model folder, texts, and negative log likelihoods for the tests inside vLLM."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from kvq_calib import KVArtifact, KVQCache
from kvq_calib.data.python_docs import python_docs
from kvq_calib.model.compat import with_cache
from kvq_calib.model.load import load_model

GIB = 1 << 30
#: Tokens of a text.
TOKENS = 500


def folder_of(model: str, folder: Path) -> None:
    """Write a model that transformers reads, a ``.gguf`` file for instance, as vLLM reads it."""
    loaded = load_model(model, device="cpu", dtype="float32")
    save(loaded.model, folder)
    loaded.tokenizer.save_pretrained(folder)


def save(model: Any, folder: Path) -> None:
    """Write weights and configuration; transformers refuses to for what it read from a ``.gguf`` file."""
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, default=str))


def texts(tokenizer: Any, count: int = 5) -> list[list[int]]:
    """Tokens of texts that come with Python."""
    ids = tokenizer("\n\n".join(python_docs("evaluation")))["input_ids"]
    apart = len(ids) // count
    return [ids[n * apart : n * apart + TOKENS] for n in range(count)]


@contextmanager
def engine(folder: Path, artifact: Path | None, **options: Any) -> Iterator[Any]:
    """An engine of vLLM; with an artifact on the packed cache."""
    from vllm import LLM

    if artifact is not None:
        options |= {"attention_backend": "CUSTOM", "additional_config": {"kvq_artifact": str(artifact)}}
    known = {
        **{"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8, "seed": 0},
        **{"kv_cache_memory_bytes": GIB // 4, "disable_log_stats": False},
    }
    made = LLM(str(folder), **{**known, **options})
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def tokens_in_a_step(llm: Any, count: int) -> Iterator[None]:
    """Steps of at most ``count`` tokens, as with ``max_num_batched_tokens``, without another start."""
    scheduler = scheduler_of(llm)
    before, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, count
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before


@contextmanager
def free_pages(llm: Any, count: int) -> Iterator[None]:
    """All pages but ``count`` are taken, as with ``num_gpu_blocks_override``, without another start."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - count)
    try:
        yield
    finally:
        pool.free_blocks(taken)


def preemptions(llm: Any) -> int:
    """Number of preemptions since the start."""
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"))


def prompt_nll(llm: Any, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log likelihood of each text's tokens, as vLLM finds them, one text at a time."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for ids in prompts:
        (output,) = llm.generate([{"prompt_token_ids": list(ids)}], asked, use_tqdm=False)
        each = [
            place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        ]
        found.append(-sum(each) / len(each))
    return found


def generated(llm: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[list[int], float, int]]:
    """What is generated after each prompt, the mean negative log likelihood of it, and the tokens found in the prefix
    cache."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    given = [{"prompt_token_ids": list(ids)} for ids in prompts]
    found = []
    for output in llm.generate(given, asked, use_tqdm=False):
        ids = list(output.outputs[0].token_ids)
        assert len(ids) == tokens
        each = [place[token].logprob for place, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        found.append((ids, -sum(each) / tokens, output.num_cached_tokens or 0))
    return found


class Own:
    """The same model in transformers, on caches of its own."""

    def __init__(self, folder: Path) -> None:
        loaded = load_model(str(folder), device="cpu", dtype="float32")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._known: dict[str, list[float]] = {}

    def nll(self, artifact: Path, texts: Sequence[Sequence[int]], chunk: int, first: int = 0) -> list[float]:
        """Mean negative log likelihood of each text's tokens after ``first``. What was computed is not computed again.

        Args:
            artifact: of the cache.
            texts: tokens of texts of equal lengths, which are one batch.
            chunk: tokens that are given at a time, after the first ones.
            first: tokens that are given at once, and do not count.
        """
        asked = str((artifact, texts, chunk, first))
        if asked not in self._known:
            self._known[asked] = self._nll(artifact, texts, chunk, first)
        return self._known[asked]

    def _nll(self, artifact: Path, texts: Sequence[Sequence[int]], chunk: int, first: int) -> list[float]:
        cache = KVQCache(KVArtifact.load(artifact), self.model)
        tokens, length = torch.tensor(texts), len(texts[0])
        stops = [*([first] if first else []), *range(first + chunk, length, chunk), length]
        start, total = 0, torch.zeros(len(texts), dtype=torch.float64)
        for stop in stops:
            with torch.inference_mode():
                logits = self.model(tokens[:, start:stop], **with_cache(cache)).logits
            targets = tokens[:, start + 1 : stop + 1]
            counted = slice(max(first - 1 - start, 0), targets.shape[1])
            each = cross_entropy(logits[:, counted].mT, targets[:, counted], reduction="none")
            total += each.double().sum(1)
            start = stop
        return (total / (length - max(first, 1))).tolist()
