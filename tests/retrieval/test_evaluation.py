"""Measures are trec_eval's, ties included; exact search is exact; intervals cover."""

import math

import numpy as np
import pytest
import pytrec_eval
import torch

from noisewise.errors import InvalidInput
from noisewise.retrieval.evaluation import Evaluation, evaluate, exact_run, paired_bootstrap

TREC = {"nDCG@10": "ndcg_cut_10", "R@10": "recall_10", "R@100": "recall_100", "Success@5": "success_5", "AP": "map"}


def random_case(seed, queries=40, documents=60, levels=8):
    """Graded judgements and a run with many ties; every fifth query has no positive."""
    generator = np.random.default_rng(seed)
    qrels, run = {}, {}
    for q in range(queries):
        grades = generator.integers(0, 4, size=documents) * (generator.random(documents) < 0.3) * (q % 5 > 0)
        names = [f"d{i}" for i in generator.permutation(documents)]
        qrels[f"q{q}"] = {name: int(grade) for name, grade in zip(names, grades, strict=True)}
        found = generator.permutation(names)[: generator.integers(5, documents)]
        run[f"q{q}"] = {str(name): float(generator.integers(levels)) / levels for name in found}
    return qrels, run


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_trec_eval_on_runs_with_ties(seed):
    qrels, run = random_case(seed)
    positive = {query for query, grades in qrels.items() if any(grades.values())}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {*TREC.values(), "recip_rank"}).evaluate(run)
    ours = evaluate(qrels, run, [*TREC, "RR", "RR@10"])
    for name, trec in (TREC | {"RR": "recip_rank"}).items():
        assert ours.per_query[name].keys() == positive
        for query in positive:
            assert ours.per_query[name][query] == pytest.approx(theirs[query][trec], abs=1e-9)
    for query in positive:
        rank = theirs[query]["recip_rank"]
        assert ours.per_query["RR@10"][query] == pytest.approx(rank if rank >= 0.1 else 0, abs=1e-9)


def test_measures_by_hand():
    # ranked: a (grade 0), b (grade 2), c (no judgement), d (grade 1); e (grade 1) is not found
    qrels = {"q": {"a": 0, "b": 2, "d": 1, "e": 1}}
    run = {"q": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}}
    scores = evaluate(qrels, run, ["nDCG@10", "R@10", "RR@10", "Success@1", "nDCG@2"]).per_query
    best = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert scores["nDCG@10"]["q"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / best)
    # the ideal ranking is cut too
    assert scores["nDCG@2"]["q"] == pytest.approx(2 / math.log2(3) / (2 + 1 / math.log2(3)))
    assert scores["R@10"]["q"] == pytest.approx(2 / 3)
    assert scores["RR@10"]["q"] == 0.5
    assert scores["Success@1"]["q"] == 0


def test_ideal_ranking_is_cut_at_ten():
    qrels = {"q": {f"d{i}": 1 for i in range(200)}}
    run = {"q": {f"d{i}": 1.0 - i / 100 for i in range(10)}}
    assert evaluate(qrels, run, ["nDCG@10"]).mean["nDCG@10"].value == pytest.approx(1)


@pytest.mark.parametrize("measure", ["nDCG@10", "RR@10", "RR", "Success@1", "P@1"])
def test_equal_scores_go_to_the_last_id_in_every_measure(measure):
    run = {"q": {"a": 1.0, "b": 1.0}}
    first, last = ({"q": {"a": a, "b": 1 - a}} for a in (1, 0))
    assert evaluate(last, run, [measure]).mean[measure].value == 1
    assert evaluate(first, run, [measure]).mean[measure].value < 1


@pytest.mark.parametrize(("rank", "value"), [(1, 1), (9, 1 / 9), (10, 0.1), (11, 0)])
def test_reciprocal_rank_is_cut_after_its_rank(rank, value):
    run = {"q": {f"d{i:02d}": -float(i) for i in range(1, 21)}}
    scores = evaluate({"q": {f"d{rank:02d}": 1}}, run, ["RR@10"]).per_query["RR@10"]
    assert scores["q"] == pytest.approx(value)


def test_queries_without_positives_are_skipped_and_missing_ones_count_zero():
    qrels = {"found": {"a": 1}, "nothing relevant": {"a": 0}, "not answered": {"a": 1}, "below": {"a": 1, "b": -2}}
    run = {"found": {"a": 1.0}, "nothing relevant": {"a": 1.0}, "below": {"a": 2.0, "b": 1.0}}
    result = evaluate(qrels, run)
    assert result.per_query["nDCG@10"] == {"found": 1.0, "not answered": 0.0, "below": 1.0}
    mean = result.mean["nDCG@10"]
    assert mean.value == pytest.approx(2 / 3)
    # standard deviation sqrt(1/3) over the root of 3 queries
    assert mean.se == pytest.approx(1 / 3)
    assert (mean.n, mean.better) == (3, "higher")
    assert "nDCG@10 0.7 ± 0.3" in str(result)
    assert isinstance(result, Evaluation)


@pytest.mark.parametrize(
    ("qrels", "run", "measures", "message"),
    [
        ({"q": {"a": 1}}, {}, ["nDCG@10"], "run is empty: 0 queries"),
        ({"q": {"a": 1}}, {"q": {}}, ["nDCG@10"], "run is empty: 1 queries"),
        ({"q": {"a": 1}}, {"q": {"a": 1.0}, "x": {"a": 1.0}}, ["nDCG@10"], r"1 queries that are not judged: \['x'\]"),
        ({"q": {"a": 0}}, {"q": {"a": 1.0}}, ["nDCG@10"], "none of the 1 judged queries has a positive"),
        ({"q": {"a": 1}}, {"q": {"a": math.nan}}, ["nDCG@10"], "finite, got nan for query 'q', document 'a'"),
        ({"q": {"a": 1}}, {"q": {"a": 1.0}}, ["nDCQ@10"], "unknown measure 'nDCQ@10'"),
        ({"q": {"a": 1}}, {"q": {"a": 1.0}}, ["recall at 10"], "unknown measure 'recall at 10'"),
        ({"q": {"a": 1}}, {"q": {"a": 1.0}}, ["nDCG@ten"], "unknown measure 'nDCG@ten'"),
        ({"q": {"a": 1}}, {"q": {"a": 1.0}}, ["ERR@10"], "trec_eval does not compute 'ERR@10'"),
    ],
)
def test_what_cannot_be_measured_is_refused(qrels, run, measures, message):
    with pytest.raises(InvalidInput, match=message):
        evaluate(qrels, run, measures)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("grade", [0.5, True, "1"])
def test_grades_that_are_not_whole_are_refused(grade):
    with pytest.raises(InvalidInput, match="a grade is a whole number"):
        evaluate({"q": {"a": grade}}, {"q": {"a": 1.0}})


def test_exact_run_ranks_as_a_full_sort():
    generator = np.random.default_rng(0)
    queries, documents = (generator.normal(size=(n, 12)).astype(np.float32) for n in (150, 333))
    run = exact_run([f"q{i}" for i in range(150)], queries, [f"d{i}" for i in range(333)], documents, k=20)
    scores = queries.astype(np.float64) @ documents.T.astype(np.float64)
    for i, row in enumerate(scores):
        best = np.argsort(-row)[:20]
        assert list(run[f"q{i}"]) == [f"d{j}" for j in best]
        np.testing.assert_allclose(list(run[f"q{i}"].values()), row[best], rtol=1e-6)


def test_exact_run_breaks_ties_as_trec_eval_also_at_the_cut():
    # equal vectors far apart in the arrays, where a matrix product's edge could round them differently
    generator = np.random.default_rng(1)
    vector = generator.normal(size=(1, 37)).astype(np.float32)
    names = [f"d{i:05d}" for i in range(20_001)]
    documents = np.repeat(vector, len(names), axis=0)
    run = exact_run(["q"], generator.normal(size=(1, 37)).astype(np.float32), names, documents, k=7)
    assert len(set(run["q"].values())) == 1
    assert list(run["q"]) == names[:-8:-1]


def test_exact_run_takes_tensors_and_the_whole_corpus_where_k_is_larger():
    queries, documents = torch.eye(2, 3), torch.eye(3)
    run = exact_run(["1", "2"], queries, ["1", "2", "3"], documents, k=10)
    assert run == {"1": {"1": 1.0, "3": 0.0, "2": 0.0}, "2": {"2": 1.0, "3": 0.0, "1": 0.0}}
    assert [list(found) for found in run.values()] == [["1", "3", "2"], ["2", "3", "1"]]
    alone = exact_run(["1", "2"], queries, ["1", "2", "3"], documents, k=2, exclude_same_id=True)
    assert [list(found) for found in alone.values()] == [["3", "2"], ["3", "1"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["q"], np.eye(2), ["a", "b"], np.eye(2)), "1 query ids need as many vectors"),
        ((["q", "r"], np.eye(2), ["a"], np.eye(2)), "1 document ids need as many vectors"),
        ((["q", "r"], np.eye(2), ["a", "a"], np.eye(2)), "document id 'a' comes twice"),
        ((["q", "r"], np.eye(2), ["a", "b", "c"], np.eye(3)), "queries have 2 dimensions, documents 3"),
        ((["q", "r"], np.eye(2), ["a", "b"], np.diag([1, np.nan])), "vector of document 'b' is not finite"),
        ((["q", "r"], np.eye(2), ["a", "b"], np.eye(2), 0), "k must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_exact_run_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        exact_run(*arguments)


def test_bootstrap_interval_is_student_s_for_large_samples():
    differences = np.random.default_rng(0).normal(0.02, 0.3, size=4000)
    result = paired_bootstrap({str(i): d for i, d in enumerate(differences)}, {str(i): 0.0 for i in range(4000)})
    se = differences.std(ddof=1) / math.sqrt(4000)
    assert result.mean == pytest.approx(differences.mean())
    assert result.se == pytest.approx(se)
    # a 2.5 % quantile of 10,000 draws has a standard error of .027 of these
    assert result.low == pytest.approx(differences.mean() - 1.96 * se, abs=4 * 0.027 * se)
    assert result.high == pytest.approx(differences.mean() + 1.96 * se, abs=4 * 0.027 * se)
    assert result.better == "a"


def test_bootstrap_covers_a_skewed_mean():
    # differences are -.1 with probability .9 and .9 otherwise: mean 0; 400 data sets of 100 queries
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        values = np.where(generator.random(100) < 0.9, -0.1, 0.9)
        interval = paired_bootstrap(
            {str(i): float(v) for i, v in enumerate(values)}, dict.fromkeys(map(str, range(100)), 0.0), resamples=500
        )
        covered += interval.low <= 0 <= interval.high
    # nominal .95; the percentile interval of 100 skewed values covers about .93; 4 standard errors are .05
    assert covered / 400 > 0.88


def test_bootstrap_is_the_seed_s_whatever_the_order():
    a, b = {"x": 0.1, "y": 0.9, "z": 0.4}, {"z": 0.2, "y": 0.95, "x": 0.0}
    result = paired_bootstrap(a, b)
    assert result == paired_bootstrap(dict(reversed(a.items())), b)
    assert paired_bootstrap(b, a).mean == -result.mean
    assert paired_bootstrap({"x": 1.0}, {"x": 0.5}).high == math.inf


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({}, {}, "same queries on both sides, got 0 and 0"),
        ({"x": 1.0}, {"y": 1.0}, r"only on one: \['x', 'y'\]"),
        ({"x": math.nan}, {"x": 1.0}, r"finite; these queries have others: \['x'\]"),
    ],
)
def test_bootstrap_refuses_what_is_not_paired(a, b, message):
    with pytest.raises(InvalidInput, match=message):
        paired_bootstrap(a, b)
