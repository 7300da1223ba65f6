"""Tokens per second in decode, beside the caches of transformers, in one run on one machine.

    python benchmarks/decode_speed.py MODEL --artifact FILE [--artifact FILE ...] [--contexts 1024 4096 16384]

Keys and values of a real text of 1,024 tokens are computed once and repeated until a cache holds the context,
so the filling costs no forward passes; what a step costs does not depend on what the tokens are. Then single
tokens are decoded through the whole model and the median time is reported. Each peer runs if its package is
installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, QuantizedCache

from kvq_calib.artifact import KVArtifact
from kvq_calib.attention import LayerKV, intercept
from kvq_calib.models import load_model
from kvq_calib.runtime import KVQCache, attached

SAMPLE_TOKENS = 1024
WARM_UP = 2


def sample_layers(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer: un-rotated keys, rotated keys and values of ``ids``, each ``[1, H, T, D]``."""
    layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(kv: LayerKV) -> None:
        layers[kv.layer] = (kv.keys, kv.rotated_keys, kv.values)

    with intercept(model, keep), torch.no_grad():
        model(ids, use_cache=False)
    return [layers[index] for index in sorted(layers)]


def repeated(x: Tensor, tokens: int) -> Tensor:
    """``x [1, H, T, D]`` repeated to ``tokens`` tokens."""
    return x.repeat(1, 1, -(-tokens // x.shape[2]), 1)[:, :, :tokens]


def fill(cache: Cache, layers: list[tuple[Tensor, Tensor, Tensor]], tokens: int) -> None:
    """Store ``tokens`` tokens in an empty cache."""
    if isinstance(cache, KVQCache):
        cache._begin(1, torch.arange(tokens)[None], None)
        for layer, (keys, rotated, values) in zip(cache.layers, layers, strict=True):
            chosen = keys if layer.ops.key.spec.pre_rope else rotated
            layer.ops.append(layer.storage, repeated(chosen, tokens), repeated(values, tokens), cache.table)
        return
    for index, (_, rotated, values) in enumerate(layers):
        cache.update(repeated(rotated, tokens), repeated(values, tokens), index)


def held_bytes(root: object) -> int:
    """Bytes of all tensors and arrays that an object leads to."""
    total, seen, todo = 0, set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            inner = [getattr(item, name) for name in ("_data", "_scale", "_shift") if hasattr(item, name)]
            if inner:  # a quantized tensor of optimum-quanto wraps its parts
                todo += inner
            elif item.untyped_storage().data_ptr() not in seen:
                seen.add(item.untyped_storage().data_ptr())
                total += item.untyped_storage().nbytes()
        elif isinstance(item, array):
            total += len(item) * item.itemsize
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return total


def measure(model: Any, cache: Cache, layers: Any, context: int, steps: int) -> dict[str, float]:
    """Fill, decode ``steps`` tokens, and report."""
    started = time.perf_counter()
    fill(cache, layers, context)
    filled = time.perf_counter() - started
    times = []
    token = torch.tensor([[1]])
    with torch.no_grad():
        for step in range(WARM_UP + steps):
            positions = torch.tensor([[context + step]])
            started = time.perf_counter()
            logits = model(token, past_key_values=cache, position_ids=positions).logits
            times.append(time.perf_counter() - started)
            token = logits[:, -1:].argmax(-1)
    seconds = statistics.median(times[WARM_UP:])
    size = cache.nbytes if isinstance(cache, KVQCache) else held_bytes(cache)
    return {
        "context": context,
        "tokens_per_second": 1 / seconds,
        "ms_per_token": 1e3 * seconds,
        "bytes": size,
        "fill_seconds": filled,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--artifact", type=Path, action="append", default=[])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    loaded = load_model(options.model, device="cpu", dtype="float32")
    model = loaded.model
    text = (Path(transformers.__file__).parent / "cache_utils.py").read_text(encoding="utf-8")
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :SAMPLE_TOKENS]
    layers = sample_layers(model, ids)
    config = model.config.get_text_config()

    caches: dict[str, Callable[[], Cache]] = {"DynamicCache": DynamicCache}
    for path in options.artifact:
        artifact = KVArtifact.load(path)
        caches[path.name.removesuffix(".kvq.safetensors")] = lambda a=artifact: KVQCache(
            a, model, max_tokens=max(options.contexts) + 2 * WARM_UP + options.steps
        )
    for backend in ("hqq", "quanto"):
        axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        caches[f"QuantizedCache {backend} 4 bit"] = lambda b=backend, a=axis: QuantizedCache(
            backend=b, config=config, nbits=4, q_group_size=64, residual_length=128, **a
        )

    rows = []
    for context in options.contexts:
        for name, make in caches.items():
            try:
                with attached(model):
                    row = {"cache": name, **measure(model, make(), layers, context, options.steps)}
            except ImportError as error:
                print(f"{name}: not measured ({error})".splitlines()[0])
                continue
            rows.append(row)
            gc.collect()
            print(
                f"{context:6d} tokens  {name:28s} {row['tokens_per_second']:8.2f} tokens/s "
                f"{row['ms_per_token']:9.1f} ms/token {row['bytes'] / 2**20:9.1f} MiB",
                flush=True,
            )
    if options.json:
        facts = {
            "model": loaded.name,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rows": rows,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
