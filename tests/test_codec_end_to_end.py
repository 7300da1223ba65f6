"""An external codec, from the calibration text to the packed cache. It only has to be registered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from artifact_factory import artifact_for
from models_zoo import tiny_model, token_ids
from plain_cache import plain_cache, record
from torch import Tensor, nn
from toy_codec import ToyParams, registered

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.calibrate import fitter as fitters
from kvq_calib.calibrate.fit_scalar import SketchKey
from kvq_calib.calibrate.fitter import Fitted, Materials, Recipe, layer_params
from kvq_calib.calibrate.plan import ChannelView, ObservedKey, Stage
from kvq_calib.calibrate.run import calibrate
from kvq_calib.calibrate.texts import Source, text_of
from kvq_calib.data import TokenWindows
from kvq_calib.model.compat import with_cache
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.runtime import KVQCache, detach
from kvq_calib.schema.recipe import CalibrationConfig

pytestmark = pytest.mark.model

CACHE = {"key": {"codec": "toy"}, "value": {"codec": "toy"}, "sink_tokens": 2, "recent_tokens": 3}
WINDOWS = TokenWindows(token_ids(4, 40, 0), {"dataset": "random", "seqlen": 40})


class ToyFitter:
    """Thresholds that hold all of a channel, and evenly spaced levels."""

    def __init__(self, recipe: Recipe) -> None:
        self._cache = recipe.config.cache
        text = text_of({Source.CALIBRATION: recipe.windows})
        sinks = self._cache.sink_tokens
        self._sketches = {at: SketchKey(ChannelView(at, text, sinks, True)) for at in recipe.tensors}
        self._geometry = recipe.geometry

    def keys(self, stage: Stage) -> list[ObservedKey]:
        return list(self._sketches.values()) if stage is Stage.THRESHOLDS else []

    def fit(self, materials: Materials) -> Fitted:
        params = {}
        for at, key in self._sketches.items():
            sketch = materials.totals.get(key)
            low, high = sketch.quantile(0.0).float(), sketch.quantile(1.0).float()
            heads = self._geometry.layers[at.layer].num_kv_heads
            levels = torch.linspace(-0.75, 0.75, 4).half().repeat(heads, 1)
            params[at] = ToyParams(levels, ((high - low) / 2).clamp(min=1e-6), (high + low) / 2)
        return Fitted(self._cache, layer_params(params), {"fitted": "evenly"})


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    """Codec and fitter are known while this file is tested."""
    with registered(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(fitters._FITTERS, "toy", ToyFitter)
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama")


def logits_through(model: nn.Module, cache: object, ids: Tensor) -> Tensor:
    """Of a prefill that fills blocks and of single steps that fill another."""
    done, parts = 0, []
    for tokens in (70, 25, *[1] * 10):
        with torch.no_grad():
            parts.append(model(input_ids=ids[:, done : done + tokens], **with_cache(cache)).logits)
        done += tokens
    return torch.cat(parts, dim=1)


def assert_read_as_quantized(model: nn.Module, artifact: KVArtifact) -> None:
    """The packed cache of the torch backend against a plain one whose contents went through the quantizers."""
    ids = token_ids(2, 105, seed=1)
    cache = KVQCache(artifact, model, backend="torch")
    assert cache.backend == "torch"
    recording = record(cache)
    ours = logits_through(model, cache, ids)
    detach(model)
    with plain_cache(artifact, model, torch.zeros(2, dtype=torch.int64), None, recording) as plain:
        theirs = logits_through(model, plain, ids)
    assert float((ours - theirs).abs().max()) < 1e-4 * max(1.0, float(theirs.std()))
    stated = artifact.storage(105, batch=2)
    held = cache.memory()
    assert held["codes"] == stated["codes"]
    assert held["parameters"] == stated["parameters"]


def test_a_random_artifact_of_the_codec_is_packed_and_read(model: nn.Module) -> None:
    spec = CalibrationConfig.model_validate({"cache": CACHE}).cache
    assert_read_as_quantized(model, artifact_for(model, spec))


def test_the_codec_is_calibrated_saved_and_run(model: nn.Module, tmp_path) -> None:
    config = CalibrationConfig.model_validate({"cache": CACHE})
    assert config.codec == "toy"
    fingerprint = model_fingerprint(model)
    made = calibrate(model, WINDOWS, {"toy": config}, model_id="tiny", model_config=fingerprint)
    file = tmp_path / "toy.kvq.safetensors"
    made.artifacts["toy"].save(file)
    artifact = KVArtifact.load(file)
    artifact.check_model(fingerprint)
    assert artifact.spec == config.cache
    assert artifact.calibration["fitted"] == "evenly"
    assert len(artifact.calibration["amax"]["key"]) == len(artifact.layers)
    assert_read_as_quantized(model, artifact)
    # Two bits over the range of each channel: an eighth of it is the largest error on what calibration saw.
    quantizer = artifact.quantizers()[0]["value"]
    with torch.no_grad():
        cache = model(input_ids=WINDOWS.ids[:1], use_cache=True).past_key_values
    x = cache.layers[0].values[:, :, 2:].float()
    error = (quantizer(x) - x).abs().amax((0, 2)).flatten()
    assert bool((error <= quantizer.scale * 0.2501).all())
