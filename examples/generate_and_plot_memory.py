"""Generate a long text with a packed cache and plot its memory beside an ordinary cache.

    python examples/generate_and_plot_memory.py MODEL ARTIFACT [--tokens 4096] [--plot memory.png] [--csv memory.csv]

Both caches generate greedily from the same prompt; after every token the bytes that each really holds are noted.
Without matplotlib the table is still written.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.model.compat import with_cache
from kvq_calib.model.load import load_model
from kvq_calib.runtime import KVQCache

PROMPT = "Here is a long story about a lighthouse keeper and the sea.\n\n"


def held(cache: Any) -> int:
    """Bytes of keys and values, and of everything else a packed cache keeps."""
    if isinstance(cache, KVQCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def generate(model: Any, prompt: torch.Tensor, cache: Any, tokens: int) -> tuple[torch.Tensor, list[int]]:
    """Greedy continuation of ``prompt [1, T]`` by ``tokens`` tokens, and the bytes held after each."""
    text, token, sizes = [prompt], prompt, []
    for _ in range(tokens):
        token = model(input_ids=token, **with_cache(cache)).logits[:, -1:].argmax(-1)
        text.append(token)
        sizes.append(held(cache))
    return torch.cat(text, dim=1), sizes


def plot(path: Path, start: int, series: dict[str, list[int]]) -> None:
    """Draw bytes over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, sizes in series.items():
        axes.plot(range(start, start + len(sizes)), [size / 2**20 for size in sizes], label=name)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("MiB held")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run both caches, write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--plot", type=Path, default=Path("memory.png"))
    parser.add_argument("--csv", type=Path, default=Path("memory.csv"))
    options = parser.parse_args()

    loaded = load_model(options.model)
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids.to(loaded.model.device)
    caches = {
        "DynamicCache": DynamicCache(),
        options.artifact.name: KVQCache(KVArtifact.load(options.artifact), loaded.model),
    }
    series: dict[str, list[int]] = {}
    for name, cache in caches.items():
        text, series[name] = generate(loaded.model, prompt, cache, options.tokens)
        print(f"{name}: {series[name][-1] / 2**20:.1f} MiB for {text.shape[1]} tokens")
        print("  ..." + repr(loaded.tokenizer.decode(text[0, -40:])))

    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens", *series])
        start = prompt.shape[1]
        writer.writerows([start + step, *row] for step, row in enumerate(zip(*series.values(), strict=True)))
    try:
        plot(options.plot, prompt.shape[1], series)
    except ImportError:
        print(f"matplotlib is not installed (pip install matplotlib); see {options.csv}")


if __name__ == "__main__":
    main()
