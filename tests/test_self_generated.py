"""Self-generated calibration text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_zoo import FAMILIES, tiny_model, token_ids

from kvq_calib.calibrate import run as run_module
from kvq_calib.calibrate.checkpoint import Checkpoint, RunState
from kvq_calib.calibrate.clock import Clock
from kvq_calib.calibrate.fitter import Recipe, make_fitter
from kvq_calib.calibrate.passes import Passes
from kvq_calib.calibrate.plan import Stage, Table
from kvq_calib.calibrate.run import calibrate
from kvq_calib.calibrate.self_generated import SelfGeneratedText, continue_texts
from kvq_calib.calibrate.texts import TextLibrary
from kvq_calib.data import TokenWindows
from kvq_calib.errors import CalibrationError, ConfigError
from kvq_calib.model.inspect import inspect_model
from kvq_calib.schema.recipe import calibration_config

pytestmark = pytest.mark.model

FIT = ("learn=null", "allocation.context=65536")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def generated(model, windows=3, seqlen=40, repeating=0, **changes):
    settings = {"prefix": (), "vocabulary": 128, "seed": 0, **changes}
    text = SelfGeneratedText(windows, repeating, seqlen, **settings)
    for batch in range(len(text.ids)):
        text.generate(model, batch)
    return text


def run(model, recipes, windows=None, **options):
    windows = windows or TokenWindows(token_ids(4, 24, 0), {"dataset": "random", "seqlen": 24})
    return calibrate(model, windows, recipes, model_id="", model_config={}, **options).artifacts


def recipe(*assignments):
    return calibration_config("kvq3", assignments=(*FIT, "allocation.self_generated=1", *assignments))


def test_tokens_that_the_model_does_not_know_are_no_text_of_its():
    text = SelfGeneratedText(1, 0, 24, prefix=(), vocabulary=128, seed=0)
    for token, possible in ((127, True), (128, False), (-1, False)):
        assert text.is_possible({"ids": torch.full_like(text.ids, token)}) == possible


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes(family):
    model = tiny_model(family)
    prompt = token_ids(3, 2, 0)
    text = continue_texts(model, prompt, 5, torch.Generator().manual_seed(0))
    assert text.shape == (3, 7)
    assert torch.equal(text[:, :2], prompt)
    assert int(text.min()) >= 0
    assert int(text.max()) < model.get_input_embeddings().num_embeddings


def test_what_is_written_follows_the_predictions(model):
    """Over many texts a token is as frequent as the model says, on the context it was written in."""
    prompt = token_ids(1, 3, 0).expand(4000, 3)
    text = continue_texts(model, prompt, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for place in (3, 4):
            # The mean over contexts of the predicted distribution is the distribution of what stands there.
            expected = model(input_ids=text[:, :place]).logits[:, -1].softmax(-1).mean(0)
            found = torch.bincount(text[:, place], minlength=len(expected)) / len(text)
            assert float((found - expected).abs().sum()) < 0.2
            assert float((found - expected.roll(1)).abs().sum()) > 0.4


def test_windows_are_documents_one_after_the_other(model, monkeypatch):
    monkeypatch.setattr("kvq_calib.calibrate.self_generated._DOCUMENT_TOKENS", 8)
    text = generated(model)
    assert text.ids.shape == (1, 24, 8)  # fifteen documents fill three windows of forty tokens
    rows = text.windows(3, repeats=False)
    assert rows.shape == (3, 40)
    assert torch.equal(rows.flatten(), text.ids.flatten()[:120])
    assert torch.equal(rows[:, ::8].flatten(), text.beginnings.flatten()[:15])
    more = generated(model, windows=12)
    assert torch.equal(more.windows(12, repeats=False)[:3], rows)
    assert not torch.equal(generated(model, seed=1).windows(3, repeats=False), rows)
    assert torch.equal(generated(model).windows(3, repeats=False), rows)


def test_every_third_document_repeats_pieces_of_two(model, monkeypatch):
    monkeypatch.setattr("kvq_calib.calibrate.self_generated._DOCUMENT_TOKENS", 8)
    text = generated(model, windows=0, repeating=6)
    assert text.ids.shape == (1, 24, 8)  # of thirty documents ten are repeats
    rows = text.windows(6, repeats=True)
    assert rows.shape == (6, 40)
    groups = rows.view(10, 3, 8)
    assert torch.equal(groups[:, :2].flatten(0, 1), text.ids.flatten(0, 1)[:20])
    orders = set()
    for *pair, repeated in groups:
        pieces = [tuple(piece) for piece in torch.cat(pair).view(8, 2).tolist()]
        found = [tuple(piece) for piece in repeated.view(4, 2).tolist()]
        assert all(found.count(piece) <= pieces.count(piece) for piece in found)
        orders.add(tuple(pieces.index(piece) for piece in found))
    assert len(orders) > 5
    assert torch.equal(text.windows(2, repeats=True), rows[:2])
    # The text beside it stays what it is.
    both = generated(model, repeating=6)
    assert torch.equal(both.windows(6, repeats=True), rows)
    assert torch.equal(both.windows(3, repeats=False), generated(model).windows(3, repeats=False))


@given(windows=st.integers(1, 40), seqlen=st.integers(8, 600), prefix=st.sampled_from([(), (7,)]))
def test_there_are_documents_enough(windows, seqlen, prefix):
    for repeats in (False, True):
        counts = (0, windows) if repeats else (windows, 0)
        text = SelfGeneratedText(*counts, seqlen, prefix=prefix, vocabulary=16, seed=0)
        assert text.windows(windows, repeats=repeats).shape == (windows, seqlen)


def test_every_window_begins_as_the_calibration_text_does(model, monkeypatch):
    monkeypatch.setattr("kvq_calib.calibrate.self_generated._DOCUMENT_TOKENS", 13)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    rows = generated(model, prefix=(7,)).windows(3, repeats=False)
    hook.remove()
    assert bool((rows[:, 0] == 7).all())
    prompts = [ids for ids in seen if ids.shape[1] > 1]
    assert all(bool((ids[:, 0] == 7).all()) for ids in prompts)  # each document is written after it
    assert int((rows[:, 1:] == 7).sum()) < 10


def test_statistics_take_it_up(model):
    both = run(model, {"with": recipe(), "without": recipe("allocation.self_generated=0")})
    assert both["with"].to_bytes() != both["without"].to_bytes()
    # Each is what it is alone: nothing of what is written reaches the other, nor KVQuant's recipes.
    assert run(model, {"with": recipe()})["with"].to_bytes() == both["with"].to_bytes()
    assert (
        run(model, {"without": recipe("allocation.self_generated=0")})["without"].to_bytes()
        == both["without"].to_bytes()
    )
    plain = calibration_config("nuq3-1p")
    beside = run(model, {"plain": plain, "with": recipe()})
    assert beside["plain"].to_bytes() == run(model, {"plain": plain})["plain"].to_bytes()
    fewer = run(model, {"with": recipe(), "half": recipe("allocation.self_generated=0.5")})
    assert (
        fewer["half"].to_bytes()
        == run(model, {"half": recipe("allocation.self_generated=0.5")})["half"].to_bytes()
    )
    assert fewer["with"].to_bytes() == both["with"].to_bytes()
    once = recipe("allocation.repeats=false", "allocation.self_generated=0.5")
    beside = run(model, {"with": recipe(), "once": once, "half": recipe("allocation.self_generated=0.5")})
    assert beside["once"].to_bytes() == run(model, {"once": once})["once"].to_bytes()
    assert len({artifact.to_bytes() for artifact in beside.values()}) == 3
    assert {name: beside[name].to_bytes() for name in fewer} == {
        name: artifact.to_bytes() for name, artifact in fewer.items()
    }


def moments_of(model, windows, settings):
    """What the first pass finds under a recipe, and the text it looked at."""
    geometry = inspect_model(model)
    recipe = Recipe("r", settings, geometry, len(windows.ids))
    keys = list(make_fitter(recipe).keys(Stage.THRESHOLDS))
    library, (text,) = TextLibrary(windows, model, 0), {key.view.text for key in keys}
    if settings.allocation.self_generated:
        library.generated = generated(model, windows=0, repeating=4, seqlen=24)
    passes = Passes(
        model, geometry, RunState(), Table(), Checkpoint(None, "", keys), Clock(), lambda *step: None
    )
    passes.observe("thresholds", keys, library.windows(text))
    return [passes.totals.get(key) for key in keys], library.rows(text)


def test_statistics_are_those_of_both_texts(model):
    """What is written counts as any other window does."""
    windows = TokenWindows(token_ids(4, 24, 0), {"dataset": "random", "seqlen": 24})
    mixed, text = moments_of(model, windows, recipe())
    assert torch.equal(text[:1], windows.ids[:1])
    assert text.shape == (2, 24)  # a quarter of both
    repeated = TokenWindows(text.repeat(4, 1), windows.source)
    plain, same = moments_of(model, repeated, recipe("allocation.self_generated=0"))
    assert torch.equal(same, text)
    assert len(mixed) == len(plain) == 4
    for one, other in zip(mixed, plain, strict=True):
        for name, tensor in one.state().items():
            torch.testing.assert_close(tensor, other.state()[name])


def test_learning_takes_it_up(model):
    learned = ("learn={steps: 2, seqlen: 16}", "allocation.context=65536")
    configs = {
        name: calibration_config("kvq3", assignments=(*learned, f"allocation.self_generated={share}"))
        for name, share in (("with", 1), ("without", 0))
    }
    found = run(model, configs)
    assert found["with"].to_bytes() == run(model, configs)["with"].to_bytes()
    assert found["with"].calibration["learning"] != found["without"].calibration["learning"]


def test_predictions_that_are_not_numbers_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(CalibrationError, match="predictions are not finite"):
        run(model, {"r": recipe()})


def test_a_model_that_waits_on_disk_does_not_write(model, monkeypatch):
    monkeypatch.setattr(run_module, "is_offloaded", lambda _: True)
    steps = []
    with pytest.raises(ConfigError, match=r"allocation\.self_generated=0"):
        run(model, {"r": recipe()}, progress=lambda *step: steps.append(step))
    assert not steps
