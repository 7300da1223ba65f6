"""Packed storage: grouping, cropping and selecting do not change the stored numbers."""

from __future__ import annotations

import torch
from artifact_factory import RECIPES, random_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.runtime.page_reader import PageReader
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KVCacheSpec

HEADS, SIZE = 2, 6
ROPE = RopeSpec(pairs=((0, 2), (1, 3)), inv_freq=(1.0, 0.1))
LAYER = LayerGeometry(num_query_heads=4, num_kv_heads=HEADS, head_dim=SIZE, rope=0)
GEOMETRY = KVGeometry(layers=(LAYER,), ropes=(ROPE,))
CPU = torch.device("cpu")

recipes = st.sampled_from(sorted(RECIPES)).map(RECIPES.get)
lengths = st.lists(st.integers(1, 150), min_size=1, max_size=6)


def tokens(count: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, HEADS, count, SIZE, generator=generator) for _ in range(2))
    return 2 * keys, 2 * values


class Store:
    """A slot table and one layer, filled in pieces."""

    def __init__(self, spec: KVCacheSpec, batch: int) -> None:
        pair: dict[str, Quantizer] = random_artifact(GEOMETRY, spec).quantizers()[0]
        self.quantizer, self.ops = pair["key"], TorchOps(pair["key"], pair["value"])
        self.table = SlotTable(batch, spec.sink_tokens, spec.recent_tokens, CPU)
        self.layer = LayerStorage(pair["key"], pair["value"], batch, spec.sink_tokens, CPU)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        start = self.table.length
        self.table.append(torch.arange(start, start + keys.shape[2])[None], None)
        self.layer.append(keys, values, self.table, self.ops.pack)

    def crop(self, length: int) -> None:
        self.table.crop(length)
        self.layer.crop(self.table)

    def same_as(self, other: Store) -> bool:
        for ours, theirs in ((self.layer.key, other.layer.key), (self.layer.value, other.layer.value)):
            if len(ours.pages) != len(theirs.pages):
                return False
            for page, expected in zip(ours.pages, theirs.pages, strict=True):
                tensors, others = page.tensors(), expected.tensors()
                if tensors.keys() != others.keys():
                    return False
                if not all(torch.equal(tensors[name], others[name]) for name in tensors):
                    return False
        exact = ("tail_key", "tail_value", "sink_key", "sink_value")
        return all(torch.equal(getattr(self.layer, name), getattr(other.layer, name)) for name in exact)


@settings(deadline=None, max_examples=30)
@given(spec=recipes, pieces=lengths, batch=st.integers(1, 3))
def test_grouping_never_changes_a_byte(spec, pieces, batch):
    keys, values = tokens(sum(pieces), batch, seed=0)
    whole, parts = Store(spec, batch), Store(spec, batch)
    whole.append(keys, values)
    start = 0
    for piece in pieces:
        parts.append(keys[:, :, start : start + piece], values[:, :, start : start + piece])
        start += piece
    assert parts.same_as(whole)
    assert parts.table.first == whole.table.first
    assert torch.equal(
        parts.table.positions(0, start), torch.arange(start, dtype=torch.int32).expand(batch, -1)
    )


@settings(deadline=None, max_examples=30)
@given(spec=recipes, length=st.integers(33, 400), data=st.data())
def test_rows_are_independent(spec, length, data):
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)))
    keys, values = tokens(length, 3, seed=1)
    chosen, direct = Store(spec, 3), Store(spec, len(rows))
    chosen.append(keys, values)
    chosen.table.select(rows)
    chosen.layer.select(rows)
    direct.append(keys[rows], values[rows])
    assert chosen.same_as(direct)
    assert torch.equal(chosen.table.sink_slots, direct.table.sink_slots)


@settings(deadline=None, max_examples=40)
@given(spec=recipes, length=st.integers(1, 400), more=st.integers(1, 300), data=st.data())
def test_cropping_keeps_what_was_stored_and_starts_a_new_block(spec, length, more, data):
    kept = data.draw(st.integers(1, length))
    keys, values = tokens(length + more, 2, seed=2)
    store = Store(spec, 2)
    store.append(keys[:, :, :length], values[:, :, :length])
    frontier = store.table.packed_slots
    before = decoded(store)
    store.crop(kept)
    assert store.table.packed_slots == min(frontier, kept)
    store.append(keys[:, :, length:], values[:, :, length:])
    table = store.table
    assert list(table.first) == [sum(table.fill[:block]) for block in range(table.blocks)]
    assert table.length == kept + more
    after = decoded(store)
    old = min(frontier, kept)
    assert torch.equal(after[..., :old], before[..., :old])
    assert store.layer.tail_key.shape[2] == table.length - table.packed_slots
    # What came after the cut is quantized like anything else, in blocks from the first token that was not packed.
    unpacked = torch.cat((keys[:, :, old:kept], keys[:, :, length:]), dim=2).to(store.layer.tail_key.dtype)
    new = after[..., old:]
    assert torch.allclose(
        store.quantizer.inverse_transform(new.flatten(1, 2).mT),
        store.quantizer(unpacked)[:, :, : new.shape[-1]],
        atol=1e-4,
    )


def decoded(store: Store) -> torch.Tensor:
    """Packed keys in the quantizer's space, in order of slots: ``[B, H, D, S]``."""
    packed, table = store.layer.key, store.table
    if not packed.pages:
        return torch.zeros(store.table.batch, HEADS, SIZE, 0)
    places = table.block_slots(0, table.blocks)
    y = PageReader(store.quantizer).read(packed.pages)[..., : len(places)]
    return y[..., places >= 0]


def test_dropped_pages_are_whole_and_older_than_the_slot():
    store = Store(RECIPES["nuq4-1p"], 1)
    keys, values = tokens(800, 1, seed=3)
    store.append(keys, values)
    store.layer.drop_before(511, store.table)
    assert (store.layer.key.dropped_pages, len(store.layer.key.pages)) == (1, 3)
    store.layer.drop_before(512, store.table)
    assert (store.layer.value.dropped_pages, len(store.layer.value.pages)) == (2, 2)
