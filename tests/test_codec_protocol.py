"""The protocol of codecs, tested with each codec and with one for tests (``toy_codec.py``)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from artifact_factory import random_artifact, random_quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_codec import ToyQuantizer, ToySpec, registered

from kvq_calib.artifact import sealed as files
from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.errors import ArtifactMetadataError, ArtifactTensorError, ArtifactValueError
from kvq_calib.artifact.export_fp8 import amax_of, losses
from kvq_calib.artifact.shard import shard
from kvq_calib.codec import registry
from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_TOKENS
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.schema import spec as specs
from kvq_calib.schema.geometry import KINDS, HeadShape, KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KVCacheSpec, LayerSpec, QuantSpec


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """The toy codec is known while this file is tested."""
    with registered():
        yield


OUTLIERS = {"fraction": 0.05, "max_per_token": 4}
#: Between them every feature of every codec.
CASES: dict[str, dict[str, object]] = {
    "scalar": {"bits": 3},
    "scalar-outliers": {"bits": 4, "outliers": OUTLIERS},
    "scalar-token": {"bits": 2, "thresholds": "token"},
    "scalar-token-outliers": {"bits": 1, "thresholds": "token", "outliers": OUTLIERS},
    "scalar-normalized": {"bits": 8, "thresholds": "token_normalized", "outliers": OUTLIERS},
    "scalar-post-rope": {"bits": 3, "pre_rope": False, "levels": "uniform"},
    "scalar-online": {"bits": 5, "thresholds": "channel_online", "outliers": OUTLIERS},
    "trellis": {"codec": "trellis", "max_bits": 4},
    "trellis-full": {
        "codec": "trellis",
        "max_bits": 7,
        "pair_rotation": True,
        "error_compensation": {"refinement_passes": 1},
        "token_weighting": True,
    },
    "trellis-rank": {"codec": "trellis", "max_bits": 3, "error_compensation": {"rank": 2}},
    "one-state": {"codec": "trellis", "states": 1, "max_bits": 6, "pair_rotation": True},
    "one-state-compensation": {"codec": "trellis", "states": 1, "max_bits": 2, "error_compensation": {}},
    "toy": {"codec": "toy"},
}
case = pytest.mark.parametrize("name", CASES)
drawn_cases = st.sampled_from(sorted(CASES))


def spec_of(name: str) -> QuantSpec:
    return KVCacheSpec.model_validate({"key": CASES[name], "value": {"bits": 1}}).key


def cache_spec(name: str) -> KVCacheSpec:
    """Of a case for keys and values; values have no pairs to turn."""
    value = {setting: what for setting, what in CASES[name].items() if setting != "pair_rotation"}
    return KVCacheSpec.model_validate({"key": CASES[name], "value": value})


def rope_for(head_dim: int) -> RopeSpec:
    half = head_dim // 2
    return RopeSpec(pairs=tuple((i, i + half) for i in range(half)), inv_freq=(0.5,) * half)


def quantizer_of(name: str, heads: int = 2, head_dim: int = 6, seed: int = 0) -> Quantizer:
    shape, rope = HeadShape(heads, head_dim), rope_for(head_dim)
    return random_quantizer(spec_of(name), shape, rope, seed=seed)


def values(quantizer: Quantizer, batch: int = 2, tokens: int = 50, seed: int = 1) -> Tensor:
    heads, size = quantizer.shape
    return 2 * torch.randn(batch, heads, tokens, size, generator=torch.Generator().manual_seed(seed))


#: Keys and values of different head sizes, layers of different ones, and a layer without rotary embedding.
GEOMETRY = KVGeometry(
    layers=(
        LayerGeometry(num_query_heads=8, num_kv_heads=4, head_dim=6, value_head_dim=10, rope=0),
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=8),
    ),
    ropes=(rope_for(6),),
)


# ---- spec and artifact


@case
def test_a_spec_finds_its_codec_and_survives_json(name: str) -> None:
    spec = spec_of(name)
    codec = registry.codec_of(spec)
    assert codec.codec == spec.codec
    assert type(spec) is codec.spec_type
    cache = KVCacheSpec(
        key=spec, value=spec_of("toy"), layers={-1: LayerSpec(key=spec, value=spec_of("scalar"))}
    )
    again = KVCacheSpec.model_validate_json(cache.model_dump_json())
    assert again == cache
    assert type(again.layers[-1].key) is codec.spec_type
    assert str(spec.max_width) in spec.width_words
    assert all(isinstance(words, str) for words in spec.features())
    with pytest.raises(ValueError, match="colour"):
        KVCacheSpec.model_validate({"key": {**CASES[name], "colour": "red"}, "value": {"bits": 1}})


@case
def test_an_artifact_holds_what_the_codec_says_and_nothing_else(name: str) -> None:
    made = random_artifact(GEOMETRY, cache_spec(name))
    loaded = KVArtifact.from_bytes(made.to_bytes())
    assert loaded.to_bytes() == made.to_bytes()
    assert loaded.spec == made.spec
    _, tensors = files.unseal(made.to_bytes(), "kvq")
    for number, layer in enumerate(loaded.layers):
        pairs = 3 if number == 0 else 0
        for kind, quantizer in loaded.quantizers()[number].items():
            assert quantizer.shape == GEOMETRY.layers[number].shape(kind)
            expected = quantizer.stored_tensors(
                quantizer.spec, quantizer.shape, pairs if kind == "key" else 0
            )
            found = layer.of(kind).tensors()
            assert found.keys() == expected.keys()
            assert isinstance(layer.of(kind), quantizer.params_type)
            for part, tensor in found.items():
                stored = tensors.pop(f"layers.{number}.{kind}.{part}")
                assert torch.equal(stored, tensor)
                assert str(tensor.dtype).removeprefix("torch.") in expected[part].dtypes
            x = values(quantizer)
            assert torch.equal(quantizer(x), made.quantizers()[number][kind](x))
    assert not tensors


@case
def test_tensors_that_are_missing_or_of_another_shape_or_kind_are_named(name: str) -> None:
    made = random_artifact(GEOMETRY, cache_spec(name))

    def refused(message: str) -> None:
        data = files.seal("kvq", metadata, tensors)
        with pytest.raises(ArtifactTensorError, match=rf"tensor layers\.0\.key\.{part} {message}"):
            KVArtifact.from_bytes(data)

    for part in made.layers[0].key.tensors():
        metadata, tensors = files.unseal(made.to_bytes(), "kvq")
        whole = tensors.pop(f"layers.0.key.{part}")
        refused("is missing")
        tensors[f"layers.0.key.{part}"] = whole[None].clone()
        refused(r"is .*, not ")
        tensors[f"layers.0.key.{part}"] = whole.to(torch.int64)
        refused(r"is int64 .*, not ")


@case
def test_values_that_are_no_numbers_are_named(name: str) -> None:
    made = random_artifact(GEOMETRY, cache_spec(name))
    for number, kind in ((0, "key"), (1, "value")):
        for part, tensor in made.layers[number].of(kind).tensors().items():
            if not tensor.is_floating_point():
                continue
            for wrong in (float("nan"), float("inf")):
                right = tensor.flatten()[-1].clone()
                tensor.view(-1)[-1] = wrong
                with pytest.raises(ArtifactValueError, match=rf"layers\.{number}\.{kind}\.{part} has values"):
                    made.to_bytes()
                tensor.view(-1)[-1] = right
    made.to_bytes()


def test_registering_makes_a_codec_known_by_its_name() -> None:
    spec = spec_of("toy")
    assert type(spec) is ToySpec
    assert registry.codec_of(spec) is ToyQuantizer
    assert registry.register(ToyQuantizer) is ToyQuantizer  # again changes nothing
    assert registry.codec_of(spec) is ToyQuantizer


def test_a_codec_that_is_not_known_is_named_with_those_that_are() -> None:
    data = random_artifact(GEOMETRY, cache_spec("toy")).to_bytes()
    del specs._SPECS["toy"]
    try:
        with pytest.raises(
            ArtifactMetadataError, match="key: unknown codec 'toy'; use one of scalar, trellis"
        ):
            KVArtifact.from_bytes(data)
    finally:
        specs.register_spec(ToySpec)


@case
def test_what_works_on_artifacts_works_with_every_codec(name: str) -> None:
    artifact = random_artifact(GEOMETRY, cache_spec(name))
    assert losses(artifact)
    ranges = amax_of(artifact)
    for kind in KINDS:
        known = all(pair[kind].channel_range() is not None for pair in artifact.quantizers())
        assert all((number is not None) == known for number in ranges[kind])
    assert 0 < artifact.bits_per_element(4096) < 16
    parts = [shard(artifact, rank, 2) for rank in range(2)]
    codes = [part.storage(4096)["codes"] for part in parts]
    assert sum(codes) == artifact.storage(4096)["codes"]
    again = KVArtifact.from_bytes(parts[1].to_bytes())
    assert again.layers[0].key.of_heads(again.spec.key, again.geometry.layers[0].shape("key"), 0, 1)


# ---- layout and size


@case
def test_readers_turn_keys_that_are_stored_before_rope_and_never_values(name: str) -> None:
    artifact = random_artifact(GEOMETRY, cache_spec(name))
    with_rope, without = artifact.quantizers()
    assert with_rope["key"].read_rope == (GEOMETRY.ropes[0] if artifact.spec.key.pre_rope else None)
    assert without["key"].read_rope is with_rope["value"].read_rope is without["value"].read_rope is None


@case
def test_the_layout_says_what_a_page_holds(name: str) -> None:
    quantizer = quantizer_of(name)
    layout, q = quantizer.layout, quantizer.quantize(values(quantizer))
    assert layout.widths == quantizer.widths
    assert (layout.heads, layout.head_dim) == quantizer.shape
    assert layout.channels == len(layout.widths) == quantizer.shape.channels
    assert layout.token_params == quantizer.per_token == (q.token_scale is not None)
    assert layout.outlier_cap == quantizer.outlier_cap
    assert (q.outliers is None) == (q.residual is None) == (quantizer.outlier_cap == 0)
    if q.outliers is not None and q.residual is not None:
        assert 0 < int(q.outliers.sum(-1).max()) <= quantizer.outlier_cap
        assert not bool(q.residual[~q.outliers].any())


@case
def test_nominal_sizes_are_those_of_the_widest_codes(name: str) -> None:
    quantizer = quantizer_of(name)
    spec, shape = quantizer.spec, quantizer.shape
    nominal = quantizer.nominal_layout(spec, shape)
    assert set(nominal.widths) == {spec.max_width}
    assert nominal.token_params == quantizer.layout.token_params
    assert nominal.outlier_cap == quantizer.layout.outlier_cap
    assert nominal.words_per_block >= quantizer.layout.words_per_block
    assert 0 <= quantizer.nominal_outliers(spec, shape) <= nominal.outlier_cap
    if quantizer.widths == nominal.widths:
        assert quantizer.nominal_bytes(spec, shape, pairs=3) == quantizer.params.held_bytes


@case
def test_another_device_changes_nothing_but_the_place(name: str) -> None:
    quantizer = quantizer_of(name)
    assert quantizer.device == torch.device("cpu")
    assert quantizer.to("cpu") is quantizer
    again = quantizer.with_params(quantizer.params)
    x = values(quantizer)
    assert torch.equal(again(x), quantizer(x))
    there = quantizer.to("meta")
    assert there.device == torch.device("meta")
    assert there.params.held_bytes == quantizer.params.held_bytes
    assert (there.storage, there.shape, there.rope) == (quantizer.storage, quantizer.shape, quantizer.rope)


# ---- numbers to codes and back


@settings(max_examples=60, deadline=None)
@given(drawn_cases, st.integers(1, 3), st.integers(4, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_codes_fit_their_widths_and_come_back_from_a_page(
    name: str, heads: int, head_dim: int, tokens: int, seed: int
) -> None:
    quantizer = quantizer_of(name, heads, head_dim, seed)
    x = values(quantizer, tokens=tokens, seed=seed)
    codes = quantizer.quantize(x).codes
    assert codes.dtype == torch.uint8
    assert codes.shape == (2, tokens, heads * head_dim)
    assert bool((codes < 1 << torch.tensor(quantizer.widths)).all())
    blocks = tokens // BLOCK_TOKENS
    page = quantizer.layout.new_page(2)
    assert page.nbytes == quantizer.layout.page_bytes(2)["codes"]
    whole = codes[:, : blocks * BLOCK_TOKENS]
    quantizer.layout.write(page, whole, 1)
    back = quantizer.layout.read(page)[..., BLOCK_TOKENS : (1 + blocks) * BLOCK_TOKENS]
    assert torch.equal(back.transpose(1, 2), whole)


@settings(max_examples=60, deadline=None)
@given(drawn_cases, st.integers(0, 2**31))
def test_reading_follows_the_formula_that_runtimes_compute(name: str, seed: int) -> None:
    quantizer = quantizer_of(name, seed=seed)
    q = quantizer.quantize(values(quantizer, seed=seed))
    seen = quantizer.decode(q.codes)
    if q.token_scale is not None and q.token_zero_point is not None:
        y = q.token_zero_point.float()[..., None] + q.token_scale.float()[..., None] * seen
    elif q.channel_scale is not None and q.channel_zero_point is not None:
        y = q.channel_zero_point + q.channel_scale * seen
    elif quantizer.has_channel_thresholds:
        y = quantizer.zero_point + quantizer.scale * seen
    else:
        y = seen
    if q.residual is not None:
        y = y + q.residual.float()
    if quantizer.channel_normalised:
        y = quantizer.zero_point + quantizer.scale * y
    found = quantizer.dequantize(q)
    assert found.dtype == torch.float32
    assert torch.equal(found, quantizer.inverse_transform(y))


@settings(max_examples=60, deadline=None)
@given(drawn_cases, st.integers(0, 2**31))
def test_what_is_read_lies_within_the_reach_of_the_quantizer(name: str, seed: int) -> None:
    """Between the outer levels, however far out the numbers are; with an outlier's residual near the number itself."""
    quantizer = quantizer_of(name, seed=seed)
    x = 10 * values(quantizer, seed=seed)
    q = quantizer.quantize(x)
    levels, seen = quantizer.levels, quantizer.decode(q.codes)
    assert bool((seen >= levels.amin(1)).all())
    assert bool((seen <= levels.amax(1)).all())
    held = quantizer.channel_range()
    y = quantizer.transform(quantizer.dequantize(q))
    if held is not None and not quantizer.per_token and q.outliers is None:
        centre, half = held
        assert bool(((y - centre).abs() <= half * (1 + 1e-4) + 1e-4).all())
    if q.outliers is not None and q.residual is not None and not quantizer.channel_normalised:
        error = (y - quantizer.transform(x)).abs()[q.outliers]
        assert bool((error <= q.residual.float().abs()[q.outliers] * 2**-10 + 1e-4).all())


@case
def test_two_bits_and_more_leave_a_small_error_of_what_thresholds_fit(name: str) -> None:
    made = quantizer_of(name)
    x = values(made, tokens=200)
    quantizer = random_quantizer(made.spec, made.shape, made.rope, seed=3, sample=x)
    y, seen = quantizer.transform(x), quantizer.transform(quantizer(x))
    share = (seen - y).square().mean((0, 1)) / y.square().mean((0, 1))
    wide = torch.tensor(quantizer.widths) >= min(2, made.spec.max_width)
    assert float(share[wide].median()) < 0.25


@case
def test_the_transform_is_undone(name: str) -> None:
    quantizer = quantizer_of(name)
    x = values(quantizer)
    y = quantizer.transform(x.half())
    assert y.dtype == torch.float32
    assert y.shape == (2, 50, quantizer.shape.channels)
    torch.testing.assert_close(quantizer.inverse_transform(y), x.half().float(), atol=1e-5, rtol=1e-5)
    n = quantizer.normalise(x)
    torch.testing.assert_close(n.zero_point + n.scale * n.normalised, n.y, atol=1e-4, rtol=1e-4)
    assert (n.outliers is None) == (quantizer.outlier_cap == 0)


@settings(max_examples=60, deadline=None)
@given(drawn_cases, st.integers(2, 80), st.integers(0, 2**31))
def test_how_tokens_are_grouped_changes_nothing(name: str, tokens: int, seed: int) -> None:
    """Sequences never see each other; blocks do not either; single tokens do not where codes are not made by block."""
    quantizer = quantizer_of(name, seed=seed)
    online = quantizer.cannot_stream() is not None
    step = BLOCK_TOKENS if quantizer.codes_in_blocks else 1
    x = values(quantizer, tokens=tokens, seed=seed)
    whole, codes = quantizer(x), quantizer.quantize(x).codes
    assert torch.equal(quantizer(x[1:]), whole[1:])
    assert torch.equal(quantizer.quantize(x[1:]).codes, codes[1:])
    if online:
        return
    for first in range(0, x.shape[2], step):
        part = slice(first, first + step)
        assert torch.equal(quantizer.quantize(x[:, :, part]).codes, codes[:, part])
        assert torch.equal(quantizer(x[:, :, part]), whole[:, :, part])


@settings(max_examples=40, deadline=None)
@given(drawn_cases, st.integers(0, 2**31))
def test_codes_mean_the_levels_that_their_indices_name(name: str, seed: int) -> None:
    quantizer = quantizer_of(name, seed=seed)
    codes = quantizer.quantize(values(quantizer, tokens=2 * BLOCK_TOKENS, seed=seed)).codes
    index = quantizer.level_index(codes.permute(0, 2, 1)).to(torch.int64)
    seen, levels = quantizer.decode(codes), quantizer.levels
    for channel, width in enumerate(quantizer.widths):
        own = index[:, channel]
        assert int(own.max()) < quantizer.level_count(width) <= levels.shape[1]
        assert torch.equal(seen[..., channel], levels[channel][own])
        assert torch.equal(levels[channel, quantizer.level_count(width) - 1 :].unique(), levels[channel, -1:])
    if quantizer.shared_levels is not None:
        assert torch.equal(levels, quantizer.shared_levels.expand_as(levels))


@case
def test_heads_alone_are_quantized_as_among_the_others(name: str) -> None:
    whole = quantizer_of(name, heads=4)
    part = whole.params.of_heads(whole.spec, whole.shape, 1, 2)
    mine = type(whole)(whole.spec, part, HeadShape(2, whole.shape.head_dim), whole.rope)
    mine.check_values(mine.spec, part.tensors())
    assert mine.widths == whole.widths[6:18]
    x = values(whole)
    if whole.per_token or whole.outlier_cap:  # thresholds and caps of a token are of all its heads
        assert mine(x[:, 1:3]).shape == x[:, 1:3].shape
    else:
        assert torch.equal(mine(x[:, 1:3]), whole(x)[:, 1:3])


@case
def test_what_is_derived_is_made_once(name: str) -> None:
    """It counts as memory, so whoever quantizes must not make it again."""
    quantizer = quantizer_of(name)
    before = quantizer.derived()
    assert all(isinstance(tensor, Tensor) for tensor in before)
    quantizer.quantize(values(quantizer))
    assert [id(tensor) for tensor in quantizer.derived()] == [id(tensor) for tensor in before]


@case
def test_what_cannot_stream_says_so_in_one_line(name: str) -> None:
    reason = quantizer_of(name).cannot_stream()
    assert (reason is None) == (name != "scalar-online")
    assert reason is None or "\n" not in reason


def test_a_page_of_the_toy_codec_has_two_bits_for_every_element() -> None:
    quantizer = quantizer_of("toy", heads=2, head_dim=8)
    assert quantizer.layout.page_bytes() == {"codes": 2 * 16 * PAGE_TOKENS // 8}
    x = values(quantizer)
    levels = quantizer.params.head_levels.float()
    assert not torch.equal(levels[0], levels[1])
    scale, zero_point = (part.view(2, 8, 1) for part in (quantizer.scale, quantizer.zero_point))
    for head, seen in enumerate(quantizer(x).unbind(1)):
        reachable = zero_point[head] + scale[head] * levels[head]
        assert bool((seen[..., None] == reachable).any(-1).all())
