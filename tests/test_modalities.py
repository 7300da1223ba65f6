"""Models of several modalities: calibrated with text, used with a picture."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from artifact_factory import RECIPES, artifact_for, recipe
from models_zoo import token_ids
from whole_chain import (
    EVERYTHING,
    ROUNDING,
    assert_crops,
    assert_modes_agree,
    assert_passes_are_exact,
    assert_the_whole_chain,
    calibrated,
)

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.compat import with_cache
from kvq_calib.model.inspect import check_generation, inspect_model
from kvq_calib.runtime import KVQCache

pytestmark = pytest.mark.model

PICTURE, BEGIN, END = 100, 101, 102
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_IDS = torch.tensor([[1, 5, 6, BEGIN, *[PICTURE] * 4, END, 9, 10, 11]])


def ready(model):
    model.generation_config.eos_token_id = None
    model.config.vocab_size = 128
    return model.eval().requires_grad_(False)


def gemma3():
    """A mask that is not causal over the picture, sliding windows; and what it is given."""
    text = {**_TEXT, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=PICTURE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    torch.manual_seed(0)
    model = ready(transformers.Gemma3ForConditionalGeneration(config))
    with torch.no_grad():
        model.get_submodule("model.multi_modal_projector").mm_input_projection_weight.normal_()
    return model, {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (_IDS == PICTURE).long()}


def qwen2_5_vl():
    """Positions in three sections, which differ over the picture; and what it is given."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0]},
        image_token_id=PICTURE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        video_token_id=103,
    )
    torch.manual_seed(0)
    model = ready(transformers.Qwen2_5_VLForConditionalGeneration(config))
    given = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (_IDS == PICTURE).long()
    return model, given


def qwen3_vl():
    """The same with sections that take turns, and what layers see of the picture added to the text's; its input."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 16, "rope_parameters": rope},
        vision_config={
            **vision,
            "patch_size": 14,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=PICTURE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        video_token_id=103,
    )
    torch.manual_seed(0)
    model = ready(transformers.Qwen3VLForConditionalGeneration(config))
    given = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (_IDS == PICTURE).long()
    return model, given


SECTIONS = pytest.mark.parametrize("family", [qwen2_5_vl, qwen3_vl])


def assert_a_picture_is_seen_alike(model, artifact, given):
    """Generation after a picture gives the tokens of the model's own cache, and the picture matters."""
    inputs = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS), **given}
    ours, own = (
        model.generate(**inputs, **with_cache(cache), do_sample=False, max_new_tokens=8)
        for cache in (KVQCache(artifact, model, recent_tokens=EVERYTHING), None)
    )
    assert torch.equal(ours, own)
    with torch.no_grad():
        cache = KVQCache(artifact, model, recent_tokens=EVERYTHING)
        got = model(**inputs, **with_cache(cache)).logits
        want = model(**inputs, use_cache=False).logits
        other = model(**{**inputs, "pixel_values": -given["pixel_values"]}, use_cache=False).logits
    size = float(want.abs().max())
    assert float((got - want).abs().max()) < ROUNDING * size
    assert float((other - want)[:, -1].abs().max()) > 2 * ROUNDING * size


@pytest.mark.parametrize("family", [gemma3, qwen2_5_vl, qwen3_vl])
def test_text_is_served_as_for_models_of_text(family):
    model, _ = family()
    assert_crops(model, assert_the_whole_chain(model))


def test_a_mask_that_is_not_causal_over_a_picture():
    model, given = gemma3()
    artifact = calibrated(model)
    assert not check_generation(model, inspect_model(model)).materialized
    assert_modes_agree(model, artifact)
    assert_passes_are_exact(model, artifact)
    assert_a_picture_is_seen_alike(model, artifact, given)


@SECTIONS
def test_positions_in_sections_need_keys_as_they_are_cached(family):
    model, given = family()
    after_rope = artifact_for(model, recipe(key={"pre_rope": False}))
    assert_passes_are_exact(
        model, after_rope
    )  # first: the model remembers where the last picture left its positions
    assert_a_picture_is_seen_alike(model, after_rope, given)


@SECTIONS
def test_positions_in_sections_and_keys_before_rope_serve_text_and_refuse_a_picture(family):
    model, given = family()
    artifact = calibrated(model)
    assert_modes_agree(model, artifact)
    assert_passes_are_exact(model, artifact)
    if artifact.geometry.layers[0].rope is None:  # older releases rotate in a way that cannot be undone
        assert_a_picture_is_seen_alike(model, artifact, given)
        return
    cache = KVQCache(artifact, model)
    inputs = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS), **given}
    with pytest.raises(RuntimeMismatchError, match=r"by other angles.*pre_rope=false"):
        model.generate(**inputs, **with_cache(cache), max_new_tokens=2)
    assert cache.get_seq_length() == 0


def test_a_picture_through_packed_pages():
    model, given = gemma3()
    cache = KVQCache(artifact_for(model, RECIPES["nuq4-1p"]), model)
    inputs = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS), **given}
    text = model.generate(**inputs, **with_cache(cache), do_sample=False, max_new_tokens=60)
    assert cache.table.blocks == 2
    assert text.shape[1] == 72
    cache.reset()
    with torch.no_grad():
        assert bool(model(input_ids=token_ids(2, 40), **with_cache(cache)).logits.isfinite().all())
