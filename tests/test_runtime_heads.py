"""Keys and values with heads of different sizes, from packing to a saved cache."""

from __future__ import annotations

import pytest
import torch
from artifact_factory import RECIPES, random_artifact
from shim.host import HostLauncher

from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.rope import RopeTable
from kvq_calib.runtime.checkpoint import load_contents, save_contents
from kvq_calib.runtime.contents import CacheContents
from kvq_calib.runtime.cuda.ops import ops_with
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.runtime.visibility import AttentionRequest, Visibility
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

HEADS, GROUP, KEY_SIZE, VALUE_SIZE = 2, 3, 12, 8
ROPE = RopeSpec(pairs=((0, 4), (1, 5), (2, 6), (3, 7)), inv_freq=(1.0, 0.3, 0.1, 0.03), attention_scaling=1.1)
CPU = torch.device("cpu")


def one_layer(size: int) -> KVGeometry:
    layer = LayerGeometry(num_query_heads=HEADS * GROUP, num_kv_heads=HEADS, head_dim=size, rope=0)
    return KVGeometry(layers=(layer,), ropes=(ROPE,))


def quantizers(name: str) -> tuple[Quantizer, Quantizer]:
    spec = RECIPES[name]
    wide, narrow = (random_artifact(one_layer(size), spec).quantizers()[0] for size in (KEY_SIZE, VALUE_SIZE))
    return wide["key"], narrow["value"]


class Layer:
    """A cache of one layer, and all tokens that went into it."""

    def __init__(self, name: str, batch: int) -> None:
        spec = RECIPES[name]
        self.artifact = random_artifact(one_layer(KEY_SIZE), spec)
        self.key, self.value = quantizers(name)
        self.ops = TorchOps(self.key, self.value)
        self.contents = self.empty()
        self.table = self.contents.start(batch)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(3)
        self.tokens = self.drawn(0)

    def empty(self) -> CacheContents:
        spec = self.artifact.spec
        return CacheContents([(self.key, self.value)], [None], spec.sink_tokens, spec.recent_tokens, CPU)

    @property
    def storage(self) -> LayerStorage:
        return self.contents.storages[0]

    def drawn(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.batch, HEADS, count)
        keys, values = (
            torch.randn(*shape, size, generator=self.generator) for size in (KEY_SIZE, VALUE_SIZE)
        )
        return keys, values

    def append(self, count: int) -> None:
        new = self.drawn(count)
        start = self.table.length
        self.table.append(torch.arange(start, start + count)[None], None)
        self.storage.append(*new, self.table, self.ops.pack)
        self.tokens = tuple(torch.cat(pair, 2) for pair in zip(self.tokens, new, strict=True))

    def attended(self, query: torch.Tensor) -> torch.Tensor:
        count = query.shape[2]
        seen = Visibility(None, self.table.length, count, None)
        return self.ops.attend(AttentionRequest(query, seen, 0.4), self.storage, self.table)

    def expected(self, query: torch.Tensor) -> torch.Tensor:
        """``[B, T, Hq, D]`` in float64, from what a reader sees of every token."""
        packed, sinks = self.table.packed_slots, self.storage.sink_key.shape[2]
        sides = []
        for quantizer, x in zip((self.key, self.value), self.tokens, strict=True):
            exact = x.to(quantizer.storage).float()
            seen = torch.cat((exact[:, :, :sinks], quantizer(exact[:, :, :packed])[:, :, sinks:]), 2)
            sides.append(torch.cat((seen, exact[:, :, packed:]), 2))
        keys, values = sides
        if self.key.read_rope is not None:
            table = RopeTable(ROPE, CPU)
            turned = table.rotate_(keys.mT.clone(), *table.cos_sin(torch.arange(keys.shape[2])[None]))
            keys = table.scale_(turned).mT
        keys, values = (x.double().repeat_interleave(GROUP, 1) for x in (keys, values))
        scores = 0.4 * query.double() @ keys.mT
        tokens = query.shape[2]
        hidden = torch.ones(tokens, keys.shape[2]).triu(keys.shape[2] - tokens + 1).bool()
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("name", RECIPES)
def test_attention_mixes_values_of_their_own_size(name):
    layer = Layer(name, 2)
    for count in (300, 1, 40):
        layer.append(count)
        query = torch.randn(2, HEADS * GROUP, count, KEY_SIZE, generator=layer.generator)
        out = layer.attended(query)
        assert out.shape == (2, count, HEADS * GROUP, VALUE_SIZE)
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), layer.expected(query), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nuq3-exact", "trellis"])
def test_a_filled_cache_survives_save_and_load(name, tmp_path):
    layer = Layer(name, 2)
    layer.append(330)
    file = tmp_path / "cache.safetensors"
    save_contents(layer.contents, layer.artifact, file, {})
    again = layer.empty()
    load_contents(again, layer.artifact, file, None)
    assert again.memory() == layer.contents.memory()
    (ours,), (theirs,) = again.storages, layer.contents.storages
    assert ours.tail_value.shape[3] == ours.sink_value.shape[3] == VALUE_SIZE
    for kind in ("key", "value"):
        for page, expected in zip(getattr(ours, kind).pages, getattr(theirs, kind).pages, strict=True):
            for part, tensor in page.tensors().items():
                assert torch.equal(tensor, expected.tensors()[part]), part
    query = torch.randn(2, HEADS * GROUP, 1, KEY_SIZE, generator=layer.generator)
    before = layer.attended(query)
    layer.contents, layer.table = again, again.table
    assert torch.equal(layer.attended(query), before)


def test_the_kernels_refuse_such_layers_by_number():
    key, value = quantizers("nuq4-1p")
    same = random_artifact(one_layer(KEY_SIZE), RECIPES["nuq4-1p"]).quantizers()[0]
    with pytest.raises(RuntimeMismatchError) as caught:
        ops_with([same, {"key": key, "value": value}], HostLauncher())
    assert str(caught.value) == (
        "layer 1 has heads of 12 channels in keys and 8 in values; the kernels need the same size for both"
    )
