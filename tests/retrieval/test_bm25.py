"""BM25 is the textbook's, agrees with bm25s, and weighs new passages with frozen statistics."""

import math
import os
from pathlib import Path

import bm25s
import numpy as np
import pytest

from noisewise.errors import InvalidInput
from noisewise.retrieval.beir import load_beir, text_of
from noisewise.retrieval.bm25 import BM25, words_of
from noisewise.retrieval.evaluation import evaluate

PASSAGES = [
    "Rivers carry water to the sea; the river Ouse carries most of it.",
    "A heron waits by the water, and the heron is patient.",
    "Bridges over the river are painted every seven years.",
    "Painters of bridges fear the wind, the rain and the heron.",
    "",
]
QUERIES = ["herons near water", "painting a bridge over a river river", "zeppelin", ""]


def test_scores_by_hand():
    # both passages hold two terms; "cat" is in one, "dog" in both
    model = BM25.of(["cat dog", "dog dog"], k1=1.2, b=0.75, language=None)
    cat, dog = math.log(1 + 1.5 / 1.5), math.log(1 + 0.5 / 2.5)
    assert model.terms == ("cat", "dog")
    np.testing.assert_allclose(model.idf, [cat, dog], rtol=1e-15)
    # the mean length is 2, so the length factor is 1
    expected = [(cat + dog) / 2.2 / (cat + dog), dog * 2 / 3.2 / (cat + dog)]
    np.testing.assert_allclose(model.scores(["dog cat"]), [expected], rtol=1e-14)


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4), (2.0, 0.0), (1.2, 1.0)])
def test_agrees_with_bm25s_up_to_the_query_s_sum_of_idf(k1, b):
    model = BM25.of(PASSAGES, k1=k1, b=b)
    peer = bm25s.BM25(method="lucene", k1=k1, b=b, dtype="float64")
    peer.index(words_of(PASSAGES), show_progress=False)
    scores = model.scores(QUERIES)
    for row, query in zip(scores, words_of(QUERIES), strict=True):
        idf = dict(zip(model.terms, model.idf, strict=True))
        known = [word for word in query if word in idf]
        if not known:
            assert not row.any()
            continue
        theirs = peer.get_scores(known)
        np.testing.assert_allclose(row * sum(idf[word] for word in known), theirs, rtol=1e-6, atol=1e-12)


def test_scores_are_the_product_of_both_weights_and_stay_below_one():
    model = BM25.of(PASSAGES)
    product = model.query_weights(QUERIES) @ model.document_weights(PASSAGES).T
    assert np.array_equal(product.toarray(), model.scores(QUERIES))
    assert np.array_equal(model.scores(QUERIES), model.scores(QUERIES, PASSAGES))
    repeated = model.scores(["heron water"], ["heron water " * 10_000, "heron water"])
    assert 0 < repeated[0, 1] < repeated[0, 0] < 1


def test_query_weights_sum_to_one_and_unknown_words_are_left_out():
    model = BM25.of(PASSAGES)
    np.testing.assert_allclose(np.asarray(model.query_weights(QUERIES).sum(1)).ravel(), [1, 1, 0, 0], atol=1e-15)
    assert np.array_equal(model.scores(["heron zeppelin"]), model.scores(["heron"]))


def test_new_passages_are_weighed_with_frozen_statistics():
    model = BM25.of(PASSAGES)
    before = model.document_weights(["the heron and the river"]).toarray()
    model.document_weights(["river river zeppelins", "heron"])
    assert np.array_equal(before, model.document_weights(["the heron and the river"]).toarray())
    # a word without statistics scores nothing, but makes the passage longer
    short, long = model.document_weights(["heron", "heron zeppelin"]).toarray()
    assert short.nonzero()[0].tolist() == long.nonzero()[0].tolist()
    assert long.max() < short.max()


@pytest.mark.parametrize(
    ("text", "language", "terms"),
    [
        (
            "The Rivers' RUNNING waters, e.g. a 7-day flood of 1953",
            "english",
            ["river", "run", "water", "day", "flood", "1953"],
        ),
        ("The Rivers", None, ["the", "rivers"]),
        ("die Häuser", "german", ["die", "haus"]),
        ("ﬁne Ｗｉｄｅ ½", None, ["fine", "wide"]),
        ("水力発電", None, ["水力", "力発", "発電"]),
        ("covid患者 of 水", "english", ["covid", "患者", "水"]),
        ("हिन्दी भाषा", None, ["हिन्दी", "भाषा"]),
        ("…", "english", []),
    ],
)
def test_words(text, language, terms):
    assert words_of([text], language) == [terms]


def test_read_back_it_weighs_as_before():
    model = BM25.of([*PASSAGES, "水力発電 naïve"], k1=0.9)
    again = BM25.from_saved(model.config(), model.tensors())
    assert again.terms == model.terms
    for texts in (PASSAGES, QUERIES):
        assert np.array_equal(again.document_weights(texts).toarray(), model.document_weights(texts).toarray())
        assert np.array_equal(again.query_weights(texts).toarray(), model.query_weights(texts).toarray())
    with pytest.raises(InvalidInput, match="holds no passages"):
        again.scores(QUERIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": 0}, "k1 must be a finite number above 0, got 0"),
        ({"b": 1.5}, r"b must lie in \[0, 1\], got 1.5"),
        ({"language": "klingon"}, "no stemmer for the language 'klingon'.*english"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        BM25.of(PASSAGES, **options)


@pytest.mark.parametrize("documents", [[], ["", "..."], ["the of and"]])
def test_passages_without_words_are_refused(documents):
    with pytest.raises(InvalidInput, match="without a single word"):
        BM25.of(documents)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [("tenk-uber", 0.805), ("covidqa", 0.634), ("scifact-mini", 0.745), ("xquad-en", 0.964)]
)
def test_real_sets_score_as_a_prototype_did(name, value):
    # nDCG@10 of the test split with an implementation of other hands and its own word splitting
    folder = Path(os.environ.get("NOISEWISE_DATA", "")) / name
    if not os.environ.get("NOISEWISE_DATA") or not folder.is_dir():
        pytest.skip(f"set NOISEWISE_DATA to a folder that holds {name}, a data set in the layout of BEIR")
    corpus, queries, qrels = load_beir(folder)
    scores = BM25.of([text_of(document) for document in corpus.values()]).scores([queries[q] for q in qrels["test"]])
    run = {q: dict(zip(corpus, row.tolist(), strict=True)) for q, row in zip(qrels["test"], scores, strict=True)}
    assert evaluate(qrels["test"], run).mean["nDCG@10"].value == pytest.approx(value, abs=0.01)
