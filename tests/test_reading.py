"""The page for runtime authors: its code reads artifacts as the quantizers do."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_factory import RECIPES, random_artifact
from tiny_artifacts import TINY, golden_file

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.schema.geometry import KINDS, KVGeometry, LayerGeometry, RopeSpec

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "reading.md"
ROPE = RopeSpec(pairs=tuple((i, i + 6) for i in range(6)), inv_freq=tuple(0.5**i for i in range(6)))
GEOMETRY = KVGeometry(
    layers=tuple(
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=16, value_head_dim=own, rope=rope)
        for rope, own in ((0, None), (0, 12), (None, None))
    ),
    ropes=(ROPE,),
)


@pytest.fixture(scope="module")
def page():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 65
    assert {m[1] for m in re.finditer(r"^(?:import|from) (\w+)", code, re.MULTILINE)} == {
        "json",
        "numpy",
        "safetensors",
    }
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def numbers(part):
    """Of one sequence, as numpy has them."""
    return None if part is None else part[0].float().numpy()


def assert_read_as_by_the_quantizers(page, file, artifact):
    meta, tensors = page["load"](file)
    for layer, quantizers in enumerate(artifact.quantizers()):
        for kind in KINDS:
            heads, size = artifact.geometry.layers[layer].shape(kind)
            x = torch.randn(1, heads, 40, size, generator=torch.Generator().manual_seed(3))
            quantized = quantizers[kind].quantize(x)
            got = page["dequantize"](
                meta,
                tensors,
                layer,
                kind,
                quantized.codes[0].numpy().astype(np.int64),
                numbers(quantized.token_scale),
                numbers(quantized.token_zero_point),
                numbers(quantized.residual),
            )
            want = quantizers[kind].dequantize(quantized)[0].transpose(0, 1)
            assert got.dtype == np.float32
            torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_codes_become_what_the_quantizers_see(page, tmp_path, name):
    artifact = random_artifact(GEOMETRY, RECIPES[name])
    artifact.save(tmp_path / "a.kvq.safetensors")
    assert_read_as_by_the_quantizers(page, tmp_path / "a.kvq.safetensors", artifact)


@pytest.mark.parametrize("codec", TINY)
def test_the_golden_files_are_read(page, codec):
    assert_read_as_by_the_quantizers(page, golden_file(codec), KVArtifact.load(golden_file(codec)))


def test_overrides_of_layers_count_from_both_ends(page):
    spec = RECIPES["nuq4-1p"].model_dump(mode="json")
    layers = {"0": {"key": {"bits": 1}, "value": {}}, "-1": {"key": {"bits": 2}, "value": {}}}
    meta = {"spec": {**spec, "layers": layers}, "geometry": GEOMETRY.model_dump(mode="json")}
    found = [page["layer_of"](meta, {}, layer, "key")[0]["bits"] for layer in range(3)]
    assert found == [1, 4, 2]


def test_rotation_is_that_of_the_geometry(page, tmp_path):
    artifact = random_artifact(GEOMETRY, RECIPES["nuq4-1p"])
    artifact.save(tmp_path / "a.kvq.safetensors")
    meta, _ = page["load"](tmp_path / "a.kvq.safetensors")
    keys = np.random.default_rng(0).standard_normal((5, 2, 16)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 3])
    got = page["rotate"](meta, 0, keys, positions)
    for p, (first, second) in enumerate(ROPE.pairs):
        complex_keys = keys[..., first] + 1j * keys[..., second]
        turned = complex_keys * np.exp(1j * positions * ROPE.inv_freq[p])[:, None]
        np.testing.assert_allclose(got[..., first] + 1j * got[..., second], turned, atol=1e-5)
    np.testing.assert_array_equal(got[..., 12:], keys[..., 12:])
