"""Time to encode keys and values of one layer: torch against the native encoder with each instruction set.

Random numbers on the scale of the artifact's channels, a window of tokens as calibration and evaluation have them, and
one block as decoding has it. Codes must be equal.

    python benchmarks/encode_speed.py --artifact benchmarks/artifacts/smollm2-135m-wikitext2/kvq3.kvq.safetensors
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
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
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.native.loader import usable_isas
from kvq_calib.schema.geometry import KINDS

ARTIFACT = Path(__file__).parent / "artifacts" / "smollm2-135m-wikitext2" / "kvq3.kvq.safetensors"
#: Standard deviation of the numbers, in units of half a channel's range.
SPREAD = 0.6
TORCH = "torch"


@contextmanager
def computed_by(name: str) -> Iterator[None]:
    """Have torch or the library of an instruction set compute."""
    settings = (
        {"KVQ_CALIB_OPS": TORCH} if name == TORCH else {"KVQ_CALIB_OPS": "native", "KVQ_CALIB_ISA": name}
    )
    before = {key: os.environ.pop(key, None) for key in ("KVQ_CALIB_OPS", "KVQ_CALIB_ISA")}
    os.environ.update(settings)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def drawn(quantizer: Quantizer, tokens: int) -> Tensor:
    """Random keys or values ``[1, H, tokens, D]``."""
    noise = torch.randn(1, tokens, quantizer.shape.channels, generator=torch.Generator().manual_seed(tokens))
    held = quantizer.channel_range()
    assert held is not None
    centre, half = held
    return quantizer.inverse_transform(centre + SPREAD * half * noise)


def fastest(work: Callable[[], Any], repeats: int) -> tuple[Any, Seconds]:
    """The result, and the least of several times."""
    runs = [timed(work) for _ in range(repeats)]
    return runs[0][0], min((seconds for _, seconds in runs), key=lambda seconds: seconds.cpu)


def compare(
    quantizer: Quantizer, kind: str, tokens: int, isas: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Seconds of each to encode; codes must be those of torch.

    Raises:
        SystemExit: they are not.
    """
    x = drawn(quantizer, tokens)
    with computed_by(TORCH):
        expected, seconds = fastest(lambda: quantizer.quantize(x).codes, max(repeats // 10, 3))
        _, transform = fastest(lambda: quantizer.transform(x), repeats)
    found = {TORCH: asdict(seconds)}
    for isa in isas:
        with computed_by(isa):
            codes, seconds = fastest(lambda: quantizer.quantize(x).codes, repeats)
        if not torch.equal(codes, expected):
            raise SystemExit(f"{isa}: codes of {kind}s are not those of torch")
        found[isa] = asdict(seconds)
    return {"kind": kind, "tokens": tokens, "transform": asdict(transform), "seconds": found}


def report(content: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    settings, isas = content["settings"], content["instruction_sets"]
    rows = []
    for row in content["rows"]:
        cpu = {name: 1e3 * seconds["cpu"] for name, seconds in row["seconds"].items()}
        cells = [f"{cpu[isa]:.2f} ({cpu[TORCH] / cpu[isa]:.0f}x)" for isa in isas]
        rows.append([f"{row['kind']}s, {row['tokens']:,} tokens", f"{cpu[TORCH]:.1f}", *cells])
    return [
        "# Encoding keys and values of one layer",
        "",
        f"Layer {settings['layer']} of {settings['artifact']}: {settings['heads']} heads of {settings['head_dim']}. "
        "Milliseconds of processor time from keys or values to codes with everything that belongs to it (turned RoPE "
        f"pairs, token weights, paths, error compensation), the least of {settings['repeats']} runs, for torch of a "
        "tenth as many; in brackets how many times faster than torch. Codes are equal.",
        "",
        *markdown_table(["", "torch", *isas], rows),
        "",
        *environment_lines(content["environment"]),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, default=ARTIFACT)
    parser.add_argument("--layer", type=int, help="the middle one by default")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=RESULTS / "encode_speed.json")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    isas = list(usable_isas())
    if not isas:
        raise SystemExit(
            "there is no native library; install the package with a C++ compiler, or run kernels/compile_cpu.py"
        )
    artifact = KVArtifact.load(options.artifact)
    layer = len(artifact.layers) // 2 if options.layer is None else options.layer
    quantizers = artifact.quantizers(torch.device("cpu"))[layer]
    shape = quantizers["key"].shape
    content: dict[str, Any] = {
        "settings": {
            "artifact": options.artifact.name,
            "layer": layer,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "repeats": options.repeats,
        },
        "environment": environment(options.note),
        "instruction_sets": isas,
        "rows": [],
    }
    with torch.no_grad():
        for kind in KINDS:
            for tokens in options.tokens:
                row = compare(quantizers[kind], kind, tokens, isas, options.repeats)
                content["rows"].append(row)
    write_results(options.output, content, report(content))
    print(markdown(report(content)))


if __name__ == "__main__":
    main()
