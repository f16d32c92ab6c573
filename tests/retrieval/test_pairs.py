"""Batches hold each passage once and no hidden positive, splits share nothing, nDCG is trec_eval's."""

import math

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.retrieval.loss import ranking_loss
from noisewise.retrieval.pairs import (
    PairRows,
    Pairs,
    first_copies,
    hard_negatives,
    ndcg,
    split_by_passage,
)

ir_measures = pytest.importorskip("ir_measures")


def pairs(*triples):
    query, document, grade = zip(*triples, strict=True)
    return Pairs(torch.tensor(query), torch.tensor(document), torch.tensor(grade, dtype=torch.float32))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def test_judgements_become_positions():
    qrels = {"b": {"y": 2, "x": 0}, "a": {"x": 1}, "elsewhere": {"y": 1}}
    found = Pairs.of(qrels, ["a", "b"], ["x", "y"])
    assert sorted(zip(found.query.tolist(), found.document.tolist(), found.grade.tolist(), strict=True)) == [
        (0, 0, 1.0), (1, 1, 2.0)
    ]  # fmt: skip
    assert found.grades(torch.tensor([1, 0]), torch.tensor([1, 0])).tolist() == [[2.0, 0.0], [0.0, 1.0]]
    assert len(Pairs.of({}, ["a"], ["x"])) == 0
    with pytest.raises(InvalidInput, match="'z'"):
        Pairs.of({"a": {"z": 1}}, ["a"], ["x"])
    with pytest.raises(InvalidInput, match="pair 1"):
        pairs((0, 0, 1), (0, 1, 0))


def test_two_questions_of_one_passage_cost_what_they_cost_over_the_distinct_candidates():
    known = pairs((0, 3, 1), (1, 3, 1), (2, 5, 1), (3, 1, 1))
    rows = PairRows(known, known, torch.arange(8))
    batch = rows[torch.tensor([0, 1, 2])]
    assert batch.documents.tolist() == [3, 5]
    scores = unit(4, 8).double()
    loss = ranking_loss(scores[batch.queries][:, batch.documents], batch.target.double())
    separately = []
    for query, document in ((0, 3), (1, 3), (2, 5)):
        s = scores[query, [3, 5]]
        separately.append(float(s.logsumexp(0) - scores[query, document]))
    assert float(loss) == pytest.approx(sum(separately) / 3, abs=1e-12)


def test_a_known_positive_of_another_pair_is_never_a_negative():
    known = pairs((0, 0, 1), (0, 1, 2), (1, 1, 1), (2, 2, 1))
    rows = PairRows(known[torch.tensor([0, 2, 3])], known, torch.arange(3))
    batch = rows[torch.tensor([0, 1, 2])]
    # document 1 came with query 1, and is relevant to query 0 too, to its degree
    assert batch.target.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 1]]


def test_a_pair_or_passage_drawn_twice_counts_once():
    known = pairs((0, 0, 1), (1, 1, 1))
    rows = PairRows(known, known, torch.arange(2))
    twice, once = rows[torch.tensor([0, 1, 1, 0, 1])], rows[torch.tensor([0, 1])]
    for name in ("queries", "documents", "target"):
        assert torch.equal(getattr(twice, name), getattr(once, name))


def test_copies_of_a_text_are_one_passage():
    copies = first_copies(["a", "b", "a", "c", "b"])
    assert copies.tolist() == [0, 1, 0, 3, 1]
    known = pairs((0, 2, 1), (1, 4, 1), (2, 0, 1))
    batch = PairRows(known, known, copies)[torch.arange(3)]
    assert batch.documents.tolist() == [0, 1]
    assert batch.target.tolist() == [[1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_shares_no_passage_and_no_query(seed):
    # two questions a passage, some of them with two passages
    known = pairs(*((q, q // 2, 1) for q in range(200)), *((q, 99 - q // 2, 2) for q in range(0, 200, 40)))
    training, dev = split_by_passage(known, 0.15, seed)
    assert len(training) + len(dev) == len(known)
    assert abs(len(dev) - 0.15 * len(known)) <= 4
    for name in ("query", "document"):
        assert not set(getattr(training, name).tolist()) & set(getattr(dev, name).tolist())
    again = split_by_passage(known, 0.15, seed)[1]
    assert torch.equal(again.query, dev.query)


def test_a_densely_judged_set_is_split_too():
    known = pairs(*((q, d, 1) for q in range(40) for d in (q, (q + 1) % 40, (q + 2) % 40)))
    training, dev = split_by_passage(known, 0.2)
    for name in ("query", "document"):
        assert not set(getattr(training, name).tolist()) & set(getattr(dev, name).tolist())
    assert len(set(dev.query.tolist())) == 8
    # each dev query has all of its pairs
    assert len(dev) == 24


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InvalidInput, match=r"0\.15"):
        split_by_passage(pairs((0, 0, 1), (1, 0, 1)), 0.15)
    with pytest.raises(InvalidInput, match="share"):
        split_by_passage(pairs((0, 0, 1), (1, 1, 1)), 1.0)


def test_hard_negatives_are_ranked_from_10_to_60_and_well_below_the_positive():
    q, d = unit(30, 6), unit(200, 6, seed=1)
    scores = q @ d.T
    # the positive is the best passage, so that every rank is below it
    known = pairs(*((query, int(scores[query].argmax()), 1) for query in range(20)),
                  *((query, int(scores[query].topk(15).indices[-1]), 1) for query in range(10)))  # fmt: skip
    found = hard_negatives(q, d, known, 4, seed=2)
    assert found.shape == (30, 4)
    assert bool((found[20:] == -1).all())
    rank = scores.argsort(1, descending=True).argsort(1) + 1
    relevant = known.grades(torch.arange(30), torch.arange(200)) > 0
    for query in range(20):
        picked = found[query][found[query] >= 0]
        assert len(picked.unique()) == 4
        assert bool(((rank[query, picked] >= 10) & (rank[query, picked] <= 60)).all())
        assert not bool(relevant[query, picked].any())
        assert bool((scores[query, picked] < 0.95 * scores[query].max()).all())
    assert torch.equal(found, hard_negatives(q, d, known, 4, seed=2))
    assert not torch.equal(found, hard_negatives(q, d, known, 4, seed=3))


def test_without_passages_below_rank_10_there_are_no_hard_negatives():
    q = unit(3, 6)
    known = pairs((0, 0, 1), (1, 1, 1), (2, 2, 1))
    assert bool((hard_negatives(q, unit(9, 6, seed=1), known, 2) == -1).all())
    rows = PairRows(known, known, torch.arange(20), hard_negatives(q, unit(20, 6, seed=1), known, 2))
    batch = rows[torch.tensor([0])]
    assert 0 in batch.documents
    assert len(batch.documents) <= 3


@pytest.mark.parametrize("grades", [(1,), (1, 2, 3)])
@pytest.mark.parametrize("documents", [6, 80])
def test_ndcg_is_that_of_trec_eval(grades, documents):
    queries = 50
    scores = unit(queries, documents)
    chance = uniform(queries, documents, seed=1)
    judged = torch.zeros(queries, documents)
    for index, grade in enumerate(grades):
        judged[chance > 0.8 + 0.2 * index / len(grades)] = grade
    judged[:, 0] = torch.where(judged.sum(1) == 0, 1.0, judged[:, 0])
    qrels = {str(q): {str(d): int(judged[q, d]) for d in range(documents) if judged[q, d]} for q in range(queries)}
    run = {str(q): {str(d): float(scores[q, d]) for d in range(documents)} for q in range(queries)}
    measure = ir_measures.nDCG @ 10
    expected = {m.query_id: m.value for m in ir_measures.iter_calc([measure], qrels, run)}
    found = ndcg(scores, judged)
    assert max(abs(float(found[q]) - expected[str(q)]) for q in range(queries)) < 1e-9


def test_ndcg_of_a_query_without_positives_is_zero():
    assert ndcg(torch.ones(1, 3), torch.zeros(1, 3)).tolist() == [0.0]
    assert float(ndcg(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0.0, 0.0, 1.0]]))) == pytest.approx(
        1 / math.log2(3)
    )
