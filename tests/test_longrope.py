"""LongRoPE: one table of frequencies up to a length of text, another above it, and never both in one cache."""

import pytest
import torch
from models_zoo import tiny_model, token_ids

from kvq_calib import KVQCache
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.errors import ConfigError, RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.rope import rope_switch
from kvq_calib.schema.recipe import calibration_config

pytestmark = pytest.mark.model

SWITCH = 64
LONGROPE = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + channel for channel in range(8)],
    },
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("phi3", **LONGROPE)


def artifact(model, recipe="nuq4-1p", *assignments):
    found = calibrate(
        model,
        TokenWindows(token_ids(2, 48), {"sha256": "0"}),
        {recipe: calibration_config(recipe, assignments=assignments)},
        model_id="tiny",
        model_config=model_fingerprint(model),
    )
    return found.artifacts[recipe]


@pytest.mark.parametrize(
    ("recipe", "assignments", "end"),
    [
        ("nuq3-1p", (), "quantize them after it, with --set cache.key.pre_rope=false"),
        (
            "nuq3-1p",
            ("cache.key.pre_rope=false", "cache.layers.-1.key.pre_rope=true"),
            "quantize them after it, with --set cache.layers.1.key.pre_rope=false",
        ),
        (
            "kvq3",
            (),
            "the trellis codec cannot do otherwise, so take a nuq* recipe with --set cache.key.pre_rope=false",
        ),
    ],
)
def test_a_recipe_for_keys_before_rope_is_refused_before_any_pass(model, recipe, assignments, end):
    with pytest.raises(ConfigError) as caught:
        artifact(model, recipe, *assignments)
    assert str(caught.value) == (
        f"{recipe}: the keys of this model cannot be quantized before the rotary embedding: its frequencies depend on "
        f"the length of the sequence; {end}"
    )


def generated(model, ids, cache, tokens):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), **with_cache(cache), max_new_tokens=tokens, do_sample=False
    )


@pytest.mark.parametrize("prompt", [SWITCH - 12, SWITCH + 1, SWITCH + 40])
def test_a_text_on_one_side_of_the_switch_is_generated_as_without(model, prompt):
    cache = KVQCache(artifact(model, "nuq4-1p", "cache.key.pre_rope=false"), model, recent_tokens=10**6)
    ids = token_ids(2, prompt, seed=1)
    expected = generated(model, ids, None, 12)
    assert torch.equal(generated(model, ids, cache, 12), expected)
    assert cache.get_seq_length() == prompt + 11  # the last token is not asked for its keys


def test_a_text_that_passes_the_switch_is_refused_and_the_cache_stays(model):
    cache = KVQCache(artifact(model, "nuq4-1p", "cache.key.pre_rope=false"), model)
    ids = token_ids(1, SWITCH - 4, seed=1)
    with pytest.raises(RuntimeMismatchError, match=f"passes {SWITCH} tokens.*whole text to an empty cache"):
        generated(model, ids, cache, 12)
    assert cache.get_seq_length() == SWITCH
    cache.reset()
    whole = token_ids(1, SWITCH + 8)
    assert generated(model, whole, cache, 4).shape[1] == SWITCH + 12


def test_where_a_configuration_switches(model):
    assert rope_switch(model.config) == SWITCH
    assert rope_switch(tiny_model("llama").config) is None
    own_field = {name: value for name, value in LONGROPE["rope_parameters"].items() if "original" not in name}
    assert rope_switch(tiny_model("phi3", **{**LONGROPE, "rope_parameters": own_field}).config) == SWITCH
