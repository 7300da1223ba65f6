"""Calibration end to end on tiny models: determinism, resuming, sharing, and every switch of the method."""

import json
import logging

import pytest
import safetensors.torch
import torch
from models_zoo import FAMILIES, tiny_model, token_ids

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.artifact.sealed import read_sealed, seal
from kvq_calib.calibrate import checkpoint as checkpoints
from kvq_calib.calibrate import run as run_module
from kvq_calib.calibrate.distribution import WeightedHistogram
from kvq_calib.calibrate.plan import magnitude_keys
from kvq_calib.calibrate.run import calibrate
from kvq_calib.calibrate.statistics import ChannelHistogram, Magnitude
from kvq_calib.data import TokenWindows
from kvq_calib.errors import CalibrationError, ConfigError
from kvq_calib.model.capture import intercept
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.schema.geometry import KVGeometry, LayerGeometry
from kvq_calib.schema.recipe import CalibrationConfig, calibration_config
from kvq_calib.schema.spec import QuantSpec

pytestmark = pytest.mark.model


def windows(samples=3, seqlen=24, seed=0):
    return TokenWindows(token_ids(samples, seqlen, seed), {"dataset": "random", "sha256": str(seed)})


def config(recipe="nuq3-1p", *assignments):
    return calibration_config(recipe, assignments=assignments)


def run(model, configs, data=None, **options):
    result = calibrate(
        model,
        windows() if data is None else data,
        {"only": configs} if isinstance(configs, CalibrationConfig) else configs,
        model_id="tiny",
        model_config=model_fingerprint(model),
        **options,
    )
    return result.artifacts["only"] if isinstance(configs, CalibrationConfig) else result.artifacts


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated_and_quantized(family):
    model = tiny_model(family)
    artifact = run(model, config())
    KVArtifact.from_bytes(artifact.to_bytes()).check_model(model_fingerprint(model))
    assert len(artifact.layers) == len(artifact.geometry.layers)
    for layer, params in zip(artifact.quantizers(), artifact.layers, strict=True):
        assert bool((params.key.scale > 0).all())
        assert layer["value"].spec.thresholds == "token"
        for kind in ("key", "value"):
            levels = params.of(kind).codebook[0]
            assert bool((levels.diff() >= 0).all())
            assert levels.abs().max() <= 1


def test_the_same_inputs_give_the_same_bytes(model):
    assert run(model, config()).to_bytes() == run(model, config()).to_bytes()
    other = run(model, config(), windows(seed=1))
    assert other.to_bytes() != run(model, config()).to_bytes()


def test_recipes_calibrated_together_are_those_calibrated_alone(model):
    configs = {name: config(name) for name in ("nuq4-1p", "nuq2-1p", "nuq3", "nf3", "uniform2")}
    together = run(model, configs)
    for name, settings in configs.items():
        alone = run(model, {name: settings})[name]
        assert alone.to_bytes() == together[name].to_bytes(), name


def test_recipes_share_their_passes(model, monkeypatch):
    seen = []
    configs = {name: config(name) for name in ("nuq4-1p", "nuq3-1p", "nuq2-1p")}
    run(model, configs, progress=lambda *step: seen.append(step))
    assert seen == [(what, done, 3) for what in ("thresholds", "codebooks") for done in (1, 2, 3)]


def test_learning_is_told_apart_by_recipe(model):
    seen = []
    configs = {
        name: config(name, "learn={steps: 2, seqlen: 16}", "allocation.context=65536")
        for name in ("kvq3", "kvq2")
    }
    run(model, configs, progress=lambda *step: seen.append(step))
    learning = [step for step in seen if step[0].startswith("learning")]
    assert learning == [(f"learning {name}", done, 2) for name in configs for done in (1, 2)]


def test_data_free_levels_need_one_pass(model):
    seen = []
    run(model, config("nf3"), progress=lambda what, *_: seen.append(what))
    assert set(seen) == {"thresholds"}


def test_thresholds_are_quantiles_of_pre_rope_keys(model):
    collected = {}

    def observe(kv):
        collected.setdefault(kv.layer, []).append(kv.keys[:, :, 1:].transpose(1, 2).flatten(2)[0])

    data = windows(samples=8, seqlen=64)
    with torch.no_grad(), intercept(model, observe):
        for row in data.ids:
            model(input_ids=row[None], use_cache=False)
    artifact = run(model, config("nuq3"), data)
    for layer, parts in collected.items():
        keys = torch.cat(parts)
        low, high = keys.amin(0), keys.amax(0)
        torch.testing.assert_close(artifact.layers[layer].key.scale, (high - low) / 2, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            artifact.layers[layer].key.zero_point, (high + low) / 2, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("recipe", ["nuq3-1p", "uniform3", "kvq-3"])
def test_magnitudes_are_those_of_rotated_keys_and_values(model, recipe):
    largest = {"key": [0.0] * 2, "value": [0.0] * 2}

    def observe(kv):
        for kind, x in (("key", kv.rotated_keys), ("value", kv.values)):
            largest[kind][kv.layer] = max(largest[kind][kv.layer], float(x.abs().max()))

    data = windows(samples=4, seqlen=64)
    with torch.no_grad(), intercept(model, observe):
        for row in data.ids:
            model(input_ids=row[None], use_cache=False)
    recorded = run(model, config(recipe), data).calibration["amax"]
    assert recorded["key"] == pytest.approx(largest["key"], rel=1e-6)
    assert recorded["value"] == pytest.approx(largest["value"], rel=1e-6)


@pytest.mark.parametrize(
    "assignments",
    [
        ("cache.key.thresholds=token",),
        ("cache.key.pre_rope=false",),
        ("cache.key.thresholds=channel_online",),
        ("cache.value.thresholds=channel",),
        ("cache.value.thresholds=token_normalized",),
        ("cache.key.levels=uniform", "cache.value.levels=normal_float"),
        ("fit.weights=uniform",),
        ("fit.solver=lloyd",),
        ("cache.key.outliers.fraction=0.05", "cache.value.outliers.fraction=0"),
        ("cache.key.outliers.max_per_token=1",),
        ("cache.sink_tokens=4",),
        ("cache.sink_tokens=0",),
        ("cache.key.q_norm=true", "cache.value.q_norm=true"),
        ("cache.key.bits=4", "cache.value.bits=2"),
        ("cache.layers={-1: {key: {bits: 8}, value: {bits: 8}}}",),
        ("cache.storage_dtype=bfloat16",),
        ("recompute=true",),
    ],
    ids=lambda assignments: ",".join(assignments),
)
def test_every_switch_makes_a_usable_artifact(model, assignments):
    artifact = KVArtifact.from_bytes(run(model, config("nuq3-1p", *assignments)).to_bytes())
    x = torch.randn(1, 2, 9, artifact.geometry.layers[0].head_dim, generator=torch.Generator().manual_seed(0))
    for layer in artifact.quantizers():
        for quantizer in layer.values():
            quantized = quantizer.quantize(x)
            assert torch.isfinite(quantizer.dequantize(quantized)).all()
            if quantized.outliers is not None:
                assert int(quantized.outliers.sum(-1).max()) <= quantizer.outlier_cap


def test_recomputing_layers_changes_nothing(model):
    plain = run(model, config("nuq3-1p", "seed=1"))
    again = run(model, config("nuq3-1p", "seed=1", "recompute=true"))
    for a, b in zip(plain.layers, again.layers, strict=True):
        torch.testing.assert_close(a.key.codebook, b.key.codebook, atol=1e-3, rtol=0)


def test_fisher_weights_matter(model):
    weighted = run(model, config("nuq2"))
    plain = run(model, config("nuq2", "fit.weights=uniform"))
    assert not torch.equal(weighted.layers[0].key.codebook, plain.layers[0].key.codebook)
    assert torch.equal(weighted.layers[0].key.scale, plain.layers[0].key.scale)


class Interrupted(Exception):
    pass


def test_work_is_not_lost_when_the_artifact_cannot_be_saved(model, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"

    def full(artifacts):
        assert list(artifacts) == ["only"]
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run(model, config(), checkpoint=checkpoint, deliver=full)
    steps, delivered = [], {}
    resumed = run(
        model,
        config(),
        checkpoint=checkpoint,
        resume=True,
        progress=lambda *step: steps.append(step),
        deliver=delivered.update,
    )
    assert not steps
    assert delivered["only"].to_bytes() == resumed.to_bytes() == run(model, config()).to_bytes()
    assert not checkpoint.exists()


UNLEARNED = ("kvq3", "learn=null", "allocation.context=65536")
#: Steps of each part for four windows of text and two that the model writes, in one batch.
PASSES = {"generating text": 1, "thresholds": 2, "vocabulary samples": 4, "codebooks": 6}


@pytest.mark.parametrize(
    ("settings", "stop_at"),
    [
        (("nuq3-1p",), ("thresholds", 2)),
        (("nuq3-1p",), ("thresholds", 3)),
        (("nuq3-1p",), ("codebooks", 1)),
        (("nuq3-1p",), ("codebooks", 3)),
        (UNLEARNED, ("generating text", 1)),
        (UNLEARNED, ("thresholds", 1)),
        (UNLEARNED, ("vocabulary samples", 1)),
        (UNLEARNED, ("vocabulary samples", 3)),
        (UNLEARNED, ("codebooks", 2)),
        (UNLEARNED, ("codebooks", 5)),
    ],
)
def test_resuming_gives_the_identical_artifact(model, tmp_path, monkeypatch, settings, stop_at):
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    checkpoint = tmp_path / "run.checkpoint"
    data, settings = windows(samples=4), config(*settings)

    def interrupt(what, done, total):
        if (what, done) == stop_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, settings, data, checkpoint=checkpoint, progress=interrupt)
    steps = []
    resumed = run(
        model,
        settings,
        data,
        checkpoint=checkpoint,
        resume=True,
        progress=lambda *step: steps.append(step[:2]),
    )
    assert resumed.to_bytes() == run(model, settings, data).to_bytes()
    assert not checkpoint.exists()
    # The checkpoint is written after the callback, so the window at which the run stopped is done again.
    passes = PASSES if settings.allocation else {"thresholds": 4, "codebooks": 4}
    every = [(what, done + 1) for what, count in passes.items() for done in range(count)]
    assert [step for step in steps if step[0] in passes] == every[every.index(stop_at) :]


def test_a_checkpoint_of_another_run_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    checkpoint = tmp_path / "run.checkpoint"

    def interrupt(what, done, total):
        if what == "codebooks":
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, config(), checkpoint=checkpoint, progress=interrupt)
    kept = checkpoint.read_bytes()
    half = tiny_model("llama").bfloat16()
    for other, settings, data in (
        (model, config("nuq2-1p"), None),
        (model, config(), windows(seed=1)),
        (half, config(), None),
    ):
        with pytest.raises(CalibrationError, match="other settings, data, model or version"):
            run(other, settings, data, checkpoint=checkpoint, resume=True)
        assert checkpoint.read_bytes() == kept
    with monkeypatch.context() as later:
        later.setattr(run_module, "VERSION", checkpoints.VERSION + 1)
        with pytest.raises(CalibrationError, match="other settings, data, model or version"):
            run(model, config(), checkpoint=checkpoint, resume=True)
    assert checkpoint.read_bytes() == kept
    checkpoint.write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match="not a checkpoint"):
        run(model, config(), checkpoint=checkpoint, resume=True)


SHAPE = LayerGeometry(num_query_heads=2, num_kv_heads=1, head_dim=4)
PLACE = KVGeometry(layers=(SHAPE,))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint that holds the magnitudes of keys, and not those of values."""
    kept = checkpoints.Checkpoint(tmp_path / "run.checkpoint", "this run", magnitude_keys(1, 3))
    state = checkpoints.RunState(done={"thresholds": 2})
    magnitude = Magnitude()
    magnitude.update(torch.tensor([1.0, -2.5]))
    state.statistics.put(magnitude_keys(1, 3)[0], magnitude)
    kept.save(state, at_once=True)
    return kept


def rewritten(tmp_path, change):
    """Apply ``change(metadata, tensors)`` to the checkpoint and make its digest right again."""
    file = tmp_path / "run.checkpoint"
    metadata, tensors = read_sealed(file, "kvq_checkpoint")
    change(metadata, tensors)
    file.write_bytes(seal("kvq_checkpoint", metadata, tensors))


def test_a_checkpoint_gives_back_what_was_saved(checkpoint):
    state = checkpoint.load(PLACE)
    assert state.done == {"thresholds": 2}
    ((key, magnitude),) = state.statistics.items()
    assert key == magnitude_keys(1, 3)[0]
    assert magnitude.largest.tolist() == [2.5]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m, t: m.update(done=None), "'done' does not hold"),
        (lambda m, t: m.update(done=[["thresholds", 1]]), "'done' does not hold"),
        (lambda m, t: m["done"].update(thresholds="2"), "'done' does not hold"),
        (lambda m, t: m["done"].update(thresholds=-1), "'done' does not hold"),
        (lambda m, t: m["done"].update(thresholds=True), "'done' does not hold"),
        (lambda m, t: m.pop("positions"), "'positions' does not name"),
        (lambda m, t: m.update(positions={"0": 0}), "'positions' does not name"),
        (lambda m, t: m.update(positions=[2]), "'positions' does not name"),
        (lambda m, t: m.update(positions=[-1]), "'positions' does not name"),
        (lambda m, t: m.update(positions=[[0]]), "'positions' does not name"),
        (lambda m, t: m.update(positions=[0, 0]), "names statistics twice"),
        (lambda m, t: m.update(positions=[]), "tensor '0/largest' is unknown"),
        (lambda m, t: m.update(positions=[0, 1]), "tensor '1/largest' is missing"),
        (
            lambda m, t: t.update({"0/largest": torch.tensor(2.5)}),
            r"is torch.float32 \[\], not torch.float32 \[1\]",
        ),
        (
            lambda m, t: t.update({"0/largest": torch.tensor([2])}),
            r"is torch.int64 \[1\], not torch.float32 \[1\]",
        ),
        (
            lambda m, t: t["0/largest"].fill_(-1),
            "tensor '0/largest', or one beside it, has impossible values",
        ),
        (lambda m, t: t["0/largest"].fill_(torch.inf), "impossible values"),
        (lambda m, t: t["0/largest"].fill_(torch.nan), "impossible values"),
        (lambda m, t: m.update(identity=["this run"]), "other settings, data, model or version"),
        (lambda m, t: m.pop("identity"), "other settings, data, model or version"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(checkpoint, tmp_path, change, match):
    rewritten(tmp_path, change)
    with pytest.raises(CalibrationError, match=match) as caught:
        checkpoint.load(PLACE)
    assert "remove it, or run without --resume" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "{", "[" * 100_000, '{"identity": NaN}', '{"a":' * 5000]
)
def test_a_checkpoint_whose_header_is_no_json_object_is_refused(checkpoint, tmp_path, text):
    (tmp_path / "run.checkpoint").write_bytes(safetensors.torch.save({}, {"kvq_checkpoint": text}))
    with pytest.raises(CalibrationError, match=r"is not a checkpoint of this run .its metadata is not"):
        checkpoint.load(PLACE)


def test_what_no_text_could_have_given_is_told_apart():
    def changed(statistics, name, place, value):
        state = {part: tensor.clone() for part, tensor in statistics.state().items()}
        state[name][place] = value
        return type(statistics)(3).is_possible(state)

    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    channels = ChannelHistogram(3)
    assert channels.is_possible(channels.state())  # nothing seen yet: bounds are infinite
    channels.update(y)
    assert ChannelHistogram(3).is_possible(channels.state())
    assert changed(channels, "low", 1, -(2.0**120))
    for name, value in (("counts", -1), ("low", torch.nan), ("low", -torch.inf), ("high", torch.inf)):
        assert not changed(channels, name, 1, value), (name, value)
    weighted = WeightedHistogram(3)
    weighted.update(y, y.square(), y.mean(0), y.std(0))
    assert WeightedHistogram(3).is_possible(weighted.state())
    for place, value in (((0, 0, 0), -1.0), ((2, 1, 0), -1.0), ((3, 1, 0), 1e-9), ((1, 2, 250), 1e99)):
        assert not changed(weighted, "sums", place, value), place
    assert not changed(weighted, "count", 0, torch.nan)


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    file = tmp_path / "run.checkpoint"
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            state = checkpoint.load(PLACE)
        except CalibrationError:
            continue
        assert data[place] in b' "'  # white space of the header, say
        assert state.done == {"thresholds": 2}
    tensors = safetensors.torch.load(data)
    tensors["0/largest"] += 1
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    file.write_bytes(safetensors.torch.save(tensors, header))
    with pytest.raises(CalibrationError, match="is damaged: its content does not match its digest"):
        checkpoint.load(PLACE)


def test_states_that_take_long_to_write_are_written_less_often(model, tmp_path, monkeypatch):
    """Saving takes a thirtieth of the time at most, however large the statistics are, but for the end of a part."""
    now, writes = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def write(*_):
        writes.append(now[0])
        now[0] += 10.0

    def step(*_):
        now[0] += 20.0

    monkeypatch.setattr(checkpoints, "write_atomically", write)
    settings = config("nuq3-1p", "fit.weights=uniform", "cache.key.thresholds=channel_online")
    run(model, settings, windows(samples=40), checkpoint=tmp_path / "run.checkpoint", progress=step)
    assert writes == [40.0, 350.0, 660.0, 830.0]


def test_a_run_says_where_time_and_memory_went(model):
    result = calibrate(
        model,
        windows(),
        {"kvq3": config("kvq3", "learn={steps: 1, seqlen: 16}", "allocation.context=65536")},
        model_id="",
        model_config={},
    )
    assert set(result.seconds) == {*PASSES, "learning", "fit"}
    assert min(result.seconds.values()) > 0
    assert set(result.statistics_seconds) == {"thresholds", "vocabulary samples", "codebooks"}
    for part, seconds in result.statistics_seconds.items():
        assert 0 < seconds < result.seconds[part]
    channels = 2 * 2 * model.config.head_dim  # of two layers
    # Histograms of keys and values, of the text's tokens and of those drawn from the vocabulary, moments, and gradient
    # covariances of keys.
    assert result.statistics_bytes == pytest.approx(2 * 2 * channels * 4 * 512 * 8, rel=0.05)
    again = calibrate(model, windows(samples=9), {"r": config("nuq3-1p")}, model_id="", model_config={})
    assert again.statistics_bytes == pytest.approx(channels * 1024 * 8 + 2 * 2 * 2 * 4096 * 8, rel=0.01)
    assert list(again.peak_bytes.values()) == sorted(again.peak_bytes.values())


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="layer 1 gives values that are not finite"):
        run(model, config("nuq3-1p", "cache.value.thresholds=channel"))
    for settings in (config(), config("nuq3-1p", "fit.weights=uniform"), config("kvq3")):
        with pytest.raises(CalibrationError, match="layer 1 gives values that are not finite; try --dtype"):
            run(model, settings)


@pytest.mark.parametrize(("kind", "value"), [("k", "inf"), ("v", "nan"), ("v", "-inf")])
def test_the_first_layer_that_is_not_finite_is_named_and_not_those_that_follow(kind, value):
    model = tiny_model("llama", num_hidden_layers=3)

    def spoil(module, args, output):  # on real text only, not on the few tokens that look the model over
        return output.index_fill(1, torch.tensor(20), float(value)) if output.shape[1] > 20 else output

    getattr(model.model.layers[1].self_attn, f"{kind}_proj").register_forward_hook(spoil)
    name = {"k": "keys", "v": "values"}[kind]
    with pytest.raises(CalibrationError, match=f"layer 1 gives {name} that are not finite"):
        run(model, config())


def with_keys_that_reach(largest, from_token=0):
    """A model with keys of that magnitude in layer 1, at tokens from ``from_token`` on."""
    model = tiny_model("llama")

    def enlarge(module, args, output):
        late = torch.arange(output.shape[1])[:, None] >= from_token
        return torch.where(late, output * (largest / output.detach().abs().max()), output)

    model.model.layers[1].self_attn.k_proj.register_forward_hook(enlarge)
    return model


def test_keys_near_the_end_of_float16_are_stored_in_bfloat16(caplog):
    for largest, dtype in ((20_000.0, "float16"), (40_000.0, "bfloat16"), (1e6, "bfloat16")):
        caplog.clear()
        artifact = run(with_keys_that_reach(largest), config())
        assert artifact.spec.storage_dtype == dtype
        assert artifact.calibration["settings"] == config().record()  # what was asked for
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        if dtype == "float16":
            assert not said
        else:
            assert len(said) == 1
            assert "the keys of layer 1 reach" in said[0]
            assert "stored in bfloat16, as with --set cache.storage_dtype=bfloat16" in said[0]


def test_keys_beyond_float16_further_on_in_the_text_are_a_warning(caplog):
    late = TokenWindows(token_ids(1, 160), {"dataset": "random", "sha256": "0"})
    artifact = run(with_keys_that_reach(1e5, from_token=140), config(), late)
    assert artifact.spec.storage_dtype == "float16"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "only: the keys of layer 1 reach 9.3" in record.getMessage()  # rotated
    assert record.getMessage().endswith("calibrate with --set cache.storage_dtype=bfloat16")


def test_settings_that_do_not_fit_are_refused(model):
    with pytest.raises(ConfigError, match="at least one recipe"):
        run(model, {})
    with pytest.raises(ConfigError, match="agree on recompute"):
        run(model, {"a": config(), "b": config("nuq3-1p", "recompute=true")})
    with pytest.raises(ConfigError, match="layer override 99"):
        run(model, config("nuq3-1p", "cache.layers={99: {key: {bits: 8}, value: {bits: 8}}}"))


def test_what_the_artifact_records(model, caplog):
    caplog.set_level(logging.WARNING)
    artifact = run(model, config())
    assert artifact.model["id"] == "tiny"
    assert artifact.calibration["recipe"] == "only"
    assert artifact.calibration["data"]["sha256"] == "0"
    assert artifact.calibration["settings"]["fit"] == {"weights": "fisher", "solver": "exact"}
    assert "time" not in str(artifact.calibration).lower().replace("runtime", "")
    assert all(rate > 0 for rate in artifact.outliers_per_token["key"])
    assert isinstance(artifact.spec.key, QuantSpec)
