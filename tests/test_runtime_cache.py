"""The packed cache against the same model with a plain cache whose contents went through the quantizer."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from artifact_factory import RECIPES, artifact_for, recipe, trellis
from models_zoo import FAMILIES, tiny_model, token_ids
from plain_cache import plain_cache, record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from kvq_calib.model.compat import with_cache
from kvq_calib.native.loader import library
from kvq_calib.runtime import KVQCache, attached, detach
from kvq_calib.schema.spec import KVCacheSpec

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("each_cpu_backend")]

#: Issue: "logits agree to 1e-4 in float32", relative to logits of unit spread.
TOLERANCE = 1e-4


def logits_through(model, cache, ids, chunks, mask=None, positions=None):
    """Teacher-forced logits, ``chunks`` tokens per call."""
    parts, done = [], 0
    for tokens in chunks:
        inputs = {"input_ids": ids[:, done : done + tokens], **with_cache(cache)}
        done += tokens
        if mask is not None:
            inputs["attention_mask"] = mask[:, :done]
        if positions is not None:
            inputs["position_ids"] = positions[:, done - tokens : done]
        with torch.no_grad():
            parts.append(model(**inputs).logits)
    return torch.cat(parts, dim=1)


def tiny(family: str, **overrides: object):
    model = tiny_model(family, **overrides)
    if family == "gemma2":  # sdpa of older releases leaves its softcap out
        model.set_attn_implementation("eager")
    return model


def assert_same_logits(model, spec, chunks, *, padding=(0, 0), recent=None):
    """Both caches, the same calls; returns the packed cache."""
    artifact = artifact_for(model, spec)
    ids = token_ids(len(padding), sum(chunks), seed=1)
    left = torch.tensor(padding)
    mask = positions = None
    if any(padding):
        mask = (torch.arange(ids.shape[1]) >= left[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = KVQCache(artifact, model, recent_tokens=recent)
    recording = record(cache)
    ours = logits_through(model, cache, ids, chunks, mask, positions)
    detach(model)
    with plain_cache(artifact, model, left, recent, recording) as plain:
        theirs = logits_through(model, plain, ids, chunks, mask, positions)
    real = slice(None) if mask is None else mask.bool()
    assert (ours - theirs)[real].abs().max() < TOLERANCE * max(1.0, float(theirs.std()))
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_match_the_plain_cache(family):
    spec = RECIPES["trellis-one-state"] if family in ("llama", "gpt_neox", "glm") else RECIPES["nuq4-1p"]
    assert_same_logits(tiny(family), spec, [45, 1, 1, 18, *[1] * 12], padding=(0, 5))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_matches(name):
    assert_same_logits(tiny("llama"), RECIPES[name], [70, 1, 31, 1, 1])


@pytest.mark.parametrize(
    "spec",
    [
        recipe(
            key={"bits": bits}, value={"bits": bits, "outliers": {}}, recent_tokens=bits, sink_tokens=bits % 3
        )
        for bits in range(1, 9)
    ],
    ids=lambda spec: f"{spec.key.bits}bit",
)
def test_every_width_matches(spec: KVCacheSpec):
    assert_same_logits(tiny("qwen3"), spec, [66, 1, 1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_sliding_windows_over_several_pages(family, implementation):
    if family == "gpt_oss" and implementation == "sdpa":
        pytest.skip("the family has no sdpa")
    model = tiny(family)
    model.set_attn_implementation(implementation)
    cache = assert_same_logits(model, RECIPES["nuq4-1p"], [300, 1, 250, 1, 1], padding=(0, 40))
    dropped = [layer.storage.key.dropped_pages for layer in cache.layers]
    windows = [layer.sliding_window for layer in cache.layers]
    assert [count > 0 for count in dropped] == [window is not None for window in windows]
    assert any(dropped)


@pytest.mark.parametrize("bits", range(1, 8))
def test_every_width_matches_with_a_trellis(bits: int):
    spec = recipe(key=trellis(bits), value=trellis(8 - bits), recent_tokens=bits, sink_tokens=bits % 3)
    assert_same_logits(tiny("qwen3"), spec, [66, 1, 1])


@pytest.mark.parametrize("name", ["nuq3-exact", "trellis"])
def test_left_padding_over_several_pages_and_sinks_in_different_pages(name):
    assert_same_logits(tiny("llama"), RECIPES[name], [200, 150, *[1] * 3], padding=(0, 270, 31))


def test_one_call_chunks_and_single_tokens_store_the_same():
    model = tiny("llama")
    artifact = artifact_for(model, RECIPES["nuq3-exact"])
    ids = token_ids(2, 90)
    nbytes = set()
    for chunks in ([90], [33, 57], [1] * 90):
        cache = KVQCache(artifact, model)
        logits_through(model, cache, ids, chunks)
        nbytes.add((cache.table.blocks, cache.memory()["codes"], cache.memory()["exact_recent"]))
    assert len(nbytes) == 1


def generate(model, cache=None, **options):
    options = {"max_new_tokens": 40, "do_sample": False, **options}
    return model.generate(**with_cache(cache), **options)


@pytest.fixture(scope="module")
def near_exact():
    """A recipe so fine that greedy and beam search must find what the unquantized model finds."""
    spec = recipe(
        key={"bits": 8, "outliers": {"fraction": 0.05}}, value={"bits": 8, "outliers": {"fraction": 0.05}}
    )
    return spec


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam"])
def test_generate_finds_the_sequences_of_the_plain_cache(family, search):
    model = tiny(family)
    artifact = artifact_for(model, RECIPES["trellis" if family == "mistral" else "nuq4-1p"])
    ids = token_ids(2, 37)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **search}
    ours = generate(model, KVQCache(artifact, model), **inputs)
    detach(model)
    left = torch.tensor([0, 9]).repeat_interleave(search.get("num_beams", 1))
    with plain_cache(artifact, model, left) as plain:
        theirs = generate(model, plain, **inputs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_generation_crops_the_cache(family, near_exact):
    model, assistant = tiny(family), tiny(family, num_hidden_layers=1)
    artifact = artifact_for(model, near_exact)
    ids = token_ids(1, 50)
    lengths = []
    cache = KVQCache(artifact, model)
    crop = cache.crop
    cache.crop = lambda count: (lengths.append(cache.get_seq_length()), crop(count))[1]
    ours = generate(model, cache, input_ids=ids, assistant_model=assistant)
    assert lengths
    detach(model)
    assert torch.equal(ours, generate(model, input_ids=ids))


@pytest.mark.parametrize(
    ("name", "kept"),
    [*(("nuq3-exact", kept) for kept in (101, 96, 75, 64, 33, 2)), ("trellis", 75), ("trellis", 33)],
)
def test_crop_matches_the_plain_cache(name, kept):
    model = tiny("llama")
    artifact = artifact_for(model, RECIPES[name])
    ids = token_ids(2, 320, seed=3)
    cache = KVQCache(artifact, model)
    recording = record(cache)
    logits_through(model, cache, ids, [102])
    cache.crop(kept)
    assert cache.get_seq_length() == kept
    ours = logits_through(model, cache, ids[:, kept:], [40, *[1] * 40, 100])
    detach(model)
    with plain_cache(artifact, model, torch.zeros(2, dtype=torch.int64), recording=recording) as plain:
        logits_through(model, plain, ids, [102])
        plain.crop_to(kept)
        theirs = logits_through(model, plain, ids[:, kept:], [40, *[1] * 40, 100])
    assert (ours - theirs).abs().max() < TOLERANCE * float(theirs.std())


def test_crop_accepts_negative_counts_and_all():
    model = tiny("llama")
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model)
    logits_through(model, cache, token_ids(1, 50), [50])
    cache.crop(-7)
    assert cache.get_seq_length() == 43
    cache.crop(100)
    assert cache.get_seq_length() == 43
    cache.crop(-43)
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized


def test_rows_can_be_selected_repeated_and_reordered():
    model = tiny("llama")
    artifact = artifact_for(model, RECIPES["trellis-one-state"])
    ids = token_ids(3, 300)
    rows = torch.tensor([2, 0, 2, 1])
    cache = KVQCache(artifact, model)
    logits_through(model, cache, ids, [299])
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(2 * rows)
    ours = logits_through(model, cache, ids[rows, -1:], [1])
    other = KVQCache(artifact, model)
    expected = logits_through(model, other, ids[rows], [299, 1])[:, -1:]
    assert (ours - expected).abs().max() < TOLERANCE
    assert cache.outliers() == other.outliers()


def test_reset_frees_everything_and_allows_another_batch():
    model = tiny("llama")
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model)
    empty = cache.nbytes
    logits_through(model, cache, token_ids(2, 40), [40])
    assert cache.nbytes > empty
    cache.reset()
    assert cache.nbytes == empty
    logits_through(model, cache, token_ids(3, 40), [40])


def test_deepcopy_forks_the_text_and_shares_the_artifact():
    model = tiny("llama")
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    cache = KVQCache(artifact, model)
    ids = token_ids(1, 60)
    logits_through(model, cache, ids, [50])
    fork = copy.deepcopy(cache)
    assert fork.artifact is artifact
    first = logits_through(model, cache, ids[:, 50:], [10])
    second = logits_through(model, fork, ids[:, 50:], [10])
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["trellis-one-state", "post-rope-token"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_filled_cache_survives_save_and_load(family, name, tmp_path):
    model = tiny(family)
    artifact = artifact_for(model, RECIPES[name])
    ids = token_ids(2, 400)
    cache = KVQCache(artifact, model)
    logits_through(model, cache, ids, [300, 50])
    cache.crop(341)
    logits_through(model, cache, ids[:, 341:], [29])
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQCache.load(tmp_path / "cache.safetensors", artifact, model)
    first = logits_through(model, cache, ids[:, 370:], [1, 29])
    second = logits_through(model, loaded, ids[:, 370:], [1, 29])
    assert torch.equal(first, second)
    assert loaded.memory() == cache.memory()


def test_an_attached_model_works_as_before_without_a_packed_cache():
    model = tiny("llama")
    ids = token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    before = model(ids, attention_mask=mask).logits
    implementation = model.config._attn_implementation
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    with attached(model):
        KVQCache(artifact, model)
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
        plain = logits_through(model, DynamicCache(), ids, [15, 5], mask)
        assert (plain - before).abs().max() < 1e-5
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_bfloat16_models_work():
    model = tiny("llama")
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    exact = logits_through(model, KVQCache(artifact, model), token_ids(2, 60), [50, 1, 9])
    detach(model)
    model = model.to(torch.bfloat16)
    rounded = logits_through(model, KVQCache(artifact, model), token_ids(2, 60), [50, 1, 9])
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.std()


def test_work_space_does_not_grow_with_the_text():
    """Decoding allocates one group of pages at a time: the largest tensor made depends on the group only."""
    from kvq_calib.runtime import torch_ops

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    model = tiny("llama", max_position_embeddings=1 << 16)
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    largest = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "WORK_ELEMENTS", 4 * 256 * 32)
        for tokens in (2500, 5000):
            cache = KVQCache(artifact, model, backend="torch")
            logits_through(model, cache, token_ids(1, tokens), [tokens - 4, 1, 1, 1])
            with Largest() as mode:
                logits_through(model, cache, token_ids(1, 1), [1])
            largest.append(mode.elements)
    assert largest[0] == largest[1] == 4 * 256 * 32


class PeakBytes(TorchDispatchMode):
    """Most bytes that tensors made meanwhile held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                self.made.append(weakref.ref(x))
        live = [x for reference in self.made if (x := reference()) is not None]
        self.made = [weakref.ref(x) for x in live]
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in live}
        self.peak = max(self.peak, sum(sizes.values()))
        return result


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_step_at_32k_tokens_needs_one_work_space_beside_what_is_packed(monkeypatch, backend):
    """Peak of a step: the packed bytes, and what a step over 4 pages needs as well; nothing stays behind."""
    from kvq_calib.runtime import torch_ops

    if backend == "native" and library() is None:
        pytest.skip("no native library is there")
    monkeypatch.setattr(torch_ops, "WORK_ELEMENTS", 2 * 256 * 32)
    monkeypatch.setattr(torch_ops, "ANGLE_ELEMENTS", 2 * 256 * 16)
    model = tiny("llama", max_position_embeddings=1 << 16)
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    generator = torch.Generator().manual_seed(0)
    beside = {}
    for tokens in (1024, 32768):
        cache = KVQCache(artifact, model, backend=backend)
        cache.append(torch.randn(2, 1, 2, tokens, 16, generator=generator) for _ in cache.layers)
        logits_through(model, cache, token_ids(1, 1), [1])
        packed = cache.nbytes
        with PeakBytes() as mode:
            logits_through(model, cache, token_ids(1, 1), [1])
        beside[tokens] = mode.peak
        assert 0 < cache.nbytes - packed < 4096
        assert not cache.table.angles
    assert beside[32768] <= 0.15 * packed + beside[1024]
    assert beside[32768] < 0.5 * packed  # so a copy of the history, which is 7 times as large, would be seen
