"""Tokens per second and peak memory of decoding with DynamicCache and with KVQCache, on one GPU.

A model with random weights in the shape of Llama-3-8B; caches are filled with random keys and values, then single
tokens are decoded. Each context length runs with either cache; the longest that fits is searched by doubling.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import environment
from gpu_recipes import RECIPES, Recipe
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.params import LayerParams
from kvq_calib.codec.registry import codec_of
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.runtime import KVQCache
from kvq_calib.schema.spec import KINDS, KVCacheSpec

LENGTHS = (4096, 8192, 32768, 131072)
CHUNK = 8192
WARM_UP, TOKENS = 4, 64


def build_model(layers: int, device: torch.device) -> LlamaForCausalLM:
    """Llama-3-8B's shape with random float16 weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
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
    """For keys and values of unit spread: speed needs no better."""
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
    """Random keys and values, a chunk at a time, without the cost of a real prompt."""
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


def decode(model: LlamaForCausalLM, cache: Any, device: torch.device) -> float:
    """Tokens per second of single-token steps."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    begun = 0.0
    for step in range(WARM_UP + TOKENS):
        if step == WARM_UP:
            torch.cuda.synchronize()
            begun = time.perf_counter()
        logits = model(token, **with_cache(cache), use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    return TOKENS / (time.perf_counter() - begun)


def measure(model: LlamaForCausalLM, make: Any, tokens: int, device: torch.device) -> dict[str, Any]:
    """One cache at one length, or "memory" where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        cache = make()
        with torch.no_grad():
            fill(cache, model, tokens, device)
            rate = decode(model, cache, device)
    except torch.OutOfMemoryError:
        return {"left_out": "memory"}
    return {
        "tokens_per_second": rate,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        **({"backend": cache.backend, "cache_bytes": cache.nbytes} if isinstance(cache, KVQCache) else {}),
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recipe", choices=list(RECIPES), nargs="+", default=list(RECIPES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    model = build_model(arguments.layers, device)
    caches: dict[str, Any] = {"dynamic": lambda: DynamicCache(config=model.config)}
    for name in arguments.recipe:
        artifact = build_artifact(model, RECIPES[name])
        caches[name] = lambda artifact=artifact: KVQCache(artifact, model)
    rows = []
    for name, make in caches.items():
        lengths = list(LENGTHS)
        for tokens in lengths:
            row = {"cache": name, "tokens": tokens, **measure(model, make, tokens, device)}
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            if "left_out" in row:
                break
            if tokens == lengths[-1] and tokens < 1 << 23:
                lengths.append(2 * tokens)
    if arguments.json:
        result = {
            **environment(),
            "gpu": torch.cuda.get_device_name(device),
            "layers": arguments.layers,
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
