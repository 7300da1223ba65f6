"""FP8 scales: numbers from the artifact's ranges, and the names and keys that three runtimes document."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from artifact_factory import RECIPES, artifact_for, random_artifact, recipe, trellis
from click.testing import CliRunner
from models_zoo import tiny_model, token_ids

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.export_fp8 import amax_of, export, losses, read_amax, recorded_amax
from kvq_calib.cli.artifact import artifact_group
from kvq_calib.errors import ConfigError, KVQError
from kvq_calib.model.compat import cache_of
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "integrations.md"
ROPE = RopeSpec(
    pairs=tuple((i, i + 6) for i in range(6)),
    inv_freq=tuple(0.5**i for i in range(6)),
    attention_scaling=1.25,
)
GEOMETRY = KVGeometry(
    layers=tuple(
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=16, rope=rope) for rope in (0, 0, None)
    ),
    ropes=(ROPE,),
)
#: Thresholds of every channel, so that the artifact holds the ranges.
STATIC = recipe(value={"thresholds": "channel"})
MODEL = {"config": {"model_type": "llama"}}


def rotate(x, positions):
    """``[B, H, T, D]`` keys at ``positions [T]``, by the artifact format's own formula."""
    first, second = torch.tensor(ROPE.pairs).T
    angle = positions[:, None] * torch.tensor(ROPE.inv_freq)
    cos, sin = 1.25 * angle.cos(), 1.25 * angle.sin()
    turned = x.clone()
    turned[..., first] = cos * x[..., first] - sin * x[..., second]
    turned[..., second] = sin * x[..., first] + cos * x[..., second]
    return turned


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("name", ["scalar", "trellis"])
def test_no_element_within_the_range_of_channels_exceeds_it_and_one_comes_close(name, kind):
    spec = STATIC if name == "scalar" else recipe(key=trellis(4, pair_rotation=True), value=trellis(4))
    artifact = random_artifact(GEOMETRY, spec)
    generator = torch.Generator().manual_seed(1)
    for layer, quantizers in enumerate(artifact.quantizers()):
        quantizer, limit = quantizers[kind], amax_of(artifact)[kind][layer]
        centre, half = quantizer.channel_range()
        channels = GEOMETRY.layers[layer].shape(kind).channels
        u = torch.randint(0, 2, (1, 20000, channels), generator=generator) * 2.0 - 1  # corners of the box
        x = quantizer.inverse_transform(centre + half * u)
        if kind == "key" and GEOMETRY.layers[layer].rope is not None:
            x = rotate(x, torch.randint(0, 10**5, (20000,), generator=generator).float())
        assert float(x.abs().max()) <= limit * (1 + 1e-5)
        assert float(x.abs().max()) >= 0.9 * limit


@pytest.mark.parametrize("states", [1, 4])
def test_with_widths_per_channel_the_range_follows_the_levels(states):
    artifact = random_artifact(
        GEOMETRY, recipe(key=trellis(3, states=states), value=trellis(3, states=states))
    )
    for layer, quantizers in enumerate(artifact.quantizers()):
        quantizer, expected = quantizers["value"], 0.0
        for channel, width in enumerate(quantizer.widths):
            levels = quantizer.levels[channel, : quantizer.level_count(width)]
            gaps = levels.diff().tolist() or [0.0]
            for end in (float(levels[0]) - gaps[0] / 2, float(levels[-1]) + gaps[-1] / 2):
                expected = max(expected, abs(end))
        assert amax_of(artifact)["value"][layer] == pytest.approx(expected, rel=1e-5)


def test_thresholds_per_token_leave_no_range_unless_channels_are_normalised_first():
    assert amax_of(random_artifact(GEOMETRY, RECIPES["nuq4-1p"]))["value"] == [None] * 3
    ranges = amax_of(random_artifact(GEOMETRY, RECIPES["post-rope-token"]))
    assert all(number > 0 for kind in ("key", "value") for number in ranges[kind])
    with pytest.raises(ConfigError, match=r"range of its values \(layer 0\).*--amax"):
        export(random_artifact(GEOMETRY, RECIPES["nuq4-1p"]), "modelopt")


def scales(artifact):
    found = amax_of(artifact)
    return [pytest.approx(n / 448) for n in found["key"]], [pytest.approx(n / 448) for n in found["value"]]


def test_vllm_finds_the_tensors_and_the_scheme_of_compressed_tensors():
    artifact = random_artifact(GEOMETRY, STATIC)
    files = export(artifact, "fp8-scales")
    assert set(files) == {"kv_cache_scales.safetensors", "quantization_config.json"}
    tensors = safetensors.torch.load(files["kv_cache_scales.safetensors"])
    keys, values = scales(artifact)
    assert len(tensors) == 6
    for layer in range(3):
        for name, want in (("k_scale", keys[layer]), ("v_scale", values[layer])):
            tensor = tensors[f"model.layers.{layer}.self_attn.{name}"]
            assert tensor.dtype == torch.float32
            assert tensor.tolist() == [want]
    config = json.loads(files["quantization_config.json"])
    assert config["quant_method"] == "compressed-tensors"
    assert config["config_groups"] == {}
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True
    }  # fmt: skip


def test_tensorrt_llm_finds_the_tensors_and_the_config_of_modelopt():
    artifact = random_artifact(GEOMETRY, STATIC)
    files = export(artifact, "modelopt", prefix="backbone.layers.{layer}.mixer")
    assert set(files) == {"kv_cache_scales.safetensors", "hf_quant_config.json"}
    tensors = safetensors.torch.load(files["kv_cache_scales.safetensors"])
    keys, values = scales(artifact)
    names = {f"backbone.layers.{n}.mixer.{p}_proj.{p}_scale" for n in range(3) for p in "kv"}
    assert set(tensors) == names
    for layer in range(3):
        assert tensors[f"backbone.layers.{layer}.mixer.k_proj.k_scale"].item() == keys[layer]
        assert tensors[f"backbone.layers.{layer}.mixer.v_proj.v_scale"].item() == values[layer]
    config = json.loads(files["hf_quant_config.json"])
    assert config["producer"]["name"] == "modelopt"
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert config["quantization"]["quant_algo"] is None
    with pytest.raises(ConfigError, match=r"needs \{layer\}"):
        export(artifact, "modelopt", prefix="model.layers.0.self_attn")


def test_sglang_finds_one_factor_for_each_rank_and_layer():
    artifact = random_artifact(GEOMETRY, STATIC, model=MODEL)
    (content,) = export(artifact, "sglang", ranks=2).values()
    content = json.loads(content)
    assert content["model_type"] == "llama"
    assert content["kv_cache"]["dtype"] == "float8_e4m3fn"
    factors = content["kv_cache"]["scaling_factor"]
    assert list(factors) == ["0", "1"]
    found = amax_of(artifact)
    for layers in factors.values():
        assert list(layers) == ["0", "1", "2"]
        for layer, factor in layers.items():
            larger = max(found["key"][int(layer)], found["value"][int(layer)])
            assert factor == pytest.approx(larger / 448)


def test_what_is_lost_is_named():
    lost = "; ".join(losses(random_artifact(GEOMETRY, RECIPES["nuq3-exact"])))
    for words in (
        "kmeans levels of keys and values",
        "thresholds for each channel of keys",
        "thresholds for each token of values",
        "exact outliers of keys and values",
        "4 exact first tokens",
        "20 exact newest tokens",
    ):
        assert words in lost
    turned = random_artifact(GEOMETRY, RECIPES["trellis"])
    lost = "; ".join(losses(turned))
    for words in (
        "a width for each channel of keys and values",
        "trellis codes of keys and values",
        "turned RoPE pairs of keys",
        "token weighting of keys and values",
        "a true range (it is estimated from the levels; --amax takes a measured one) of keys and values",
    ):
        assert words in lost
    assert "a true range" not in "; ".join(losses(turned, {"key": [1.0] * 3, "value": [1.0] * 3}))
    compensated = losses(random_artifact(GEOMETRY, RECIPES["compensation"]))
    assert "error compensation of keys and values" in compensated
    assert not [words for words in compensated if "trellis codes" in words]


def command(*arguments):
    return CliRunner().invoke(artifact_group, ["export", *map(str, arguments)])


def test_command_asks_for_force_and_writes_nothing_before(tmp_path):
    file, folder = tmp_path / "a.kvq.safetensors", tmp_path / "out"
    random_artifact(GEOMETRY, STATIC, model=MODEL).save(file)
    for format_name in ("fp8-scales", "modelopt", "sglang"):
        refused = command(file, "--format", format_name, "-o", folder)
        assert refused.exit_code == 1
        assert isinstance(refused.exception, KVQError)
        assert re.search("would lose: kmeans levels.*repeat with --force", str(refused.exception))
        assert not folder.exists()
    done = command(file, "--format", "sglang", "-o", folder, "--force", "--ranks", "4")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{folder / 'kv_cache_scales.json'}\n"
    assert done.stderr.startswith("lost: kmeans levels")
    want = export(KVArtifact.load(file), "sglang", ranks=4)["kv_cache_scales.json"]
    assert (folder / "kv_cache_scales.json").read_bytes() == want
    blocked = command(file, "--format", "sglang", "-o", file, "--force")
    assert blocked.exit_code == 1
    assert "cannot make the folder" in str(blocked.exception)


def test_measured_magnitudes_take_the_place_of_what_the_artifact_holds(tmp_path):
    plain = {"bits": 8, "thresholds": "token", "levels": "uniform", "outliers": {}}
    spec = recipe(key=plain, value=plain, sink_tokens=0)
    file, amax = tmp_path / "a.kvq.safetensors", tmp_path / "amax.json"
    random_artifact(GEOMETRY, spec).save(file)
    assert losses(KVArtifact.load(file)) == ["thresholds for each token of keys and values"]
    amax.write_text(json.dumps({"key": [448.0, 4.48, 1.0], "value": [1.0, 2.0, 3.0]}))
    done = command(file, "--format", "fp8-scales", "-o", tmp_path / "out", "--amax", amax, "--force")
    assert done.exit_code == 0, done.output
    tensors = safetensors.torch.load_file(tmp_path / "out" / "kv_cache_scales.safetensors")
    assert tensors["model.layers.0.self_attn.k_scale"].item() == 1.0
    assert tensors["model.layers.1.self_attn.k_scale"].item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "must hold an object"),
        ('{"keys": [1, 1, 1]}', "must hold an object"),
        ('{"key": [1, 1]}', "key must be 3 numbers"),
        ('{"value": [1, 1, -1]}', "value must be 3 numbers that are not negative"),
        ('{"value": [1, 1, NaN]}', "value must be 3 numbers that are not negative"),
        ('{"value": [1, 1, true]}', "value must be 3 numbers that are not negative"),
        ('{"value": 3}', "value must be 3 numbers that are not negative"),
    ],
)
def test_bad_magnitudes_are_refused(tmp_path, content, message):
    (tmp_path / "amax.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_amax(tmp_path / "amax.json", 3)
    with pytest.raises(ConfigError, match="cannot read"):
        read_amax(tmp_path / "missing.json", 3)


def test_what_calibration_recorded_comes_before_an_estimate(tmp_path):
    spec = RECIPES["nuq4-1p"]  # its values have no range of their own
    made = random_artifact(GEOMETRY, spec)
    with pytest.raises(ConfigError, match="--amax"):
        export(made, "fp8-scales")
    recorded = replace(made, calibration={"amax": {"key": [448.0, 0.0, 1.0], "value": [1.0, 2.0, 3.0]}})
    recorded.save(tmp_path / "a.kvq.safetensors")
    artifact = KVArtifact.load(tmp_path / "a.kvq.safetensors")
    assert recorded_amax(artifact) == recorded.calibration["amax"]
    tensors = safetensors.torch.load(export(artifact, "fp8-scales")["kv_cache_scales.safetensors"])
    assert tensors["model.layers.0.self_attn.k_scale"].item() == 1.0
    assert tensors["model.layers.1.self_attn.k_scale"].item() > 0
    assert tensors["model.layers.2.self_attn.v_scale"].item() == pytest.approx(3 / 448)
    tensors = safetensors.torch.load(
        export(artifact, "fp8-scales", amax={"key": [1.0] * 3})["kv_cache_scales.safetensors"]
    )
    assert tensors["model.layers.0.self_attn.k_scale"].item() == pytest.approx(1 / 448)
    assert tensors["model.layers.2.self_attn.v_scale"].item() == pytest.approx(3 / 448)
    with pytest.raises(ConfigError, match=r"calibration\.amax of the artifact: key must be 3 numbers"):
        export(replace(made, calibration={"amax": {"key": [1.0]}}), "fp8-scales")


@pytest.mark.model
def test_the_page_measures_what_the_command_takes(tmp_path):
    (code,) = re.findall(r"```python\n(def measure_amax.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    model, seen = tiny_model("gemma3_text"), {}
    windows = [token_ids(1, 40, seed=seed) for seed in range(3)]
    (tmp_path / "amax.json").write_text(json.dumps(names["measure_amax"](model, windows)))
    amax = read_amax(tmp_path / "amax.json", 3)
    for ids in windows:
        with torch.no_grad():
            cache = cache_of(model(input_ids=ids, use_cache=True))
        for index, layer in enumerate(cache.layers):
            for kind, cached in (("key", layer.keys), ("value", layer.values)):
                largest = float(cached.abs().max())
                seen[kind, index] = max(seen.get((kind, index), 0.0), largest)
    for (kind, index), largest in seen.items():
        assert amax[kind][index] >= largest * (1 - 1e-6)  # a sliding window's cache forgets its oldest tokens
    assert amax["key"][2] == pytest.approx(seen["key", 2])
    assert amax["value"][2] == pytest.approx(seen["value", 2])
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    tensors = safetensors.torch.load(export(artifact, "fp8-scales", amax=amax)["kv_cache_scales.safetensors"])
    assert tensors["model.layers.2.self_attn.v_scale"].item() == pytest.approx(amax["value"][2] / 448)
