"""Texts that hide something, and what caches find in them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from models_zoo import tiny_model

from kvq_calib.cli.evaluate import recall as command
from kvq_calib.errors import ConfigError
from kvq_calib.evaluate import decode, recall
from kvq_calib.evaluate.recall import RecallCell, answered, measure_recall
from kvq_calib.evaluate.recall_texts import TASKS, RecallConfig, make_text

SHORT = {"tasks": ("passkey",), "lengths": (300,), "texts": 1}


def words(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids[0].tolist()))


def test_the_command_knows_all_tasks():
    assert command.TASKS == RecallConfig().tasks == tuple(TASKS)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_text_has_its_length_and_hides_what_is_asked_for(tokenizer, number):
    config = RecallConfig(needles=6, hops=2)
    made = make_text(tokenizer, 3000, number, config)
    text = words(tokenizer, made.ids)
    assert made.ids.shape[1] + max(q.prompt.shape[1] for q in made.questions) == 3000
    kinds = [question.kind for question in made.questions]
    hops = ["variables, 0 hops", "variables, 1 hop", "variables, 2 hops"]
    assert kinds == ["passkey", *["key-value"] * 6, *[h for h in hops for _ in range(2)], "common-words"]
    values = dict(re.findall(r"VAR (\w\w) = (?:VAR )?(\w+)\.", text))
    for question in made.questions:
        asked, answer = words(tokenizer, question.prompt), words(tokenizer, question.answer).strip()
        if question.kind == "passkey":
            assert text.count(answer) == 2
        elif question.kind == "key-value":
            assert f"{asked.split('? ')[1]} {answer}." in text
        elif question.kind == "common-words":
            assert text.count(f"is {answer}.") == 8
        else:
            steps, value = -1, asked.split()[1]
            while value in values:
                steps, value = steps + 1, values[value]
            assert (value, f"{steps} hop") == (answer, question.kind.split(", ")[1].removesuffix("s"))


def test_needles_stand_in_equal_parts_and_a_single_one_moves(tokenizer):
    config = RecallConfig(tasks=("passkey", "key-value"), texts=4, needles=5)
    for number in range(4):
        made = make_text(tokenizer, 1500, number, config)
        assert made.questions[0].depth == (number + 0.5) / 4
        assert [int(5 * q.depth) for q in made.questions[1:]] == [0, 1, 2, 3, 4]
    text = words(tokenizer, make_text(tokenizer, 1500, 3, RecallConfig(tasks=("passkey",), texts=4)).ids)
    assert 0.8 < text.index("Remember this") / len(text) < 0.9


def test_texts_are_the_same_for_the_same_seed_alone(tokenizer):
    def ids(**settings):
        return make_text(tokenizer, 2500, 1, RecallConfig(**settings)).ids

    assert torch.equal(ids(), ids())
    assert not torch.equal(ids(), ids(seed=1))


def test_a_beginning_of_sequence_token_stands_first_where_the_tokenizer_adds_one(tokenizer, bos_tokenizer):
    config = RecallConfig(**SHORT)
    with_bos, without = (make_text(t, 300, 0, config) for t in (bos_tokenizer, tokenizer))
    assert with_bos.ids[0, 0] == bos_tokenizer.bos_token_id
    assert without.ids[0, 0] != tokenizer.bos_token_id
    assert with_bos.ids.shape == without.ids.shape


def test_the_shortest_text_is_named_and_works(tokenizer):
    with pytest.raises(ConfigError, match=r"64 tokens are too few .* use --length (\d+)") as caught:
        make_text(tokenizer, 64, 0, RecallConfig())
    shortest = int(str(caught.value).split("--length ")[1].split()[0])
    assert shortest > 64
    make_text(tokenizer, shortest, 0, RecallConfig())


class Held(list):
    """A cache: the tokens."""

    def get_seq_length(self):
        return len(self)


class Parrot:
    """A model that has read the text once, and knows the answers to some questions."""

    def __init__(self, text, knows):
        self.text, self.knows, self.calls = text, knows, []
        self.device = torch.device("cpu")

    def __call__(self, input_ids, logits_to_keep=0, **cache):
        (held,) = cache.values()
        self.calls.append(input_ids.shape[1])
        held += input_ids[0].tolist()
        logits = torch.zeros(1, input_ids.shape[1], 256)
        if not logits_to_keep:
            for place, question in enumerate(self.text.questions):
                fed = torch.cat((self.text.ids, question.prompt, question.answer[:, :-1]), dim=1)[0].tolist()
                if held == fed:
                    said = question.answer[0].clone()
                    said[-1] += place not in self.knows
                    logits[0, torch.arange(-len(said), 0), said] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("knows", [set(), {0, 3}, {0, 1, 2, 3, 4}])
def test_a_text_is_read_once_and_every_question_sees_the_text_alone(tokenizer, knows, monkeypatch):
    monkeypatch.setattr(
        decode, "next_pass", lambda model, ids, cache, length: {"input_ids": ids, "cache": cache}
    )
    text = make_text(tokenizer, 700, 0, RecallConfig(tasks=("passkey", "key-value"), needles=4))
    model = Parrot(text, knows)
    assert answered(model, Held(), text, chunk=256) == [place in knows for place in range(5)]
    tokens = text.ids.shape[1]
    assert model.calls[:3] == [256, 256, tokens - 512]
    assert len(model.calls) == 8


@pytest.mark.model
def test_all_caches_answer_the_same_questions(tokenizer, monkeypatch):
    model = tiny_model("llama")
    implementation = model.config._attn_implementation
    artifact = artifact_for(model, RECIPES["nuq4-1p"])
    outcomes = iter([[True, False], [True, True], [True, True], [False, True]])
    caches, told, kept = [], [], []

    def fake(model, cache, text, chunk):
        caches.append(type(cache).__name__)
        return next(outcomes)

    monkeypatch.setattr(recall, "answered", fake)
    config = RecallConfig(tasks=("key-value",), lengths=(300,), texts=2, needles=2)
    (cell,) = measure_recall(
        model, tokenizer, {"a": artifact}, config, lambda *step: told.append(step),
        lambda cells: kept.append([len(each.baseline) for each in cells]),
    )  # fmt: skip
    assert (cell.kind, cell.length, cell.baseline) == ("key-value", 300, [True, False, True, True])
    assert cell.found == {"a": [True, True, False, True]}
    assert cell.changes("a") == (1, 1)
    assert cell.difference("a")[0] == 0
    assert caches == ["DynamicCache", "KVQCache"] * 2
    assert told == [("texts", done, 4) for done in (1, 2, 3, 4)]
    assert kept == [[2], [4]]
    assert model.config._attn_implementation == implementation


@pytest.mark.model
def test_a_question_changes_nothing_for_the_next(tokenizer):
    """Asked alone and after others, through a cache that packs while it answers."""
    model = tiny_model("llama")
    cache_of = recall.KVQCache
    artifact = artifact_for(model, RECIPES["dense2"])
    text = make_text(tokenizer, 430, 0, RecallConfig(tasks=("key-value",), needles=3))
    said = []

    def spy(model, cache, ids, chunk, through=recall.logits_through):
        logits = through(model, cache, ids, chunk)
        said.append(logits)
        return logits

    with pytest.MonkeyPatch.context() as patch, recall.attached(model):
        patch.setattr(recall, "logits_through", spy)
        cache = cache_of(artifact, model)
        answered(model, cache, text, 64)
        assert cache.get_seq_length() == text.ids.shape[1]
        together, said[:] = list(said), []
        cache.reset()
        answered(model, cache, recall.RecallText(text.ids, text.questions[2:]), 64)
    assert torch.equal(said[0], together[2])


def test_a_cell_says_how_sure_it_is():
    cell = RecallCell("passkey", 300, [0.5] * 10, [True] * 10, {"a": [True] * 9 + [False]})
    content = cell.to_json()
    assert content["unquantized"]["share"] == 1.0
    a = content["artifacts"]["a"]
    assert (a["share"], a["lost"], a["gained"]) == (0.9, 1, 0)
    assert a["difference"] == pytest.approx(-0.1)
    assert a["difference_interval"][0] < -0.1 < 0 < a["difference_interval"][1]


@pytest.mark.model
def test_more_tokens_than_the_model_allows(tokenizer):
    with pytest.raises(ConfigError, match="more than the model's 2048"):
        measure_recall(tiny_model("llama"), tokenizer, {}, RecallConfig(**{**SHORT, "lengths": (2048,)}))
