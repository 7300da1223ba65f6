"""Tokens per second and peak memory of decoding with a float16 cache and with KVQCache, on one GPU.

The model has random weights and the shape of Llama-3-8B. Caches are filled with random keys and values. Then single
tokens are decoded, without and with a CUDA graph. The float16 cache is allocated beforehand and returns views, so that
no tokens are copied and attention can use torch's fastest backend. Its graph replays the step of one length, which is
the least that a static cache can cost.

Each context length runs with every cache. With ``--longest``, the length is then doubled until no cache fits. The file
is written after every row, and no row starts when the budget is spent.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import environment
from gpu_recipes import RECIPES, Recipe
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.registry import codec_of
from kvq_calib.files import write_atomically
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.runtime import KVQCache, captured_steps
from kvq_calib.schema.spec import KINDS, KVCacheSpec

LENGTHS = (131072, 32768, 8192, 4096)
CHUNK = 8192
#: Whole blocks of 32 tokens, so that work once per block has its share.
WARM_UP, TOKENS = 4, 64


class AllocatedLayer(DynamicLayer):
    """Memory for the keys and values of all tokens. Attention gets views of it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.length = tokens, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for all tokens."""
        batch, heads, _, size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.held = torch.empty(2, batch, heads, self.tokens, size, dtype=self.dtype, device=self.device)
        self.keys, self.values = self.held[:, :, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens in place."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.held[0, :, :, start : self.length] = key_states
        self.held[1, :, :, start : self.length] = value_states
        self.keys, self.values = self.held[0, :, :, : self.length], self.held[1, :, :, : self.length]
        return self.keys, self.values


def float16_cache(layers: int, tokens: int) -> Cache:
    """A float16 cache with room for this number of tokens."""
    return Cache(layers=[AllocatedLayer(tokens) for _ in range(layers)])


SHAPES: dict[str, dict[str, int]] = {
    "Llama-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {  # for rehearsals
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def build_model(shape: str, device: torch.device) -> LlamaForCausalLM:
    """Make a model with random float16 weights."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=1 << 24,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with device:
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def build_artifact(model: LlamaForCausalLM, recipe: Recipe) -> KVArtifact:
    """Make an artifact for keys and values of unit spread, which is enough to measure speed."""
    specs, geometry = recipe.specs(), inspect_model(model)
    layers = tuple(
        LayerParams(
            **{kind: recipe.params(kind, layer.shape(kind), geometry.rope_of(index)) for kind in KINDS}
        )
        for index, layer in enumerate(geometry.layers)
    )
    section = {"id": "random", "config": model_fingerprint(model)}
    rates: dict[str, list[float]] = {
        kind: [
            codec_of(specs[kind]).nominal_outliers(specs[kind], layer.shape(kind))
            for layer in geometry.layers
        ]
        for kind in KINDS
    }
    return KVArtifact(KVCacheSpec(**specs), geometry, layers, section, {}, rates)


def fill(cache: Any, model: LlamaForCausalLM, tokens: int, device: torch.device) -> None:
    """Fill a cache with random keys and values, in chunks, without the cost of a prompt."""
    config = model.config
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        shape = (2, 1, config.num_key_value_heads, count, config.head_dim)
        layers = (
            tuple(torch.randn(shape, device=device, dtype=torch.float16))
            for _ in range(config.num_hidden_layers)
        )
        if isinstance(cache, KVQCache):
            cache.append(layers)
        else:
            for index, (keys, values) in enumerate(layers):
                cache.update(keys, values, index)


def rate(step: Callable[[Tensor], Tensor], device: torch.device) -> float:
    """Measure the tokens per second of a step from tokens ``[1, 1]`` to logits."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    begun = 0.0
    for number in range(WARM_UP + TOKENS):
        if number == WARM_UP:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        token = step(token)[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    return TOKENS / (time.perf_counter() - begun)


def rates(model: LlamaForCausalLM, cache: Any, device: torch.device) -> dict[str, float]:
    """Measure tokens per second without and with a CUDA graph."""

    def step(token: Tensor) -> Tensor:
        logits: Tensor = model(token, **with_cache(cache), use_cache=True).logits
        return logits

    found = {"tokens_per_second": rate(step, device)}
    if isinstance(cache, KVQCache):
        with captured_steps(model, cache):
            return {**found, "captured_tokens_per_second": rate(step, device)}
    taken = torch.zeros(1, 1, dtype=torch.int64, device=device)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(taken)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        logits = step(taken)

    def replay(token: Tensor) -> Tensor:
        taken.copy_(token)
        graph.replay()
        return logits

    return {**found, "captured_tokens_per_second": rate(replay, device)}


def measure(model: LlamaForCausalLM, make: Any, tokens: int, device: torch.device) -> dict[str, Any]:
    """Measure one cache at one length, or find that it does not fit. ``make`` makes a cache for a number of tokens."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        cache = make(tokens + 2 * (WARM_UP + TOKENS))
        with torch.no_grad():
            fill(cache, model, tokens, device)
            found = rates(model, cache, device)
    except torch.OutOfMemoryError:
        return {"left_out": "memory"}
    return {
        **found,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        **({"backend": cache.backend, "cache_bytes": cache.nbytes} if isinstance(cache, KVQCache) else {}),
    }


def rows_of(
    model: LlamaForCausalLM, arguments: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Measure all lengths with all caches."""
    layers = model.config.num_hidden_layers
    caches: dict[str, Any] = {"float16": lambda tokens: float16_cache(layers, tokens)}
    for name in arguments.recipes:
        artifact = build_artifact(model, RECIPES[name])
        caches[name] = lambda tokens, artifact=artifact: KVQCache(artifact, model)
    fitting = set(caches)
    for tokens in arguments.lengths:
        for name in caches:
            yield {"cache": name, "tokens": tokens, **measure(model, caches[name], tokens, device)}
    tokens = max(arguments.lengths)
    while arguments.longest and fitting and tokens < 1 << 23:
        tokens *= 2
        for name in sorted(fitting):
            row = {"cache": name, "tokens": tokens, **measure(model, caches[name], tokens, device)}
            if "left_out" in row:
                fitting.remove(name)
            yield row


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=list(SHAPES), default="Llama-3-8B")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--longest", action="store_true", help="also double the length until no cache fits")
    parser.add_argument("--recipes", choices=list(RECIPES), nargs="+", default=list(RECIPES))
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no row starts"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    begun = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device())
    model = build_model(arguments.model, device)
    rows: list[dict[str, Any]] = []
    result = {
        **environment(),
        "gpu": torch.cuda.get_device_name(device),
        "model": arguments.model,
        "complete": False,
        "rows": rows,
    }

    def write() -> None:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())

    for row in rows_of(model, arguments, device):
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        write()
        if time.perf_counter() - begun > arguments.budget:
            print(f"{arguments.budget:.0f} seconds are spent", flush=True)
            return 0
    result["complete"] = True
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
