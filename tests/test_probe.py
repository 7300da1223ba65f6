"""Models that a packed cache cannot serve are refused at the start."""

from __future__ import annotations

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from custom_attention import (
    ChangesKeys,
    ChangesValues,
    CustomAttention,
    KeepsNothing,
    UsesValues,
    UsesWeights,
    custom_model,
)
from models_zoo import FAMILIES, tiny_model, token_ids
from transformers import AutoModelForCausalLM, BertConfig
from transformers.cache_utils import Cache

from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.errors import ModelError
from kvq_calib.model import probe
from kvq_calib.model.compat import cache_of, with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import check_generation, inspect_model
from kvq_calib.model.probe import ExactLayer
from kvq_calib.runtime import KVQCache, attached
from kvq_calib.runtime.attention import is_attached
from kvq_calib.schema.recipe import calibration_config

pytestmark = pytest.mark.model


def check(model):
    check_generation(model, inspect_model(model))


def count_passes(model):
    """A list that grows with every pass of the model."""
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    return passes


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_work_are_accepted_and_the_exact_cache_is_exact(family):
    model, ids = tiny_model(family), token_ids(2, 40)
    check(model)
    geometry = inspect_model(model)
    exact, own = Cache(layers=[ExactLayer(layer.sliding_window) for layer in geometry.layers]), None
    with torch.no_grad(), attached(model):
        for part in torch.split(ids, [20, 15, 1, 4], dim=1):  # beyond windows of 16
            want = model(part, use_cache=True, **with_cache(own))
            own = cache_of(want)
            got = model(part, **with_cache(exact)).logits
            assert torch.allclose(got, want.logits, atol=1e-5 * float(want.logits.abs().max()))


def test_custom_attention_that_only_attends_is_accepted():
    for implementation in ("sdpa", "eager"):
        check(custom_model(CustomAttention, implementation=implementation))


@pytest.mark.parametrize(
    ("kind", "implementation", "reason"),
    [
        (ChangesKeys, "sdpa", "the keys that layer 0 gets back from the cache do not come to attention"),
        (ChangesValues, "eager", "it changes the keys or values of layer 0 between the cache and attention"),
        (UsesValues, "sdpa", "it uses keys or values outside the attention call"),
        (UsesWeights, "eager", "it uses the weights of attention, which are not computed"),
    ],
)
def test_what_attention_does_besides_is_served_by_numbers_and_the_reason_said(
    kind, implementation, reason, caplog
):
    model = custom_model(kind, implementation=implementation)
    geometry = inspect_model(model)
    assert check_generation(model, geometry).materialized
    (record,) = caplog.records
    assert f"decoding is slower ({reason}" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_model_that_gives_its_cache_nothing_is_refused():
    with pytest.raises(ModelError, match=r"does not give the keys and values of layer 0 to the cache$"):
        check(custom_model(KeepsNothing))


def test_models_that_are_not_causal_are_refused():
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ModelError, match="depends on later tokens, so it is no causal model"):
        check(AutoModelForCausalLM.from_config(config).eval())


def test_calibration_refuses_before_it_reads_text():
    model = custom_model(KeepsNothing)
    told = []
    with pytest.raises(ModelError, match="cannot generate with a packed cache"):
        calibrate(
            model,
            TokenWindows(token_ids(2, 32), {"sha256": "x"}),
            {"r": calibration_config("uniform4")},
            model_id="x",
            model_config=model_fingerprint(model),
            progress=lambda *step: told.append(step),
        )
    assert told == []


def test_a_cache_is_refused_and_the_model_stays_as_it_was():
    model = custom_model(KeepsNothing)
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    with pytest.raises(ModelError, match="does not give the keys and values"):
        KVQCache(artifact, model)
    assert not is_attached(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_was_found_is_kept_per_model():
    model = tiny_model("llama")
    passes = count_passes(model)
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    tried = len(passes)
    assert (
        tried == 2 + 1 + len(probe._PASSES) + 1
    )  # two that tell shapes, one without a cache, one of the artifact's
    KVQCache(artifact, model)
    check(torch.compile(model, backend="eager"))
    assert len(passes) == tried
    refused = custom_model(KeepsNothing)
    for _ in range(2):
        with pytest.raises(ModelError, match="does not give"):
            check(refused)


def test_dropout_does_not_count_and_stays_on():
    model = tiny_model("llama", attention_dropout=0.5)
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    check(model)
    assert [module.training for module in model.modules()] == modes


def test_half_precision_and_numbers_that_are_not_finite_say_nothing():
    check(tiny_model("llama").bfloat16())
    check(tiny_model("gpt_oss").bfloat16())  # experts are chosen by numbers that are rounded
    broken = tiny_model("llama")
    geometry = inspect_model(broken)
    broken.model.layers[1].self_attn.v_proj.weight[3] = float("nan")
    check_generation(broken, geometry)


def test_a_model_without_a_head_is_tried_too():
    check(tiny_model("llama").model)
    with pytest.raises(ModelError, match="LlamaModel cannot generate"):
        check(custom_model(KeepsNothing).model)


def test_a_model_whose_own_cache_fails_is_refused(monkeypatch):
    model = custom_model(UsesValues)

    def fail(self, cache, key, value):
        raise NotImplementedError("no cache\nhere")

    monkeypatch.setattr(UsesValues, "update", fail)
    with pytest.raises(
        ModelError, match=r"it does not take the next tokens alone with its own cache \(no cache here\)$"
    ):
        check(model)
