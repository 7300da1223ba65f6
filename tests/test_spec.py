"""Specs: illegal combinations cannot be made, and stored tensors follow from spec and geometry."""

import pytest
from pydantic import ValidationError

from kvq_calib.codec.registry import codec_of
from kvq_calib.schema.geometry import HeadShape, KVGeometry, LayerGeometry, RopeSpec, cache_elements
from kvq_calib.schema.spec import (
    ErrorCompensationSpec,
    KVCacheSpec,
    LayerSpec,
    OutlierSpec,
    ScalarSpec,
    TrellisSpec,
)

SHAPE = LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=8, rope=0)
ROPE = RopeSpec(pairs=((0, 4), (1, 5)), inv_freq=(1.0, 0.1))
KEY = ScalarSpec(bits=3)
VALUE = ScalarSpec(bits=3, thresholds="token")
FULL = TrellisSpec(
    max_bits=3,
    pair_rotation=True,
    error_compensation=ErrorCompensationSpec(rank=1),
    token_weighting=True,
)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"bits": 0}, "greater than or equal to 1"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 3, "thresholds": "channels"}, "channel_online"),
        ({"bits": 3, "outliers": {"fraction": 0.06}}, "less than or equal to 0.05"),
        ({"bits": 3, "outliers": {"max_per_token": 0}}, "greater than or equal to 1"),
        ({"bits": 3, "levels": "magic"}, "uniform"),
        ({"bits": 3, "colour": "red"}, "Extra inputs"),
        ({"bits": 3, "pair_rotation": True}, "Extra inputs"),
        ({"codec": "trellis", "max_bits": 8}, "less than or equal to 7"),
        ({"codec": "trellis", "max_bits": 3, "states": 2}, "1 or 4"),
        ({"codec": "trellis", "max_bits": 3, "outliers": {}}, "Extra inputs"),
        ({"codec": "trellis", "max_bits": 3, "thresholds": "token"}, "Extra inputs"),
        ({"codec": "trellis", "max_bits": 3, "states": 1, "token_weighting": True}, "needs states: 4"),
        ({"codec": "trellis", "max_bits": 3, "pre_rope": False}, "keys before the rotary embedding only"),
        ({"codec": "trellis", "max_bits": 3, "error_compensation": {"rank": -1}}, "greater than or equal"),
        ({"codec": "trellis", "max_bits": 3, "error_compensation": True}, "valid dictionary"),
        ({"codec": "magic"}, "unknown codec 'magic'; use one of scalar, trellis"),
        ({"codec": ["scalar"]}, "unknown codec"),
        (3, "valid dictionary"),
    ],
)
def test_illegal_specs(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        KVCacheSpec.model_validate({"key": settings, "value": VALUE})


def test_a_spec_is_of_the_class_of_its_codec():
    spec = KVCacheSpec.model_validate({"key": {"codec": "trellis", "max_bits": 3}, "value": {"bits": 2}})
    assert spec.key == TrellisSpec(max_bits=3)
    assert spec.value == ScalarSpec(bits=2)
    assert [s.codec for s in spec.specs()] == ["trellis", "scalar"]


@pytest.mark.parametrize("make", [LayerSpec, KVCacheSpec])
def test_only_keys_have_pairs_to_turn(make):
    with pytest.raises(ValidationError, match=r"value\.pair_rotation: values have no RoPE pairs"):
        make(key=KEY, value=TrellisSpec(max_bits=3, pair_rotation=True))


def test_layer_overrides_resolve_from_both_ends():
    eight = LayerSpec(key=ScalarSpec(bits=8), value=VALUE)
    spec = KVCacheSpec(key=KEY, value=VALUE, layers={0: eight, -1: eight})
    assert [layer.key.bits for layer in spec.resolved(4)] == [8, 3, 3, 8]
    assert spec.specs() == [KEY, VALUE, *[ScalarSpec(bits=8), VALUE] * 2]
    with pytest.raises(ValueError, match="twice"):
        spec.resolved(1)
    with pytest.raises(ValueError, match="has 2 layers"):
        KVCacheSpec(key=KEY, value=VALUE, layers={2: eight}).resolved(2)


def test_a_spec_survives_json():
    spec = KVCacheSpec(key=KEY, value=VALUE, layers={-1: LayerSpec(key=FULL, value=KEY)}, sink_tokens=4)
    again = KVCacheSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert again.layers[-1].key.error_compensation.rank == 1


def test_a_spec_says_what_it_is_in_words():
    assert KEY.width_words == "3 bits per element"
    assert KEY.features() == ["kmeans levels", "thresholds for each channel"]
    plain = ScalarSpec(bits=8, levels="uniform", thresholds="token")
    assert plain.features() == ["thresholds for each token"]
    rich = ScalarSpec(bits=2, thresholds="token_normalized", q_norm=True, outliers={"fraction": 0.01})
    assert rich.features()[1:] == [
        "thresholds for each token after those for each channel",
        "Q-Norm",
        "1.0% exact outliers",
    ]
    assert FULL.width_words == "up to 3 bits per element"
    assert FULL.features()[2:] == [
        "trellis codes",
        "turned RoPE pairs",
        "error compensation",
        "token weighting",
    ]
    assert TrellisSpec(max_bits=2, states=1).features() == FULL.features()[:2]


@pytest.mark.parametrize(
    ("fraction", "channels", "per_side", "token_cap", "channel_cap"),
    [
        (0.0, 192, 0, 0, 0),
        (0.01, 192, 1, 2, 48),
        (0.01, 1024, 5, 10, 256),
        (0.01, 8, 1, 2, 2),
    ],
)
def test_outlier_capacities(fraction, channels, per_side, token_cap, channel_cap):
    outliers = OutlierSpec(fraction=fraction)
    assert outliers.per_side(channels) == per_side
    assert outliers.cap(True, channels) == token_cap
    assert outliers.cap(False, channels) == channel_cap
    if fraction:
        assert OutlierSpec(fraction=fraction, max_per_token=3).cap(False, channels) == 3


def test_geometry_is_checked():
    with pytest.raises(ValidationError, match="not a multiple"):
        LayerGeometry(num_query_heads=3, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValidationError, match="there are 0"):
        KVGeometry(layers=(SHAPE,))
    with pytest.raises(ValidationError, match="outside the head"):
        KVGeometry(layers=(SHAPE,), ropes=(RopeSpec(pairs=((0, 8),), inv_freq=(1.0,)),))
    with pytest.raises(ValidationError, match="one inv_freq"):
        RopeSpec(pairs=((0, 1),), inv_freq=())
    with pytest.raises(ValidationError, match="distinct"):
        RopeSpec(pairs=((0, 1), (1, 2)), inv_freq=(1.0, 1.0))
    geometry = KVGeometry(layers=(SHAPE, SHAPE.model_copy(update={"rope": None})), ropes=(ROPE,))
    assert geometry.rope_of(0) is ROPE
    assert geometry.rope_of(1) is None


def test_values_may_have_a_head_size_of_their_own():
    assert SHAPE.shape("key") == SHAPE.shape("value") == (2, 8)
    assert SHAPE.shape("key").channels == 16
    uneven = LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=8, value_head_dim=5, sliding_window=10)
    assert (uneven.shape("key"), uneven.shape("value")) == (HeadShape(2, 8), HeadShape(2, 5))
    assert cache_elements([SHAPE, uneven], context=100, batch=3) == 3 * (100 * (16 + 16) + 10 * (16 + 10))
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=8, value_head_dim=0)
    narrow_keys = SHAPE.model_copy(update={"head_dim": 4, "value_head_dim": 8})
    with pytest.raises(ValidationError, match="outside the head of 4"):  # pairs are of keys
        KVGeometry(layers=(narrow_keys,), ropes=(ROPE,))


def stored(spec, pairs=2):
    return codec_of(spec).stored_tensors(spec, HeadShape(2, 8), pairs)


def test_stored_tensors_follow_the_spec():
    assert stored(VALUE) == {"codebook": ((1, 8), ("float32",))}
    online = KEY.model_copy(update={"thresholds": "channel_online"})
    assert set(stored(online)) == {"codebook"}
    for thresholds in ("channel", "token_normalized"):
        found = stored(KEY.model_copy(update={"thresholds": thresholds}))
        assert found["scale"] == found["zero_point"] == ((16,), ("float32",))
    plain = stored(TrellisSpec(max_bits=3))
    assert plain == {
        "bits": ((16,), ("uint8",)),
        "level_offset": ((16,), ("float16", "float32")),
        "level_scale": ((16,), ("float16", "float32")),
        "level_shape": ((None,), ("int8",)),
    }
    assert plain == stored(TrellisSpec(max_bits=7, states=1))


@pytest.mark.parametrize(
    ("compensation", "entries", "weighed"),
    [
        ({}, 28, False),
        ({"refinement_passes": 2}, 28, True),
        ({"rank": 3}, 24, True),
        ({"rank": 3, "refinement_passes": 2}, 24, True),
    ],
)
def test_what_the_encoder_needs_is_stored_with_it(compensation, entries, weighed):
    spec = TrellisSpec(max_bits=3, error_compensation=compensation)
    found = stored(spec)
    assert found["compensation"] == ((2, entries), ("int8",))
    assert found["compensation_scale"] == ((2,), ("float32",))
    assert found.get("error_weight") == (((2, 8), ("float16",)) if weighed else None)
    assert "token_weight" not in found
    both = stored(spec.model_copy(update={"token_weighting": True}))
    assert both.keys() - found.keys() == {"token_weight", "token_size_unit"}
    assert both["token_weight"] == ((2, 32), ("float16",))
    assert both["token_size_unit"] == ((2,), ("float32",))


def test_a_layer_without_rotary_embedding_has_no_angles():
    assert stored(FULL)["pair_angle"] == ((2, 2), ("float16",))
    assert "pair_angle" not in stored(FULL, pairs=0)
