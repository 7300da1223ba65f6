"""Bad input to the runtime: one clear error each, before anything is stored."""

from __future__ import annotations

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from artifact_factory import RECIPES, artifact_for, recipe
from models_zoo import tiny_model, token_ids

from kvq_calib.artifact.errors import ArtifactModelError
from kvq_calib.artifact.sealed import read_sealed, seal
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import KVQCache, attach, detach
from kvq_calib.runtime.visibility import Visibility

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("each_cpu_backend")]


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture
def artifact(llama):
    return artifact_for(llama, RECIPES["nuq4-1p"])


def fill(model, cache, tokens=40, batch=1):
    with torch.no_grad():
        return model(token_ids(batch, tokens), **with_cache(cache))


def refused(model, cache, match, **arguments):
    """A call that must fail and leave what is stored as it was."""
    before = cache.memory()
    with pytest.raises(RuntimeMismatchError, match=match) as caught:
        fill(model, cache, **arguments)
    assert "\n" not in str(caught.value)
    assert cache.memory() == before


def test_artifact_of_another_model_names_the_field(artifact):
    other = tiny_model("llama", num_key_value_heads=4)
    implementation = other.config._attn_implementation
    with pytest.raises(ArtifactModelError, match="num_key_value_heads = 2, this model has 4"):
        KVQCache(artifact, other)
    assert other.config._attn_implementation == implementation


@pytest.mark.parametrize("prepared", [False, True], ids=["never attached", "attached"])
def test_cache_of_another_model_object(llama, artifact, prepared):
    cache = KVQCache(artifact, llama)
    fill(llama, cache)
    other = tiny_model("llama", seed=1)
    if prepared:
        attach(other)
    refused(other, cache, "another model", tokens=1)
    fill(llama, cache, tokens=1)
    assert cache.get_seq_length() == 41


def test_detached_model(llama, artifact):
    cache = KVQCache(artifact, llama)
    detach(llama)
    refused(llama, cache, "detached")


def test_more_tokens_than_the_model_allows(llama, artifact):
    cache = KVQCache(artifact, llama, max_tokens=41)
    fill(llama, cache)
    refused(llama, cache, "42 tokens are more than the model's 41", tokens=2)
    fill(llama, cache, tokens=1)


def test_the_limit_is_the_models(artifact):
    model = tiny_model("llama")
    assert KVQCache(artifact, model).max_tokens == model.config.max_position_embeddings


def test_batch_that_changes_size(llama, artifact):
    cache = KVQCache(artifact, llama)
    fill(llama, cache, batch=2)
    refused(llama, cache, "holds 2 sequences and was given 3", batch=3, tokens=1)


def test_thresholds_beyond_the_storage_dtype(llama, artifact):
    key = artifact.layers[1].key
    broken = dataclasses.replace(key, zero_point=key.zero_point + 1e5)
    layer = dataclasses.replace(artifact.layers[1], key=broken)
    artifact = dataclasses.replace(artifact, layers=(artifact.layers[0], layer))
    with pytest.raises(RuntimeMismatchError, match="layer 1, keys: channels reach 1e\\+05"):
        KVQCache(artifact, llama)


def test_numbers_beyond_the_storage_dtype(llama, artifact):
    cache = KVQCache(artifact, llama)
    with torch.no_grad():
        llama.model.layers[0].self_attn.v_proj.weight.mul_(1e6)
    with pytest.raises(RuntimeMismatchError, match="not finite in float16"):
        fill(llama, cache)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_online_channel_thresholds_cannot_be_streamed(llama):
    artifact = artifact_for(llama, recipe(key={"thresholds": "channel_online"}))
    with pytest.raises(RuntimeMismatchError, match="layer 0, keys: online thresholds per channel"):
        KVQCache(artifact, llama)


def test_unknown_backend_and_missing_gpu(llama, artifact):
    with pytest.raises(RuntimeMismatchError, match="unknown backend 'rocm'"):
        KVQCache(artifact, llama, backend="rocm")
    if not torch.cuda.is_available():
        with pytest.raises(
            RuntimeMismatchError, match="the cuda operations cannot be used: there is no CUDA device"
        ):
            KVQCache(artifact, llama, backend="cuda")


def test_unreadable_masks_are_refused_before_anything_is_switched(llama):
    llama.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(RuntimeMismatchError, match="flex_attention"):
        attach(llama)
    assert llama.config._attn_implementation_internal == "flex_attention"


def test_rotary_embedding_that_changed(llama, artifact):
    cache = KVQCache(artifact, llama)
    fill(llama, cache)
    llama.model.rotary_emb.inv_freq.mul_(0.5)
    refused(llama, cache, "layer 0 rotates keys by other angles", tokens=3)


def test_position_ids_of_the_wrong_shape(llama, artifact):
    cache = KVQCache(artifact, llama)
    seen = Visibility(None, 5, 5, None)
    with pytest.raises(RuntimeMismatchError, match="position_ids of shape"):
        cache.forward_pass.enter(0, 1, seen, torch.zeros(3, 1, 4, dtype=torch.int64))
    assert cache.table is None


@pytest.mark.parametrize("after", ["run again", "crop", "reset"])
def test_layers_that_disagree_after_a_failed_pass(llama, artifact, after):
    cache, clean = KVQCache(artifact, llama), KVQCache(artifact, llama)
    fill(llama, cache)
    fill(llama, clean)

    def fail(*args):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        fill(llama, cache, tokens=30)
    hook.remove()
    if after == "run again":
        with pytest.raises(RuntimeMismatchError, match=r"failed midway\); what it stored is undone now"):
            fill(llama, cache, tokens=1)
    elif after == "crop":
        cache.crop(35)
        clean.crop(35)
    else:
        cache.reset()
        clean.reset()
    assert cache.get_seq_length() == clean.get_seq_length()
    assert torch.equal(*(fill(llama, each, tokens=3).logits for each in (cache, clean)))


@pytest.mark.parametrize("held", [0, 40, 300, 500])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_numbers_that_do_not_fit_leave_the_cache_as_it_was(family, held):
    model = tiny_model(family)
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    cache, clean = KVQCache(artifact, model), KVQCache(artifact, model)
    if held:
        fill(model, cache, held)
        fill(model, clean, held)
    hook = model.model.layers[-1].self_attn.v_proj.register_forward_hook(
        lambda module, inputs, output: torch.full_like(output, float("inf"))
    )
    before = cache.memory()
    with pytest.raises(RuntimeMismatchError, match="not finite in float16"):
        fill(model, cache, 45)  # the layers before the last have stored them
    hook.remove()
    if family == "llama":  # what a sliding window has passed may be gone
        after = cache.memory()
        # What is made of positions stays for the next pass.
        del before["tables"], after["tables"]
        assert after == before
    assert cache.get_seq_length() == held
    again, expected = (fill(model, each, 3).logits for each in (cache, clean))
    assert torch.equal(again, expected)


def test_crop_behind_what_a_window_has_freed():
    model = tiny_model("mistral")
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model)
    for tokens in (300, 300, 1):
        fill(model, cache, tokens)
    before = cache.memory()
    with pytest.raises(RuntimeMismatchError, match="cannot crop to 200 tokens: layer 0"):
        cache.crop(200)
    assert cache.memory() == before
    cache.crop(590)
    fill(model, cache, 1)


def safetensors_metadata(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


class TestSavedCache:
    @pytest.fixture
    def saved(self, llama, artifact, tmp_path):
        cache = KVQCache(artifact, llama)
        fill(llama, cache, 300)
        path = tmp_path / "cache.safetensors"
        cache.save(path)
        return path

    def rewrite(self, path, change):
        """Apply ``change(tensors, metadata)`` to the file and make its digest right again."""
        metadata, tensors = read_sealed(path, "kvq_cache")
        change(tensors, metadata)
        path.write_bytes(seal("kvq_cache", metadata, tensors))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t, m: t.pop("layers.1.value.0.codes"), "layers.1.value.0.codes is missing"),
            (lambda t, m: t.update(more=torch.zeros(1)), "more is unknown"),
            (
                lambda t, m: t.update({"layers.0.tail_key": t["layers.0.tail_key"].float()}),
                "tail_key is torch.float32",
            ),
            (lambda t, m: t["block_fill"].fill_(33), "block table"),
            (lambda t, m: t["layers.0.key.0.outlier_start"].__setitem__(3, 9999), "not sorted"),
            (lambda t, m: t["layers.0.key.0.outlier_index"].fill_(2047), "points outside a head"),
            (lambda t, m: t["sink_slots"].fill_(5000), "a sink lies outside"),
            (
                lambda t, m: t["layers.0.key.0.outlier_start"][1:3].copy_(
                    torch.tensor([2**31 - 1, -(2**31)])
                ),
                "not sorted",  # although differences, which wrap around, are all positive
            ),
            (lambda t, m: t["sink_slots"].fill_(-2), "a sink lies outside"),
            (lambda t, m: m.update(format_version=3), "format version 3, not 2"),
            (lambda t, m: m.update(format_version=2.0), r"format version 2\.0"),
            (lambda t, m: m.update(batch=2**40), r"positions\.0 is .*, which does not fit"),
            (lambda t, m: m.update(length="x" * 10_000), "length is 'xxx"),
            (lambda t, m: m.update(artifact="0" * 64), "another artifact"),
            (lambda t, m: m.update(length=-1), "length is -1"),
            (lambda t, m: m.update(length=100000), "more than the model's"),
            (lambda t, m: m.update(dropped_pages=[1, 0]), "pages of it are missing"),
        ],
    )
    def test_damage_is_named(self, saved, llama, artifact, change, match):
        self.rewrite(saved, change)
        with pytest.raises(RuntimeMismatchError, match=match):
            KVQCache.load(saved, artifact, llama)

    def test_a_flipped_bit_anywhere_is_noticed(self, saved, llama, artifact):
        data = saved.read_bytes()
        for place in torch.linspace(0, len(data) - 1, 60).int().tolist():
            saved.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(RuntimeMismatchError) as caught:
                KVQCache.load(saved, artifact, llama)
            assert "\n" not in str(caught.value)
        tensors = safetensors.torch.load(data)
        tensors["layers.0.key.0.codes"][0, 0] ^= 1
        saved.write_bytes(safetensors.torch.save(tensors, safetensors_metadata(data)))
        with pytest.raises(RuntimeMismatchError, match="is damaged: its content does not match its digest"):
            KVQCache.load(saved, artifact, llama)

    @pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', "{", "[" * 100_000, '{"batch": NaN}'])
    def test_metadata_that_is_no_json_object(self, saved, llama, artifact, text):
        saved.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}, {"kvq_cache": text}))
        with pytest.raises(RuntimeMismatchError, match=r"cannot use .*: its metadata is not (a )?JSON"):
            KVQCache.load(saved, artifact, llama)

    def test_a_cache_of_the_version_before_is_named(self, saved, llama, artifact):
        metadata, tensors = read_sealed(saved, "kvq_cache")
        metadata["format_version"] = 1  # had no digest
        saved.write_bytes(safetensors.torch.save(tensors, {"kvq_cache": json.dumps(metadata)}))
        with pytest.raises(RuntimeMismatchError, match="it has format version 1, not 2"):
            KVQCache.load(saved, artifact, llama)

    def test_no_cache_at_all(self, llama, artifact, tmp_path):
        path = tmp_path / "x.safetensors"
        with pytest.raises(RuntimeMismatchError, match="cannot read"):
            KVQCache.load(path, artifact, llama)
        path.write_bytes(b"nonsense")
        with pytest.raises(RuntimeMismatchError, match="not a cache of kvq-calib"):
            KVQCache.load(path, artifact, llama)

    def test_nothing_to_save(self, llama, artifact, tmp_path):
        with pytest.raises(RuntimeMismatchError, match="empty"):
            KVQCache(artifact, llama).save(tmp_path / "x.safetensors")


def test_a_pass_that_was_interrupted_gives_no_positions_to_another_model(llama, artifact):
    def fail(*args):
        raise KeyboardInterrupt

    cache = KVQCache(artifact, llama)
    hook = llama.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        llama(token_ids(1, 1), position_ids=torch.zeros(1, 1, dtype=torch.int64), **with_cache(cache))
    hook.remove()
    bloom = tiny_model("bloom")  # which takes no positions
    other = KVQCache(artifact_for(bloom, RECIPES["nuq4-1p"]), bloom)
    fill(bloom, other, tokens=32)
    assert other.get_seq_length() == 32
