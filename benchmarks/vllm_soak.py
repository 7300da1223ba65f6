"""Random requests to vLLM with the packed cache: random lengths, cancellations and shared prefixes.

    python benchmarks/vllm_soak.py MODEL --artifact FILE [--requests 500] [--seed 0] [--blocks 24] [--json FILE]

It fails if an output has a wrong length, a page is not freed, or memory keeps growing. oneDNN keeps code for each shape
of a product that it has met, up to 1,024 of them, which takes over 150 MiB. So it may keep only a few here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from common import environment

#: MiB that memory may grow over the second half of the requests; the first half fills caches.
MOST_GROWTH = 16


def resident_mib() -> int:
    """Memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def make_engine(options: argparse.Namespace) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = EngineArgs(
        model=options.model,
        dtype=options.dtype,
        skip_tokenizer_init=True,
        attention_backend="CUSTOM",
        additional_config={"kvq_artifact": options.artifact},
        enforce_eager=True,
        max_model_len=options.longest,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=options.blocks,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=True,
        disable_log_stats=False,
    )
    return LLMEngine.from_engine_args(arguments)


def soak(engine: Any, options: argparse.Namespace) -> dict[str, Any]:
    from vllm import SamplingParams

    draw = random.Random(options.seed)
    prefixes = [[draw.randrange(1000, 40000) for _ in range(700)] for _ in range(4)]
    asked: dict[str, int] = {}
    counts = {"finished": 0, "cancelled": 0, "wrong lengths": 0, "from prefixes": 0}
    sent, memory = 0, [(0, resident_mib())]
    while sent < options.requests or engine.has_unfinished_requests():
        while sent < options.requests and len(asked) < 12:
            ids = [
                draw.randrange(1000, 40000)
                for _ in range(draw.choice([1, 3, 31, 32, 33, 64, 100, 255, 256, 257]))
            ]
            if draw.random() < 0.4:
                ids = draw.choice(prefixes)[: draw.choice([256, 300, 512, 700])] + ids
            wanted = min(draw.choice([1, 2, 5, 16, 33, 64]), options.longest - len(ids) - 1)
            name = str(sent)
            parameters = SamplingParams(
                temperature=draw.choice([0.0, 1.0]), max_tokens=wanted, ignore_eos=True
            )
            engine.add_request(name, {"prompt_token_ids": ids}, parameters)
            asked[name], sent = wanted, sent + 1
        for output in engine.step():
            if output.finished and output.request_id in asked:
                wanted = asked.pop(output.request_id)
                counts["finished"] += 1
                counts["from prefixes"] += bool(output.num_cached_tokens)
                counts["wrong lengths"] += len(output.outputs[0].token_ids) != wanted
        if asked and draw.random() < 0.02:
            name = draw.choice(sorted(asked))
            engine.abort_request([name])
            del asked[name]
            counts["cancelled"] += 1
        if sent % 50 == 0 and memory[-1][0] != sent:
            memory.append((sent, resident_mib()))
            print(sent, counts, memory[-1][1], "MiB", flush=True)
    return {**counts, "memory_mib": memory}


def free_pages(engine: Any) -> tuple[int, int]:
    """Number of free pages, and of all pages; vLLM reserves one."""
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--blocks", type=int, default=24, help="pages, few enough that requests are preempted"
    )
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = make_engine(options)
    start = time.perf_counter()
    found = soak(engine, options)
    free, pages = free_pages(engine)
    preemptions = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"]
    found |= {"seconds": round(time.perf_counter() - start), "free_pages": free, "pages": pages}
    found |= {"preemptions": preemptions[0] if preemptions else None}
    engine.engine_core.shutdown()
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps({"config": environment(), **found}, indent=2) + "\n")
    memory = [mib for _, mib in found["memory_mib"]]
    grown = memory[-1] - memory[len(memory) // 2]
    return int(found["wrong lengths"] > 0 or free != pages or grown > MOST_GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
