"""The artifact: the same bytes for the same content, golden bytes, and a named refusal for every damage."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from artifact_factory import RECIPES, random_artifact
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.artifact import artifact as module
from kvq_calib.artifact.artifact import (
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
from kvq_calib.artifact.shard import shard
from kvq_calib.codec.quantizer import Quantizer, QuantParams, codebook_table, pack_codebooks
from kvq_calib.errors import KVQError
from kvq_calib.files import WriteError
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KINDS, KVCacheSpec, LayerSpec, OutlierSpec, QuantSpec

GOLDEN_FILES = Path(__file__).parent / "golden"
#: Of the present version.
GOLDEN = GOLDEN_FILES / "tiny-6.kvq.safetensors"
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
LEVELS = [-1, -0.5, -0.25, -0.125, 0, 0.25, 0.5, 1.0]
#: By width. Versions before 3 let channels of all widths share one row.
ROWS = [LEVELS[: 1 << width] for width in range(4)]


def tiny() -> KVArtifact:
    """An artifact with one of everything, of numbers that are the same on every machine."""
    layers = []
    for index in range(2):
        widths = torch.tensor([3, 2, 1, 0, 3, 2, 1, 3], dtype=torch.uint8)
        key = QuantParams(
            bits=widths,
            codebook=torch.tensor([level for row in ROWS for level in row]).half(),
            codebook_index=widths.clone(),
            scale=(torch.arange(1, 9) / 8).half(),
            zero_point=(torch.arange(8) / 16).half(),
            phase=torch.tensor([[0.5, -0.25], [0.0, 1.0]]).half() if index == 0 else None,
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


def newest(rank: int = 1) -> KVArtifact:
    """The same with what only the present version has, in its second layer; without a rank, what version 5 brought."""
    artifact = tiny()
    key = QuantSpec(
        bits=3,
        variable_bits=True,
        phase=True,
        feedback=True,
        feedback_rank=rank,
        sweeps=1,
        trellis=True,
        importance=True,
    )
    layer = SPEC.layers[1].model_copy(update={"key": key})
    rows = [[0.0], *([place / 8 - 1 for place in range(2 << width)] for width in (1, 2, 3))]
    params = replace(
        artifact.layers[1].key,
        codebook=torch.tensor([level for row in rows for level in row]).half(),
        **({"feedback": torch.arange(-4, 4).to(torch.int8).view(2, 4)} if rank else {}),
        feedback_weight=torch.tensor(
            [[1.0, 0.5, 0.25, 0.125], [0.75 if rank else 0.0, 1.0, 1.0, 0.5]]
        ).half(),
        importance=(torch.arange(64) / 16).half().view(2, 32),
        importance_unit=torch.tensor([4.0, 0.5]),
    )
    layers = (artifact.layers[0], LayerParams(params, artifact.layers[1].value))
    return replace(artifact, spec=SPEC.model_copy(update={"layers": {1: layer}}), layers=layers)


def same(a: KVArtifact, b: KVArtifact) -> bool:
    return a.to_bytes() == b.to_bytes()


def repacked(change_metadata=None, change_tensors=None, rehash=True, file=None) -> bytes:
    """The tiny artifact's file, or another, with something changed, and the digest made right again."""
    metadata, tensors = module._parse(tiny().to_bytes() if file is None else file, "tiny")
    if change_metadata:
        change_metadata(metadata)
    if change_tensors:
        change_tensors(tensors)
    if rehash:
        metadata.pop("digest", None)
        metadata["digest"] = module._digest(metadata, tensors)
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


def as_read_from(version: int, artifact: KVArtifact) -> KVArtifact:
    """The artifact with the numbers in float32 that an older version held so."""
    names = {
        1: ("phase", "scale", "zero_point"),
        2: ("phase", "scale", "zero_point"),
        3: ("scale", "zero_point"),
        4: (),
    }

    def wide(params: QuantParams) -> QuantParams:
        found = params.tensors()
        return replace(params, **{name: found[name].float() for name in names[version] if name in found})

    layers = tuple(LayerParams(wide(layer.key), wide(layer.value)) for layer in artifact.layers)
    return replace(artifact, layers=layers)


def as_version_2(artifact: KVArtifact, change=None) -> bytes:
    """The file that version 2 had for an artifact: rows padded, in float32; indices int32."""
    quantizers = artifact.quantizers()

    def tensors(found):
        for name in list(found):
            _, layer, kind, what = name.split(".")
            quantizer = quantizers[int(layer)][kind]
            if what == "codebook" and quantizer.spec.variable_bits:
                found[name] = quantizer.table.contiguous()
            elif what == "codebook_index":
                found[name] = found[name].to(torch.int32)
            elif what in ("phase", "scale", "zero_point"):
                found[name] = found[name].float()
        if change:
            change(found)

    return repacked(lambda m: m.update(format_version=2), tensors, file=artifact.to_bytes())


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
    assert newest().to_bytes() == GOLDEN.read_bytes()
    assert same(KVArtifact.load(GOLDEN), newest())


def test_a_file_of_version_5_knows_no_rank_of_feedback():
    old = GOLDEN_FILES / "tiny-5.kvq.safetensors"
    assert b"feedback_rank" not in old.read_bytes()
    loaded = KVArtifact.load(old)
    assert same(loaded, newest(rank=0))
    assert loaded.older_sha256 is not None
    x = torch.randn(1, 2, 40, 4, generator=torch.Generator().manual_seed(0))
    for before, now in zip(loaded.quantizers(), newest(rank=0).quantizers(), strict=True):
        for kind in KINDS:
            assert torch.equal(before[kind](x), now[kind](x))


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_files_of_older_versions_are_read(version):
    """Version 1 knows no trellis, version 2 no compact codebooks, version 3 no thresholds in float16, version 4 no sweeps and no
    importance."""
    old = GOLDEN_FILES / f"tiny-{version}.kvq.safetensors"
    assert (b'"trellis' in old.read_bytes()) == (version > 1)
    loaded = KVArtifact.load(old)
    assert same(loaded, as_read_from(version, tiny()))
    assert same(KVArtifact.from_bytes(loaded.to_bytes()), loaded)
    x = torch.randn(1, 2, 40, 4, generator=torch.Generator().manual_seed(0))
    tensors = safetensors.torch.load_file(old)
    for number, (layer, now) in enumerate(zip(loaded.quantizers(), tiny().quantizers(), strict=True)):
        for kind in KINDS:
            assert torch.equal(layer[kind](x), now[kind](x))
        # The single row of all widths, as the file has it.
        params = replace(
            loaded.layers[number].key,
            codebook=tensors[f"layers.{number}.key.codebook"],
            codebook_index=tensors[f"layers.{number}.key.codebook_index"],
        )
        quantizer = layer["key"]
        as_before = Quantizer(quantizer.spec, params, quantizer.geometry, quantizer.rope)
        codes = quantizer.quantize(x).codes
        assert codes.unique().numel() > 4
        assert torch.equal(as_before.quantize(x).codes, codes)
        assert torch.equal(as_before(x), quantizer(x))


@pytest.mark.parametrize("name", ["mixed-phase-rotation", "feedback", "trellis", "nuq4-1p"])
def test_a_file_of_version_2_reads_as_a_new_one(name):
    artifact = random_artifact(GEOMETRY, RECIPES[name], codebooks=2 if "mixed" in name else 1)
    old = as_version_2(artifact)
    loaded = KVArtifact.from_bytes(old)
    assert same(loaded, as_read_from(2, artifact))
    x = torch.randn(2, 2, 40, 4, generator=torch.Generator().manual_seed(0))
    for before, now in zip(loaded.quantizers(), artifact.quantizers(), strict=True):
        for kind in KINDS:
            one, other = before[kind].quantize(x), now[kind].quantize(x)
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(before[kind].dequantize(one), now[kind].dequantize(other))
            padded = replace(before[kind].params, codebook=before[kind].table)  # as version 2 held it
            quantizer = Quantizer(before[kind].spec, padded, before[kind].geometry, before[kind].rope)
            assert torch.equal(quantizer(x), now[kind](x))


def test_phases_of_version_2_stay_as_they_are():
    angle = torch.tensor([[0.3, -1.1], [2.0, 0.7]])  # no float16 numbers
    loaded = KVArtifact.from_bytes(as_version_2(tiny(), set_tensor("layers.0.key.phase", lambda _: angle)))
    again = KVArtifact.from_bytes(loaded.to_bytes())
    for artifact in (loaded, again):
        assert artifact.layers[0].key.phase.dtype == torch.float32
        assert torch.equal(artifact.layers[0].key.phase, angle)


def test_an_artifact_remembers_the_older_file_that_saved_caches_name():
    old = as_version_2(tiny())
    loaded = KVArtifact.from_bytes(old)
    assert loaded.older_sha256 == hashlib.sha256(old).hexdigest()
    assert KVArtifact.load(GOLDEN).older_sha256 is None
    assert shard(loaded, 0, 2).older_sha256 is None  # another artifact


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            put("layers.0.key.codebook", (3, 0), -0.9999),
            ArtifactValueError,
            "no float16 numbers; calibrate again",
        ),
        (put("layers.0.key.codebook", (0, 0), float("nan")), ArtifactValueError, "not finite"),
        (put("layers.0.key.codebook", (3, 0), 0.9), ArtifactValueError, "unsorted"),
        (put("layers.0.key.codebook_index", 2, 4), ArtifactValueError, "outside the 4 codebooks"),
        (put("layers.0.key.codebook_index", 2, -1), ArtifactValueError, "outside the 4 codebooks"),
        (put("layers.0.key.bits", 0, 4), ArtifactValueError, "widths over 3"),
        (
            set_tensor("layers.0.key.codebook", lambda x: x[:, :4].contiguous()),
            ArtifactValueError,
            "4 columns for 8",
        ),
        (
            set_tensor("layers.0.key.codebook", lambda x: x[0]),
            ArtifactTensorError,
            "not float32 \\['any', 'any'\\]",
        ),
        (set_tensor("layers.0.key.codebook", lambda x: x.half()), ArtifactTensorError, "not float32"),
        (
            set_tensor("layers.0.key.codebook_index", lambda x: x.to(torch.uint8)),
            ArtifactTensorError,
            "not int32",
        ),
        (lambda t: t.pop("layers.0.key.bits"), ArtifactTensorError, "bits is missing"),
    ],
)
def test_wrong_tensors_of_version_2_are_named(change, error, message):
    with pytest.raises(error, match=message):
        KVArtifact.from_bytes(as_version_2(tiny(), change))


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("layers.0.key.scale"), ArtifactTensorError, "layers.0.key.scale is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), ArtifactTensorError, "extra is unknown"),
        (lambda t: t.update({"layers.9.key.bits": torch.zeros(1)}), ArtifactTensorError, "unknown"),
        (set_tensor("layers.1.key.bits", lambda x: x[:-1]), ArtifactTensorError, "not uint8 \\[8\\]"),
        (
            set_tensor("layers.0.key.scale", lambda x: x.double()),
            ArtifactTensorError,
            "not float16 or float32",
        ),
        (set_tensor("layers.0.key.codebook", lambda x: x[None]), ArtifactTensorError, "any"),
        (set_tensor("layers.0.key.codebook", lambda x: x.float()), ArtifactTensorError, "not float16"),
        (
            set_tensor("layers.0.key.codebook_index", lambda x: x.to(torch.int32)),
            ArtifactTensorError,
            "not uint8",
        ),
        (set_tensor("layers.0.key.phase", lambda x: x.double()), ArtifactTensorError, "float16 or float32"),
        (put("layers.0.key.scale", 0, float("nan")), ArtifactValueError, "not finite"),
        (put("layers.0.key.zero_point", 0, float("inf")), ArtifactValueError, "not finite"),
        (put("layers.0.key.scale", 3, 0.0), ArtifactValueError, "must be positive"),
        (put("layers.0.key.codebook", 3, 0.9), ArtifactValueError, "unsorted"),
        (put("layers.0.key.codebook", 0, float("inf")), ArtifactValueError, "not finite"),
        (put("layers.0.key.bits", 0, 4), ArtifactValueError, "widths over 3"),
        (lambda t: t.update({"layers.0.value.bits": torch.full((8,), 2)}), ArtifactTensorError, "unknown"),
        (
            set_tensor("layers.0.value.codebook", lambda x: x.repeat(2, 1)),
            ArtifactTensorError,
            "not float32 \\[1, 4\\]",
        ),
        (set_tensor("layers.0.key.codebook", lambda x: x[1:]), ArtifactValueError, "14 levels, .* need 15"),
        (
            set_tensor("layers.0.key.codebook", lambda x: torch.cat((x, x[-1:]))),
            ArtifactValueError,
            "16 levels, .* need 15",
        ),
        (put("layers.0.key.codebook_index", 3, 4), ArtifactValueError, "codebook 0 to no channel"),
        (put("layers.0.key.codebook_index", 0, 255), ArtifactValueError, "codebook 4 to no channel"),
        (
            put("layers.0.key.codebook_index", 0, 2),
            ArtifactValueError,
            "codebook 2 to channels of 3 and of 2 bits",
        ),
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
        (put("layers.1.key.feedback_weight", (0, 1), -1.0), ArtifactValueError, "must not be negative"),
        (put("layers.1.key.feedback_weight", (0, 1), float("inf")), ArtifactValueError, "not finite"),
        (put("layers.1.key.feedback_weight", (0, 1), 0.0), ArtifactValueError, "must be positive"),
        (put("layers.1.key.feedback", (1, 0), 4), ArtifactValueError, "nothing of its own"),
        (
            set_tensor("layers.1.key.feedback", lambda x: x[:, 1:].contiguous()),
            ArtifactTensorError,
            "\\[2, 4\\]",
        ),
        (put("layers.1.key.importance", (1, 5), -0.5), ArtifactValueError, "must not be negative"),
        (put("layers.1.key.importance_unit", 1, 0.0), ArtifactValueError, "must be positive"),
        (set_tensor("layers.1.key.importance", lambda x: x[:, 1:].contiguous()), ArtifactTensorError, "32"),
        (lambda found: found.pop("layers.1.key.importance_unit"), ArtifactTensorError, "is missing"),
    ],
)
def test_wrong_tensors_of_the_encoder_are_named(change, error, message):
    with pytest.raises(error, match=message):
        KVArtifact.from_bytes(repacked(change_tensors=change, file=newest().to_bytes()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m.update(format_version=module.FORMAT_VERSION + 1),
            ArtifactVersionError,
            "update kvq-calib",
        ),
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
    broken.layers[0].key.codebook[1] = 5.0
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
    assert loaded.layers[0].value.held_bytes == 1 + 1 + 4 * 4 + 2 * 16 * 4
    assert loaded.layers[0].key.held_bytes == 8 + 8 + 15 * 2 + 2 * 8 * 2 + 4 * 2
    assert loaded.layers[0].value.to("cpu").held_bytes == loaded.layers[0].value.held_bytes


@pytest.mark.parametrize("name", ["mixed-phase-rotation", "trellis"])
def test_what_is_held_is_what_the_file_has(name):
    artifact = random_artifact(GEOMETRY, RECIPES[name], codebooks=3 if "mixed" in name else 1)
    _, tensors = module._parse(artifact.to_bytes(), name)
    _, padded = module._parse(as_version_2(artifact), name)

    def size(found):
        return sum(t.numel() * t.element_size() for key, t in found.items() if ".key." in key)

    assert artifact.spec.key.variable_bits
    assert sum(layer.key.held_bytes for layer in artifact.layers) == size(tensors)
    assert sum(layer.key.held_bytes for layer in KVArtifact.from_bytes(artifact.to_bytes()).layers) == size(
        tensors
    )
    assert size(tensors) < 0.8 * size(padded)


def test_more_codebooks_than_a_byte_can_number_are_refused():
    channels = 257
    geometry = KVGeometry(layers=(LayerGeometry(num_query_heads=1, num_kv_heads=1, head_dim=channels),))
    side = QuantSpec(bits=1, variable_bits=True)
    bits = torch.ones(channels, dtype=torch.uint8)
    table = torch.tensor([[-1.0, 1.0]]).expand(channels, 2)
    codebook, index = pack_codebooks(side, bits, table, torch.arange(channels))
    params = QuantParams(bits, codebook, index, torch.ones(channels), torch.zeros(channels))

    def copy(params):  # tensors of a file share no memory
        return QuantParams(**{name: tensor.clone() for name, tensor in params.tensors().items()})

    assert torch.equal(codebook_table(side, params), table)
    rates = {kind: [0.0] for kind in KINDS}
    layers = (LayerParams(params, copy(params)),)
    artifact = KVArtifact(KVCacheSpec(key=side, value=side), geometry, layers, outliers_per_token=rates)
    with pytest.raises(ArtifactValueError, match="names 257 codebooks, at most 256") as caught:
        artifact.to_bytes()
    assert "\n" not in str(caught.value)

    def more(tensors):
        for kind in KINDS:
            tensors[f"layers.0.{kind}.codebook"] = table.clone()
            tensors[f"layers.0.{kind}.codebook_index"] = index.clone()

    fits = replace(params, codebook=codebook[:2], codebook_index=torch.zeros_like(bits))
    fewer = replace(artifact, layers=(LayerParams(fits, copy(fits)),))
    assert same(KVArtifact.from_bytes(fewer.to_bytes()), fewer)
    with pytest.raises(ArtifactValueError, match="names 257 codebooks, at most 256"):
        KVArtifact.from_bytes(as_version_2(fewer, more))


def test_packed_codebooks_are_those_that_are_used():
    spec = QuantSpec(bits=2, variable_bits=True)
    table = torch.tensor([[9.0, 9, 9, 9], [-1, -0.5, 0.5, 1], [0, 1, 1, 1]])
    bits = torch.tensor([2, 1, 0, 2], dtype=torch.uint8)
    codebook, index = pack_codebooks(spec, bits, table, torch.tensor([1, 1, 2, 1]))
    assert codebook.tolist() == [-1, -0.5, -1, -0.5, 0.5, 1, 0]
    assert index.tolist() == [1, 0, 2, 1]
    padded = codebook_table(spec, QuantParams(bits, codebook, index))
    assert padded.tolist() == [[-1, -0.5, -0.5, -0.5], [-1, -0.5, 0.5, 1], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="no float16"):
        pack_codebooks(spec, bits, table + 1e-5, torch.tensor([1, 1, 2, 1]))


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
    assert made.elements(10, batch=3) == 2 * 2 * 8 * 10 * 3
    assert made.elements(100, batch=3) == 2 * 8 * (100 + 16) * 3  # a window of 16 in the second layer
    total = sum(made.storage(4096).values())
    assert made.bits_per_element(4096) == pytest.approx(8 * total / made.elements(4096))
    codes = (
        (15 + 16) * (4096 + 256) / 8
    )  # 15 bits of keys and 16 of values a token and layer; a page for the window
    assert made.storage(4096)["codes"] == codes
    more = made.bits_per_element(4096, outliers_per_token={"key": [1.5, 1.25], "value": [0.0, 0.0]})
    assert more > made.bits_per_element(4096)
