"""The artifact: the same bytes for the same content, golden bytes, and a named refusal for every damage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from artifact_factory import random_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib import artifact as module
from kvq_calib.artifact import (
    ArtifactDigestError,
    ArtifactError,
    ArtifactFileError,
    ArtifactMetadataError,
    ArtifactModelError,
    ArtifactTensorError,
    ArtifactValueError,
    ArtifactVersionError,
    KVArtifact,
    LayerParams,
)
from kvq_calib.errors import KVQError
from kvq_calib.files import WriteError
from kvq_calib.quantizer import QuantParams
from kvq_calib.spec import KVCacheSpec, KVGeometry, LayerGeometry, LayerSpec, OutlierSpec, QuantSpec, RopeSpec

GOLDEN_FILES = Path(__file__).parent / "golden"
#: Of the present version.
GOLDEN = GOLDEN_FILES / "tiny-2.kvq.safetensors"
GEOMETRY = KVGeometry(
    layers=(
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=4, rope=0),
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=4, sliding_window=16),
    ),
    ropes=(RopeSpec(pairs=((0, 2), (1, 3)), inv_freq=(1.0, 0.01)),),
)
SPEC = KVCacheSpec(
    key=QuantSpec(bits=3, variable_bits=True, phase=True, outliers=OutlierSpec(fraction=0.01)),
    value=QuantSpec(bits=2, granularity="token", dynamic=True, rotation=True),
    layers={
        1: LayerSpec(
            key=QuantSpec(bits=3, variable_bits=True, phase=True, feedback=True),
            value=QuantSpec(bits=2, granularity="token", dynamic=True, rotation=True),
        )
    },
)


def tiny() -> KVArtifact:
    """An artifact with one of everything, of numbers that are the same on every machine."""
    layers = []
    for index in range(2):
        widths = torch.tensor([3, 2, 1, 0, 3, 2, 1, 3], dtype=torch.uint8)
        key = QuantParams(
            bits=widths,
            codebook=torch.tensor([[-1, -0.5, -0.25, -0.125, 0, 0.25, 0.5, 1.0]]),
            codebook_index=torch.zeros(8, dtype=torch.int32),
            scale=torch.arange(1, 9) / 8,
            zero_point=torch.arange(8) / 16,
            phase=torch.tensor([[0.5, -0.25], [0.0, 1.0]]) if index == 0 else None,
            feedback=torch.arange(-6, 6).to(torch.int8).view(2, 6) if index == 1 else None,
            feedback_scale=torch.tensor([0.125, 0.25]) if index == 1 else None,
        )
        value = QuantParams.uniform(
            2,
            8,
            torch.tensor([[-1, -0.25, 0.25, 1.0]]),
            rotation=torch.eye(4)[[1, 0, 3, 2]].expand(2, 4, 4).contiguous(),
        )
        layers.append(LayerParams(key, value))
    return KVArtifact(
        SPEC,
        GEOMETRY,
        tuple(layers),
        model={"id": "tiny", "config": {"model_type": "llama", "vocab_size": 7}},
        calibration={"recipe": "none", "seed": 0},
        outliers_per_token={"key": [0.5, 0.25], "value": [0.0, 0.0]},
    )


def same(a: KVArtifact, b: KVArtifact) -> bool:
    return a.to_bytes() == b.to_bytes()


def repacked(change_metadata=None, change_tensors=None, rehash=True) -> bytes:
    """The tiny artifact's file with something changed, and the digest made right again."""
    metadata, tensors = module._parse(tiny().to_bytes(), "tiny")
    if change_metadata:
        change_metadata(metadata)
    if change_tensors:
        change_tensors(tensors)
    if rehash:
        metadata.pop("digest", None)
        metadata["digest"] = module._digest(metadata, tensors)
    return safetensors.torch.save(tensors, {"kvq": json.dumps(metadata)})


def test_round_trip(tmp_path):
    file = tmp_path / "a.kvq.safetensors"
    tiny().save(file)
    loaded = KVArtifact.load(file)
    assert same(loaded, tiny())
    assert loaded.spec == SPEC
    assert loaded.geometry == GEOMETRY
    assert loaded.outliers_per_token == {"key": [0.5, 0.25], "value": [0.0, 0.0]}
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_golden_bytes():
    """The format is pinned: a change that breaks this needs a new format version (docs/format.md)."""
    assert tiny().to_bytes() == GOLDEN.read_bytes()
    assert same(KVArtifact.load(GOLDEN), tiny())


def test_files_of_older_versions_are_read():
    """Version 1 knows no trellis."""
    old = GOLDEN_FILES / "tiny-1.kvq.safetensors"
    assert b'"trellis' not in old.read_bytes()
    assert same(KVArtifact.load(old), tiny())


def test_random_artifacts_round_trip():
    for seed in range(5):
        made = replace(random_artifact(GEOMETRY, SPEC, seed=seed), model={"id": "x", "config": {}})
        assert same(KVArtifact.from_bytes(made.to_bytes()), made)


def test_loading_needs_no_pickle_and_no_model():
    quantizers = KVArtifact.load(GOLDEN).quantizers()
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    for layer in quantizers:
        for quantizer in layer.values():
            assert torch.isfinite(quantizer(x)).all()


def set_tensor(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name].clone())

    return apply


def put(name, index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return set_tensor(name, change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("layers.0.key.scale"), ArtifactTensorError, "layers.0.key.scale is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), ArtifactTensorError, "extra is unknown"),
        (lambda t: t.update({"layers.9.key.bits": torch.zeros(1)}), ArtifactTensorError, "unknown"),
        (set_tensor("layers.1.key.bits", lambda x: x[:-1]), ArtifactTensorError, "not uint8 \\[8\\]"),
        (set_tensor("layers.0.key.scale", lambda x: x.double()), ArtifactTensorError, "not float32"),
        (set_tensor("layers.0.key.codebook", lambda x: x[0]), ArtifactTensorError, "any"),
        (put("layers.0.key.scale", 0, float("nan")), ArtifactValueError, "not finite"),
        (put("layers.0.key.zero_point", 0, float("inf")), ArtifactValueError, "not finite"),
        (put("layers.0.key.scale", 3, 0.0), ArtifactValueError, "must be positive"),
        (put("layers.0.key.codebook", (0, 0), 0.9), ArtifactValueError, "unsorted"),
        (put("layers.0.key.bits", 0, 4), ArtifactValueError, "widths over 3"),
        (lambda t: t.update({"layers.0.value.bits": torch.full((8,), 2)}), ArtifactTensorError, "unknown"),
        (
            set_tensor("layers.0.value.codebook", lambda x: x.repeat(2, 1)),
            ArtifactTensorError,
            "not float32 \\[1, 4\\]",
        ),
        (set_tensor("layers.0.key.codebook", lambda x: x[:, :4]), ArtifactValueError, "4 columns for 8"),
        (put("layers.0.key.codebook_index", 2, 1), ArtifactValueError, "outside the 1 codebooks"),
        (put("layers.0.key.codebook_index", 2, -1), ArtifactValueError, "outside the 1 codebooks"),
        (put("layers.0.key.phase", (0, 0), float("nan")), ArtifactValueError, "not finite"),
        (put("layers.1.key.feedback_scale", 0, -1.0), ArtifactValueError, "must not be negative"),
        (put("layers.0.value.rotation", (0, 0, 0), 0.5), ArtifactValueError, "not orthogonal"),
    ],
)
def test_wrong_tensors_are_named(change, error, message):
    with pytest.raises(error, match=message):
        KVArtifact.from_bytes(repacked(change_tensors=change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update(format_version=3), ArtifactVersionError, "update kvq-calib"),
        (lambda m: m.update(format_version="1"), ArtifactMetadataError, "format_version"),
        (lambda m: m.update(format_version=True), ArtifactMetadataError, "format_version"),
        (lambda m: m["spec"].update(sink_tokens=-1), ArtifactMetadataError, "sink_tokens"),
        (lambda m: m["spec"].update(colour="red"), ArtifactMetadataError, "no such key"),
        (lambda m: m["spec"]["key"].update(bits=99), ArtifactMetadataError, "key.bits"),
        (lambda m: m["spec"].update(layers={"7": {}}), ArtifactMetadataError, "layers"),
        (lambda m: m.update(spec=None), ArtifactMetadataError, "tiny|valid"),
        (lambda m: m["geometry"].update(layers=[]), ArtifactMetadataError, "layers"),
        (lambda m: m.update(surprise=1), ArtifactMetadataError, "unknown metadata 'surprise'"),
        (lambda m: m.update(model=[]), ArtifactMetadataError, "'model'"),
        (lambda m: m["outliers_per_token"].update(key=[0.0]), ArtifactMetadataError, "2 numbers"),
        (lambda m: m["outliers_per_token"].update(key=[-1, 0]), ArtifactMetadataError, "-1"),
        (lambda m: m.pop("outliers_per_token"), ArtifactMetadataError, "outliers_per_token"),
    ],
)
def test_wrong_metadata_is_named(change, error, message):
    with pytest.raises(error, match=message):
        KVArtifact.from_bytes(repacked(change_metadata=change))


@pytest.mark.parametrize("text", ["[]", "{", '{"format_version": NaN}', "[" * 100000])
def test_metadata_that_is_no_json_object(text):
    with pytest.raises(ArtifactMetadataError):
        KVArtifact.from_bytes(safetensors.torch.save({}, {"kvq": text}))


def test_metadata_that_can_be_read_but_not_written_again():
    def with_calibration(text):
        return safetensors.torch.save({}, {"kvq": f'{{"format_version": 1, "calibration": {text}}}'})

    with pytest.raises(ArtifactMetadataError, match="not plain JSON"):
        KVArtifact.from_bytes(with_calibration("1e999"))
    # Around the interpreter's limit, where reading may succeed and writing fail.
    for depth in range(900, 1010, 5):
        with pytest.raises(ArtifactError):
            KVArtifact.from_bytes(with_calibration("[" * depth + "]" * depth))


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(ArtifactFileError, match="No such file"):
        KVArtifact.load(tmp_path / "missing")
    with pytest.raises(ArtifactMetadataError, match="not an artifact of kvq-calib"):
        KVArtifact.from_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    for data in (b"", b"PK\x03\x04", b"\x80\x04\x95", b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little")):
        with pytest.raises(ArtifactFileError, match="not a readable safetensors file"):
            KVArtifact.from_bytes(data)


def test_hostile_headers_are_refused():
    def header(entries):
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + b"\0" * 16

    for entry in (
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 4]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 60]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]},
    ):
        with pytest.raises(ArtifactFileError):
            KVArtifact.from_bytes(header({"layers.0.key.bits": entry}))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(position, bit):
    data = bytearray(tiny().to_bytes())
    data[position % len(data)] ^= 1 << bit
    try:
        loaded = KVArtifact.from_bytes(bytes(data))
    except ArtifactError:
        return
    assert same(loaded, tiny())  # white space and the like may change without a change of content


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_every_truncation_is_refused(length):
    data = tiny().to_bytes()
    with pytest.raises(ArtifactError):
        KVArtifact.from_bytes(data[: length % len(data)])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused(data):
    with pytest.raises(ArtifactError):
        KVArtifact.from_bytes(data)


def test_an_edit_without_the_digest_is_noticed():
    with pytest.raises(ArtifactDigestError, match="damaged"):
        KVArtifact.from_bytes(repacked(change_tensors=put("layers.0.key.scale", 0, 9.0), rehash=False))


def test_an_illegal_artifact_cannot_be_written(tmp_path):
    broken = tiny()
    broken.layers[0].key.codebook[0, 0] = 5.0
    with pytest.raises(ArtifactValueError, match="unsorted"):
        broken.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_channels_with_widths_of_their_own_need_variable_bits():
    made = tiny()
    mixed = replace(made.layers[0].value, bits=torch.tensor([2, 2, 2, 2, 2, 2, 2, 1], dtype=torch.uint8))
    layers = (replace(made.layers[0], value=mixed), made.layers[1])
    with pytest.raises(ArtifactValueError, match="needs variable_bits"):
        replace(made, layers=layers).to_bytes()


def test_what_is_the_same_for_all_channels_is_held_once():
    loaded = KVArtifact.load(GOLDEN)
    assert loaded.layers[0].value.held_bytes == 1 + 4 + 4 * 4 + 2 * 16 * 4
    assert loaded.layers[0].key.held_bytes == 8 + 8 * 4 + 8 * 4 + 2 * 8 * 4 + 4 * 4
    assert loaded.layers[0].value.to("cpu").held_bytes == loaded.layers[0].value.held_bytes


def test_another_model_is_refused_by_the_field_that_differs():
    tiny().check_model({"model_type": "llama", "vocab_size": 7})
    with pytest.raises(ArtifactModelError, match="vocab_size = 7, this model has 8"):
        tiny().check_model({"model_type": "llama", "vocab_size": 8})
    with pytest.raises(ArtifactModelError, match="rope = None"):
        tiny().check_model({"model_type": "llama", "vocab_size": 7, "rope": 1})


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.kvq.safetensors"
    file.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvq_calib.files.os.fsync", full)
    with pytest.raises(WriteError, match="No space left on device"):
        tiny().save(file)
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    with pytest.raises(KVQError, match="No such file"):
        tiny().save(tmp_path / "missing" / "a")


def test_bits_per_element_count_everything():
    made = tiny()
    assert made.elements(100, batch=3) == 2 * 2 * 8 * 100 * 3
    total = sum(made.storage(4096).values())
    assert made.bits_per_element(4096) == pytest.approx(8 * total / made.elements(4096))
    codes = 2 * (15 + 16) * 4096 / 8  # 15 bits of keys and 16 of values a token and layer
    assert made.storage(4096)["codes"] <= codes
    more = made.bits_per_element(4096, outliers_per_token={"key": [1.5, 1.25], "value": [0.0, 0.0]})
    assert more > made.bits_per_element(4096)
