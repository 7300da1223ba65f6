"""Bytes of a packed cache: pages, exact tokens, outliers and what layers share, each counted by hand."""

import pytest
from artifact_factory import RECIPES, random_artifact

from kvq_calib.codec.packing import PageLayout
from kvq_calib.codec.registry import codec_of
from kvq_calib.codec.size import CacheShape, TensorShape, cache_bytes, packed_tokens
from kvq_calib.schema.geometry import HeadShape, KVGeometry, LayerGeometry
from kvq_calib.schema.spec import ScalarSpec, TrellisSpec

LAYOUT = PageLayout((3,) * 8, heads=2, head_dim=4, token_params=True, outlier_cap=2)


def test_the_formula_counts_pages_tail_and_sinks():
    shape = TensorShape(LAYOUT, None, outliers_per_token=10 / 576, parameters=52)
    # 296 tokens are older than the window, 288 of them fill 9 blocks on 2 pages, 12 tokens are exact.
    assert shape.bytes(CacheShape(300, batch=2, sink_tokens=1, recent_tokens=4)) == {
        "codes": 2 * (8 * 24 * 4) * 2,
        "token_scales": 2 * 256 * 4 * 2,
        "outlier_starts": 2 * 2 * (8 * 2 * 2 + 1),
        "outlier_entries": pytest.approx(40),
        "exact_sinks": 1 * 8 * 2 * 2,
        "exact_recent": 12 * 8 * 2 * 2,
        "parameters": 52,
    }


@pytest.mark.parametrize(
    ("context", "recent", "window", "expected"),
    [
        (300, 0, None, (0, 288)),
        (300, 13, None, (0, 256)),
        (20, 0, None, (0, 0)),
        (10, 64, None, (0, 0)),
        (1000, 0, 100, (768, 992)),  # 900 tokens are out of sight, 768 of them are whole pages
        (1000, 0, 4000, (0, 992)),
        (1000, 900, 40, (0, 96)),
    ],
)
def test_whole_blocks_are_packed_and_whole_pages_freed(context, recent, window, expected):
    assert packed_tokens(context, recent, window) == expected


def test_a_window_holds_the_pages_that_it_reaches_into():
    plain = PageLayout((4,) * 8, heads=2, head_dim=4, token_params=False, outlier_cap=0)
    sizes = TensorShape(plain, 100, 0.0, 0).bytes(CacheShape(1000))
    assert sizes["codes"] == 256 * 8 / 2
    assert sizes["exact_recent"] == 8 * 8 * 2
    assert not {"outlier_starts", "outlier_entries", "token_scales"} & sizes.keys()
    sparse = PageLayout((4,) * 8, heads=2, head_dim=4, token_params=False, outlier_cap=2)
    held = TensorShape(sparse, 100, 0.5, 0).bytes(CacheShape(1000, batch=3))
    assert held["outlier_entries"] == 4 * 0.5 * (992 - 768) * 3


def test_layers_share_positions_places_of_blocks_and_slots_of_sinks():
    cache = CacheShape(300, batch=2, sink_tokens=3)
    assert cache.shared_bytes() == {
        "positions": 4 * 512 * 2,
        "block_table": 8 * 9,
        "sink_slots": 4 * 2 * 3,
    }
    shape = TensorShape(LAYOUT, None, 0.5, 100)
    total, one = cache_bytes([shape] * 3, cache), shape.bytes(cache)
    assert total == {name: 3 * size for name, size in one.items()} | cache.shared_bytes()


@pytest.mark.parametrize("name", RECIPES)
def test_an_artifact_adds_up_what_its_quantizers_say(name):
    layers = (
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=8, value_head_dim=12),
        LayerGeometry(num_query_heads=4, num_kv_heads=1, head_dim=4, sliding_window=40),
    )
    artifact = random_artifact(KVGeometry(layers=layers), RECIPES[name])
    rates = {"key": [0.5, 0.25], "value": [1.0, 0.0]}
    spec, context, batch = artifact.spec, 500, 3
    cache = CacheShape(context, batch, spec.sink_tokens, spec.recent_tokens)
    assert artifact.cache_shape(context, batch) == cache
    expected = cache_bytes(
        [
            TensorShape(
                quantizer.layout,
                layers[number].sliding_window,
                rates[kind][number],
                quantizer.params.held_bytes,
            )
            for number, pair in enumerate(artifact.quantizers())
            for kind, quantizer in pair.items()
        ],
        cache,
    )
    assert artifact.storage(context, batch, outliers_per_token=rates) == expected
    assert artifact.cache_shape(context, recent_tokens=7).recent_tokens == 7
    # Keys of 16 and 4 channels, values of 24 and 4.
    assert artifact.elements(context, batch) == batch * (500 * (16 + 24) + 40 * (4 + 4))
    bits = 8 * sum(expected.values()) / artifact.elements(context, batch)
    assert artifact.bits_per_element(context, batch, rates) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("spec", "width", "parameters"),
    [
        (ScalarSpec(bits=3), 3, 4 * 8 + 2 * 4 * 24),
        (ScalarSpec(bits=4, thresholds="token"), 4, 4 * 16),
        (TrellisSpec(max_bits=1, states=1), 1, 24 * (1 + 2 * 2)),
        (TrellisSpec(max_bits=3, pair_rotation=True), 3, 24 * (1 + 2 * 2 + 2) + 2 * 2 * 5),
        (
            TrellisSpec(max_bits=2, error_compensation={"rank": 4}, token_weighting=True),
            2,
            24 * (1 + 2 * 2 + 2) + 2 * (12 * 4 + 4 + 2 * 12) + 2 * (2 * 32 + 4),
        ),
    ],
)
def test_what_an_artifact_that_is_not_there_yet_will_take(spec, width, parameters):
    codec, shape = codec_of(spec), HeadShape(2, 12)
    layout = codec.nominal_layout(spec, shape)
    assert layout.widths == (width,) * 24
    assert layout.token_params == (getattr(spec, "thresholds", "") == "token")
    assert codec.nominal_bytes(spec, shape, pairs=5) == parameters
