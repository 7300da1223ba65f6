"""A block that a step of one token completes is packed after attention, and in native code by one call for all layers.
It stores what torch stores, bit for bit."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from artifact_factory import RECIPES, artifact_for, random_artifact, recipe, trellis
from models_zoo import tiny_model, token_ids
from native_factory import threads, variables
from torch import Tensor

from kvq_calib.codec.native_blocks import block_tables
from kvq_calib.model.compat import with_cache
from kvq_calib.native.close import BlockCoder, NewBlock, OutlierBlock
from kvq_calib.native.loader import KvqBlock, Library
from kvq_calib.runtime import KVQCache
from kvq_calib.runtime.closing import close_blocks
from kvq_calib.runtime.native_ops import make_native_ops
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.storage import LayerStorage
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KVCacheSpec

CPU = torch.device("cpu")
ROPE = RopeSpec(pairs=((0, 3), (1, 4), (2, 5)), inv_freq=(1.0, 0.3, 0.1))
#: Heads of keys and values that differ, by layer; the last layer has a window.
LAYERS = (
    LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=6, rope=0),
    LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=6, value_head_dim=9, rope=0),
    LayerGeometry(num_query_heads=3, num_kv_heads=3, head_dim=18, value_head_dim=4, rope=0),
    LayerGeometry(num_query_heads=1, num_kv_heads=1, head_dim=16, rope=0, sliding_window=70),
)
GEOMETRY = KVGeometry(layers=LAYERS, ropes=(ROPE,))
NAMES = [*RECIPES, "uniform"]
SPECS = {
    **RECIPES,
    "uniform": recipe(
        key={"bits": 3, "outliers": {}, "levels": "uniform"},
        value={"bits": 3, "outliers": {}, "levels": "uniform"},
    ),
}


class Counting:
    """The functions of a library, counted."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.functions, self.calls = functions, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return getattr(self.functions, name)(*arguments)

        return call

    @property
    def coding(self) -> dict[str, int]:
        """Calls that code, pack or list outliers, since the last time."""
        names = (
            "kvq_close_blocks",
            "kvq_encode_trellis",
            "kvq_encode_scalar",
            "kvq_pack",
            "kvq_list_outliers",
        )
        found = {name: self.calls.pop(name) for name in names if name in self.calls}
        return found


@pytest.fixture(params=[0, -1], ids=["best", "least"])
def counted(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, libraries: list[Library]
) -> Counting:
    """Calls of the library that caches use from now on: that of the best or the least instruction set."""
    library = libraries[request.param]
    counting = Counting(library.functions)
    made = replace(library, functions=counting)  # type: ignore[arg-type]
    for module in ("runtime.native_ops", "codec.packing", "codec.native_encoding"):
        monkeypatch.setattr(
            f"kvq_calib.{module}.library",
            lambda: None if os.environ.get("KVQ_CALIB_OPS") == "torch" else made,
        )
    return counting


class Layers:
    """The layers of a cache without a model, filled by single tokens."""

    def __init__(self, spec: KVCacheSpec, batch: int, native: bool, geometry: KVGeometry = GEOMETRY) -> None:
        pairs = random_artifact(geometry, spec).quantizers()
        made = (
            make_native_ops(pairs, CPU)
            if native
            else [TorchOps(pair["key"], pair["value"]) for pair in pairs]
        )
        self.pairs, self.ops, self.geometry = pairs, made, geometry
        self.table = SlotTable(batch, spec.sink_tokens, spec.recent_tokens, CPU)
        self.storages = [
            LayerStorage(pair["key"], pair["value"], batch, spec.sink_tokens, CPU) for pair in pairs
        ]

    def step(self, tokens: Sequence[tuple[Tensor, Tensor]]) -> None:
        table = self.table
        table.add(torch.tensor([[table.length]]), None)
        for layer, storage, op, new in zip(
            self.geometry.layers, self.storages, self.ops, tokens, strict=True
        ):
            if layer.sliding_window:
                storage.drop_before(storage.length + 1 - layer.sliding_window, table)
            storage.append(*new, table, op.pack)
        close_blocks(self.ops, self.storages, table)


def new_tokens(
    batch: int, generator: torch.Generator, geometry: KVGeometry = GEOMETRY
) -> list[tuple[Tensor, Tensor]]:
    made = []
    for layer in geometry.layers:
        shapes = [(batch, layer.num_kv_heads, 1, layer.shape(kind).head_dim) for kind in ("key", "value")]
        made.append(tuple(2 * torch.randn(shape, generator=generator) for shape in shapes))
    return made  # type: ignore[return-value]


def assert_same(ours: Sequence[LayerStorage], theirs: Sequence[LayerStorage]) -> None:
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.length == other.length
        assert torch.equal(mine.tail_key, other.tail_key)
        assert torch.equal(mine.tail_value, other.tail_value)
        for one, two in ((mine.key, other.key), (mine.value, other.value)):
            assert (one.blocks, one.dropped_pages) == (two.blocks, two.dropped_pages)
            for page, expected in zip(one.pages, two.pages, strict=True):
                assert page.tensors().keys() == expected.tensors().keys()
                for name, tensor in page.tensors().items():
                    assert torch.equal(tensor, expected.tensors()[name]), (number, name)


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (1, 2), (3, 2), (21, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_it_stores_what_torch_stores(counted: Counting, name: str, batch: int, count: int) -> None:
    """Over a whole page and into the next, with one call for each block."""
    spec = SPECS[name]
    ours, theirs = (Layers(spec, batch, native) for native in (True, False))
    generator = torch.Generator().manual_seed(batch)
    length = 300 if batch < 3 else 70
    with threads(count):
        for number in range(1, length + 1):
            new = new_tokens(batch, generator)
            ours.step(new)
            closed = number > spec.recent_tokens and (number - spec.recent_tokens) % 32 == 0
            assert counted.coding == ({"kvq_close_blocks": 1} if closed else {}), number
            with variables(KVQ_CALIB_OPS="torch"):
                theirs.step(new)
            assert not counted.coding
    assert ours.table.blocks == (length - spec.recent_tokens) // 32 > 0
    assert_same(ours.storages, theirs.storages)
    outliers = [storage.value.outlier_entries > 0 for storage in ours.storages]
    assert all(outliers) if ours.pairs[0]["value"].outlier_cap else not any(outliers)


def test_pages_that_a_window_has_passed(counted: Counting) -> None:
    """One layer frees pages, the others keep theirs; blocks of all go to the same place."""
    spec = RECIPES["nuq4-1p"]
    ours, theirs = (Layers(spec, 1, native) for native in (True, False))
    generator = torch.Generator().manual_seed(0)
    for _ in range(420):
        new = new_tokens(1, generator)
        for layers in (ours, theirs):
            layers.step(new)
    assert [storage.key.dropped_pages for storage in ours.storages] == [0, 0, 0, 1]
    assert_same(ours.storages, theirs.storages)


def test_what_is_no_number_is_left_to_torch(counted: Counting) -> None:
    """Only in the layer that has it; the others are packed by the one call."""
    key = trellis(5, pair_rotation=True, error_compensation={"refinement_passes": 1})
    spec = recipe(key=key, value=trellis(4, token_weighting=True), storage_dtype="bfloat16")
    ours, theirs = (Layers(spec, 2, native) for native in (True, False))
    generator = torch.Generator().manual_seed(0)
    for number in range(32):
        new = new_tokens(2, generator)
        if number == 5:
            new[1][0][1, 1] = 3.3e38  # turned, some coordinates are infinite
        ours.step(new)
        calls = counted.coding
        with variables(KVQ_CALIB_OPS="torch"):
            theirs.step(new)
    assert calls["kvq_close_blocks"] == 1
    assert calls["kvq_pack"] == 2
    assert_same(ours.storages, theirs.storages)


def test_gradients_are_left_to_each_layer(counted: Counting) -> None:
    """Parameters that are trained, in one layer of several."""
    layers = Layers(RECIPES["shaped"], 1, native=True)
    for tensor in layers.pairs[2]["value"].params.tensors().values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for _ in range(31):
        layers.step(new_tokens(1, generator))
    counted.coding  # noqa: B018
    with torch.enable_grad():
        layers.step(new_tokens(1, generator))
    # The layer's keys are coded natively, its values by torch, and both are packed by themselves.
    assert counted.coding == {"kvq_close_blocks": 1, "kvq_encode_trellis": 1, "kvq_pack": 2}
    assert {storage.key.blocks for storage in layers.storages} == {1}


def test_more_blocks_at_once_are_packed_by_each_layer(counted: Counting) -> None:
    layers = Layers(RECIPES["nuq4-1p"], 1, native=True)
    generator = torch.Generator().manual_seed(0)
    layers.table.recent_tokens = 40
    for _ in range(70):
        layers.step(new_tokens(1, generator))
    layers.table.recent_tokens = 0
    counted.coding  # noqa: B018
    layers.step(new_tokens(1, generator))
    assert "kvq_close_blocks" not in counted.coding
    assert [storage.value.blocks for storage in layers.storages] == [2] * 4


# ---- passes of a model ----------------------------------------------------------------------------------------


def model_and_cache(spec: KVCacheSpec, backend: str, **options: Any) -> tuple[Any, KVQCache]:
    model = tiny_model("llama", head_dim=16)
    return model, KVQCache(artifact_for(model, spec), model, backend=backend, **options)


@pytest.mark.model
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_attention_of_the_step_reads_the_block_exactly(
    counted: Counting, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of one token packs after its last layer; a pass of several before attention of each."""
    model, cache = model_and_cache(SPECS["nuq4-1p"], backend)
    seen: list[tuple[int, int]] = []
    for layer in cache.packed:
        attend = layer.ops.attend

        def watching(request: Any, storage: LayerStorage, table: SlotTable, attend: Any = attend) -> Tensor:
            seen.append((table.blocks, storage.tail_key.shape[2]))
            return attend(request, storage, table)

        monkeypatch.setattr(layer.ops, "attend", watching)
    ids = token_ids(1, 80, seed=1)
    with torch.no_grad():
        model(ids[:, :31], **with_cache(cache))
        counted.coding  # noqa: B018
        seen.clear()
        model(ids[:, 31:32], **with_cache(cache))
        assert set(seen) == {(0, 32)}
        assert (cache.table.blocks, cache.packed[0].storage.tail_key.shape[2]) == (1, 0)
        if backend == "native":
            assert counted.coding == {"kvq_close_blocks": 1}
        seen.clear()
        model(ids[:, 32:70], **with_cache(cache))
        assert set(seen) == {(2, 6)}


@pytest.mark.model
@pytest.mark.parametrize("blocks", [0, 3, 8])
def test_a_failure_at_the_end_undoes_the_pass(
    counted: Counting, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some layers were packed: what is stored, and what the next step gives, is as if it had never been."""
    model, cache = model_and_cache(SPECS["nuq4-1p"], "native", recent_tokens=0)
    ids = token_ids(2, 32 * (blocks + 1) + 1, seed=1)
    with torch.no_grad():
        model(ids[:, : 32 * blocks + 31], **with_cache(cache))
        other = KVQCache(cache.artifact, model, backend="native", recent_tokens=0)
        model(ids[:, : 32 * blocks + 31], **with_cache(other))
        before = [(s.tail_key.clone(), s.tail_value.clone()) for s in cache.contents.storages]
        last, shorten = cache.contents.storages[-1], LayerStorage.shorten_tail

        def failing(storage: LayerStorage, packed: int) -> None:
            if storage is last:
                raise KeyboardInterrupt
            shorten(storage, packed)

        new = ids[:, 32 * blocks + 31 : 32 * blocks + 32]
        with monkeypatch.context() as patch:
            patch.setattr(LayerStorage, "shorten_tail", failing)
            with pytest.raises(KeyboardInterrupt):
                model(new, **with_cache(cache))
        assert cache.get_seq_length() == 32 * blocks + 31
        assert cache.table.blocks == blocks
        for storage, tails, expected in zip(
            cache.contents.storages, before, other.contents.storages, strict=True
        ):
            assert torch.equal(storage.tail_key, tails[0])
            assert torch.equal(storage.tail_value, tails[1])
            for one, two in ((storage.key, expected.key), (storage.value, expected.value)):
                assert (one.blocks, len(one.pages), one.outlier_entries) == (
                    two.blocks,
                    len(two.pages),
                    two.outlier_entries,
                )
        for step in (new, ids[:, -1:]):
            found, want = (model(step, **with_cache(each)).logits for each in (cache, other))
            assert torch.equal(found, want)
    assert_same(cache.contents.storages, other.contents.storages)


# ---- what the call refuses ------------------------------------------------------------------------------------


def test_blocks_that_do_not_fit_are_refused(libraries: list[Library]) -> None:
    spec = RECIPES["post-rope-token"]
    pair = random_artifact(GEOMETRY, spec).quantizers()[1]
    tables = [block_tables(pair[kind]) for kind in ("key", "value")]
    storage = LayerStorage(pair["key"], pair["value"], 2, 0, CPU)
    page = storage.key.new_page()
    x = torch.randn(2, 2, 33, 6).bfloat16()
    good = NewBlock(0, x, page.codes, page.token_params)
    coder = BlockCoder(libraries[0], [each for each in tables if each is not None])
    assert coder.close([], 0) == []
    assert isinstance(coder.close([good], 7)[0], OutlierBlock)
    wide = torch.zeros(2, 2, 33, 12, dtype=torch.bfloat16)
    for bad in (
        {"side": 2},
        {"side": -1},
        {"side": 1},
        {"x": x[:, :, :31]},
        {"x": x[:1]},
        {"x": x.half()},
        {"x": x[..., :5]},
        {"x": wide[..., ::2]},
        {"x": wide[..., :6]},
        {"page": page.codes[:1]},
        {"page": page.codes[:, 1:]},
        {"page": page.codes.long()},
        {"token": None},
        {"token": page.token_params[:, :255]},
    ):
        with pytest.raises(ValueError, match=r"side|x|page|token"):
            coder.close([replace(good, **bad)], 0)
    for place in (-1, 8):
        with pytest.raises(ValueError, match="place"):
            coder.close([good], place)
    with pytest.raises(ValueError, match="two of one side"):
        coder.close([good, good], 0)
    key = tables[0]
    assert key is not None
    for fields in (
        {"widths": key.widths[1:]},
        {"widths": key.widths.int()},
        {"widths": key.widths + 9},
        {"storage": torch.float16},
        {"storage": torch.float32},
        {"by_size": True},
    ):
        with pytest.raises(ValueError, match=r"width|storage|classes"):
            replace(key, **fields)


def test_the_function_refuses_what_does_not_fit(libraries: list[Library]) -> None:
    """By itself: counts out of range, and pointers that are missing. Nothing is written then."""
    outliers, paths = (
        random_artifact(GEOMETRY, RECIPES[name]).quantizers()[0] for name in ("nuq4-1p", "trellis")
    )
    scalar, trellis_tables = block_tables(outliers["value"]), block_tables(paths["key"])
    assert scalar is not None
    assert trellis_tables is not None
    x = torch.randn(1, 2, 32, 6).half()
    page = torch.zeros(1, 8 * 12 * 8, dtype=torch.int32)
    room = torch.zeros(1, 4096, dtype=torch.int32)
    for library in libraries:
        call = library.functions.kvq_close_blocks
        for tables in (scalar, trellis_tables):
            codec = tables.described()
            name = "scalar" if tables is scalar else "trellis"

            def block(codec: Any = codec, name: str = name, tables: Any = tables, **fields: Any) -> Any:
                made = KvqBlock(width=tables.widths.data_ptr(), x=x.data_ptr(), page=page.data_ptr())
                made.token = made.index = made.listed = made.counts = room.data_ptr()
                made.stride[:] = [x.stride(0), x.stride(1)]
                setattr(made, name, ctypes.addressof(codec))
                for field, value in fields.items():
                    setattr(made, field, value)
                return made

            def status(made: Any, *numbers: int, call: Any = call) -> int:
                return int(call(ctypes.addressof(made) if made is not None else None, *numbers))

            assert status(block(), 1, 1, 0, 1) == 0
            page.zero_()
            for numbers in ((-1, 1, 0), (1, 0, 0), (1, -1, 0), (1, 1, -1), (1, 1, 8), (1 << 30, 1, 0)):
                assert status(block(), *numbers, 1) == 2, numbers
            assert status(None, 1, 1, 0, 1) == 2
            assert status(None, 0, 1, 0, 1) == 0
            missing = ["x", "width", "page", name]
            missing += ["token", "index", "listed", "counts"] if tables is scalar else []
            for field in missing:
                assert status(block(**{field: None}), 1, 1, 0, 1) == 2, field
            other = scalar.described() if tables is trellis_tables else trellis_tables.described()
            both = block(**{"trellis" if tables is scalar else "scalar": ctypes.addressof(other)})
            assert status(both, 1, 1, 0, 1) == 2
            wide = tables.widths.clone()
            wide[-1] = 9
            assert status(block(width=wide.data_ptr()), 1, 1, 0, 1) == 2
            size = "size" if tables is scalar else "head_dim"
            for field, value in (("heads", 0), ("heads", 1 << 20), (size, -1), (size, 1 << 20)):
                bad = tables.described()
                setattr(bad, field, value)
                assert status(block(bad), 1, 1, 0, 1) == 2, (field, value)
            if tables is scalar:
                assert status(block(bfloat=1), 1, 1, 0, 1) == 2
                for value in (-1, 13):
                    bad = tables.described()
                    bad.outlier_cap = value
                    assert status(block(bad), 1, 1, 0, 1) == 2
            else:
                for field in ("levels", "level_count"):
                    bad = tables.described()
                    setattr(bad, field, None)
                    assert status(block(bad), 1, 1, 0, 1) == 2
            assert not page.any()
