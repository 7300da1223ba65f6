"""The packed cache in vLLM's pages on a simulated GPU: the kernels run, and the host never waits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from artifact_factory import random_artifact, recipe, trellis
from pretended.device import pretended_cuda, watched
from pretended.drivers import Machine, installed, write_nvcc
from shim.host import compiler
from test_vllm_pages import DENSE, GEOMETRY, Own, own_codes
from torch import Tensor

from kvq_calib import KVArtifact
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.gpu_layer import GpuLayer
from kvq_calib.integrations.vllm.gpu_step import GpuStep
from kvq_calib.integrations.vllm.layer import PagedLayer
from kvq_calib.integrations.vllm.pages import AHEAD, pages_of
from kvq_calib.runtime.cuda import launcher as launchers
from kvq_calib.runtime.cuda.ops import make_cuda_ops

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

GPU = torch.device("cuda", 0)
RECIPES = {
    "scales of tokens": recipe(key=DENSE, value=DENSE, sink_tokens=3),
    "trellis": recipe(
        key=trellis(4, pair_rotation=True), value=trellis(3, token_weighting=True), sink_tokens=40
    ),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Machine]:
    write_nvcc(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("KVQ_CALIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launchers, "_launchers", {})
    made = Machine()
    with installed(made, "cuda-bindings"), pretended_cuda():
        yield made


class Pool:
    """Sequences of one layer in pages of a GPU's memory that are handed out in no order."""

    def __init__(self, artifact: KVArtifact, pages: int) -> None:
        quantizers = artifact.quantizers(GPU)
        (ops,) = make_cuda_ops(quantizers, GPU)
        self.sinks = artifact.spec.sink_tokens
        self.geometry = artifact.geometry.layers[0]
        self.scaling = self.geometry.head_dim**-0.5
        self.layer = GpuLayer(quantizers[0], ops, self.sinks, self.scaling)
        self.generator = torch.Generator().manual_seed(0)
        shape = pages, self.layer.pages.page_bytes
        self.pool = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator).to(GPU)
        self.free = torch.randperm(pages, generator=self.generator).tolist()

    def table(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(pages_of(tokens) + AHEAD)]

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as a model in half precision hands them over."""
        g = self.geometry
        shapes = (g.num_query_heads, g.head_dim), *2 * [(g.num_kv_heads, g.head_dim)]
        query, keys, values = (torch.randn(count, *shape, generator=self.generator) for shape in shapes)
        return (2 * query).half(), (3 * keys).half(), values.half()

    def forward(
        self, tables: list[list[int]], lengths: list[int], new: list[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[list[Tensor], list[str]]:
        """Outputs of one step, and for what the host waited in it."""
        starts = torch.tensor([0, *(len(each[0]) for each in new)]).cumsum(0).tolist()
        widest = max(map(len, tables))
        padded = torch.tensor(
            [[*table, *[0] * (widest - len(table))] for table in tables], dtype=torch.int32
        ).to(GPU)
        query, keys, values = (torch.cat(parts).to(GPU) for parts in zip(*new, strict=True))
        out = torch.full(query.shape, torch.nan, dtype=torch.float16, device=GPU)
        with watched() as waits:
            step = GpuStep(starts, lengths, padded, self.sinks)
            self.layer.forward(step, self.pool, query, keys, values, out)
            found = list(waits)
        out = out.to("cpu")
        return [out[a:b] for a, b in itertools.pairwise(starts)], found

    def codes(self, table: list[int], blocks: int, side: int) -> Tensor:
        pool, pages = self.pool.to("cpu"), self.layer.pages
        found = [pages.packed_page(pool, number, side).codes for number in table]
        layout = pages.quantizers[side].layout
        return torch.cat([layout.read(page.to(GPU)).to("cpu")[0] for page in found], dim=1)[:, : 32 * blocks]


@pytest.mark.parametrize("name", RECIPES)
def test_any_chunks_in_scattered_pages_without_a_wait(gpu, name) -> None:
    artifact = random_artifact(GEOMETRY, RECIPES[name])
    pool, choose = Pool(artifact, 12), random.Random(2)
    lengths = [290, 96, 40]
    own = [Own(artifact, 0, "torch") for _ in lengths]
    turning = PagedLayer(artifact.quantizers()[0], own[0].ops, 0, pool.scaling)
    tables, done, steps = [pool.table(length) for length in lengths], [0] * len(lengths), 0
    while done != lengths:
        counts = [
            min(choose.choice([0, 1, 1, 5, 31, 32, 70]), whole - held)
            for whole, held in zip(lengths, done, strict=True)
        ]
        rows = [row for row, count in enumerate(counts) if count]
        if not rows:
            continue
        done = [held + count for held, count in zip(done, counts, strict=True)]
        new = [pool.draw(counts[row]) for row in rows]
        found, waits = pool.forward([tables[row] for row in rows], [done[row] for row in rows], new)
        assert waits == []
        for row, given, out in zip(rows, new, found, strict=True):
            want = own[row].forward(*(x.float() for x in given), turning)
            assert float((out - want).norm() / want.norm()) < 4e-3
        steps += 1
    for table, each in zip(tables, own, strict=True):
        for side in range(2):
            codes = pool.codes(table, each.storage.key.blocks, side)
            assert torch.equal(codes, own_codes(each, side))
    launches = [note[1] for note in gpu.notes if note[0] == "launch"]
    assert {"append_blocks", "decode_attention", "dequantize_blocks"} <= set(launches)
    assert launches.count("decode_attention") <= steps


def test_too_few_pages_are_refused(gpu) -> None:
    with pytest.raises(RuntimeMismatchError, match="do not fit 1 pages"):
        GpuStep([0, 4], [4], torch.zeros(1, 1, dtype=torch.int32, device=GPU), 0)


def test_capped_scores_are_refused(gpu) -> None:
    quantizers = random_artifact(GEOMETRY, RECIPES["scales of tokens"]).quantizers(GPU)
    with pytest.raises(RuntimeMismatchError, match="caps its scores"):
        GpuLayer(quantizers[0], make_cuda_ops(quantizers, GPU)[0], 0, 0.25, 50.0)
