"""Folds of labelled queries: none shares a passage with another, and all are of about one size."""

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.retrieval.pairs import Pairs, folds_by_passage, split_by_passage


def pairs_of(edges):
    query, document = zip(*sorted(edges), strict=True)
    return Pairs(torch.tensor(query), torch.tensor(document), torch.ones(len(query)))


def test_no_passage_is_in_two_folds_and_folds_are_of_about_one_size():
    rng = np.random.default_rng(0)
    # two queries to a passage, as where an LLM wrote them, and some that chain passages together
    edges = {(index, index // 2) for index in range(200)}
    edges |= {(int(index), (int(index) // 2 + 1) % 100) for index in rng.choice(200, 20, replace=False)}
    pairs, held_queries = pairs_of(edges), []
    for training, held in folds_by_passage(pairs, 5):
        assert len(training) + len(held) == len(pairs)
        assert not set(training.document.tolist()) & set(held.document.tolist())
        assert not set(training.query.tolist()) & set(held.query.tolist())
        assert len(held) == pytest.approx(len(pairs) / 5, abs=6)
        held_queries += held.query.unique().tolist()
    assert sorted(held_queries) == list(range(200))


def test_queries_that_all_share_passages_are_parted_one_by_one():
    edges = {(index, 0) for index in range(20)} | {(index, 1 + index) for index in range(20)}
    for training, held in folds_by_passage(pairs_of(edges), 5):
        assert len(held.query.unique()) == 4
        # the common passage is held out with them
        assert 0 not in training.document.tolist()
        assert len(training) == 16


def test_too_few_queries_are_refused():
    with pytest.raises(InvalidInput, match="4 labelled queries"):
        folds_by_passage(pairs_of({(index, index) for index in range(4)}), 5)
    with pytest.raises(InvalidInput, match="leaves 0"):
        folds_by_passage(pairs_of({(index, 0) for index in range(6)}), 5)


def test_of_few_passages_there_are_as_many_folds():
    parts = folds_by_passage(pairs_of({(index, index % 4) for index in range(40)}), 5)
    assert sorted(int(held.document.unique()) for _, held in parts) == [0, 1, 2, 3]


def test_a_text_under_several_ids_is_one_passage():
    # each text twice: pair i asks for document 2 i or its copy 2 i + 1
    pairs = pairs_of({(index, index) for index in range(80)})
    copies = torch.arange(80) // 2 * 2
    parts = [*folds_by_passage(pairs, 5, copies=copies), split_by_passage(pairs, 0.2, copies=copies)]
    for training, held in parts:
        assert not set(copies[training.document].tolist()) & set(copies[held.document].tolist())
        assert len(held) == pytest.approx(16, abs=2)
    apart = [set(copies[t.document].tolist()) & set(copies[h.document].tolist()) for t, h in folds_by_passage(pairs, 5)]
    assert any(apart)


def test_grades_are_looked_up_by_query_and_document():
    pairs = Pairs(torch.tensor([0, 0, 3]), torch.tensor([5, 2, 7]), torch.tensor([1.0, 2.0, 3.0]))
    found = pairs.grades(torch.tensor([3, 0, 9]), torch.tensor([2, 7, 5, 11]))
    assert found.tolist() == [[0, 3, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]
    # in any order, and more than once
    again = pairs.grades(torch.tensor([0, 3, 0]), torch.tensor([7, 2, 2]))
    assert again.tolist() == [[0, 2, 2], [3, 0, 0], [0, 2, 2]]
