"""Decode steps of vLLM's attention alone, with the packed cache and with vLLM's default cache.

    python benchmarks/vllm_attention.py --artifact kvq3.kvq.safetensors [--artifact ...] [--requests 8] [--tokens 4096]
        [--steps 64] [--json FILE]

All caches take turns in one process. A step stores a new token of each request and computes attention in every layer.
Layers share no pages, so memory is as cold as in a model. Pages have random bytes, because the time does not depend on
them. Times are processor time. Give whole blocks of 32 steps: a step that completes blocks encodes them, so the result
is the mean, with the longest step and the median beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvq_calib import KVArtifact
from kvq_calib.codec.packing import PAGE_TOKENS
from kvq_calib.integrations.vllm.decode import NativeDecoding
from kvq_calib.integrations.vllm.layer import PagedLayer
from kvq_calib.integrations.vllm.pages import AHEAD
from kvq_calib.integrations.vllm.step import Step
from kvq_calib.runtime.ops import choose_ops
from kvq_calib.schema.geometry import KVGeometry

#: Runs a step in which every request has this number of tokens, including the new one.
Run = Callable[[int], None]
#: Tokens in a page of vLLM's default cache on a CPU.
OWN_PAGE = 128


def new_tokens(requests: int, geometry: KVGeometry, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value, and room for the result."""
    shape = geometry.layers[0]
    heads = shape.num_query_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_query_heads
    return [torch.randn(requests, count, shape.head_dim).to(dtype) for count in heads]


def packed(artifact: KVArtifact, requests: int, longest: int) -> Run:
    quantizers = artifact.quantizers()
    ops, _ = choose_ops(quantizers, torch.device("cpu"), "native")
    sinks, decoding = artifact.spec.sink_tokens, NativeDecoding()
    layers = [
        PagedLayer(pair, own, sinks, 0.125, decoding=decoding)
        for pair, own in zip(quantizers, ops, strict=True)
    ]
    pages = longest // PAGE_TOKENS + 1 + AHEAD
    pools = []
    for layer in layers:
        pool = torch.randint(0, 256, (requests * pages, layer.pages.page_bytes), dtype=torch.uint8)
        for areas in layer.pages.areas:  # random bytes may not be finite numbers
            for area in (areas.token, areas.sinks, areas.tail):
                pool[:, area.start : area.start + area.size] = 0
        pools.append(pool)
    tables = torch.randperm(requests * pages).view(requests, pages)
    query, key, value, out = new_tokens(requests, artifact.geometry, torch.bfloat16)

    def run(tokens: int) -> None:
        step = Step(list(range(requests + 1)), [tokens] * requests, tables, sinks)
        for layer, pool in zip(layers, pools, strict=True):
            layer.forward(step, pool, query, key, value, out)

    return run


def unquantized(geometry: KVGeometry, requests: int, longest: int, dtype: torch.dtype) -> Run:
    shape = geometry.layers[0]
    heads, size, pages = shape.num_kv_heads, shape.head_dim, longest // OWN_PAGE + 1
    once = torch.randn(requests * pages, heads, 2 * OWN_PAGE, size).to(dtype)
    pools = [once.clone().chunk(2, dim=2) for _ in geometry.layers]
    isa = _get_attn_isa(dtype, OWN_PAGE, size)
    tables = torch.randperm(requests * pages).view(requests, pages).to(torch.int32)
    starts = torch.arange(requests + 1, dtype=torch.int32)
    query, key, value, out = new_tokens(requests, geometry, dtype)

    def run(tokens: int) -> None:
        lengths = torch.full((requests,), tokens, dtype=torch.int32)
        slots = tables[:, (tokens - 1) // OWN_PAGE].long() * OWN_PAGE + (tokens - 1) % OWN_PAGE
        plan = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=requests,
            num_heads=shape.num_query_heads,
            num_kv_heads=heads,
            head_dim=size,
            seq_lens=lengths,
            dtype=dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        for keys, values in pools:
            vllm_ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa)
            vllm_ops.cpu_attention_with_kv_cache(
                query, keys, values, out, starts, lengths, 0.125, True, None, -1, tables, 0.0, plan, None
            )

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", action="append", required=True)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=64, help="whole blocks of 32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    longest = options.tokens + options.steps
    runs: dict[str, Run] = {}
    for file in options.artifact:
        artifact = KVArtifact.load(file)
        runs[Path(file).name.removesuffix(".kvq.safetensors")] = packed(artifact, options.requests, longest)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"vLLM's own, {str(dtype).removeprefix('torch.')}"
        runs[name] = unquantized(artifact.geometry, options.requests, longest, dtype)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(options.steps):
        for name, run in runs.items():
            before = time.process_time()
            run(options.tokens + 1 + step)
            found[name].append(1e3 * (time.process_time() - before))
    rows = {
        name: {
            "mean_ms": round(statistics.mean(all_), 1),
            "median_ms": round(statistics.median(all_), 1),
            "longest_ms": round(max(all_), 1),
            "ms": [round(ms, 1) for ms in all_],
        }
        for name, all_ in found.items()
    }
    for name, row in rows.items():
        print(f"{name}: {row['mean_ms']} ms of a processor, at most {row['longest_ms']}")
    if options.json is not None:
        note = f"{options.requests} requests of {options.tokens} tokens, {len(artifact.layers)} layers"
        options.json.write_text(json.dumps({"config": environment(note), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
