"""Decode speed of packed caches and of the caches of transformers, in one run on one machine.

    python benchmarks/decode_speed.py MODEL --artifact FILE [--artifact FILE ...] [--contexts 1024 4096 8192 16384]

Keys and values of a real text of 1,024 tokens are computed once and repeated until a cache is full. So filling needs no
forward passes, and the cost of a step does not depend on the tokens. Then single tokens are decoded through the whole
model, with all caches in turns. The mean is over whole blocks of 32 tokens, so that work done once per block counts.
The longest step and the median are reported, too. Then attention is timed separately: of one token to the keys and
values of all layers. Peers whose package is not installed are left out: hqq, optimum-quanto and, for a GGUF file,
llama.cpp (llama-cpp-python). llama.cpp reads the text itself and computes with the weights as they are in the file.
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

import numpy as np
import torch
import transformers
from common import (
    RESULTS,
    Seconds,
    environment,
    environment_lines,
    markdown,
    markdown_table,
    timed,
    write_results,
)
from torch import Tensor, nn
from transformers import Cache, DynamicCache, QuantizedCache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.model.capture import LayerKV, intercept
from kvq_calib.model.compat import with_cache
from kvq_calib.model.load import load_model
from kvq_calib.runtime import KVQCache, attached
from kvq_calib.runtime.visibility import AttentionRequest, Visibility

SAMPLE_TOKENS = 1024
WARM_UP = 2
ATTENTION_RUNS = 7


def sample_layers(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer, the un-rotated keys, rotated keys and values of ``ids``, each ``[1, H, T, D]``."""
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


def query_group(model: Any) -> int:
    """Number of query heads per key-value head."""
    config = model.config.get_text_config()
    return int(config.num_attention_heads // config.num_key_value_heads)


def held_bytes(root: object) -> int:
    """Bytes of all tensors and arrays that are reachable from an object."""
    total, seen, todo = 0, set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            inner = [getattr(item, name) for name in ("_data", "_scale", "_shift") if hasattr(item, name)]
            if inner:  # a quantized tensor of optimum-quanto contains tensors
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
    model: Any,
    caches: dict[str, Callable[[], Cache]],
    peers: LlamaCppPeers,
    layers: Any,
    context: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Fill every cache, decode ``steps`` tokens with each in turns, and return a row for each."""
    filled = {name: make() for name, make in caches.items()}
    times: dict[str, list[Seconds]] = {name: [] for name in (*caches, *peers.models)}
    token = torch.tensor([[1]])
    peers.fill(context)
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
            for name, peer in peers.models.items():
                times[name].append(timed(lambda peer=peer: peer.decode(peers.ids[:1]))[1])
        alone = attention_alone(filled, layers, context, query_group(model))
    rows = []
    for name, cache in (*filled.items(), *peers.models.items()):
        row: dict[str, Any] = {"cache": name, "context": context, "threads": torch.get_num_threads()}
        for clock in ("wall", "cpu"):
            each = [getattr(seconds, clock) for seconds in times[name][WARM_UP:]]
            row[f"{clock}_mean"], row[f"{clock}_longest"] = statistics.mean(each), max(each)
            row[f"{clock}_median"] = statistics.median(each)
        row["bytes"] = held_bytes(cache) if isinstance(cache, DynamicCache | QuantizedCache) else cache.nbytes
        row["backend"] = cache.backend if isinstance(cache, KVQCache) else None
        rows.append(row)
    return rows + alone


#: Cache types of llama.cpp to time.
_LLAMA_CPP_TYPES = ("f16", "q8_0", "q4_0")


class LlamaCppPeers:
    """llama.cpp with each of its caches, on the file of the model.

    Args:
        path: of the model.
        ids: int64 ``[T]``, a text that is repeated.
        tokens: that each has room for.

    Attributes:
        models: by name; none where the package is not installed or the model is no GGUF file.
        ids: the text, int32.
    """

    def __init__(self, path: Path, ids: Tensor, tokens: int) -> None:
        self.ids = ids.int().numpy()
        self.models: dict[str, Any] = {}
        if path.suffix != ".gguf":
            return
        if not _is_installed("llama_cpp"):
            print("llama_cpp is not installed: not measured")
            return
        from llama_cpp_model import LlamaCpp

        self.models = {f"llama.cpp {name}": LlamaCpp(path, name, tokens) for name in _LLAMA_CPP_TYPES}

    def fill(self, context: int) -> None:
        """Let each hold ``context`` tokens, or a few more."""
        for peer in self.models.values():
            peer.use_threads(torch.get_num_threads())
            missing = max(context - peer.length, 0)
            peer.decode(np.resize(self.ids, missing))


def attention_alone(filled: dict[str, Cache], layers: Any, context: int, group: int) -> list[dict[str, Any]]:
    """Rows for the attention of one token in all layers: the faster of two ways in torch, and packed caches."""
    heads, size = layers[0][1].shape[1], layers[0][1].shape[3]
    works: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        sides = [(repeated(k, context).to(dtype), repeated(v, context).to(dtype)) for _, k, v in layers]
        query = torch.randn(1, heads * group, 1, size).to(dtype)
        works[f"torch {dtype}, sdpa".replace("torch.", "")] = lambda sides=sides, query=query: [
            nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True) for k, v in sides
        ]
        by_head = query.view(1, heads, group, size)
        works[f"torch {dtype}, matmul".replace("torch.", "")] = lambda sides=sides, query=by_head: [
            (query @ k.mT * size**-0.5).softmax(-1) @ v for k, v in sides
        ]
    for name, cache in filled.items():
        if isinstance(cache, KVQCache):
            works[name] = packed_attention(cache, torch.randn(1, heads * group, 1, size))
    times: dict[str, list[Seconds]] = {name: [] for name in works}
    for _ in range(ATTENTION_RUNS):
        for name, work in works.items():
            times[name].append(timed(work)[1])
    return [
        {
            "attention": name,
            "context": context,
            "threads": torch.get_num_threads(),
            "wall_least": min(seconds.wall for seconds in each),
            "cpu_least": min(seconds.cpu for seconds in each),
        }
        for name, each in times.items()
    ]


def packed_attention(cache: KVQCache, query: Tensor) -> Callable[[], Any]:
    """Attention of one token to the whole cache, in all layers."""
    assert cache.table is not None
    table = cache.table
    request = AttentionRequest(query, Visibility(None, table.length, 1, None), query.shape[-1] ** -0.5)
    pairs = [(layer.ops, layer.storage) for layer in cache.layers]
    return lambda: [ops.attend(request, storage, table) for ops, storage in pairs]


def report(content: dict[str, Any]) -> list[str]:
    """The results in Markdown."""
    settings, rows = content["settings"], content["rows"]
    lines = [
        "# Decode on a CPU",
        "",
        f"{settings['model']}, {settings['dtype']}, one sequence, {settings['steps']} tokens, all caches in turns in "
        "one process. Milliseconds of processor time of the whole model, over all threads: other work on the machine "
        "hardly changes it. The mean is over whole blocks of 32 tokens.",
        "",
    ]
    steps = [row for row in rows if "cache" in row]
    plain = {(row["context"], row["threads"]): row for row in steps if row["cache"] == "DynamicCache"}
    table = []
    for row in steps:
        base = plain[row["context"], row["threads"]]
        table.append(
            [
                row["cache"] + (f" ({row['backend']})" if row["backend"] else ""),
                f"{row['context']:,}",
                str(row["threads"]),
                *(f"{1e3 * row[f'cpu_{part}']:.0f}" for part in ("mean", "median", "longest")),
                f"{1e3 * row['wall_mean']:.0f}",
                f"{row['cpu_mean'] / base['cpu_mean']:.2f}",
                f"{row['bytes'] / 2**20:.1f}",
            ]
        )
    headings = [
        "cache",
        "context",
        "threads",
        "mean",
        "median",
        "longest",
        "wall mean",
        "/ DynamicCache",
        "MiB",
    ]
    lines += markdown_table(headings, table)
    alone = [
        [row["attention"], f"{row['context']:,}", str(row["threads"])]
        + [f"{1e3 * row[f'{clock}_least']:.1f}" for clock in ("cpu", "wall")]
        for row in rows
        if "attention" in row
    ]
    lines += ["", "## Attention alone", "", f"All layers, least of {ATTENTION_RUNS} runs, milliseconds.", ""]
    lines += markdown_table(["", "context", "threads", "processor", "wall"], alone)
    return [*lines, "", *environment_lines(content["environment"])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--artifact", type=Path, action="append", default=[])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--steps", type=int, default=64, help="whole blocks of 32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument(
        "--backend", action="append", default=[], help="of packed caches; the best by default"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "decode_speed.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)
    loaded = load_model(options.model, device="cpu", dtype=options.dtype)
    model = loaded.model
    text = (Path(transformers.__file__).parent / "cache_utils.py").read_text(encoding="utf-8")
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, :SAMPLE_TOKENS]
    layers = sample_layers(model, ids)
    config = model.config.get_text_config()

    caches: dict[str, Callable[[], Cache]] = {"DynamicCache": DynamicCache}
    for path in options.artifact:
        artifact = KVArtifact.load(path)
        name = path.name.removesuffix(".kvq.safetensors")
        for backend in options.backend or ["auto"]:
            caches[name if backend == "auto" else f"{name}, {backend}"] = lambda a=artifact, b=backend: (
                KVQCache(a, model, max_tokens=max(options.contexts) + WARM_UP + options.steps, backend=b)
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
        "settings": {"model": Path(options.model).name, "steps": options.steps, "dtype": options.dtype},
        "environment": environment(options.note),
        "rows": [],
    }
    most = max(options.contexts) + len(options.contexts) * len(options.threads) * (WARM_UP + options.steps)
    peers = LlamaCppPeers(Path(options.model), ids[0], most)
    for context in sorted(options.contexts):
        for threads in options.threads:
            torch.set_num_threads(threads)
            content["rows"] += measure(model, caches, peers, layers, context, options.steps)
            write_results(options.output, content, report(content))
            gc.collect()
    print(markdown(report(content)))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
