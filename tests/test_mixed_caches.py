"""Models in which some layers keep keys and values and others a state: linear attention, convolutions, Mamba."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from artifact_factory import RECIPES, artifact_for
from models_zoo import HYBRIDS, tiny_model, token_ids
from whole_chain import (
    EVERYTHING,
    assert_memory_is_what_buffers_hold,
    assert_passes_are_exact,
    assert_the_whole_chain,
    logits_after,
)

from kvq_calib.errors import ModelError, RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.model.inspect import inspect_model
from kvq_calib.runtime import KVQCache

pytestmark = pytest.mark.model


def single_steps(model, cache, ids: torch.Tensor) -> torch.Tensor:
    """Logits after single tokens."""
    return torch.cat([logits_after(model, cache, token) for token in ids.split(1, 1)], 1)


@pytest.mark.parametrize(
    ("family", "attends_to"),
    [
        ("qwen3_next", (None, 0, None, 1)),
        ("lfm2", (None, 0, None)),
        ("minimax", (None, 0)),
        ("falcon_h1", ()),
    ],
)
def test_geometry_lists_the_layers_with_keys_and_values(family, attends_to):
    geometry = inspect_model(tiny_model(family))
    assert geometry.attends_to == attends_to
    assert geometry.numbers == (tuple(i for i, n in enumerate(attends_to) if n is not None) or (0, 1))
    assert geometry.state_bytes > 0
    assert type(geometry).model_validate(geometry.model_dump()) == geometry


def test_a_model_of_states_alone_has_nothing_to_quantize():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ModelError, match=r"has no layer that caches keys and values|keeps no keys and values in a cache"
    ):
        inspect_model(model)


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_whole_chain(family):
    assert_the_whole_chain(tiny_model(family))


@pytest.fixture
def hybrid():
    """A model and an artifact."""
    model = tiny_model("qwen3_next")
    return model, artifact_for(model, RECIPES["nuq4-1p"])


@pytest.mark.parametrize("family", HYBRIDS)
def test_memory_counts_states_beside_what_is_packed(family):
    model = tiny_model(family)
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model)
    empty = cache.nbytes
    assert cache.memory()["states"] == 0
    logits_after(model, cache, token_ids(3, 40))
    assert cache.memory()["states"] == 3 * inspect_model(model).state_bytes > 0
    assert cache.nbytes == sum(cache.memory().values()) > empty
    assert_memory_is_what_buffers_hold(cache)
    assert f"{len(cache.packed)} layers, 40 tokens" in repr(cache)
    cache.reset()
    assert cache.nbytes == empty


def test_rows_forks_files_and_resets_take_states_along(hybrid, tmp_path):
    model, artifact = hybrid
    ids, more = token_ids(2, 60), token_ids(2, 9, seed=8)

    def read(cache: KVQCache) -> KVQCache:
        logits_after(model, cache, ids[:, :50])
        logits_after(model, cache, ids[:, 50:])
        return cache

    expected = logits_after(model, read(KVQCache(artifact, model)), more)

    cache = read(KVQCache(artifact, model))
    cache.batch_repeat_interleave(2)  # rows 0, 0, 1, 1
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))  # 1, 0, 1, 0
    # The same rows in the same places as before, so that every number is the same.
    cache.batch_select_indices(torch.tensor([False, True, True, False]))
    fork = copy.deepcopy(cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = KVQCache.load(tmp_path / "cache.safetensors", artifact, model)
    held, again = cache.memory(), loaded.memory()
    assert {**again, "tables": 0} == {**held, "tables": 0}  # scratch space comes with use
    assert fork.artifact is artifact
    for each in (cache, fork, loaded):
        assert torch.equal(logits_after(model, each, more), expected)
    cache.reset()
    assert torch.equal(logits_after(model, read(cache), more), expected)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_state_that_cannot_be_taken_back_is_not_cropped(family):
    model = tiny_model(family)
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    ids = token_ids(1, 40)
    cache = KVQCache(artifact, model, recent_tokens=EVERYTHING)
    logits_after(model, cache, ids)
    fork = copy.deepcopy(cache)
    with pytest.raises(
        RuntimeMismatchError, match="layer 0 keeps a state from which tokens cannot be removed"
    ):
        cache.crop(-3)
    assert cache.get_seq_length() == 40
    assert torch.equal(logits_after(model, cache, ids[:, :1]), logits_after(model, fork, ids[:, :1]))
    cache.activate_past_recording()  # of the passes up to here, nothing is recorded
    with pytest.raises(RuntimeMismatchError, match="it can return to where a forward pass began"):
        cache.crop(-3)
    cache.crop(-41)  # nothing is left that could be wrong
    assert_passes_are_exact(model, artifact, cache=cache)


@pytest.mark.parametrize("family", HYBRIDS)
def test_recorded_states_return_to_where_a_pass_began(family):
    model = tiny_model(family)
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    ids, more = token_ids(2, 40), token_ids(2, 3, seed=9)
    cache, other = KVQCache(artifact, model), KVQCache(artifact, model)
    cache.activate_past_recording()
    for each in (cache, other):
        logits_after(model, each, ids[:, :36])
        single_steps(model, each, ids[:, 36:37])
    single_steps(model, cache, ids[:, 37:])
    assert cache.memory()["states"] > other.memory()["states"]
    cache.crop(-3)
    assert cache.get_seq_length() == 37
    assert cache.memory()["states"] == other.memory()["states"]
    single_steps(model, cache, ids[:, 38:])
    cache.crop(-2)  # recording goes on
    got, want = (single_steps(model, each, more) for each in (cache, other))
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe"])
def test_convolutions_that_record_are_cropped(family):
    model = tiny_model(family)
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model, recent_tokens=EVERYTHING)
    if not hasattr(cache.layers[0], "activate_past_recording"):
        pytest.skip("this release records no past")
    cache.activate_past_recording()
    ids, other = token_ids(1, 40), token_ids(1, 5, seed=9)
    logits_after(model, cache, ids)
    cache.crop(-6)
    got = logits_after(model, cache, other)
    with torch.no_grad():
        want = model(torch.cat((ids[:, :34], other), 1), use_cache=False).logits[:, 34:]
    assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_what_fails_midway_is_not_continued(hybrid):
    model, artifact = hybrid
    ids = token_ids(1, 40)
    cache = KVQCache(artifact, model, max_tokens=45)
    with pytest.raises(RuntimeMismatchError, match="46 tokens are more"):
        logits_after(model, cache, token_ids(1, 46))
    logits_after(model, cache, ids)  # it was empty, so nothing was lost
    for _ in range(5):
        logits_after(model, cache, ids[:, :1])
    with pytest.raises(RuntimeMismatchError, match="46 tokens are more"):
        logits_after(model, cache, ids[:, :1])
    for attempt in (lambda: logits_after(model, cache, ids[:, :1]), lambda: cache.crop(-1)):
        with pytest.raises(RuntimeMismatchError, match=r"a forward pass failed midway.*reset\(\) the cache"):
            attempt()
    cache.reset()
    logits_after(model, cache, ids)


def test_models_that_continue_by_single_tokens_get_no_others():
    model = tiny_model("jamba")
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model)
    assert cache.single_tokens
    ids = token_ids(1, 40)
    logits_after(model, cache, ids[:, :30])
    with (
        pytest.raises(RuntimeMismatchError, match="by one token at a time only, and was given 10"),
        torch.no_grad(),
    ):
        model(ids[:, 30:], **with_cache(cache))
    cache.reset()
    logits_after(model, cache, ids)
    logits_after(model, cache, ids[:, :1])


def test_tokens_are_not_appended_without_a_pass(hybrid):
    model, artifact = hybrid
    cache = KVQCache(artifact, model)
    with pytest.raises(RuntimeMismatchError, match="only a forward pass can bring up to date"):
        cache.append((torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)) for _ in cache.packed)


def test_the_model_works_as_before_without_a_packed_cache(hybrid):
    model, artifact = hybrid
    ids = token_ids(1, 20)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        KVQCache(artifact, model)
        assert torch.equal(model(ids, use_cache=False).logits, before)
        model(ids, use_cache=True, **with_cache(None))
