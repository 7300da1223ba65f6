"""Decode attention for many sequences in one pool: wrong arguments are refused before a pointer is passed."""

from __future__ import annotations

import pytest
import torch
from artifact_factory import random_artifact
from test_vllm_pages import GEOMETRY, RECIPES, Pool

from kvq_calib.native.loader import library
from kvq_calib.native.pooled import PooledSequences


@pytest.fixture
def pool() -> Pool:
    if library() is None:
        pytest.skip("no native library is there")
    return Pool(random_artifact(GEOMETRY, RECIPES["scalar"]), 0, 8, "native")


@pytest.mark.parametrize(
    ("lengths", "tables", "words"),
    [
        ([0], [[0, 1]], "no token"),
        ([300], [[0]], "fewer pages"),
        ([300], [[0, 8, 1]], "not one of 8"),
        ([300], [[-1, 0, 1]], "not one of 8"),
    ],
)
def test_tables_that_do_not_fit_the_pool_are_refused(lengths, tables, words):
    with pytest.raises(ValueError, match=words):
        PooledSequences(lengths, tables, 1, 8)


def test_a_page_ahead_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="not one of 8"):
        print(PooledSequences([3], [[0, 9]], 1, 8).ahead)


def test_first_tokens_are_hidden_where_they_are_packed_and_nowhere_else():
    sequences = PooledSequences([70, 20, 256], [[0, 1], [2, 3], [4, 5]], 33, 8)
    first, second = sequences.seen[:8].tolist(), sequences.seen[8:].tolist()
    assert first == [0, -2, 0, 0, 0, 0, 0, 0]
    assert second == [0, -2, -1, -1, -1, -1, -1, -1]
    assert sequences.sinks.tolist() == [33, 0, 33]
    assert sequences.tail.tolist() == [6, 20, 0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda query, memory: (query[:, :3].contiguous(), memory), "heads do not fit"),
        (lambda query, memory: (query.double(), memory), "query: is torch.float64"),
        (lambda query, memory: (query[:1], memory), "query: is"),
        (lambda query, memory: (query, memory[:, :-64].contiguous()), "pool: is"),
        (lambda query, memory: (query, memory[:7]), "pool: is"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(pool, changed, words):
    native = pool.layer._native
    assert native is not None
    sequences = PooledSequences([3, 40], [[0, 1], [2, 3]], 1, 8)
    query, memory = changed(torch.randn(2, 4, 16), pool.pool)
    with pytest.raises(ValueError, match=words):
        native._kernel.attend(sequences, memory, query, 1.0)
