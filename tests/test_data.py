import gzip
import hashlib
import itertools
import json
import logging

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_calib.data import load_windows
from kvq_calib.data import python_docs as docs
from kvq_calib.data.windows import _starts
from kvq_calib.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(LETTERS[i % 26] for i in range(107)))
    return path


def decode(tokenizer, row):
    return "".join(tokenizer.convert_ids_to_tokens(row.tolist()))


def test_evaluation_cuts_consecutive_windows_from_the_start(text, tokenizer):
    windows = load_windows(str(text), tokenizer, samples=3, seqlen=10, split="evaluation")
    assert windows.ids.dtype == torch.int64
    assert "".join(decode(tokenizer, row) for row in windows.ids) == text.read_text()[:30]
    everything = load_windows(str(text), tokenizer, samples=None, seqlen=10, split="evaluation")
    assert everything.ids.shape == (10, 10)
    assert everything.source == {
        "dataset": "text.txt",
        "split": "evaluation",
        "convention": "consecutive",
        "seed": None,
        "seqlen": 10,
        "windows": 10,
        "requested": None,
        "bos": None,
        "tokens": 107,
        "sha256": hashlib.sha256(everything.ids.numpy().astype("<i8").tobytes()).hexdigest(),
    }


def test_calibration_spreads_seeded_windows_without_overlap(text, tokenizer):
    def load(seed):
        return load_windows(str(text), tokenizer, samples=4, seqlen=10, seed=seed)

    first, same, other = load(0), load(0), load(1)
    assert torch.equal(first.ids, same.ids)
    assert first.source == same.source
    assert not torch.equal(first.ids, other.ids)
    starts = [text.read_text().index(decode(tokenizer, row)) for row in first.ids]
    assert first.source["seed"] == 0
    assert all(start % 2 == 0 for start in starts)
    assert len({decode(tokenizer, row) for row in first.ids}) == 4


def test_fewer_windows_than_asked_are_reported(text, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="kvq_calib"):
        windows = load_windows(str(text), tokenizer, samples=16, seqlen=25)
    assert windows.ids.shape == (4, 25)
    assert (windows.source["windows"], windows.source["requested"], windows.source["seed"]) == (4, 16, None)
    assert [record.getMessage() for record in caplog.records] == [
        f"{text} has 4 windows of 25 tokens, not the 16 asked for"
    ]


def test_text_shorter_than_a_window_is_refused(text, tokenizer):
    with pytest.raises(DataError, match="has 107 tokens, less than one window of 108"):
        load_windows(str(text), tokenizer, samples=1, seqlen=108)
    assert load_windows(str(text), tokenizer, samples=1, seqlen=107).ids.shape == (1, 107)


def test_every_window_starts_with_bos_where_the_tokenizer_adds_one(text, bos_tokenizer):
    windows = load_windows(str(text), bos_tokenizer, samples=3, seqlen=10, split="evaluation")
    assert windows.ids.shape == (3, 10)
    assert windows.ids[:, 0].tolist() == [1, 1, 1]
    assert windows.source["bos"] == 1
    assert "".join(decode(bos_tokenizer, row[1:]) for row in windows.ids) == text.read_text()[:27]
    assert bos_tokenizer.model_max_length == 64  # borrowed while long texts are tokenized, and put back


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 400),
    body=st.integers(1, 50),
    samples=st.none() | st.integers(1, 20),
    seed=st.integers(0, 99),
    cut=st.sampled_from(["consecutive", "random", "spread"]),
)
def test_windows_lie_within_the_text(total, body, samples, seed, cut):
    if total < body:
        return
    starts = _starts(total, body, samples, seed, cut)
    assert starts == _starts(total, body, samples, seed, cut)
    assert all(0 <= start <= total - body for start in starts)
    if cut != "random":
        assert all(b - a >= body for a, b in itertools.pairwise(starts))
        assert len(starts) == min(total // body, samples or total)
    if cut == "consecutive":
        assert starts == list(range(0, body * len(starts), body))


def test_unknown_names_and_empty_folders_are_refused(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match="no such data set or file: wikitext3; use wikitext2, c4, python-docs"
    ):
        load_windows("wikitext3", tokenizer, samples=1, seqlen=4)
    with pytest.raises(DataError, match=r"holds no \.txt"):
        load_windows(str(tmp_path), tokenizer, samples=1, seqlen=4)
    with pytest.raises(DataError, match="at least one window of two tokens"):
        load_windows(str(tmp_path), tokenizer, samples=1, seqlen=1)


def paragraphs(part):
    return {" ".join(p.split()) for topic in docs.python_docs(part) for p in topic.split("\n\n") if p.strip()}


def test_python_docs_are_split_without_a_shared_paragraph(tokenizer):
    calibration, evaluation = paragraphs("calibration"), paragraphs("evaluation")
    assert not calibration & evaluation
    sizes = [sum(map(len, part)) for part in (calibration, evaluation)]
    assert min(sizes) > 50_000  # windows enough for a demonstration on either side
    first = load_windows("python-docs", tokenizer, samples=4, seqlen=256)
    assert torch.equal(first.ids, load_windows("python-docs", tokenizer, samples=4, seqlen=256).ids)
    assert first.source["dataset"] == f"python-docs {docs.python_docs_version()}"


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_hub_data_without_network_names_the_alternatives(name, split, tokenizer, capsys):
    verbosity = datasets.logging.get_verbosity()
    with pytest.raises(DataError, match=rf"cannot load {name} from the hub .*python-docs") as caught:
        load_windows(name, tokenizer, samples=1, seqlen=8, split=split)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")
    assert datasets.logging.get_verbosity() == verbosity


def test_wikitext_lines_are_joined_and_drawn_at_random(tokenizer, monkeypatch):
    asked = []

    def fake(path, name, split):
        asked.append((path, name, split))
        return {"text": ["", LETTERS, "xyz" * 20]}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    joined = "\n\n" + LETTERS + "\n\n" + "xyz" * 20
    windows = load_windows("wikitext2", tokenizer, samples=5, seqlen=12, seed=3)
    assert all(decode(tokenizer, row) in joined for row in windows.ids)
    assert (windows.source["convention"], windows.source["seed"]) == ("random", 3)
    other = load_windows("wikitext2", tokenizer, samples=5, seqlen=12, seed=4)
    assert not torch.equal(windows.ids, other.ids)
    evaluation = load_windows("wikitext2", tokenizer, samples=2, seqlen=12, split="evaluation")
    assert "".join(decode(tokenizer, row) for row in evaluation.ids) == joined[:24]
    assert [split for *_, split in asked] == ["train", "train", "test"]
    assert asked[0][:2] == ("Salesforce/wikitext", "wikitext-2-raw-v1")


def test_c4_takes_long_documents_or_joins_the_first(tokenizer, monkeypatch, tmp_path):
    texts = ["short", LETTERS, "abc", LETTERS[::-1] * 2, "0123456789" * 3]
    shard = tmp_path / "c4.json.gz"
    with gzip.open(shard, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    asked = []

    def fake(path, data_files, split, streaming):
        asked.append((path, data_files, split, streaming))
        with gzip.open(shard, "rt") as file:
            return [json.loads(line) for line in file]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    windows = load_windows("c4", tokenizer, samples=2, seqlen=20)
    assert [decode(tokenizer, row) in text for row, text in zip(windows.ids, texts[1::2], strict=True)] == [
        True
    ] * 2
    assert windows.source["tokens"] is None
    evaluation = load_windows("c4", tokenizer, samples=2, seqlen=20, split="evaluation")
    assert "".join(decode(tokenizer, row) for row in evaluation.ids) == " ".join(texts)[:40]
    assert asked[0] == ("allenai/c4", {"train": "en/c4-train.00000-of-01024.json.gz"}, "train", True)
    assert asked[1][2] == "validation"
    with pytest.raises(DataError, match="no document of 500 tokens"):
        load_windows("c4", tokenizer, samples=2, seqlen=500)


def test_both_published_conventions_can_be_chosen(text, tokenizer):
    windows = load_windows(str(text), tokenizer, samples=30, seqlen=10, convention="random")
    assert windows.ids.shape == (30, 10)  # more than the ten that do not overlap
    consecutive = load_windows(str(text), tokenizer, samples=2, seqlen=10, convention="consecutive")
    assert np.array_equal(
        consecutive.ids, load_windows(str(text), tokenizer, samples=2, seqlen=10, split="evaluation").ids
    )
