from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from models_zoo import tiny_model

from kvq_calib.errors import ConfigError
from kvq_calib.evaluate import passkey
from kvq_calib.evaluate.passkey import PasskeyCell, PasskeyConfig, make_trial, measure_passkey, passes


def text(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids[0].tolist()))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_trial_has_the_length_the_key_and_the_question(tokenizer, depth):
    trial = make_trial(tokenizer, 600, depth, 48213)
    prompt = text(tokenizer, trial.prompt)
    assert trial.prompt.shape == (1, 600)
    assert text(tokenizer, trial.answer) == " 48213"
    assert prompt.count("48213") == 2
    assert prompt.endswith("The pass key is")
    room = 600 - len(passkey._NEEDLE.format(key=48213)) - len(passkey._QUESTION)
    assert prompt.index("Remember this") == round(depth * room)


def test_a_beginning_of_sequence_token_stands_first_where_the_tokenizer_adds_one(tokenizer, bos_tokenizer):
    with_bos, without = (make_trial(t, 300, 0.0, 12345).prompt[0, 0] for t in (bos_tokenizer, tokenizer))
    assert with_bos == bos_tokenizer.bos_token_id
    assert without != tokenizer.bos_token_id


def test_shortest_text_is_named_and_works(tokenizer):
    with pytest.raises(ConfigError, match=r"50 tokens are too few .* use (\d+) or more") as caught:
        make_trial(tokenizer, 50, 0.5, 12345)
    shortest = int(str(caught.value).split("use ")[1].split()[0])
    assert make_trial(tokenizer, shortest, 0.5, 12345).prompt.shape[1] == shortest


def test_depth_outside_the_text(tokenizer):
    with pytest.raises(ConfigError, match=r"depth 1\.5"):
        make_trial(tokenizer, 300, 1.5, 12345)


class Parrot:
    """A model that expects to be asked once the whole prompt was read, and then knows the answer."""

    def __init__(self, trial, correct=True):
        self.trial, self.correct, self.read, self.calls = trial, correct, [], []
        self.device = torch.device("cpu")

    def __call__(self, input_ids, logits_to_keep=0, **cache):
        self.read += input_ids[0].tolist()
        self.calls.append(input_ids.shape[1])
        logits = torch.zeros(1, input_ids.shape[1], 256)
        if not logits_to_keep:
            said = self.trial.answer[0].clone()
            said[-1] += not self.correct
            logits[0, torch.arange(len(said)), said] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("correct", [True, False])
def test_the_prompt_goes_in_chunks_and_every_answer_token_counts(tokenizer, correct):
    trial = make_trial(tokenizer, 300, 0.5, 55555)
    model = Parrot(trial, correct)
    assert passes(model, object(), trial, chunk=128) is correct
    assert model.calls == [128, 128, 43, 6]
    assert model.read == [*trial.prompt[0].tolist(), *trial.answer[0, :-1].tolist()]


@pytest.mark.model
def test_a_model_that_cannot_retrieve_says_nothing_about_an_artifact(tokenizer):
    model = tiny_model("llama")
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    seen = []
    cells = measure_passkey(
        model, tokenizer, {"a": artifact}, PasskeyConfig([260, 280], [0.5], trials=1), lambda *told: seen.append(told)
    )  # fmt: skip
    assert [(cell.length, cell.baseline, cell.rate("a")) for cell in cells] == [
        (260, 0, None),
        (280, 0, None),
    ]
    assert seen == [("baseline", 1, 4), ("a", 2, 4), ("baseline", 3, 4), ("a", 4, 4)]


@pytest.mark.model
def test_an_artifact_is_judged_on_what_the_model_passes(tokenizer, monkeypatch):
    model = tiny_model("llama")
    implementation = model.config._attn_implementation
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    outcomes = iter([True, True, False, True, False])  # baseline, artifact, baseline, baseline, artifact
    caches = []

    def fake(model, cache, trial, chunk):
        caches.append(type(cache).__name__)
        return next(outcomes)

    monkeypatch.setattr(passkey, "passes", fake)
    (cell,) = measure_passkey(model, tokenizer, {"a": artifact}, PasskeyConfig([300], [0.0], trials=3))
    assert cell == PasskeyCell(300, 0.0, 3, 2, {"a": 1})
    assert cell.as_dict()["rates"] == {"a": 0.5}
    assert caches == ["DynamicCache", "KVQCache", "DynamicCache", "DynamicCache", "KVQCache"]
    assert model.config._attn_implementation == implementation


@pytest.mark.model
def test_more_tokens_than_the_model_allows(tokenizer):
    with pytest.raises(ConfigError, match="more than the model's 2048"):
        measure_passkey(tiny_model("llama"), tokenizer, {}, PasskeyConfig([2048], [0.5], trials=1))
