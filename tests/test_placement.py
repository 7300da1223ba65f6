"""Models with offloaded weights: the same artifact, and no weights left in memory."""

import pytest
import torch
from models_zoo import needs_whole_models_on_disk, tiny_model, tiny_tokenizer, token_ids

from kvq_calib.calibrate.gradients import fisher_pass
from kvq_calib.calibrate.run import calibrate
from kvq_calib.data import TokenWindows
from kvq_calib.errors import ModelError
from kvq_calib.model.fingerprint import model_fingerprint
from kvq_calib.model.load import load_model
from kvq_calib.model.placement import input_device, is_offloaded
from kvq_calib.schema.recipe import calibration_config

pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:accelerate"),
]
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", num_hidden_layers=LAYERS).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **options):
    return load_model(str(folder), dtype="bfloat16", **options).model


def on_disk(model):
    return sum(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spread", "recipe", "assignments"),
    [
        pytest.param({"device_map": {"": "disk"}}, "nuq3-1p", (), marks=needs_whole_models_on_disk),
        (
            {"device_map": "auto", "max_memory": {"cpu": "100KB"}},
            "kvq3",
            ("learn={steps: 1, seqlen: 16}", "allocation.context=65536", "allocation.self_generated=0"),
        ),
    ],
    ids=["disk-nuq3-1p", "auto-kvq3"],
)
def test_offloaded_models_give_the_same_artifact(folder, spread, recipe, assignments):
    windows = TokenWindows(token_ids(2, 32), {"sha256": "x"})
    config = calibration_config(recipe, assignments=[*assignments, "recompute=true"])
    found = []
    for options in ({}, spread):
        model = load(folder, **options)
        before = on_disk(model)
        artifacts = calibrate(
            model, windows, {"r": config}, model_id="x", model_config=model_fingerprint(model)
        ).artifacts
        found.append(artifacts["r"].to_bytes())
        assert on_disk(model) == before  # what was fetched was let go
    assert before > len(list(model.parameters())) / 2
    assert is_offloaded(model)
    assert input_device(model) == torch.device("cpu")
    assert found[0] == found[1]


@needs_whole_models_on_disk
def test_the_backward_pass_holds_the_weights_of_one_layer_at_a_time(folder):
    model = load(folder, device_map={"": "disk"})
    most = []

    def count(kv, *_):
        held = [module for module in model.model.layers if on_disk(module) < len(list(module.parameters()))]
        most.append(len(held))

    fisher_pass(model, token_ids(1, 16), count, on_forward=count)
    assert len(most) == 2 * LAYERS
    assert max(most) <= 1
    assert on_disk(model) == len(list(model.parameters()))


def test_recomputation_of_models_in_memory_stops_early(folder):
    """Only offloaded models pay for the product that brings accelerate's hooks to their end."""
    model, calls = load(folder), []
    fisher_pass(model, token_ids(1, 16), lambda *_: None)  # looks the model over
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(None))
    fisher_pass(model, token_ids(1, 16), lambda *_: None, recompute=True)
    assert len(calls) == 1


def test_models_over_several_devices_take_their_input_where_they_compute():
    class Spread:
        def __init__(self, device, **places):
            self.device = torch.device(device)
            if places:
                self.hf_device_map = places

    assert input_device(Spread("cuda:1")) == torch.device("cuda:1")
    assert input_device(Spread("meta", a="cpu", b="cuda:1", c="cuda:0")) == torch.device("cuda:1")
    assert input_device(Spread("meta", a="cpu", b="disk")) == torch.device("cpu")
    assert not is_offloaded(Spread("cpu"))
    assert not is_offloaded(Spread("cuda:0", a=0, b=1))
    assert not is_offloaded(Spread("cpu", a="cpu"))
    assert is_offloaded(Spread("cuda:0", a=0, b="cpu"))
    assert is_offloaded(Spread("cpu", a="cpu", b="disk"))


def test_limits_without_a_map_and_maps_without_accelerate_are_refused(folder, monkeypatch):
    with pytest.raises(ModelError, match="--device-map auto"):
        load(folder, max_memory={"cpu": "1GiB"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install accelerate"):
        load(folder, device_map="auto")
