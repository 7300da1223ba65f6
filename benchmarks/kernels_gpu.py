"""Decode attention from the packed cache against float16 attention over the same tokens, on one GPU.

It uses shapes of several models, context lengths and batch sizes. It times our kernels with KVQuant's recipes (4, 3 and
2 bits, 1% outliers) and ours (mixed widths, trellis codes). Our kernels are compared with the fastest backend of
torch's scaled_dot_product_attention over float16 keys and values. A plain float16 matrix-vector pair is timed, too. A
device-to-device copy is the upper limit of speed; from it follows the time to read an FP8 cache, because torch has no
FP8 attention. Times are medians of CUDA events. Inputs are rotated so that they are not in a cache. Cases that do not
fit into memory are left out and named. The file is rewritten after every row, and no row begins after the budget is
used up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import environment
from gpu_layers import SHAPES, LayerKernels, PackedLayer, Shape
from gpu_recipes import OUTLIERS, RECIPES
from gpu_timing import LEFT_OUT, copies_for, copy_bandwidth, fits, median_seconds, time_float16

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.errors import KVQError
from kvq_calib.files import write_atomically
from kvq_calib.runtime.cuda.dequantize import dequantize
from kvq_calib.runtime.cuda.launcher import Launcher, launcher_for

LENGTHS = (131072, 32768, 8192, 2048, 524288, 1048576)
BATCHES = (1, 8)


def time_ours(kernels: LayerKernels, tokens: int, batch: int) -> dict[str, Any]:
    """Seconds and bytes of our decode attention, or the reason for none."""
    shape = kernels.shape
    expected = shape.cache_bytes(tokens, batch, 1.2 * (kernels.recipe.bits + 0.6))
    copies = copies_for(expected)
    if not fits(expected * (copies + 3)):  # drawing codes needs memory for a time
        return LEFT_OUT
    layers = [PackedLayer(kernels, tokens, batch) for _ in range(copies)]
    query = torch.randn(batch, shape.query_heads, shape.head_dim, device=kernels.device).half()
    seconds = median_seconds([lambda layer=layer: layer.attend(query) for layer in layers])
    return {"seconds": seconds, "bytes": layers[0].nbytes}


def time_append(kernels: LayerKernels, batch: int) -> float:
    """Seconds of packing 32 tokens, divided by 32."""
    shape = kernels.shape
    size = (2, batch, shape.kv_heads, BLOCK_TOKENS, shape.head_dim)
    tokens = torch.randn(size, device=kernels.device).half()
    storages = iter([kernels.storage(batch) for _ in range(100)])
    return median_seconds([lambda: kernels.append(next(storages), tokens[0], tokens[1])]) / BLOCK_TOKENS


def check(launcher: Launcher, device: torch.device) -> None:
    """Compare every recipe with a float64 attention over dequantized pages, on fresh random numbers.

    Raises:
        KVQError: they differ by more than 2e-3.
    """
    for (name, shape), (recipe_name, recipe) in itertools.product(SHAPES.items(), RECIPES.items()):
        small = Shape(shape.query_heads // 8, shape.kv_heads // 8, shape.head_dim)
        kernels = LayerKernels(recipe, small, launcher, device)
        layer = PackedLayer(kernels, 2 * PAGE_TOKENS, 2)
        query = torch.randn(2, small.query_heads, small.head_dim, device=device).half()
        positions = torch.arange(2 * PAGE_TOKENS, dtype=torch.int32, device=device).expand(2, -1).contiguous()
        blocks, turned = range(2 * PAGE_BLOCKS), {"key": positions, "value": None}
        keys, values = (
            dequantize(launcher, table, layer.pages[kind], 2, blocks, torch.float32, turned[kind]).double()
            for kind, table in kernels.tables.items()
        )
        grouped = query.double().view(2, small.kv_heads, -1, small.head_dim) * small.head_dim**-0.5
        want = ((grouped @ keys.mT).softmax(-1) @ values).view(query.shape)
        out = layer.attend(query).double()
        error = float((out - want).norm() / want.norm())
        if not error <= 2e-3:  # these keys are spread wider than unit
            raise KVQError(f"{name} with {recipe_name} is off by {error:.1e}; do not trust the timings")
        print(f"{name} {recipe_name}: error {error:.1e}", file=sys.stderr)


class Timings:
    """Rows of results. The file is written after each row.

    Args:
        arguments: arguments of the command line.
        launcher, device: where the kernels run.
    """

    def __init__(self, arguments: argparse.Namespace, launcher: Launcher, device: torch.device) -> None:
        self.arguments, self.launcher, self.device = arguments, launcher, device
        self.begun = time.perf_counter()
        self.bandwidth = copy_bandwidth(device)
        self.kernels: dict[tuple[str, str], LayerKernels] = {}
        self.rows: list[dict[str, Any]] = []
        self.result = {
            **environment(),
            "gpu": torch.cuda.get_device_name(device),
            "driver": getattr(getattr(launcher, "driver", None), "name", "unknown"),
            "copy_bytes_per_second": self.bandwidth,
            "outliers": OUTLIERS,
            "complete": False,
            "rows": self.rows,
        }

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return time.perf_counter() - self.begun > self.arguments.budget

    def write(self) -> None:
        """Write all rows so far."""
        if self.arguments.json:
            self.arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.arguments.json, (json.dumps(self.result, indent=1) + "\n").encode())

    def run(self) -> None:
        """Measure all lengths, models and batches, until the budget is used up."""
        a = self.arguments
        print(f"copy: {self.bandwidth / 1e12:.2f} TB/s read and written", flush=True)
        self.write()
        for tokens, model, batch in itertools.product(a.lengths, a.models, a.batches):
            if self.spent:
                print(f"{a.budget:.0f} seconds are spent", flush=True)
                return
            self._row(model, tokens, batch)
        self.result["complete"] = True
        self.write()

    def _row(self, model: str, tokens: int, batch: int) -> None:
        shape = SHAPES[model]
        row: dict[str, Any] = {"model": model, "tokens": tokens, "batch": batch}
        row["float16"] = peers = time_float16(shape, tokens, batch, self.device)
        row["fp8_at_copy_speed"] = shape.cache_bytes(tokens, batch, 8) / self.bandwidth
        best = peers[peers["fastest"]]["seconds"] if "fastest" in peers else None
        name = peers.get("fastest", "memory")
        print(f"{model} {tokens} x{batch}: float16 {1e6 * (best or 0):.1f} us ({name})", flush=True)
        self.rows.append(row)
        for recipe in self.arguments.recipes:
            torch.cuda.empty_cache()
            if (recipe, model) not in self.kernels:
                made = LayerKernels(RECIPES[recipe], shape, self.launcher, self.device)
                self.kernels[recipe, model] = made
            ours = row[recipe] = time_ours(self.kernels[recipe, model], tokens, batch)
            if "seconds" in ours:
                ours["roofline"] = ours["bytes"] / self.bandwidth / ours["seconds"]
                ours["speedup"] = None if best is None else best / ours["seconds"]
                ours["append_seconds_per_token"] = time_append(self.kernels[recipe, model], batch)
                print(
                    f"  {recipe:8} {ours['seconds'] * 1e6:9.1f} us {ours['speedup'] or float('nan'):6.2f} x float16 "
                    f"{ours['roofline']:5.0%} of the copy",
                    flush=True,
                )
            self.write()


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--models", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--recipes", choices=list(RECIPES), nargs="+", default=list(RECIPES))
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no row begins"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    launcher = launcher_for(device)
    if arguments.check_only:
        check(launcher, device)
        torch.cuda.synchronize()
        return 0
    Timings(arguments, launcher, device).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
