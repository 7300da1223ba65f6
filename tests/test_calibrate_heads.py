"""Calibration of a model with different head sizes of keys and values."""

import pytest
import torch
from models_zoo import tiny_model, token_ids
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    apply_rotary_pos_emb,
)

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.model.capture import capture
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.schema.recipe import calibration_config

pytestmark = pytest.mark.model

KEY_SIZE, VALUE_SIZE = 16, 8
LEARNED = ("learn={steps: 2, seqlen: 16}", "allocation.context=65536")


class NarrowValues(LlamaAttention):
    """Llama's attention with values of half the size."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.v_proj = torch.nn.Linear(hidden, config.num_key_value_heads * VALUE_SIZE, bias=False)
        self.o_proj = torch.nn.Linear(config.num_attention_heads * VALUE_SIZE, hidden, bias=False)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        **kwargs,
    ):
        def heads(projection, size):
            return projection(hidden_states).unflatten(-1, (-1, size)).transpose(1, 2)

        query, key = heads(self.q_proj, KEY_SIZE), heads(self.k_proj, KEY_SIZE)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        value = heads(self.v_proj, VALUE_SIZE)
        kept = past_key_values if cache is None else cache
        if kept is not None:
            key, value = kept.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mixed, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.flatten(2)), weights


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn = NarrowValues(model.config, number).eval()
    return model


@pytest.mark.parametrize(
    ("recipe", "assignments"),
    [
        ("nuq3-1p", ()),
        ("nuq3-1p", ("cache.value.thresholds=channel",)),
        ("kvq3", (*LEARNED, "allocation.min_key_bits=2", "allocation.min_value_bits=2")),
    ],
)
def test_values_with_heads_of_their_own_size_are_calibrated(model, recipe, assignments):
    windows = TokenWindows(token_ids(4, 24, 0), {"dataset": "random", "seqlen": 24})
    config = calibration_config(recipe, assignments=assignments)
    run = {"model_id": "", "model_config": model_fingerprint(model)}
    made = calibrate(model, windows, {"it": config}, **run).artifacts["it"]
    artifact = KVArtifact.from_bytes(made.to_bytes())  # writing and reading check every shape
    assert [layer.shape("key") for layer in artifact.geometry.layers] == [(2, KEY_SIZE)] * 2
    assert [layer.shape("value") for layer in artifact.geometry.layers] == [(2, VALUE_SIZE)] * 2
    errors = {}

    def observe(kv):
        for kind, x in (("key", kv.keys), ("value", kv.values)):
            seen = artifact.quantizers()[kv.layer][kind](x)
            assert seen.shape == x.shape
            errors[kv.layer, kind] = float((seen - x).square().sum() / x.square().sum())

    with torch.no_grad(), capture(model, observe):
        model(token_ids(1, 64, 1), use_cache=False)
    assert len(errors) == 4
    assert max(errors.values()) < 0.2
