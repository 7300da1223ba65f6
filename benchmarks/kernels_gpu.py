"""Decode attention from the packed cache against what else could be done with the same tokens, on one GPU.

For the shapes of three models, context lengths and batch sizes it times our kernels with KVQuant's recipes (4, 3 and 2
bits, 1% outliers) and ours (mixed widths, trellis codes), torch's scaled_dot_product_attention over float16 keys and values (its flash decoding), a plain float16
matrix-vector pair, the same pair with FP8, and takes a device-to-device copy as the ceiling. Medians of CUDA
events; inputs are rotated so that no cache serves them; what does not fit into memory is left out and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import environment
from gpu_recipes import OUTLIERS, RECIPES, Recipe
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, COORDINATE_BITS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.codec.registry import codec_of
from kvq_calib.errors import KVQError
from kvq_calib.runtime.cuda.append import append_blocks
from kvq_calib.runtime.cuda.decode import DecodeKernel, DecodeStep
from kvq_calib.runtime.cuda.decode_tables import KernelTables
from kvq_calib.runtime.cuda.dequantize import dequantize
from kvq_calib.runtime.cuda.launcher import Launcher, launcher_for
from kvq_calib.runtime.slot_view import DecodeContext
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.schema.geometry import LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KINDS, Kind

#: Least bytes that a rotation of inputs spans: several times any second-level cache.
ROTATED_BYTES = 512 << 20
REPEATS, WARM_UP = 41, 5


@dataclass(frozen=True)
class Shape:
    """Attention of one layer."""

    query_heads: int
    kv_heads: int
    head_dim: int = 128


SHAPES = {"LLaMA-7B": Shape(32, 32), "Llama-3-8B": Shape(32, 8), "Mistral-7B": Shape(32, 8)}
LENGTHS = (2048, 8192, 32768, 131072, 524288, 1048576)
BATCHES = (1, 8)


class PackedLayer:
    """A layer's packed keys and values with random contents: full pages, positions in order.

    Args:
        recipe: widths, and whether there are outliers.
        shape, tokens, batch: how much of it. ``tokens`` is a multiple of 256.
        launcher, device: where it runs.
    """

    def __init__(
        self,
        recipe: Recipe,
        shape: Shape,
        tokens: int,
        batch: int,
        launcher: Launcher,
        device: torch.device,
    ) -> None:
        self.launcher, self.shape, self.tokens, self.batch = launcher, shape, tokens, batch
        half = shape.head_dim // 2
        rope = RopeSpec(
            pairs=tuple((i, i + half) for i in range(half)),
            inv_freq=tuple(500000.0 ** (-i / half) for i in range(half)),
        )
        geometry = LayerGeometry(
            num_query_heads=shape.query_heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, rope=0
        )
        self.quantizers = {
            kind: codec_of(spec)(
                spec,
                recipe.params(kind, geometry.shape(kind), rope).to(device),
                geometry.shape(kind),
                rope if kind == "key" else None,
            )
            for kind, spec in recipe.specs().items()
        }
        self.tables = {kind: KernelTables(q, kind) for kind, q in self.quantizers.items()}
        self.kernel = DecodeKernel(launcher, self.tables["key"], self.tables["value"])
        self.held: list[Tensor] = []
        self.pages = {kind: self._pages(kind, device) for kind in KINDS}
        start = torch.arange(0, tokens, BLOCK_TOKENS, dtype=torch.int32, device=device)
        blocks = torch.stack((start, torch.full_like(start, -1)), dim=-1).expand(batch, -1, -1).contiguous()
        self.context = DecodeContext(blocks, torch.empty(batch, 0, dtype=torch.int32, device=device))
        none = torch.empty(batch, shape.kv_heads, 0, shape.head_dim, dtype=torch.float16, device=device)
        self.exact = [(none, none), (none, none)]

    def _pages(self, kind: Kind, device: torch.device) -> Tensor:
        shape, batch, count = self.shape, self.batch, self.tokens // PAGE_TOKENS
        layout = self.quantizers[kind].layout
        words = PAGE_BLOCKS * layout.words_per_block
        codes = torch.randint(-(2**31), 2**31, (count, batch * words), dtype=torch.int64, device=device).to(
            torch.int32
        )
        self.held.append(codes)
        index = residual = starts = params = None
        if layout.outlier_cap:
            lists = PAGE_BLOCKS * batch * shape.kv_heads
            each = round(OUTLIERS * BLOCK_TOKENS * shape.head_dim)
            place = torch.randint(0, BLOCK_TOKENS * shape.head_dim, (count, lists, each), device=device)
            place = place.sort(-1).values
            index = (
                (place // shape.head_dim << COORDINATE_BITS | place % shape.head_dim)
                .to(torch.int16)
                .view(count, -1)
            )
            residual = torch.randn(count, lists * each, device=device).half()
            starts = each * torch.arange(lists + 1, dtype=torch.int32, device=device)
            starts = starts.expand(count, -1).contiguous()
            self.held += [index, residual, starts]
        if layout.token_params:
            params = torch.rand(count, batch, PAGE_TOKENS, 2, device=device).half()
            self.held.append(params)

        def address(tensor: Tensor | None) -> Tensor:
            if tensor is None:
                return torch.zeros(count, dtype=torch.int64)
            stride = tensor[0].numel() * tensor.element_size()
            return tensor.data_ptr() + stride * torch.arange(count, dtype=torch.int64)

        columns = [address(tensor) for tensor in (codes, params, index, residual, starts)]
        columns.append(torch.full((count,), 4 if starts is None else starts.element_size()))
        return torch.stack(columns, dim=-1).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes that one decode step reads."""
        return sum(tensor.nbytes for tensor in self.held)

    def attend(self, query: Tensor) -> Tensor:
        """``[B, Hq, D]`` to the same."""
        pages = self.pages
        scaling = self.shape.head_dim**-0.5
        step = DecodeStep(query, pages["key"], pages["value"], self.exact, self.context, scaling)
        return self.kernel.attend(step)


def median_seconds(calls: list[Callable[[], Any]]) -> float:
    """Median device time of one call, going round the ``calls``."""
    for i in range(max(WARM_UP, len(calls))):
        calls[i % len(calls)]()
    times = []
    for i in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the host gets ahead, so that its own time is not measured
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def copies_for(nbytes: int) -> int:
    """How many inputs a rotation needs."""
    return max(1, -(-ROTATED_BYTES // max(nbytes, 1)))


def fits(nbytes: int) -> bool:
    """Whether so much device memory is free, with a fifth to spare."""
    free, _ = torch.cuda.mem_get_info()
    return nbytes * 1.25 < free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    size = 1 << 30
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds([lambda: target.copy_(source)])


def time_ours(
    recipe: Recipe, shape: Shape, tokens: int, batch: int, launcher: Launcher, device: torch.device
):
    """Seconds and bytes of our decode attention, or why not."""
    expected = 2.4 * batch * tokens * shape.kv_heads * shape.head_dim * (recipe.bits + 0.6) / 8
    copies = copies_for(int(expected))
    if not fits(int(expected) * (copies + 3)):  # drawing codes needs room for a while
        return {"left_out": "memory"}
    layers = [PackedLayer(recipe, shape, tokens, batch, launcher, device) for _ in range(copies)]
    query = torch.randn(batch, shape.query_heads, shape.head_dim, device=device).half()
    seconds = median_seconds([lambda layer=layer: layer.attend(query) for layer in layers])
    return {"seconds": seconds, "bytes": layers[0].nbytes}


def time_float16(shape: Shape, tokens: int, batch: int, device: torch.device) -> dict[str, Any]:
    """The float16 peers over the same number of tokens."""
    size = (batch, shape.kv_heads, tokens, shape.head_dim)
    nbytes = 2 * 2 * batch * shape.kv_heads * tokens * shape.head_dim
    if not fits(2 * nbytes * copies_for(nbytes)):
        return {name: {"left_out": "memory"} for name in ("sdpa_float16", "matvec_float16", "matvec_fp8")}
    sets = [
        tuple(torch.randn(size, device=device).half() for _ in range(2)) for _ in range(copies_for(nbytes))
    ]
    query = torch.randn(batch, shape.query_heads, 1, shape.head_dim, device=device).half()
    attention = torch.nn.functional.scaled_dot_product_attention
    grouped = query.view(batch, shape.kv_heads, -1, shape.head_dim) * shape.head_dim**-0.5

    def pair(keys: Tensor, values: Tensor) -> Tensor:
        return (grouped @ keys.mT).softmax(-1) @ values

    found = {
        "sdpa_float16": {
            "seconds": median_seconds([lambda kv=kv: attention(query, *kv, enable_gqa=True) for kv in sets]),
            "bytes": nbytes,
        },
        "matvec_float16": {
            "seconds": median_seconds([lambda kv=kv: pair(*kv) for kv in sets]),
            "bytes": nbytes,
        },
    }
    try:
        found["matvec_fp8"] = {"seconds": time_fp8(sets, grouped), "bytes": nbytes // 2}
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        found["matvec_fp8"] = {"left_out": str(error).splitlines()[0]}
    return found


def time_fp8(sets: list[tuple[Tensor, ...]], query: Tensor) -> float:
    """The matrix-vector pair with 8-bit floats: torch multiplies two matrices at a time, 16 rows at least."""
    kind = torch.float8_e4m3fn
    one = torch.ones((), device=query.device)
    rows = torch.zeros(query.shape[0] * query.shape[1], 16, query.shape[-1], device=query.device)
    rows[:, : query.shape[2]] = query.flatten(0, 1)
    queries = rows.to(kind)
    eights = [
        (keys.flatten(0, 1).to(kind), values.flatten(0, 1).mT.contiguous().to(kind)) for keys, values in sets
    ]

    def pair(keys: Tensor, values: Tensor) -> None:
        for q, k, v in zip(queries, keys, values, strict=True):
            scores = torch._scaled_mm(q, k.mT, one, one, out_dtype=torch.bfloat16)
            torch._scaled_mm(scores.softmax(-1).to(kind), v.mT, one, one, out_dtype=torch.bfloat16)

    return median_seconds([lambda kv=kv: pair(*kv) for kv in eights])


def time_append(recipe: Recipe, shape: Shape, batch: int, launcher: Launcher, device: torch.device) -> float:
    """Seconds of packing 32 tokens, divided by 32."""
    layer = PackedLayer(recipe, shape, PAGE_TOKENS, batch, launcher, device)
    quantizers, tables = layer.quantizers, layer.tables
    tokens = torch.randn(2, batch, shape.kv_heads, BLOCK_TOKENS, shape.head_dim, device=device).half()

    def append() -> None:
        storage = LayerStorage(quantizers["key"], quantizers["value"], batch, 0, device)
        append_blocks(launcher, tables["key"], tables["value"], storage, tokens[0], tokens[1])

    return median_seconds([append]) / BLOCK_TOKENS


def check(launcher: Launcher, device: torch.device) -> None:
    """Compare every recipe with a float64 attention over dequantized pages, on fresh random numbers.

    Raises:
        KVQError: they differ by more than 1e-3.
    """
    for name, shape in SHAPES.items():
        small = Shape(shape.query_heads // 8, shape.kv_heads // 8, shape.head_dim)
        for recipe_name, recipe in RECIPES.items():
            layer = PackedLayer(recipe, small, 2 * PAGE_TOKENS, 2, launcher, device)
            query = torch.randn(2, small.query_heads, small.head_dim, device=device).half()
            positions = (
                torch.arange(2 * PAGE_TOKENS, dtype=torch.int32, device=device).expand(2, -1).contiguous()
            )
            keys, values = (
                dequantize(
                    launcher,
                    layer.tables[kind],
                    layer.pages[kind],
                    2,
                    range(2 * PAGE_BLOCKS),
                    torch.float32,
                    positions if kind == "key" else None,
                ).double()
                for kind in ("key", "value")
            )
            grouped = query.double().view(2, small.kv_heads, -1, small.head_dim) * small.head_dim**-0.5
            want = ((grouped @ keys.mT).softmax(-1) @ values).view(query.shape)
            out = layer.attend(query).double()
            error = float((out - want).norm() / want.norm())
            if not error <= 2e-3:  # these keys are spread wider than unit
                raise KVQError(f"{name} with {recipe_name} is off by {error:.1e}; do not trust the timings")
            print(f"{name} {recipe_name}: error {error:.1e}", file=sys.stderr)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    launcher = launcher_for(device)
    check(launcher, device)
    torch.cuda.synchronize()
    if arguments.check_only:
        return 0
    bandwidth = copy_bandwidth(device)
    rows = []
    print(f"copy: {bandwidth / 1e12:.2f} TB/s read and written")
    print(
        f"{'model':12} {'tokens':>8} {'batch':>5} {'recipe':>8} {'us':>9} {'x sdpa':>7} {'x matvec':>8} {'roofline':>8}"
    )
    for name, shape in SHAPES.items():
        for tokens in arguments.lengths:
            for batch in BATCHES:
                row: dict[str, Any] = {"model": name, "tokens": tokens, "batch": batch}
                row |= time_float16(shape, tokens, batch, device)
                torch.cuda.empty_cache()
                for recipe_name, recipe in RECIPES.items():
                    ours = row[recipe_name] = time_ours(recipe, shape, tokens, batch, launcher, device)
                    torch.cuda.empty_cache()
                    if "seconds" not in ours:
                        continue
                    ours["append_seconds_per_token"] = time_append(recipe, shape, batch, launcher, device)
                    ours["roofline"] = ours["bytes"] / bandwidth / ours["seconds"]
                    for peer in ("sdpa_float16", "matvec_float16", "matvec_fp8"):
                        if "seconds" in row[peer]:
                            ours[f"speedup_{peer}"] = row[peer]["seconds"] / ours["seconds"]
                    print(
                        f"{name:12} {tokens:8} {batch:5} {recipe_name:>8} {ours['seconds'] * 1e6:9.1f} "
                        f"{ours.get('speedup_sdpa_float16', float('nan')):7.2f} "
                        f"{ours.get('speedup_matvec_float16', float('nan')):8.2f} {ours['roofline']:8.0%}"
                    )
                rows.append(row)
    if arguments.json:
        result = {
            **environment(),
            "gpu": torch.cuda.get_device_name(device),
            "copy_bytes_per_second": bandwidth,
            "outliers": OUTLIERS,
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
