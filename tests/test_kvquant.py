"""Importing KVQuant's pickles: the numbers carry over, and no pickle gets to run anything."""

import os
import pickle

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models_zoo import tiny_model

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.errors import ArtifactFileError
from kvq_calib.artifact.import_kvquant import import_kvquant, load_pickle
from kvq_calib.cli.artifact import artifact_group
from kvq_calib.errors import ConfigError
from kvq_calib.model.configuration import geometry_of_configuration
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.inspect import inspect_model
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

pytestmark = pytest.mark.model

HEADS, DIM, LAYERS, BITS = 2, 16, 2, 3
CHANNELS = HEADS * DIM
SHAPE = LayerGeometry(num_query_heads=4, num_kv_heads=HEADS, head_dim=DIM, rope=0)
GEOMETRY = KVGeometry(
    layers=(SHAPE,) * LAYERS,
    ropes=(RopeSpec(pairs=tuple((i, i + 8) for i in range(8)), inv_freq=(0.5,) * 8),),
)


def quantizers(norm=False, seed=0):
    """In the form KVQuant's code pickles: float64 thresholds [1, C], k-means centres [k, 1] as numpy has them."""
    generator = np.random.default_rng(seed)
    content = {}
    for layer in range(LAYERS):
        for projection in ("k_proj", "v_proj"):
            upper = torch.tensor(1 + generator.random(CHANNELS)).unsqueeze(0)
            lower = torch.tensor(-1 - generator.random(CHANNELS)).unsqueeze(0)
            centres = [
                generator.permutation(np.linspace(-0.9, 0.9, 1 << BITS) ** 3).astype(np.float32)[:, None]
            ]
            extra = (torch.tensor(1.05), torch.tensor(0.01)) if norm else ()
            content[f"model.layers.{layer}.self_attn.{projection}"] = (upper, lower, centres, *extra)
    return content


def write(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def imported(path, **options):
    return import_kvquant(path, GEOMETRY, {"id": "m", "config": {}}, **{"outliers": 0.0, **options})


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_keys_are_quantized_as_the_original_simulates(tmp_path, protocol):
    content = quantizers()
    file = write(tmp_path / "quantizers.pickle", content, protocol)
    artifact = KVArtifact.from_bytes(imported(file).to_bytes())
    x = torch.randn(1, HEADS, 40, DIM, generator=torch.Generator().manual_seed(0))
    for layer, pair in enumerate(artifact.quantizers()):
        upper, lower, (centres,) = content[f"model.layers.{layer}.self_attn.k_proj"]
        offset, half = (upper + lower) / 2, (upper - lower) / 2
        y = x[0].transpose(0, 1).flatten(1).double()
        poles = torch.from_numpy(centres).flatten().double()
        nearest = ((y - offset) / half)[..., None].sub(poles).abs().argmin(-1)
        want = (poles[nearest] * half + offset).unflatten(1, (HEADS, DIM)).transpose(0, 1)
        got = pair["key"](x)[0].double()
        gap = (got - want).abs()  # levels are stored in float16, which may decide otherwise at a boundary
        assert float(gap.median()) < 1e-3
        assert float((gap > 2e-3).double().mean()) < 0.01


def test_values_take_their_range_from_each_token(tmp_path):
    content = quantizers()
    artifact = imported(write(tmp_path / "q.pickle", content))
    x = torch.randn(1, HEADS, 20, DIM, generator=torch.Generator().manual_seed(1))
    y = x[0].transpose(0, 1).flatten(1).double()
    high, low = y.amax(1, keepdim=True), y.amin(1, keepdim=True)
    poles = torch.from_numpy(content["model.layers.0.self_attn.v_proj"][2][0]).flatten().double()
    offset, half = (high + low) / 2, (high - low) / 2
    want = poles[((y - offset) / half)[..., None].sub(poles).abs().argmin(-1)] * half + offset
    got = artifact.quantizers()[0]["value"](x)[0].transpose(0, 1).flatten(1).double()
    gap = (got - want).abs()
    assert float(gap.median()) < 2e-3
    assert float((gap > 5e-3).double().mean()) < 0.02  # at a boundary, scales in float16 may decide otherwise


def test_outliers_sinks_and_q_norm_are_kept(tmp_path):
    artifact = imported(write(tmp_path / "q.pickle", quantizers(norm=True)), outliers=0.02, sink_tokens=3)
    assert artifact.spec.key.outliers.fraction == artifact.spec.value.outliers.fraction == 0.02
    assert artifact.spec.sink_tokens == 3
    assert artifact.spec.key.q_norm
    plain = imported(write(tmp_path / "p.pickle", quantizers()))
    want = plain.layers[0].key.codebook * 1.05 + 0.01
    torch.testing.assert_close(artifact.layers[0].key.codebook, want, atol=1e-3, rtol=1e-3)


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch OWNED",)),
        (eval, ("open('OWNED', 'w')",)),
        (getattr, ("text", "upper")),
        (np.load, ("OWNED",)),
        (torch.load, ("OWNED",)),
    ],
)
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "q.pickle", {**quantizers(), "x": Hostile(*call)}, 4)
    with pytest.raises(ArtifactFileError, match="refused"):
        load_pickle(file)
    assert not (tmp_path / "OWNED").exists()


def test_a_pickle_inside_a_tensor_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = pickle.dumps(Hostile(os.system, ("touch OWNED",)))
    file = write(tmp_path / "q.pickle", Hostile(torch.storage._load_from_bytes, (inner,)), 4)
    with pytest.raises(ArtifactFileError):
        load_pickle(file)
    assert not (tmp_path / "OWNED").exists()


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x05.", pickle.dumps({"a": 1})[:-3]])
def test_what_is_no_pickle_is_one_error(tmp_path, data):
    (tmp_path / "q.pickle").write_bytes(data)
    with pytest.raises(ArtifactFileError, match=r"q\.pickle"):
        imported(tmp_path / "q.pickle")


def changed(change):
    content = quantizers()
    change(content)
    return content


KEY = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([1, 2], ArtifactFileError, "no quantizers by name"),
        (changed(lambda c: c.pop(KEY)), ConfigError, "no quantizer"),
        (changed(lambda c: c.update({KEY: c[KEY][:2]})), ArtifactFileError, "no centroids"),
        (
            changed(lambda c: c.update({KEY: (c[KEY][1], c[KEY][0], c[KEY][2])})),
            ArtifactFileError,
            "below the lower",
        ),
        (changed(lambda c: c.update({KEY: (c[KEY][0][:, 1:], *c[KEY][1:])})), ConfigError, "channels"),
        (
            changed(lambda c: c.update({KEY: (c[KEY][0] * float("nan"), *c[KEY][1:])})),
            ArtifactFileError,
            "not finite",
        ),
        (
            changed(lambda c: c.update({KEY: (*c[KEY][:2], [c[KEY][2][0][:5]])})),
            ArtifactFileError,
            "5 centroids",
        ),
        (changed(lambda c: c.update({KEY: (*c[KEY][:2], ["text"])})), ArtifactFileError, "no array"),
        (
            changed(lambda c: c.update({"model.layers.2.self_attn.k_proj": c[KEY]})),
            ConfigError,
            "more layers",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, error, message):
    with pytest.raises(error, match=message):
        imported(write(tmp_path / "q.pickle", content))


def test_command_reads_the_configuration_alone(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path / "model")
    geometry, fingerprint = geometry_of_configuration(str(tmp_path / "model"))
    assert geometry == inspect_model(model)
    assert fingerprint == model_fingerprint(model)
    shape = geometry.layers[0]
    content = {}
    for layer in range(len(geometry.layers)):
        for projection in ("k_proj", "v_proj"):
            ones = torch.ones(1, shape.shape("key").channels, dtype=torch.float64)
            content[f"model.layers.{layer}.self_attn.{projection}"] = (
                ones,
                -ones,
                [np.linspace(-1, 1, 4)[:, None]],
            )
    file = write(tmp_path / "q.pickle", content)
    output = tmp_path / "a.kvq.safetensors"
    arguments = ["import-kvquant", str(file), "-o", str(output), "--model", str(tmp_path / "model")]
    result = CliRunner().invoke(artifact_group, arguments)
    assert result.exit_code == 0, result.output
    loaded = KVArtifact.load(output)
    loaded.check_model(model_fingerprint(model))
    assert loaded.spec.key.bits == 2
