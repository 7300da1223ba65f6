"""The artifact: the same bytes for the same content, golden bytes, and a named refusal for every damage."""

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from artifact_factory import RECIPES, random_artifact, with_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_artifacts import GEOMETRY, SCALAR, TINY, TRELLIS, golden_file, tiny_scalar, tiny_trellis

from kvq_calib.artifact import artifact as module
from kvq_calib.artifact import sealed
from kvq_calib.artifact.artifact import FORMAT_VERSION, KVArtifact
from kvq_calib.artifact.errors import (
    ArtifactDigestError,
    ArtifactError,
    ArtifactFileError,
    ArtifactMetadataError,
    ArtifactModelError,
    ArtifactTensorError,
    ArtifactValueError,
    ArtifactVersionError,
)
from kvq_calib.codec.scalar import ScalarParams
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.errors import KVQError
from kvq_calib.files import WriteError
from kvq_calib.schema.geometry import KINDS, KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import ErrorCompensationSpec, KVCacheSpec, OutlierSpec, ScalarSpec, TrellisSpec

both = pytest.mark.parametrize("codec", TINY)


EVEN = GEOMETRY.model_copy(update={"layers": (GEOMETRY.layers[0],) * 2})


def same(a: KVArtifact, b: KVArtifact) -> bool:
    return a.to_bytes() == b.to_bytes()


def repacked(artifact, change_metadata=None, change_tensors=None, rehash=True) -> bytes:
    """The artifact's file with something changed, and the digest made right again."""
    metadata, tensors = sealed.unseal(artifact.to_bytes(), "kvq")
    stated = sealed.digest(metadata, tensors)
    if change_metadata:
        change_metadata(metadata)
    if change_tensors:
        change_tensors(tensors)
    metadata["digest"] = sealed.digest(metadata, tensors) if rehash else stated
    return safetensors.torch.save(tensors, {"kvq": json.dumps(metadata)})


def set_tensor(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name].clone())

    return apply


def put(name, index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return set_tensor(name, change)


def drop(name):
    return lambda tensors: tensors.pop(name)


def refused(error, message, artifact, **changes):
    """The message, of one line, with which a changed file is refused."""
    with pytest.raises(error, match=message) as caught:
        KVArtifact.from_bytes(repacked(artifact, **changes))
    assert "\n" not in str(caught.value)


@both
def test_round_trip(tmp_path, codec):
    file, made = tmp_path / "a.kvq.safetensors", TINY[codec]()
    made.save(file)
    loaded = KVArtifact.load(file)
    assert same(loaded, made)
    assert loaded.spec == {"scalar": SCALAR, "trellis": TRELLIS}[codec]
    assert loaded.geometry == GEOMETRY
    assert loaded.outliers_per_token == made.outliers_per_token
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@both
def test_golden_bytes(codec):
    """The format is pinned: a change that breaks this needs a new format version (docs/reference/format.md)."""
    assert TINY[codec]().to_bytes() == golden_file(codec).read_bytes()
    assert same(KVArtifact.load(golden_file(codec)), TINY[codec]())


def test_the_page_on_the_format_names_every_key_and_tensor():
    text = (Path(__file__).parent.parent / "docs" / "reference" / "format.md").read_text(encoding="utf-8")
    assert text.startswith(f"# The artifact format, version {FORMAT_VERSION}\n")
    declared = (
        *(KVCacheSpec, ScalarSpec, OutlierSpec, TrellisSpec, ErrorCompensationSpec),
        *(KVGeometry, LayerGeometry, RopeSpec),
    )
    names = {name for model in declared for name in model.model_fields}
    names |= {field.name for params in (ScalarParams, TrellisParams) for field in fields(params)}
    names |= sealed.unseal(tiny_scalar().to_bytes(), "kvq").metadata.keys() | {"digest"}
    names.remove("coefficients")  # only during fitting and training
    assert not [name for name in sorted(names) if f"`{name}`" not in text]


@both
@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_a_file_of_an_earlier_format_is_refused_in_one_line_that_says_what_to_do(codec, version):
    message = f"format version {version} of an earlier kvq-calib, .*calibrate the model again"
    refused(
        ArtifactVersionError,
        message,
        TINY[codec](),
        change_metadata=lambda m: m.update(format_version=version),
    )


@pytest.mark.parametrize("name", RECIPES)
def test_random_artifacts_round_trip(name):
    for seed in range(3):
        made = random_artifact(GEOMETRY, RECIPES[name], seed=seed, model={"id": "x", "config": {}})
        assert same(KVArtifact.from_bytes(made.to_bytes()), made)


@both
def test_loading_needs_no_pickle_and_no_model(codec):
    artifact = KVArtifact.load(golden_file(codec))
    for number, layer in enumerate(artifact.quantizers()):
        for kind, quantizer in layer.items():
            heads, size = GEOMETRY.layers[number].shape(kind)
            x = torch.randn(1, heads, 5, size, generator=torch.Generator().manual_seed(0))
            assert quantizer(x).shape == x.shape
            assert torch.isfinite(quantizer(x)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (drop("layers.0.key.scale"), ArtifactTensorError, "layers.0.key.scale is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), ArtifactTensorError, "extra is unknown"),
        (lambda t: t.update({"layers.9.key.scale": torch.zeros(1)}), ArtifactTensorError, "unknown"),
        (
            lambda t: t.update({"layers.0.value.scale": torch.ones(8)}),
            ArtifactTensorError,
            "layers.0.value.scale is unknown",
        ),
        (
            lambda t: t.update({"layers.0.key.bits": torch.full((8,), 3, dtype=torch.uint8)}),
            ArtifactTensorError,
            "layers.0.key.bits is unknown",
        ),
        (
            set_tensor("layers.0.key.scale", lambda x: x.half()),
            ArtifactTensorError,
            "is float16 \\[8\\], not float32 \\[8\\]",
        ),
        (
            set_tensor("layers.1.value.scale", lambda x: x[:8].clone()),
            ArtifactTensorError,
            "float32 \\[8\\], not float32 \\[12\\]",
        ),
        (
            set_tensor("layers.0.value.codebook", lambda x: x.repeat(2, 1)),
            ArtifactTensorError,
            "not float32 \\[1, 4\\]",
        ),
        (set_tensor("layers.0.key.codebook", lambda x: x[0].clone()), ArtifactTensorError, "\\[1, 8\\]"),
        (put("layers.0.key.scale", 0, float("nan")), ArtifactValueError, "not finite"),
        (put("layers.1.key.zero_point", 0, float("inf")), ArtifactValueError, "not finite"),
        (put("layers.0.value.codebook", (0, 3), float("inf")), ArtifactValueError, "not finite"),
        (put("layers.0.key.scale", 3, 0.0), ArtifactValueError, "layers.0.key.scale must be positive"),
        (put("layers.0.key.codebook", (0, 3), 0.9), ArtifactValueError, "key.codebook has unsorted levels"),
    ],
)
def test_wrong_tensors_of_the_scalar_codec_are_named(change, error, message):
    refused(error, message, tiny_scalar(), change_tensors=change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (drop("layers.0.key.bits"), ArtifactTensorError, "layers.0.key.bits is missing"),
        (drop("layers.0.value.compensation_scale"), ArtifactTensorError, "is missing"),
        (drop("layers.0.key.pair_angle"), ArtifactTensorError, "is missing"),
        (drop("layers.1.key.token_size_unit"), ArtifactTensorError, "is missing"),
        (
            lambda t: t.update({"layers.1.key.pair_angle": t["layers.0.key.pair_angle"].clone()}),
            ArtifactTensorError,
            "layers.1.key.pair_angle is unknown",  # that layer has no rotary embedding
        ),
        (set_tensor("layers.1.key.bits", lambda x: x[:-1].clone()), ArtifactTensorError, "not uint8 \\[8\\]"),
        (
            set_tensor("layers.0.key.level_offset", lambda x: x.double()),
            ArtifactTensorError,
            "not float16 or float32",
        ),
        (set_tensor("layers.0.key.level_shape", lambda x: x[None]), ArtifactTensorError, "\\['any'\\]"),
        (set_tensor("layers.0.key.pair_angle", lambda x: x.float()), ArtifactTensorError, "not float16"),
        (
            set_tensor("layers.1.key.compensation", lambda x: x[:, 1:].contiguous()),
            ArtifactTensorError,
            "not int8 \\[2, 4\\]",
        ),
        (
            set_tensor("layers.1.value.compensation", lambda x: x[:, :6].contiguous()),
            ArtifactTensorError,
            "not int8 \\[2, 15\\]",
        ),
        (
            set_tensor("layers.1.key.token_weight", lambda x: x[:, 1:].contiguous()),
            ArtifactTensorError,
            "not float16 \\[2, 32\\]",
        ),
        (put("layers.0.key.level_offset", 0, float("nan")), ArtifactValueError, "not finite"),
        (put("layers.0.key.level_scale", 5, float("inf")), ArtifactValueError, "not finite"),
        (put("layers.0.key.pair_angle", (0, 0), float("nan")), ArtifactValueError, "not finite"),
        (put("layers.1.key.error_weight", (0, 1), float("inf")), ArtifactValueError, "not finite"),
        (put("layers.1.key.token_size_unit", 1, 0.0), ArtifactValueError, "must be positive"),
        (put("layers.0.key.level_scale", 1, -1.0), ArtifactValueError, "must not be negative"),
        (put("layers.0.key.level_shape", 0, -100), ArtifactValueError, "gives levels that fall"),
        (
            set_tensor("layers.0.key.level_shape", lambda x: torch.full_like(x, 120)),
            ArtifactValueError,
            "sum to over 128",
        ),
        (put("layers.0.key.bits", 0, 4), ArtifactValueError, "bits has widths over 3"),
        (put("layers.0.key.bits", 3, 1), ArtifactValueError, "has 14 numbers, its channels need 16"),
        (
            set_tensor("layers.0.key.level_shape", lambda x: x[1:].clone()),
            ArtifactValueError,
            "has 13 numbers, its channels need 14",
        ),
        (
            set_tensor("layers.0.key.level_scale", lambda x: x.float() * 3e38),
            ArtifactValueError,
            "not finite",
        ),
        (put("layers.0.value.compensation_scale", 0, -1.0), ArtifactValueError, "must not be negative"),
        (put("layers.1.key.error_weight", (0, 1), -1.0), ArtifactValueError, "must not be negative"),
        (put("layers.1.key.token_weight", (1, 5), -0.5), ArtifactValueError, "must not be negative"),
        (put("layers.1.key.error_weight", (0, 1), 0.0), ArtifactValueError, "must be positive with a rank"),
        (put("layers.1.key.compensation", (1, 0), 4), ArtifactValueError, "nothing of its own"),
    ],
)
def test_wrong_tensors_of_the_trellis_codec_are_named(change, error, message):
    refused(error, message, tiny_trellis(), change_tensors=change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update(format_version=FORMAT_VERSION + 1), ArtifactVersionError, "update kvq-calib"),
        (lambda m: m.update(format_version="1"), ArtifactMetadataError, "format_version"),
        (lambda m: m.update(format_version=True), ArtifactMetadataError, "format_version"),
        (lambda m: m.update(format_version=0), ArtifactMetadataError, "not a positive number"),
        (lambda m: m["spec"].update(sink_tokens=-1), ArtifactMetadataError, "sink_tokens"),
        (lambda m: m["spec"].update(colour="red"), ArtifactMetadataError, "no such key"),
        (lambda m: m["spec"]["key"].update(bits=99), ArtifactMetadataError, "key.bits"),
        (lambda m: m["spec"]["key"].update(phase=True), ArtifactMetadataError, "no such key any more"),
        (
            lambda m: m["spec"]["key"].update(codec="magic"),
            ArtifactMetadataError,
            "key: unknown codec 'magic'; use one of scalar, trellis",
        ),
        (lambda m: m["spec"]["key"].update(codec="trellis"), ArtifactMetadataError, "key.max_bits"),
        (lambda m: m["spec"].update(layers={"7": {}}), ArtifactMetadataError, "layers"),
        (
            lambda m: m["spec"]["layers"].update({"7": m["spec"]["layers"]["1"]}),
            ArtifactMetadataError,
            "layer override 7: the model has 2 layers",
        ),
        (lambda m: m.update(spec=None), ArtifactMetadataError, "valid"),
        (lambda m: m["geometry"].update(layers=[]), ArtifactMetadataError, "layers"),
        (
            lambda m: m["geometry"]["layers"][0].update(value_head_dim=0),
            ArtifactMetadataError,
            "layers.0.value_head_dim",
        ),
        (
            lambda m: m["geometry"]["layers"][1].update(value_head_dim=None),
            ArtifactTensorError,
            "layers.1.value.scale is float32 \\[12\\], not float32 \\[8\\]",
        ),
        (lambda m: m.update(surprise=1), ArtifactMetadataError, "unknown metadata 'surprise'"),
        (lambda m: m.update(model=[]), ArtifactMetadataError, "'model'"),
        (lambda m: m["outliers_per_token"].update(key=[0.0]), ArtifactMetadataError, "2 numbers"),
        (lambda m: m["outliers_per_token"].update(key=[-1, 0]), ArtifactMetadataError, "-1"),
        (lambda m: m["outliers_per_token"].update(key=[True, 0]), ArtifactMetadataError, "True"),
        (lambda m: m.pop("outliers_per_token"), ArtifactMetadataError, "outliers_per_token"),
    ],
)
def test_wrong_metadata_is_named(change, error, message):
    refused(error, message, tiny_scalar(), change_metadata=change)


@pytest.mark.parametrize("text", ["[]", "{", '{"format_version": NaN}', "[" * 100000])
def test_metadata_that_is_no_json_object(text):
    with pytest.raises(ArtifactMetadataError):
        KVArtifact.from_bytes(safetensors.torch.save({}, {"kvq": text}))


def test_metadata_that_can_be_read_but_not_written_again():
    def with_calibration(text):
        content = f'{{"format_version": {FORMAT_VERSION}, "calibration": {text}}}'
        return safetensors.torch.save({}, {"kvq": content})

    with pytest.raises(ArtifactMetadataError, match="not plain JSON"):
        KVArtifact.from_bytes(with_calibration("1e999"))
    # Around the interpreter's limit, where reading may succeed and writing fail.
    for depth in range(900, 1010, 5):
        with pytest.raises(ArtifactError):
            KVArtifact.from_bytes(with_calibration("[" * depth + "]" * depth))


def test_files_that_are_something_else(tmp_path, monkeypatch):
    with pytest.raises(ArtifactFileError, match="No such file"):
        KVArtifact.load(tmp_path / "missing")
    with pytest.raises(ArtifactMetadataError, match="not an artifact of kvq-calib"):
        KVArtifact.from_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    for data in (b"", b"PK\x03\x04", b"\x80\x04\x95", b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little")):
        with pytest.raises(ArtifactFileError, match="not a readable safetensors file"):
            KVArtifact.from_bytes(data)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 2000)
    with pytest.raises(ArtifactFileError, match="too large to be an artifact"):
        KVArtifact.load(golden_file("scalar"))


@pytest.mark.parametrize(
    ("tensor", "shown"),
    [
        (torch.tensor(1.0), r"float32 \[\]"),
        (torch.tensor(True), r"bool \[\]"),
        (torch.zeros(0, 3), r"float32 \[0, 3\]"),
        (torch.zeros(1, 8), r"float32 \[1, 8\]"),
    ],
)
def test_a_tensor_of_any_shape_has_a_digest_and_is_named(tensor, shown):
    name = "layers.0.key.bits"
    refused(
        ArtifactTensorError,
        f"{name} is {shown}, not",
        tiny_trellis(),
        change_tensors=lambda t: t.update({name: tensor}),
    )
    unknown = ArtifactTensorError, "tensor more is unknown", tiny_trellis()
    refused(*unknown, change_tensors=lambda t: t.update({"more": tensor}))


def test_the_digest_is_that_of_the_page_on_the_format():
    metadata = {"b": [1, 0.5], "a": "\u00e9"}
    tensors = {
        "x": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T,
        "f": torch.tensor(1.5),
        "none": torch.zeros(0, 2),
    }
    text = '{"a":"\\u00e9","b":[1,0.5]}'
    text += "\nf torch.float32 []\n\0\0\xc0\x3f\nnone torch.float32 [0, 2]\n\nx torch.uint8 [2, 2]\n\1\3\2\4"
    want = hashlib.sha256(text.encode("latin1")).hexdigest()
    assert sealed.digest(metadata, tensors) == want
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = sealed.seal("any", metadata, plain)
    found, again = sealed.unseal(data, "any")
    assert found == metadata
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    with pytest.raises(sealed.SealError, match="no entry 'other'") as caught:
        sealed.unseal(data, "other")
    assert caught.value.fault == "kind"
    with pytest.raises(sealed.SealError, match="does not match its digest") as caught:
        sealed.unseal(data.replace(b"\0\0\xc0\x3f", b"\0\0\xc1\x3f"), "any")
    assert caught.value.fault == "digest"


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
@given(st.sampled_from(sorted(TINY)), st.integers(0, 10**9), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(codec, position, bit):
    made = TINY[codec]()
    data = bytearray(made.to_bytes())
    data[position % len(data)] ^= 1 << bit
    try:
        loaded = KVArtifact.from_bytes(bytes(data))
    except ArtifactError:
        return
    assert same(loaded, made)  # white space and the like may change without a change of content


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_every_truncation_is_refused(length):
    data = tiny_trellis().to_bytes()
    with pytest.raises(ArtifactError):
        KVArtifact.from_bytes(data[: length % len(data)])


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused(data):
    with pytest.raises(ArtifactError):
        KVArtifact.from_bytes(data)


def test_an_edit_without_the_digest_is_noticed():
    change = put("layers.0.key.scale", 0, 9.0)
    refused(ArtifactDigestError, "damaged", tiny_scalar(), change_tensors=change, rehash=False)


def test_an_illegal_artifact_cannot_be_written(tmp_path):
    broken = tiny_trellis()
    broken.layers[0].key.level_scale[1] = -5.0
    with pytest.raises(ArtifactValueError, match="level_scale must not be negative"):
        broken.save(tmp_path / "a")
    with pytest.raises(ArtifactTensorError, match=r"layers\.0\.value\.scale is unknown"):
        with_tensors(tiny_scalar(), 0, "value", scale=torch.ones(8)).save(tmp_path / "a")
    with pytest.raises(ArtifactTensorError, match=r"layers\.0\.key\.scale is missing"):
        with_tensors(tiny_scalar(), 0, "key", scale=None).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_held_is_what_the_file_has():
    scalar, trellis = (KVArtifact.load(golden_file(codec)).layers for codec in ("scalar", "trellis"))
    assert scalar[0].value.held_bytes == 4 * 4
    assert scalar[1].value.held_bytes == 2 * 4 + 2 * 12 * 4
    assert trellis[0].key.held_bytes == 8 + 2 * 8 * 2 + 14 + 4 * 2 + 2 * 2
    assert trellis[0].key.to("cpu").held_bytes == trellis[0].key.held_bytes
    for spec in RECIPES.values():
        artifact = random_artifact(GEOMETRY, spec)
        _, tensors = sealed.unseal(artifact.to_bytes(), "kvq")
        for number, layer in enumerate(artifact.layers):
            for kind in KINDS:
                own = [t for key, t in tensors.items() if key.startswith(f"layers.{number}.{kind}.")]
                assert layer.of(kind).held_bytes == sum(t.nbytes for t in own)


def test_another_model_is_refused_by_the_field_that_differs():
    made = tiny_scalar()
    made.check_model({"model_type": "llama", "vocab_size": 7})
    with pytest.raises(ArtifactModelError, match="vocab_size = 7, this model has 8"):
        made.check_model({"model_type": "llama", "vocab_size": 8})
    with pytest.raises(ArtifactModelError, match="rope = None"):
        made.check_model({"model_type": "llama", "vocab_size": 7, "rope": 1})


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.kvq.safetensors"
    file.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvq_calib.files.os.fsync", full)
    with pytest.raises(WriteError, match="No space left on device"):
        tiny_scalar().save(file)
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    with pytest.raises(KVQError, match="No such file"):
        tiny_scalar().save(tmp_path / "missing" / "a")


def test_bits_per_element_count_everything():
    made = replace(tiny_trellis(), spec=TRELLIS.model_copy(update={"sink_tokens": 1, "recent_tokens": 0}))
    assert made.elements(10, batch=3) == (2 * 8 + 8 + 12) * 10 * 3
    # A window of 16 in the second layer, whose values have 12 channels.
    assert made.elements(100, batch=3) == (2 * 8 * 100 + (8 + 12) * 16) * 3
    sizes = made.storage(4096)
    assert made.bits_per_element(4096) == pytest.approx(8 * sum(sizes.values()) / made.elements(4096))
    # 15 bits of keys a token and layer; 10 and 14 of values; one page of a window.
    assert sizes["codes"] == ((15 + 10) * 4096 + (15 + 14) * 256) / 8
    assert sizes["exact_sinks"] == 2 * (8 + 8 + 8 + 12)
    assert sizes["parameters"] == sum(layer.of(kind).held_bytes for layer in made.layers for kind in KINDS)
    assert "outlier_entries" not in sizes


def test_measured_outliers_take_the_place_of_those_of_calibration():
    made = tiny_scalar()
    layers = (made.layers[0], made.layers[0])
    one_kind = replace(made, spec=SCALAR.model_copy(update={"layers": {}}), layers=layers, geometry=EVEN)
    # Two bytes of an index and two of a residual, of a half, a quarter, and two outliers a token.
    assert one_kind.storage(4096)["outlier_entries"] == 4 * (0.5 + 0.25 + 2.0) * 4096
    measured = {"key": [1.5, 1.25], "value": [0.0, 0.0]}
    assert one_kind.storage(4096, outliers_per_token=measured)["outlier_entries"] == 4 * 2.75 * 4096
    more = one_kind.bits_per_element(4096, outliers_per_token={**measured, "key": [2.5, 1.25]})
    assert more > one_kind.bits_per_element(4096)
