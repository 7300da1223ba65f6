"""Tokens per second in decode, beside the caches of transformers, in one run on one machine.

    python benchmarks/decode_speed.py MODEL --artifact FILE [--artifact FILE ...] [--contexts 1024 4096 16384]

Keys and values of a real text of 1,024 tokens are computed once and repeated until a cache holds the context,
so the filling costs no forward passes; what a step costs does not depend on what the tokens are. Then single
tokens are decoded through the whole model with all caches in turns, and the median times are reported. Peers
whose package is not installed are left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, Seconds, environment, environment_lines, markdown_table, timed, write_results
from torch import Tensor, nn
from transformers import Cache, DynamicCache, QuantizedCache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.compat import with_cache
from kvq_calib.model.load import load_model
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
        cache.append(
            (repeated(rotated if layer.ops.rope is None else keys, tokens), repeated(values, tokens))
            for layer, (keys, rotated, values) in zip(cache.layers, layers, strict=True)
        )
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


def measure(
    model: Any, caches: dict[str, Callable[[], Cache]], layers: Any, context: int, steps: int
) -> list[dict[str, Any]]:
    """Fill every cache, decode ``steps`` tokens with each in turns, and report a row for each."""
    filled = {name: make() for name, make in caches.items()}
    times: dict[str, list[Seconds]] = {name: [] for name in caches}
    token = torch.tensor([[1]])
    with attached(model), torch.no_grad():
        for cache in filled.values():
            fill(cache, layers, context)
        for step in range(WARM_UP + steps):
            positions = torch.tensor([[context + step]])
            for name, cache in filled.items():
                _, seconds = timed(
                    lambda cache=cache, positions=positions: model(
                        token, **with_cache(cache), position_ids=positions
                    )
                )
                times[name].append(seconds)
    rows = []
    for name, cache in filled.items():
        wall, cpu = (
            statistics.median(getattr(seconds, clock) for seconds in times[name][WARM_UP:])
            for clock in ("wall", "cpu")
        )
        size = cache.nbytes if isinstance(cache, KVQCache) else held_bytes(cache)
        rows.append(
            {"cache": name, "context": context, "wall_seconds": wall, "cpu_seconds": cpu, "bytes": size}
        )
    return rows


def report(content: dict[str, Any]) -> list[str]:
    """The results for people, in Markdown."""
    settings = content["settings"]
    lines = [
        "# Decode on a CPU",
        "",
        f"{settings['model']}, float32, one sequence, median of {settings['steps']} tokens, all caches in turns in one "
        "process. Times are of the whole model; processor time is over all threads, and hardly changes with other "
        "work on the machine. The steps in which a peer quantizes its window of 128 tokens do not show in a median.",
        "",
    ]
    table = []
    for row in content["rows"]:
        dynamic = next(
            other
            for other in content["rows"]
            if other["context"] == row["context"] and other["cache"] == "DynamicCache"
        )
        table.append(
            [
                row["cache"],
                f"{row['context']:,}",
                f"{1 / row['wall_seconds']:.2f}",
                f"{1e3 * row['wall_seconds']:.0f}",
                f"{1e3 * row['cpu_seconds']:.0f}",
                f"{row['cpu_seconds'] / dynamic['cpu_seconds']:.2f}",
                f"{row['bytes'] / 2**20:.1f}",
            ]
        )
    headings = [
        "cache",
        "context",
        "tokens/s",
        "ms/token",
        "processor ms/token",
        "/ DynamicCache",
        "MiB held",
    ]
    return [*lines, *markdown_table(headings, table), "", *environment_lines(content["environment"])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--artifact", type=Path, action="append", default=[])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS / "decode_speed.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)
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
            a, model, max_tokens=max(options.contexts) + WARM_UP + options.steps
        )
    for backend, package in (("hqq", "hqq"), ("quanto", "optimum.quanto")):
        if not _is_installed(package):
            print(f"{package} is not installed: not measured")
            continue
        axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        caches[f"QuantizedCache {backend} 4 bit"] = lambda b=backend, a=axis: QuantizedCache(
            backend=b, config=config, nbits=4, q_group_size=64, residual_length=128, **a
        )

    content: dict[str, Any] = {
        "settings": {"model": Path(options.model).name, "steps": options.steps},
        "environment": environment(options.note),
        "rows": [],
    }
    for context in options.contexts:
        content["rows"] += measure(model, caches, layers, context, options.steps)
        write_results(options.output, content, report(content))
        gc.collect()
    print("\n".join(report(content)))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
