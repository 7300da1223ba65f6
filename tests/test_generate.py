"""Continuations through caches, and how far they are from a reference."""

from __future__ import annotations

import ast
import difflib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from hypothesis import given
from hypothesis import strategies as st
from models_zoo import tiny_model

from kvq_calib.cli.evaluate import generate as command
from kvq_calib.errors import ConfigError, ModelError
from kvq_calib.evaluate import generate, generate_prompts
from kvq_calib.evaluate.generate import continuations, deviation, edit_distance, measure_generate
from kvq_calib.evaluate.generate_prompts import TASKS, GenerateConfig, make_prompts

TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=12)
SHORT = {"texts": 2, "length": 300, "tokens": 6}


def recursive_distance(a, b):
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return recursive_distance(a[:-1], b[:-1])
    return 1 + min(recursive_distance(*cut) for cut in ((a[:-1], b), (a, b[:-1]), (a[:-1], b[:-1])))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("abcdef", "", 6), ("", "ab", 2), ("ab", "ba", 2)],
)  # fmt: skip
def test_edit_distance_of_words(a, b, distance):
    assert edit_distance([*map(ord, a)], [*map(ord, b)]) == distance


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_edit_distance_is_what_its_definition_says(a, b):
    assert edit_distance(a, b) == recursive_distance(a, b)


@given(TOKENS, TOKENS)
def test_what_a_deviation_says(a, b):
    found = deviation(a, b)
    assert found.same == (a == b) == (found.edit_distance == 0)
    assert a[: found.first_difference] == b[: found.first_difference]
    if found.first_difference < min(len(a), len(b)):
        assert a[found.first_difference] != b[found.first_difference]
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    kept = sum(block.size for block in blocks)
    assert abs(len(a) - len(b)) <= found.edit_distance * max(len(a), len(b)) <= len(a) + len(b) - 2 * kept
    assert 0 <= found.agreement <= 1


def test_a_deviation_by_hand():
    found = deviation([1, 2, 3, 4], [1, 2, 9, 4, 5, 6, 7, 8])
    assert (found.agreement, found.first_difference, found.edit_distance) == (0.75, 2, 5 / 8)
    assert (found.same, found.length) == (False, 4)
    assert deviation([1, 2], [1]).first_difference == 1


def test_the_command_knows_all_tasks():
    assert command.TASKS == GenerateConfig().tasks == tuple(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_their_length_and_differ(tokenizer, bos_tokenizer, task):
    config = GenerateConfig(texts=3, length=400)
    prompts = make_prompts(tokenizer, task, config)
    assert prompts.shape == (3, 400)
    assert len({tuple(row) for row in prompts.tolist()}) == 3
    assert torch.equal(prompts, make_prompts(tokenizer, task, config))
    with_bos = make_prompts(bos_tokenizer, task, config)
    assert with_bos.shape == (3, 400)
    assert torch.equal(with_bos[:, 1:], prompts[:, :-1])


def prompt(tokenizer, task, length=400):
    ids = make_prompts(tokenizer, task, GenerateConfig(texts=1, length=length))[0]
    return "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))


def test_sums_are_right(tokenizer):
    lines = prompt(tokenizer, "arithmetic").splitlines()[:-1]
    assert len(lines) > 10
    for line in lines:
        left, right = line.split(" = ")
        tree = ast.parse(left, mode="eval").body
        a, b = tree.left.value, tree.right.value
        assert int(right) == {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(tree.op)]


def test_a_copy_has_begun_and_is_not_done(tokenizer):
    listed, copied = prompt(tokenizer, "copying").removeprefix("A list: ").split("\nThe same list again: ")
    assert listed.startswith(copied)
    assert 0 < len(copied) < 0.3 * len(listed)


def test_patterns_come_back(tokenizer):
    days = [line.split(": ")[1] for line in prompt(tokenizer, "patterns", 700).splitlines()[:-1]]
    assert any(all(day == days[place % period] for place, day in enumerate(days)) for period in range(3, 16))


def test_code_is_of_the_standard_library(tokenizer):
    text = prompt(tokenizer, "code")
    sources = (find_spec(name).origin for name in generate_prompts._MODULES.split() if find_spec(name))
    known = (Path(file).read_text(encoding="utf-8") for file in sources)
    # The tokenizer of these tests has no word for what is not ASCII.
    assert any(text in "".join(c if c.isascii() else "<unk>" for c in source) for source in known)


def test_code_of_no_such_length(tokenizer):
    with pytest.raises(ConfigError, match="smaller --length"):
        make_prompts(tokenizer, "code", GenerateConfig(texts=1, length=10_000_000))


@pytest.mark.model
def test_continuations_are_those_of_generate(tokenizer):
    model = tiny_model("llama")
    prompts = make_prompts(tokenizer, "patterns", GenerateConfig(texts=3, length=64))
    said = model.generate(prompts, max_new_tokens=9, do_sample=False)[:, 64:].tolist()
    config = GenerateConfig(tokens=9, chunk=20)

    def made(ends):
        return continuations(model, generate.DynamicCache(), prompts, config, frozenset(ends))

    assert made(()) == said
    end = said[0][4]
    assert made({end}) == [row[: row.index(end) + 1] if end in row else row for row in said]
    assert made({row[0] for row in said}) == [row[:1] for row in said]


@pytest.mark.model
def test_a_cache_that_changes_nothing_deviates_nowhere(tokenizer, monkeypatch):
    """And the batches are those that were asked for."""
    model = tiny_model("llama")
    artifact = artifact_for(model, RECIPES["dense2"])
    monkeypatch.setattr(generate, "KVQCache", lambda artifact, model: Forgetful())
    config = GenerateConfig(("patterns", "arithmetic"), batch=2, **{**SHORT, "texts": 3})
    told, kept = [], []
    cells = measure_generate(
        model, tokenizer, {"a": artifact}, config, lambda *step: told.append(step), lambda cells: kept.append(len(cells))
    )  # fmt: skip
    assert [(cell.task, cell.name, len(cell.deviations)) for cell in cells] == [
        ("patterns", "a", 3),
        ("arithmetic", "a", 3),
        ("all", "a", 6),
    ]
    assert all(one.same and one.agreement == 1 for cell in cells for one in cell.deviations)
    assert told[-1] == ("continuations", 8, 8)
    assert kept == [2, 2, 3, 3]


class Forgetful(generate.DynamicCache):
    """Begins anew when it is told to, as a packed cache does."""

    def reset(self):
        self.__init__()


@pytest.mark.model
def test_a_packed_cache_deviates_and_begins_anew_for_every_batch(tokenizer):
    model = tiny_model("llama")
    artifact = artifact_for(model, RECIPES["dense2"])
    one, two = (
        measure_generate(
            model, tokenizer, {"a": artifact}, GenerateConfig(("copying",), batch=batch, **SHORT)
        )
        for batch in (1, 2)
    )
    assert one[0].to_json() == two[0].to_json()
    assert 0 < one[0].mean("edit_distance")[0] <= 1
    assert one[0].to_json()["agreement"]["standard_error"] is not None


@pytest.mark.model
def test_more_tokens_than_the_model_allows(tokenizer):
    with pytest.raises(ModelError, match="2048"):
        measure_generate(tiny_model("llama"), tokenizer, {}, GenerateConfig(length=2000, tokens=49))
