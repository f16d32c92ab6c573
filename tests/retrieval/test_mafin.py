"""`Mafin` from judged queries to a saved model: what it chooses, what its vectors rank by, and what it refuses."""

import json
import os
import re
import signal
import zlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.retrieval import LexicalBlock, Mafin, WordPieceTable, load_beir
from noisewise.retrieval.beir import text_of
from noisewise.retrieval.blackbox import CachedBlackBox, as_black_box
from noisewise.retrieval.evaluation import evaluate, exact_run
from noisewise.training import Fit

CALLED: list[int] = []


def trigrams(texts: list[str]) -> np.ndarray:
    """A black box that mixes up what it reads: trigrams of letters, hashed into 48 numbers."""
    CALLED.append(len(texts))
    rows = np.zeros((len(texts), 48), np.float32)
    for row, text in zip(rows, texts, strict=True):
        found = text.lower()[:400]
        for at in range(max(1, len(found) - 2)):
            mark = zlib.crc32(found[at : at + 3].encode())
            row[mark % 48] += 1 if mark & 1024 else -1
        row[0] += 0.5
    return rows


@pytest.fixture(scope="module")
def report_of_lyft():
    """150 passages of a real report, and the two questions to each."""
    corpus, queries, qrels = load_beir(Path(str(files("noisewise"))) / "data" / "tenk-lyft")
    kept = dict(list(corpus.items())[:150])
    judged = {query: of for query, of in qrels["train"].items() if set(of) <= set(kept)}
    return kept, {query: queries[query] for query in judged}, judged


@pytest.fixture(scope="module")
def fitted(report_of_lyft):
    return Mafin(trigrams, [WordPieceTable(dim=32), LexicalBlock(dim=256)]).fit(*report_of_lyft, epochs=2, distil=30)


def ranked(model, corpus, queries, judged):
    names, asked = list(corpus), list(judged)
    documents = model.encode_document([text_of(corpus[name]) for name in names])
    run = exact_run(asked, model.encode_query([queries[query] for query in asked]), names, documents, k=20)
    return run, evaluate(judged, run).mean["nDCG@10"].value


def test_words_are_chosen_where_a_black_box_mixes_them_up(fitted, report_of_lyft):
    assert "words" in fitted.choice_
    names = [row.name for row in fitted.report_.rows]
    assert names == [
        "black box", "black box + words", "concatenation", "late fusion", "Mafin", "lambda-Mafin", "Mafin + words", "BM25"
    ]  # fmt: skip
    scores = {row.name: row.score.value for row in fitted.report_.rows}
    # what the guard saw on held-out queries is what they score
    _, reached = ranked(fitted, *report_of_lyft)
    assert reached > scores["black box"] + 0.2
    assert scores[fitted.choice_] == pytest.approx(reached, abs=0.1)


def test_one_cosine_ranks_as_black_box_and_words_together(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    model = Mafin(trigrams, LexicalBlock(dim=256)).fit(corpus, queries, judged, form="black box + words")
    q = [queries[query] for query in judged]
    d = [text_of(passage) for passage in corpus.values()]
    vectors = model.encode_query(q), model.encode_document(d)
    for part in vectors:
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-5)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (trigrams(q), trigrams(d))]
    joint = unit[0] @ unit[1].T + model.form_.weight * model.form_.lexical.bm25_.scores(q)
    cosine = vectors[0] @ vectors[1].T
    best = np.argsort(-joint, axis=1)[:, :10]
    # the ten best are the same, but for ties that rounding decides
    gaps = np.abs(np.diff(np.take_along_axis(joint, best, 1), axis=1)).min(1)
    clear = gaps > 1e-4
    assert clear.mean() > 0.9
    assert (np.argsort(-cosine, axis=1)[clear, :10] == best[clear]).all()


def test_shuffled_judgements_leave_the_black_box(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    dealt = dict(zip(judged, np.random.default_rng(0).permutation(list(judged.values())), strict=True))
    model = Mafin(trigrams, LexicalBlock(dim=64)).fit(corpus, queries, dealt)
    assert model.choice_ == "black box"
    np.testing.assert_allclose(
        model.encode_document(["one text"]), trigrams(["one text"]) / np.linalg.norm(trigrams(["one text"])), atol=1e-6
    )


def test_few_judged_queries_all_count_by_cross_fitting(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    few = dict(list(judged.items())[:40])
    model = Mafin(trigrams, [WordPieceTable(dim=16), LexicalBlock(dim=64)]).fit(
        corpus, queries, few, epochs=1, distil=5
    )
    assert model.report_.queries == 40
    assert "5-fold cross-fitting" in str(model.report_)
    # a fit for each fold of each trained candidate
    assert sorted(name for name in model.fits_ if name.startswith("Mafin")) == [f"Mafin-{index}" for index in range(5)]


def test_queries_of_your_own_to_choose_on(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    items = list(judged.items())
    train, dev = dict(items[:-60]), dict(items[-60:])
    model = Mafin(trigrams, LexicalBlock(dim=64)).fit(corpus, queries, train, dev)
    assert model.report_.queries == 60
    # without dev queries, and nothing to train, all are judged on
    assert Mafin(trigrams, LexicalBlock(dim=64)).fit(corpus, queries, train).report_.queries == len(train)
    with pytest.raises(InvalidInput, match=re.escape(f"query {min(train)!r} is in qrels and in dev")):
        Mafin(trigrams, LexicalBlock(dim=64)).fit(corpus, queries, train, train)


def test_what_dev_asks_for_is_not_trained_on(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    items = list(judged.items())
    # of two questions to a passage one is learned from and one is judged on
    train, dev = dict(items[::2]), dict(items[1::2])
    assert {document for of in train.values() for document in of} & {document for of in dev.values() for document in of}
    with pytest.raises(InvalidInput, match="dev leaves no pair to train on"):
        Mafin(trigrams, WordPieceTable(dim=16)).fit(corpus, queries, train, dev, distil=1)
    half = dict(items[1:150:2])
    model = Mafin(trigrams, WordPieceTable(dim=16)).fit(corpus, queries, train, half, epochs=1, distil=1, form="Mafin")
    kept = {document for of in train.values() for document in of} - {
        document for of in half.values() for document in of
    }
    # an epoch of what is left, less the part that it stops on
    steps = -(-round(0.85 * len(kept)) // 32)
    assert model.fits_["Mafin"].steps == pytest.approx(steps, abs=1)


def test_a_black_box_that_is_cut_is_shown_whole_too(report_of_lyft):
    model = Mafin(trigrams, LexicalBlock(dim=64), black_dim=8).fit(*report_of_lyft)
    rows = {row.name: row for row in model.report_.rows}
    assert rows["black box, all 48 numbers"].reference
    assert rows["black box, all 48 numbers"].score.value > rows["black box"].score.value


def test_a_saved_model_gives_the_same_vectors_bit_for_bit(fitted, report_of_lyft, tmp_path):
    texts = [text_of(passage) for passage in list(report_of_lyft[0].values())[:20]]
    fitted.save_pretrained(tmp_path / "model")
    again = Mafin.from_pretrained(tmp_path / "model", trigrams)
    assert (again.choice_, again.report_) == (fitted.choice_, fitted.report_)
    np.testing.assert_array_equal(again.encode_document(texts), fitted.encode_document(texts))
    np.testing.assert_array_equal(again.encode_query(texts), fitted.encode_query(texts))
    card = (tmp_path / "model" / "README.md").read_text()
    assert fitted.choice_ in card
    assert "black box + words" in card
    assert set(json.loads((tmp_path / "model" / "config.json").read_text())) >= {"schema", "config", "class"}


def test_another_black_box_or_a_changed_one_is_refused(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "model")

    def other(texts):
        return trigrams(texts)

    with pytest.raises(NoisewiseError, match="vectors of two models do not mix"):
        Mafin.from_pretrained(tmp_path / "model", other)
    identity = fitted.cost and json.loads((tmp_path / "model" / "config.json").read_text())["config"]["black_box"]
    drifted = as_black_box(lambda texts: trigrams(texts)[:, ::-1].copy(), name=identity["model"])
    with pytest.raises(NoisewiseError, match="cosine"):
        Mafin.from_pretrained(tmp_path / "model", drifted)
    assert Mafin.from_pretrained(tmp_path / "model", drifted, check=False).choice_ == fitted.choice_
    with pytest.raises(RunFolderError):
        WordPieceTable.from_pretrained(tmp_path / "model")


def test_a_second_fit_asks_the_black_box_for_eight_texts_only(report_of_lyft, tmp_path):
    options = {"cache": tmp_path / "vectors.sqlite"}
    first = Mafin(trigrams, LexicalBlock(dim=64), **options).fit(*report_of_lyft)
    CALLED.clear()
    second = Mafin(trigrams, LexicalBlock(dim=64), **options).fit(*report_of_lyft)
    assert sum(CALLED) == 8
    np.testing.assert_array_equal(first.encode_query(["a b c"]), second.encode_query(["a b c"]))


def test_words_of_another_corpus_are_learned_without_labels(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    halves = dict(list(corpus.items())[:100]), dict(list(corpus.items())[100:])
    own = {query: of for query, of in judged.items() if set(of) <= set(halves[0])}
    model = Mafin(trigrams, LexicalBlock(dim=128)).fit(
        halves[0], queries, own, search=halves[1], form="black box + words"
    )
    assert model.form_.lexical.bm25_.corpus.shape[0] == 50
    others = {query: of for query, of in judged.items() if set(of) <= set(halves[1])}
    _, adapted = ranked(model, halves[1], queries, others)
    plain = Mafin(trigrams, LexicalBlock(dim=128)).fit(halves[0], queries, own, form="black box")
    assert adapted > ranked(plain, halves[1], queries, others)[1] + 0.1


def test_fewer_numbers_of_the_black_box(report_of_lyft, tmp_path):
    corpus, queries, judged = report_of_lyft
    model = Mafin(trigrams, LexicalBlock(dim=64), black_dim=16).fit(corpus, queries, judged, form="black box")
    texts = [text_of(passage) for passage in corpus.values()]
    vectors = model.encode_document(texts)
    assert vectors.shape == (150, 16)
    assert model.get_embedding_dimension() == 16
    full = trigrams(texts)
    full /= np.linalg.norm(full, axis=1, keepdims=True)
    # the best 16 directions there are, by an independent decomposition
    axes = np.linalg.svd(full.astype(np.float64), full_matrices=False)[2][:16]
    expected = full @ axes.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-4)
    model.save_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(Mafin.from_pretrained(tmp_path / "model", trigrams).encode_document(texts), vectors)


def test_a_vector_that_a_store_cannot_hold_is_not_chosen(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    model = Mafin(trigrams, LexicalBlock(dim=256), max_dim=200).fit(corpus, queries, judged)
    assert model.choice_ == "black box"
    words = next(row for row in model.report_.rows if row.name == "black box + words")
    assert words.lower > 0
    assert "more than 200 numbers" in words.note
    with pytest.raises(InvalidInput, match="has 304 numbers, more than max_dim=200"):
        Mafin(trigrams, LexicalBlock(dim=256), max_dim=200).fit(corpus, queries, judged, form="black box + words")
    with pytest.raises(InvalidInput, match="the black box has 48 numbers, more than max_dim=40"):
        Mafin(trigrams, LexicalBlock(dim=256), max_dim=40).fit(corpus, queries, judged)
    assert (
        Mafin(trigrams, LexicalBlock(dim=64), max_dim=112).fit(corpus, queries, judged).choice_ == "black box + words"
    )


def test_it_can_be_seen_as_a_sentence_transformer(fitted, report_of_lyft, tmp_path):
    view = fitted.as_sentence_transformer()
    texts = [*list(report_of_lyft[1].values())[:5], "x"]
    np.testing.assert_allclose(view.encode_query(texts), fitted.encode_query(texts), atol=1e-6)
    np.testing.assert_allclose(view.encode_document(texts), fitted.encode_document(texts), atol=1e-6)
    assert view.get_embedding_dimension() == fitted.get_embedding_dimension()
    similarity = view.similarity(view.encode_query(texts), view.encode_document(texts))
    torch.testing.assert_close(
        similarity, fitted.similarity(fitted.encode_query(texts), fitted.encode_document(texts)), atol=1e-5, rtol=0
    )
    with pytest.raises(NoisewiseError, match="save_pretrained"):
        view.save(str(tmp_path / "view"))


def test_one_text_gives_one_vector_and_none_gives_none(fitted):
    one = fitted.encode_query("a question")
    assert one.shape == (fitted.get_embedding_dimension(),)
    np.testing.assert_array_equal(one, fitted.encode_query(["a question"])[0])
    assert fitted.encode_document([]).shape == (0, fitted.get_embedding_dimension())
    assert isinstance(fitted.encode_query("a", convert_to_tensor=True), torch.Tensor)


def test_what_is_no_text_is_named(fitted, shapes_unchecked):
    for given, said in (
        ([None], "text 0 is no text but None"),
        ([{"text": "a"}], "text_of"),
        (3, "text 0 is no text but 3"),
    ):
        with pytest.raises(InvalidInput, match=said):
            fitted.encode_document(given)
    vectors = fitted.encode_document(["a", "b"])
    with pytest.raises(InvalidInput, match="queries have 10 numbers a vector"):
        fitted.similarity(vectors[:, :10], vectors)


def test_a_text_is_embedded_as_it_is_given(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    asked: list[str] = []

    def noted(texts):
        asked.extend(texts)
        return trigrams(texts)

    Mafin(noted, LexicalBlock(dim=64)).fit({name: text_of(of) + "\n" for name, of in corpus.items()}, queries, judged)
    assert set(asked) >= {text_of(of) + "\n" for of in corpus.values()}


def test_passages_may_be_texts_and_judgements_pairs(report_of_lyft):
    corpus, queries, judged = report_of_lyft
    texts = {name: text_of(passage) for name, passage in corpus.items()}
    pairs = [(query, document) for query, of in judged.items() for document in of]
    given = [
        Mafin(trigrams, LexicalBlock(dim=64)).fit(passages, queries, of)
        for passages, of in ((corpus, judged), (texts, pairs))
    ]
    assert given[0].report_ == given[1].report_


def test_half_a_training_is_not_judged_and_goes_on(report_of_lyft, tmp_path, monkeypatch):
    table, options = WordPieceTable(dim=16), {"form": "Mafin", "distil": 0, "epochs": 3}
    whole = Mafin(trigrams, table).fit(*report_of_lyft, **options)
    advance, calls = Fit._advance, []

    def struck(self):
        calls.append(0)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    with monkeypatch.context() as patched:
        patched.setattr(Fit, "_advance", struck)
        stopped = Mafin(trigrams, WordPieceTable(dim=16))
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(*report_of_lyft, **options, resume=tmp_path / "run")
        assert not hasattr(stopped, "form_")
    again = Mafin(trigrams, WordPieceTable(dim=16)).fit(*report_of_lyft, **options, resume=tmp_path / "run")
    np.testing.assert_array_equal(again.encode_query(["a question"]), whole.encode_query(["a question"]))


def test_bad_input_is_refused_before_the_black_box_is_asked(report_of_lyft, shapes_unchecked):
    corpus, queries, judged = report_of_lyft
    few = dict(list(judged.items())[:19])
    first = next(iter(judged))
    CALLED.clear()
    for given, options, said in (
        ((corpus, queries, few), {}, "19 judged pairs .*synthesize"),
        ((corpus, queries, judged), {"epoch": 3}, "no option 'epoch'"),
        ((corpus, queries, judged), {"form": "best"}, "no form 'best'"),
        ((corpus, queries, judged), {"form": "Mafin"}, "trainable part"),
        ((corpus, queries, judged | {first: {"nowhere": 1}}), {}, "'nowhere'"),
        ((corpus, queries | {first: " "}, judged), {}, "empty"),
        ((corpus, {k: v for k, v in queries.items() if k != first}, judged), {}, re.escape(repr(first))),
        ((corpus | {"blank": {"title": "", "text": " "}}, queries, judged), {}, "'blank'"),
        (({}, queries, judged), {}, "corpus must map"),
        ((corpus | {"odd": 3}, queries, judged), {}, "passage 'odd'"),
        ((corpus, queries, {first: ["d"]}), {}, "must map documents to grades"),
        ((corpus, queries, ["pair"]), {}, "a pair is"),
        ((corpus, queries, None), {}, "pairs of ids, got NoneType"),
        ((corpus, list(queries.values()), judged), {}, "queries must map ids to texts, got list"),
        ((corpus, queries | {first: None}, judged), {}, "must be a text, got None"),
        ((corpus, queries, judged | {first: dict.fromkeys(judged[first])}), {}, "whole number, got None"),
    ):
        with pytest.raises(InvalidInput, match=said):
            Mafin(trigrams, LexicalBlock(dim=64)).fit(*given, **options)
    for augment in ("table", [], [LexicalBlock(), LexicalBlock()], 3):
        with pytest.raises(InvalidInput, match="augment"):
            Mafin(trigrams, augment).fit(*report_of_lyft)
    assert not CALLED
    with pytest.raises(InvalidInput, match="leave cache= out"):
        Mafin(CachedBlackBox(trigrams), LexicalBlock(dim=64), cache="vectors.sqlite").fit(*report_of_lyft)
    with pytest.raises(InvalidInput, match="not fitted"):
        Mafin(trigrams).encode_query("a")
    with pytest.raises(InvalidInput, match="48 dimensions, got 49"):
        Mafin(trigrams, LexicalBlock(dim=64), black_dim=49).fit(*report_of_lyft)
