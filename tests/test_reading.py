"""The page for runtime authors: its code reads artifacts as the reference does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_factory import RECIPES, random_artifact

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry, RopeSpec
from kvq_calib.schema.spec import KINDS

PAGE = Path(__file__).parent.parent / "docs" / "reading.md"
ROPE = RopeSpec(pairs=tuple((i, i + 6) for i in range(6)), inv_freq=tuple(0.5**i for i in range(6)))
GEOMETRY = KVGeometry(
    layers=tuple(
        LayerGeometry(num_query_heads=4, num_kv_heads=2, head_dim=16, rope=rope) for rope in (0, 0, None)
    ),
    ropes=(ROPE,),
)


@pytest.fixture(scope="module")
def page():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 60
    assert {m[1] for m in re.finditer(r"^(?:import|from) (\w+)", code, re.MULTILINE)} == {
        "json",
        "numpy",
        "safetensors",
    }
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def assert_read_as_by_the_reference(page, file, artifact):
    meta, tensors = page["load"](file)
    x = torch.randn(
        1, 2, 40, artifact.geometry.layers[0].head_dim, generator=torch.Generator().manual_seed(3)
    )
    for layer, quantizers in enumerate(artifact.quantizers()):
        for kind in KINDS:
            quantized = quantizers[kind].quantize(x)

            def numpy(part):
                return None if part is None else part[0].float().numpy()

            got = page["dequantize"](
                meta,
                tensors,
                layer,
                kind,
                quantized.codes[0].numpy().astype(np.int64),
                numpy(quantized.token_scale),
                numpy(quantized.token_zero_point),
                numpy(quantized.residual),
            )
            want = quantizers[kind].dequantize(quantized)[0].transpose(0, 1)
            torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_codes_become_what_the_reference_sees(page, tmp_path, name):
    artifact = random_artifact(GEOMETRY, RECIPES[name], codebooks=2 if "mixed" in name else 1)
    artifact.save(tmp_path / "a.kvq.safetensors")
    assert_read_as_by_the_reference(page, tmp_path / "a.kvq.safetensors", artifact)


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_files_of_every_version_are_read(page, version):
    file = Path(__file__).parent / "golden" / f"tiny-{version}.kvq.safetensors"
    assert_read_as_by_the_reference(page, file, KVArtifact.load(file))


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
