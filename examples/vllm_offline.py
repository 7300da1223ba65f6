"""Texts from vLLM on a packed cache, and what fits in its memory.

    python examples/vllm_offline.py MODEL ARTIFACT [--tokens 64] [--memory 1.0] [--dtype auto]

MODEL is a hub id or a folder as vLLM takes it, ARTIFACT a file or a hub id. Without ARTIFACT vLLM's own cache is used,
for comparison: both print the line that says how many tokens fit.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: it starts sooner

from vllm import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little robot who",
    "Water boils at",
]


def main() -> None:
    """Read the command line, generate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each prompt")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB for the cache")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    packed = {}
    if options.artifact is not None:
        packed = {
            "attention_backend": "CUSTOM",
            "additional_config": {"kvq_artifact": options.artifact},
        }
    llm = LLM(
        options.model,
        dtype=options.dtype,
        kv_cache_memory_bytes=int(options.memory * 2**30),
        max_model_len=2048,
        enforce_eager=True,
        **packed,
    )
    start = time.perf_counter()
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=options.tokens), use_tqdm=False)
    seconds = time.perf_counter() - start
    for output in outputs:
        print(output.prompt + output.outputs[0].text, end="\n\n")
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"{count} tokens in {seconds:.1f} s")


if __name__ == "__main__":
    main()
