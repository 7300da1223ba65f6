"""Specs: illegal combinations cannot be made, and capacities follow from the geometry."""

import pytest
from pydantic import ValidationError

from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KVCacheSpec, LayerSpec, OutlierSpec, QuantSpec, expected_tensors

SHAPE = LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=8, rope=0)
ROPE = RopeSpec(pairs=((0, 4), (1, 5)), inv_freq=(1.0, 0.1))
KEY = QuantSpec(bits=3)
VALUE = QuantSpec(bits=3, granularity="token", dynamic=True)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"bits": 0}, "greater than or equal to 1"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 3, "granularity": "token"}, "needs dynamic"),
        ({"bits": 3, "channel_normalized": True}, "only meaningful"),
        ({"bits": 3, "phase": True, "rotation": True}, "cannot have both"),
        ({"bits": 3, "phase": True, "pre_rope": False}, "needs pre_rope"),
        ({"bits": 3, "outliers": {"fraction": 0.06}}, "less than or equal to 0.05"),
        ({"bits": 3, "datatype": "magic"}, "uniform"),
        ({"bits": 3, "colour": "red"}, "Extra inputs"),
    ],
)
def test_illegal_quant_specs(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        QuantSpec.model_validate(settings)


def test_keys_and_values_have_transforms_of_their_own():
    with pytest.raises(ValidationError, match="values only"):
        LayerSpec(key=QuantSpec(bits=3, rotation=True), value=VALUE)
    with pytest.raises(ValidationError, match="keys only"):
        KVCacheSpec(key=KEY, value=QuantSpec(bits=3, phase=True))


def test_layer_overrides_resolve_from_both_ends():
    eight = LayerSpec(key=QuantSpec(bits=8), value=VALUE)
    spec = KVCacheSpec(key=KEY, value=VALUE, layers={0: eight, -1: eight})
    assert [layer.key.bits for layer in spec.resolved(4)] == [8, 3, 3, 8]
    with pytest.raises(ValueError, match="twice"):
        spec.resolved(1)
    with pytest.raises(ValueError, match="has 2 layers"):
        KVCacheSpec(key=KEY, value=VALUE, layers={2: eight}).resolved(2)


def test_a_spec_survives_json():
    spec = KVCacheSpec(key=KEY, value=VALUE, layers={-1: LayerSpec(key=KEY, value=KEY)}, sink_tokens=4)
    assert KVCacheSpec.model_validate_json(spec.model_dump_json()) == spec


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
    assert outliers.cap("token", channels) == token_cap
    assert outliers.cap("channel", channels) == channel_cap
    if fraction:
        assert OutlierSpec(fraction=fraction, max_per_token=3).cap("channel", channels) == 3


def test_geometry_is_checked():
    with pytest.raises(ValidationError, match="no multiple"):
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
    assert SHAPE.channels == 16


def test_expected_tensors_follow_the_spec():
    assert expected_tensors(VALUE, SHAPE, ROPE) == {"codebook": ((1, 8), ("float32",))}
    mixed = expected_tensors(QuantSpec(bits=3, variable_bits=True), SHAPE, ROPE)
    assert set(mixed) == {"bits", "codebook", "codebook_index", "scale", "zero_point"}
    assert mixed["codebook"] == ((None,), ("float16",))
    assert mixed["codebook_index"] == mixed["bits"] == ((16,), ("uint8",))
    full = expected_tensors(QuantSpec(bits=3, phase=True), SHAPE, ROPE)
    assert full["phase"] == ((2, 2), ("float16", "float32"))
    assert full["scale"] == ((16,), ("float32",))
    rotated = QuantSpec(bits=3, granularity="token", dynamic=True, rotation=True, channel_normalized=True)
    assert expected_tensors(rotated, SHAPE, ROPE)["rotation"] == ((2, 8, 8), ("float32",))
    assert "scale" in expected_tensors(rotated, SHAPE, ROPE)
