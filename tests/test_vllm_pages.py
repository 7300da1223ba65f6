"""The packed cache in pages of vLLM's size, without vLLM: what is stored and computed is what a cache of its own holds.

Pages are scattered over a pool that is full of garbage, sequences come in chunks of any length, and first pages may be
shared.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from artifact_factory import random_artifact, recipe, trellis
from test_native_attend import turned, turned_back
from torch import Tensor

from kvq_calib import KVArtifact
from kvq_calib.artifact.shard import shard
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.decode import NativeDecoding
from kvq_calib.integrations.vllm.layer import PagedLayer
from kvq_calib.integrations.vllm.pages import AHEAD, LayerPages, page_bytes_of_ranks, pages_of
from kvq_calib.integrations.vllm.step import Step
from kvq_calib.native.loader import library
from kvq_calib.runtime.ops import choose_ops
from kvq_calib.runtime.page_reader import PageReader
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.visibility import AttentionRequest, Visibility
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

CPU = torch.device("cpu")
ARTIFACTS = Path(__file__).parent.parent / "benchmarks" / "artifacts" / "smollm2-135m-wikitext2"
DENSE = {"outliers": {}}
RECIPES = {
    "scalar": recipe(key=DENSE, value=DENSE),
    "scales of tokens in keys": recipe(
        key={**DENSE, "thresholds": "token_normalized"}, value=DENSE, sink_tokens=0
    ),
    "bfloat16": recipe(key=DENSE, value={**DENSE, "bits": 2}, storage_dtype="bfloat16", sink_tokens=5),
    "trellis": recipe(
        key=trellis(5, pair_rotation=True), value=trellis(4, token_weighting=True), sink_tokens=40
    ),
}
#: Two query heads to a key-value head, a part of each head turned and scaled.
GEOMETRY = KVGeometry(
    layers=(LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=16, rope=0),),
    ropes=(
        RopeSpec(
            pairs=tuple((p, p + 6) for p in range(6)),
            inv_freq=tuple(0.5**p for p in range(6)),
            attention_scaling=1.25,
        ),
    ),
)


class Own:
    """A sequence in a storage of its own, and attention over it.

    That of paged torch operations is held to the same operations here, that of the native kernels to float64.
    """

    def __init__(self, artifact: KVArtifact, index: int, backend: str) -> None:
        self.backend = backend
        self.pair = pair = artifact.quantizers()[index]
        self.ops, sinks = TorchOps(pair["key"], pair["value"]), artifact.spec.sink_tokens
        self.storage = LayerStorage(pair["key"], pair["value"], 1, sinks, CPU)
        self.table = SlotTable(1, sinks, 0, CPU)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, layer: PagedLayer) -> Tensor:
        count, first = len(keys), self.storage.length
        self.table.append(torch.arange(first, first + count, dtype=torch.int32)[None], None)
        # Turned back by the same operations: one that rounds otherwise moves codes now and then.
        step = Step([0, count], [first + count], torch.zeros(1, 9, dtype=torch.int64), 0)
        unturned, values = layer.unturned(step, keys, values)
        self.storage.append(unturned[None], values[None], self.table, self.ops.pack)
        if self.backend == "native":
            return self.attention_float64(query, layer.scaling)
        seen = Visibility(None, first + count, count, None)
        request = AttentionRequest(query.transpose(0, 1)[None], seen, layer.scaling)
        return self.ops.attend(request, self.storage, self.table)[0].double()

    def attention_float64(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of the last tokens over all that is stored, float64 ``[T, Hq, D]``."""
        storage, sides = self.storage, []
        for packed, kind in ((storage.key, "key"), (storage.value, "value")):
            quantizer = self.pair[kind]
            sinks, tail = (getattr(storage, f"{part}_{kind}")[0].double() for part in ("sink", "tail"))
            parts = [tail]
            if packed.pages:
                y = PageReader(quantizer).read(packed.pages).mT.double()
                parts.insert(0, turned_back(y, quantizer)[0, :, : 32 * packed.blocks])
            stored = torch.cat(parts, dim=1)
            first = min(
                sinks.shape[1], stored.shape[1]
            )  # blocks have the first tokens too, which are read exactly
            stored[:, :first] = sinks[:, :first]
            sides.append(stored)
        keys, values = sides
        place = torch.arange(storage.length)
        keys = turned(keys[None], place[None], self.pair["key"].read_rope)[0]
        group, count = query.shape[1] // len(keys), len(query)
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        scores = query.double().transpose(0, 1) @ keys.mT * scaling
        hidden = place > place[-count:, None]
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)


class Pool:
    """Sequences of one layer in pages that are handed out in no order."""

    def __init__(
        self, artifact: KVArtifact, index: int, pages: int, backend: str, seed: int = 0, least: int = 0
    ) -> None:
        quantizers = artifact.quantizers()
        ops, _ = choose_ops(quantizers, CPU, backend)
        self.geometry = artifact.geometry.layers[index]
        scaling = self.geometry.head_dim**-0.5
        sinks, decoding = artifact.spec.sink_tokens, NativeDecoding()
        self.layer = PagedLayer(quantizers[index], ops[index], sinks, scaling, None, decoding, least)
        self.generator = torch.Generator().manual_seed(seed)
        shape = pages, self.layer.pages.page_bytes
        self.pool = torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)
        self.free = torch.randperm(pages, generator=self.generator).tolist()

    def table(self, tokens: int) -> list[int]:
        """Pages for a sequence of this length."""
        return [self.free.pop() for _ in range(pages_of(tokens) + AHEAD)]

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens, as a model hands them over."""
        geometry = self.geometry
        shapes = [
            (geometry.num_query_heads, geometry.head_dim),
            *2 * [(geometry.num_kv_heads, geometry.head_dim)],
        ]
        query, keys, values = (torch.randn(count, *shape, generator=self.generator) for shape in shapes)
        return 2 * query, 3 * keys, values

    def forward(
        self, tables: list[list[int]], lengths: list[int], new: list[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Tensor]:
        """One step; ``lengths`` count the new tokens."""
        starts = torch.tensor([0, *(len(each[0]) for each in new)]).cumsum(0).tolist()
        widest = max(map(len, tables))
        padded = torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables])
        step = Step(starts, lengths, padded, self.layer.pages.sink_tokens)
        query, keys, values = (torch.cat(parts) for parts in zip(*new, strict=True))
        out = torch.full((starts[-1], *query.shape[1:]), torch.nan)
        self.layer.forward(step, self.pool, query, keys, values, out)
        return [out[a:b] for a, b in itertools.pairwise(starts)]

    def codes(self, table: list[int], blocks: int, side: int) -> Tensor:
        """Codes of a sequence's blocks, uint8 ``[C, 32 * blocks]``."""
        layout = self.layer.pages.quantizers[side].layout
        pages = [self.layer.pages.packed_page(self.pool, number, side).codes for number in table]
        return torch.cat([layout.read(page)[0] for page in pages], dim=1)[:, : 32 * blocks]


def own_codes(own: Own, side: int) -> Tensor:
    packed = (own.storage.key, own.storage.value)[side]
    found = [packed.layout.read(page.codes)[0] for page in packed.pages]
    return torch.cat(found, dim=1)[:, : 32 * packed.blocks]


def in_chunks(
    artifact: KVArtifact, index: int, backend: str, lengths: list[int], seed: int, least: int = 0
) -> float:
    """Feed sequences in random chunks to both; the largest difference of outputs. Codes must be equal."""
    pool, choose = Pool(artifact, index, 24, backend, seed, least), random.Random(seed)
    own = [Own(artifact, index, backend) for _ in lengths]
    tables, done, worst = [pool.table(length) for length in lengths], [0] * len(lengths), 0.0
    while done != lengths:
        counts = [
            min(choose.choice([0, 1, 1, 1, 5, 31, 32, 33, 64, 70, 300]), whole - held)
            for whole, held in zip(lengths, done, strict=True)
        ]
        rows = [row for row, count in enumerate(counts) if count]
        if not rows:
            continue
        done = [held + count for held, count in zip(done, counts, strict=True)]
        new = [pool.draw(counts[row]) for row in rows]
        found = pool.forward([tables[row] for row in rows], [done[row] for row in rows], new)
        for row, given, out in zip(rows, new, found, strict=True):
            want = own[row].forward(*given, pool.layer)
            worst = max(worst, float((out - want).abs().max() / want.abs().max()))
    for table, each in zip(tables, own, strict=True):
        for side in range(2):
            assert torch.equal(pool.codes(table, each.storage.key.blocks, side), own_codes(each, side))
    return worst


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and library() is None:
        pytest.skip("no native library is there")
    name: str = request.param
    return name


@pytest.mark.parametrize("name", RECIPES)
def test_any_chunks_in_scattered_pages_are_what_a_storage_of_its_own_holds(name, backend):
    artifact = random_artifact(GEOMETRY, RECIPES[name])
    assert in_chunks(artifact, 0, backend, [290, 96, 33, 520], seed=1) < 1e-5


@pytest.mark.parametrize("index", [0, 13, 28])
@pytest.mark.parametrize("name", ["kvq2", "kvq3", "kvq4"])
def test_layers_of_a_real_artifact(name, index, backend):
    artifact = KVArtifact.load(ARTIFACTS / f"{name}.kvq.safetensors")
    assert in_chunks(artifact, index, backend, [200, 96, 333], seed=index) < 1e-5


def test_pages_filled_in_the_same_step_are_shared(backend):
    artifact = random_artifact(GEOMETRY, RECIPES["scalar"])
    pool = Pool(artifact, 0, 16, backend)
    first = pool.table(260)
    second = [first[0], *pool.table(3)]
    whole, rest = pool.draw(260), pool.draw(4)
    beside = tuple(part[:4] for part in rest)
    outputs = pool.forward([first, second], [260, 260], [whole, beside])
    own = Own(artifact, 0, backend)
    own.forward(*(part[:256] for part in whole), pool.layer)
    want = own.forward(*beside, pool.layer)
    assert torch.allclose(outputs[1].double(), want, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_blocks_that_sequences_complete_in_the_same_step(name, backend):
    artifact = random_artifact(GEOMETRY, RECIPES[name])
    pool, lengths = Pool(artifact, 0, 24, backend), [63, 255, 287, 40]
    own, tables = [Own(artifact, 0, backend) for _ in lengths], [pool.table(300) for _ in lengths]
    for counts in (lengths, [1, 1, 1, 1]):
        new = [pool.draw(count) for count in counts]
        held = [each.storage.length + count for each, count in zip(own, counts, strict=True)]
        found = pool.forward(tables, held, new)
        for each, given, out in zip(own, new, found, strict=True):
            want = each.forward(*given, pool.layer)
            assert (out - want).abs().max() < 1e-5 * want.abs().max()
    assert [each.storage.key.blocks for each in own] == [2, 8, 9, 1]
    for table, each in zip(tables, own, strict=True):
        for side in range(2):
            assert torch.equal(pool.codes(table, each.storage.key.blocks, side), own_codes(each, side))


def test_a_page_is_as_large_as_what_it_holds():
    artifact = random_artifact(GEOMETRY, RECIPES["scalar"])
    pair = artifact.quantizers()[0]
    pages = LayerPages(pair["key"], pair["value"], 1)
    # 32 channels of 4 bits twice, scales of 256 tokens, one first token, each in whole 64 bytes
    assert pages.page_bytes == 2 * 32 * 256 // 2 + 4 * 256 + 2 * 64


def test_thin_pages_have_room_for_the_newest_tokens():
    artifact = random_artifact(GEOMETRY, recipe(key={**DENSE, "bits": 2}, value={**DENSE, "bits": 1}))
    pair = artifact.quantizers()[0]
    assert LayerPages(pair["key"], pair["value"], 0).page_bytes == 2 * 2 * 32 * 32 + 4 * 256
    assert in_chunks(artifact, 0, "torch", [290, 96], seed=2) < 1e-5


def test_ranks_have_pages_of_one_size(backend):
    artifact = random_artifact(GEOMETRY, RECIPES["trellis"])
    parts = [shard(artifact, rank, 2) for rank in range(2)]
    pairs = [part.quantizers()[0] for part in parts]
    own = [LayerPages(pair["key"], pair["value"], 40).page_bytes for pair in pairs]
    assert own[0] != own[1]
    (size,) = page_bytes_of_ranks(artifact, 2)
    assert size == max(own)
    for part in parts:
        assert in_chunks(part, 0, backend, [290, 96], seed=4, least=size + 64) < 1e-5


def test_outliers_are_refused():
    pair = random_artifact(GEOMETRY, recipe()).quantizers()[0]
    with pytest.raises(RuntimeMismatchError, match="keeps outliers"):
        LayerPages(pair["key"], pair["value"], 1)


def test_too_few_pages_are_refused():
    pool = Pool(random_artifact(GEOMETRY, RECIPES["scalar"]), 0, 8, "torch")
    with pytest.raises(RuntimeMismatchError, match="do not fit 1 pages"):
        pool.forward([[0]], [4], [pool.draw(4)])
