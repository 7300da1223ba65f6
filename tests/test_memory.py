"""Counting of bits: the formula equals the bytes of filled buffers, and everything that is stored counts."""

from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from artifact_factory import RECIPES, artifact_for, random_artifact, recipe
from models_zoo import tiny_model, token_ids
from torch import Tensor, nn

from kvq_calib.artifact.shard import shard
from kvq_calib.codec.scalar import ScalarQuantizer
from kvq_calib.codec.size import packed_tokens
from kvq_calib.errors import ConfigError
from kvq_calib.evaluate.memory import (
    PAPER_GB,
    artifact_report,
    layer_bits,
    longest_context,
    paper_comparison,
    per_gpu_report,
    shape_report,
)
from kvq_calib.evaluate.shapes import ModelShape, model_shape, stages
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import KVQCache
from kvq_calib.runtime.storage import LayerStorage, SlotTable
from kvq_calib.runtime.torch_ops import TorchOps
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.recipe import calibration_config, read_recipe
from kvq_calib.schema.spec import KINDS, KVCacheSpec, LayerSpec, ScalarSpec

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("each_cpu_backend")]


def filled(model, artifact, tokens: int, batch: int = 1, **options) -> KVQCache:
    """A cache of ``tokens`` tokens; the last comes alone, as in generation."""
    cache = KVQCache(artifact, model, **options)
    with torch.no_grad():
        ids = token_ids(batch, tokens)
        model(ids[:, :-1], **with_cache(cache))
        model(ids[:, -1:], **with_cache(cache))
    return cache


def measured_rates(cache: KVQCache) -> dict[str, list[float]]:
    """Outliers per packed token and layer."""
    rates = {}
    for kind, counts in cache.outliers().items():
        rates[kind] = []
        for layer, count in zip(cache.layers, counts, strict=True):
            first, stop = packed_tokens(cache.get_seq_length(), cache.recent_tokens, layer.sliding_window)
            rates[kind].append(count / max(1, (stop - first) * cache.table.batch))
    return rates


@pytest.mark.parametrize("tokens", [40, 257, 512, 700])
@pytest.mark.parametrize("name", RECIPES)
def test_formula_equals_the_bytes_of_filled_buffers(name, tokens):
    model = tiny_model("llama")
    artifact = artifact_for(model, RECIPES[name])
    cache = filled(model, artifact, tokens, batch=2)
    held = cache.memory()
    tables = held.pop("tables")
    formula = artifact.storage(tokens, batch=2, outliers_per_token=measured_rates(cache))
    assert {kind: pytest.approx(size) for kind, size in formula.items()} == held
    assert cache.nbytes == pytest.approx(sum(formula.values()) + tables)
    assert artifact_report(artifact, tokens, 2, measured_rates(cache)).by_kind == pytest.approx(formula)
    bits = artifact.bits_per_element(tokens, 2, measured_rates(cache))
    assert bits == pytest.approx(8 * (cache.nbytes - tables) / artifact.elements(tokens, 2))


@pytest.mark.parametrize("tokens", [200, 530, 1100])
@pytest.mark.parametrize("recent", [0, 300])
def test_formula_knows_sliding_windows_and_the_recent_window(tokens, recent):
    model = tiny_model("gemma3_text")
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    cache = filled(model, artifact, tokens, recent_tokens=recent)
    held = cache.memory()
    del held["tables"]
    formula = artifact.storage(tokens, recent_tokens=recent, outliers_per_token=measured_rates(cache))
    assert {kind: pytest.approx(size) for kind, size in formula.items()} == held
    # Bits are stated over what an unquantized cache holds: two layers of three see 16 tokens.
    own = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(1, tokens), use_cache=True, **with_cache(own))
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in own.layers)
    unseen = (
        2 * 2 * artifact.geometry.layers[0].shape("key").channels
    )  # its sliding layers count the next token in
    assert artifact.elements(tokens) == numbers + unseen


def reachable(root: object) -> tuple[dict[int, Tensor], dict[int, array]]:
    """Every tensor (by storage) and array that ``root`` leads to, modules of the model left out."""
    tensors: dict[int, Tensor] = {}
    arrays: dict[int, array] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            item = torch.from_numpy(item)
        if isinstance(item, Tensor):
            if item.numel():
                tensors[item.untyped_storage().data_ptr()] = item
        elif isinstance(item, array):
            arrays[id(item)] = item
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return tensors, arrays


@pytest.mark.parametrize("name", RECIPES)
def test_everything_reachable_from_the_cache_is_counted(name):
    model = tiny_model("mistral")
    artifact = artifact_for(model, RECIPES[name])
    cache = filled(model, artifact, 600, batch=2)
    cache.crop(590)
    tensors, arrays = reachable(cache)
    found = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    found += sum(len(item) * item.itemsize for item in arrays.values())
    # Index tensors of the layout are shared by all caches; they are counted, but hang on no cache.
    assert cache.nbytes >= found > 0.9 * cache.nbytes
    layouts = (
        {q.layout for pair in cache.quantizers for q in pair.values()} if cache.backend == "torch" else set()
    )
    shared = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for layout in layouts
        for _, *pair in layout.groups(torch.device("cpu"))
        for tensor in pair
    }
    held_by_readers = shared.keys() & tensors.keys()
    assert cache.nbytes - found == sum(shared.values()) - sum(shared[key] for key in held_by_readers)


def test_the_walk_finds_what_is_not_counted():
    model = tiny_model("llama")
    cache = filled(model, artifact_for(model, RECIPES["nuq4-1p"]), 60)
    before = sum(t.untyped_storage().nbytes() for t in reachable(cache)[0].values())
    cache.layers[1].storage.key.pages[0].forgotten = torch.zeros(10)
    after = sum(t.untyped_storage().nbytes() for t in reachable(cache)[0].values())
    assert after == before + 40


def test_memory_shrinks_as_promised():
    model = tiny_model("llama", max_position_embeddings=8192)
    spec = recipe(
        key={"bits": 3, "outliers": {}},
        value={"bits": 3, "thresholds": "channel", "outliers": {}},
    )
    artifact = artifact_for(model, spec)
    tokens = 4096 + 1
    cache = filled(model, artifact, tokens)
    bits = 8 * cache.nbytes / artifact.elements(tokens)
    # 3 bits of codes; positions cost 32 bits a token, which only a model as tiny as this one notices.
    assert 3.0 < bits < 3.0 + 32 / (4 * 32) + 0.4


def test_shape_report_is_the_formula_of_an_artifact_of_that_shape():
    model = tiny_model("gemma3_text")
    spec = recipe(sink_tokens=2, recent_tokens=40)
    artifact = artifact_for(model, spec)
    shape = ModelShape("tiny", artifact.geometry.layers, 0.0)
    for tokens in (100, 1000):
        ours = shape_report(shape, spec, tokens, batch=3)
        rates = {
            kind: [
                ScalarQuantizer.nominal_outliers(
                    LayerSpec(key=spec.key, value=spec.value).of(kind), layer.shape(kind)
                )
                for layer in shape.layers
            ]
            for kind in KINDS
        }
        theirs = artifact_report(artifact, tokens, 3, rates)
        assert dict(ours.by_kind) == pytest.approx(dict(theirs.by_kind))
        assert ours.bits_per_element == pytest.approx(theirs.bits_per_element)


@pytest.mark.parametrize(
    ("name", "context"), [(name, context) for name, row in PAPER_GB.items() for context in row]
)
def test_the_papers_sizes_of_llama_7b(name, context):
    recipes = {name: calibration_config(name)} if name != "fp16" else {}
    rows = paper_comparison(recipes, [context])
    (row,) = [row for row in rows if row["recipe"] == name]
    assert row["paper_gb"] == PAPER_GB[name][context]
    assert row["gb"] == pytest.approx(row["paper_gb"], abs=0.15)


@pytest.mark.parametrize(("name", "bits"), [("kvq4", 4.4), ("kvq3", 3.4), ("kvq2", 2.4)])
def test_a_budget_is_what_a_shape_takes(name, bits):
    config, shape = calibration_config(name), model_shape("llama-3-8b")
    budget = config.allocation
    report = shape_report(shape, config.cache, 4096, allocation=budget)
    assert report.bits_per_element == pytest.approx(bits, abs=1e-9)
    assert set(report.by_kind) == set(shape_report(shape, config.cache, 4096).by_kind)
    # Beyond the budget's context the codes of a token take what they took, and the rest is spread over more tokens.
    longer = shape_report(shape, config.cache, 8 * 4096, batch=2, allocation=budget)
    assert longer.by_kind["codes"] == pytest.approx(16 * report.by_kind["codes"], rel=1e-3)
    assert longer.bits_per_element < bits
    one = per_gpu_report(shape, config.cache, 4096, gpus=8, allocation=budget)
    assert one.by_kind["codes"] == pytest.approx(report.by_kind["codes"] / 8)
    plain = longest_context(shape, config.cache)
    assert longest_context(shape, config.cache, allocation=budget) > plain


def test_longest_context_is_the_last_that_fits():
    shape, spec = model_shape("LLaMA-7B"), KVCacheSpec.model_validate(read_recipe("nuq2")["cache"])
    longest = longest_context(shape, spec)
    room = 80 * 2**30 - shape.weight_bytes
    assert shape_report(shape, spec, longest).total <= room < shape_report(shape, spec, longest + 256).total
    assert 1_000_000 < longest < 1_200_000  # the paper: a million tokens on one GPU
    assert longest_context(model_shape("llama-65b"), spec) == 0


def test_layers_add_up_to_the_whole():
    artifact = artifact_for(tiny_model("llama"), RECIPES["nuq4-1p"])
    artifact = replace(artifact, outliers_per_token={"key": [0.5, 0.25], "value": [2.0, 2.0]})
    bits = layer_bits(artifact, 4096)
    shared = sum(
        size
        for name, size in artifact.storage(4096).items()
        if name in ("positions", "block_table", "sink_slots")
    )
    mean = sum(map(sum, bits.values())) / 4
    assert mean + 8 * shared / artifact.elements(4096) == pytest.approx(
        artifact.bits_per_element(4096), rel=1e-12
    )


def test_unknown_shape_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown shape 'gpt-5'; use one of llama-7b"):
        model_shape("gpt-5")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gpus_part_is_what_a_rank_really_holds(ranks):
    """Two layers of heads on one GPU against the filled buffers of its shard."""
    layer = LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=16)
    spec = recipe(key={"bits": 3, "outliers": {}}, value={"bits": 2, "outliers": {}})
    shape = ModelShape("two", (layer, layer), 1e6)
    whole = random_artifact(KVGeometry(layers=(layer, layer)), spec)
    tokens, cpu = 700, torch.device("cpu")
    for rank in range(ranks):
        held = 0.0
        part = shard(whole, rank, ranks) if ranks > 1 else whole
        for pair in part.quantizers():
            table = SlotTable(1, spec.sink_tokens, 0, cpu)
            storage = LayerStorage(pair["key"], pair["value"], 1, spec.sink_tokens, cpu)
            heads = 2 // ranks
            table.append(torch.arange(tokens)[None], None)
            storage.append(
                *torch.randn(2, 1, heads, tokens, 16), table, TorchOps(pair["key"], pair["value"]).pack
            )
            held += sum(size for _, size in storage.memory())
            held += sum(quantizer.params.held_bytes for quantizer in pair.values())
        held += sum(table.memory().values())
        report = per_gpu_report(shape, spec, tokens, gpus=ranks)
        assert report.total == pytest.approx(held)


def test_gpus_divide_heads_first_and_then_layers():
    llama = model_shape("llama-3-8b")
    tensor, parts = stages(llama, 8)
    assert (tensor, len(parts)) == (8, 1)
    assert {layer.num_kv_heads for layer in parts[0].layers} == {1}
    tensor, parts = stages(model_shape("smollm2-135m"), 4)  # 3 heads cannot be divided by 2
    assert tensor == 1
    assert [len(part.layers) for part in parts] == [8, 8, 7, 7]
    assert sum(part.parameters for part in parts) == pytest.approx(model_shape("smollm2-135m").parameters)
    tensor, parts = stages(llama, 16)
    assert (tensor, [len(part.layers) for part in parts]) == (8, [16, 16])
    with pytest.raises(ConfigError, match="use fewer"):
        stages(model_shape("smollm2-135m"), 31)


def test_the_fullest_gpu_takes_its_share_and_layer_overrides_stay_where_they_are():
    llama, spec = model_shape("llama-3-8b"), recipe(value={"outliers": {}}, key={"outliers": {}})
    whole = shape_report(llama, spec, 1_000_000)
    one = per_gpu_report(llama, spec, 1_000_000, gpus=8)
    assert whole.total / 8 <= one.total < 1.05 * whole.total / 8  # what belongs to a token is on each of them
    wide = spec.model_copy(
        update={"layers": {31: LayerSpec(key=ScalarSpec(bits=8), value=ScalarSpec(bits=8))}}
    )
    last = per_gpu_report(llama, wide, 4096, gpus=16)
    first = per_gpu_report(llama, spec, 4096, gpus=16)
    assert last.total > first.total
