"""KL divergence of llama.cpp's cache types from llama.cpp's own f16 cache.

    python benchmarks/llama_cpp_kl.py MODEL.gguf --dataset FILE [--windows 2] [--type q4_0 ...]

llama.cpp itself runs the model, with its own weights and kernels, on the windows that ``kvq-eval compare`` uses. It
needs ``llama-cpp-python``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, environment_lines, markdown, markdown_table, write_results
from torch import Tensor

from kvq_calib.data import load_windows
from kvq_calib.evaluate.intervals import mean_and_error
from kvq_calib.model.load import load_model

_REFERENCE = "f16"
#: Bits per element, with scales and minima: blocks of 32 numbers.
BITS = {"q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "iq4_nl": 4.5, "q4_0": 4.5}


def divergences(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence and agreement of the most likely token.

    Args:
        wanted, found: logits of the reference and of another cache, float32 ``[T, V]``.

    Returns:
        Nats for each token, float64 ``[T]``, and bool ``[T]``.
    """
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def logits_in_parts(model: Path, cache_type: str, ids: Tensor, threads: int) -> Iterator[Tensor]:
    """Logits of a window, int64 ``[T]``, with an empty cache of a type."""
    from llama_cpp_model import BATCH, LlamaCpp

    peer = LlamaCpp(model, cache_type, len(ids))
    try:
        peer.use_threads(threads)
        for part in torch.split(ids.to(torch.int32), BATCH):
            yield torch.from_numpy(peer.logits(np.ascontiguousarray(part.numpy())))
    finally:
        peer.close()


def measure(model: Path, windows: Tensor, types: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """A row for each cache type: KL divergence of every window, and agreement, over all tokens but the last."""
    rows = {name: {"type": name, "bits": BITS[name], "kl_windows": [], "top1": []} for name in types}
    for ids in windows:
        reference = list(logits_in_parts(model, _REFERENCE, ids, threads))
        for name, row in rows.items():
            parts = zip(reference, logits_in_parts(model, name, ids, threads), strict=True)
            kl, same = (
                torch.cat(each)[:-1] for each in zip(*(divergences(*one) for one in parts), strict=True)
            )
            row["kl_windows"].append(float(kl.mean()))
            row["top1"].append(float(same.double().mean()))
    return list(rows.values())


def report(content: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    settings = content["settings"]
    cells = []
    for row in content["rows"]:
        mean, error = mean_and_error(row["kl_windows"])
        kl = f"{mean:.5f}" + ("" if error is None else f" ± {error:.5f}")
        cells.append([f"`{row['type']}`", f"{row['bits']:.1f}", kl, f"{np.mean(row['top1']):.4f}"])
    return [
        "# llama.cpp's cache types, run by llama.cpp",
        "",
        f"{settings['model']}, {settings['windows']} windows of {settings['seqlen']} tokens. KL divergence from "
        "llama.cpp with its f16 cache, in nats per token.",
        "",
        *markdown_table(["cache type", "bits/element", "KL mean", "top-1 agreement"], cells),
        "",
        *environment_lines(content["environment"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--type", dest="types", action="append", choices=BITS, help="all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "llama_cpp_kl.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    tokenizer = load_model(str(options.model)).tokenizer
    text = load_windows(
        options.dataset, tokenizer, split="evaluation", samples=options.windows, seqlen=options.seqlen
    )
    content = {
        "settings": {
            "model": options.model.name,
            "windows": len(text.ids),
            "seqlen": options.seqlen,
            "data": text.source,
        },
        "environment": environment(options.note),
        "rows": measure(options.model, text.ids, options.types or list(BITS), options.threads),
    }
    write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
