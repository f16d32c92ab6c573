"""A fitted `Mafin` as others see it: MTEB's encoder, and a sentence-transformers model that MTEB wraps."""

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput, MissingExtra
from noisewise.retrieval import LexicalBlock, Mafin
from noisewise.retrieval.beir import text_of
from noisewise.retrieval.evaluation import evaluate, exact_run
from noisewise.retrieval.views import MtebEncoder

WORDS = [
    "harbour",
    "lantern",
    "cobalt",
    "meadow",
    "granite",
    "falcon",
    "ribbon",
    "walnut",
    "ember",
    "tundra",
    "violin",
    "saffron",
    "anchor",
    "marble",
    "thistle",
    "copper",
    "lagoon",
    "pepper",
    "glacier",
    "orchid",
    "canyon",
    "velvet",
    "hazel",
    "quartz",
]


def by_letters(texts):
    """Counts of letters: queries and passages of the same words are near, and of the same letters too."""
    rows = np.full((len(texts), 27), 0.2, np.float32)
    for row, text in zip(rows, texts, strict=True):
        for letter in text.lower():
            if letter.isascii() and letter.isalpha():
                row[ord(letter) - 97] += 1
    return rows


class TwoKinds:
    """Letters, stretched for passages and shrunk for queries, so that products are as without and mixing them up is seen."""

    identity = {"provider": "tests", "model": "two kinds", "dimensions": 27}
    stretch = np.exp(np.random.default_rng(1).normal(size=27)).astype(np.float32)

    def embed(self, texts, kind):
        yield list(range(len(texts))), by_letters(texts) * (self.stretch if kind == "document" else 1 / self.stretch)


@pytest.fixture(scope="module")
def set_of_words():
    """60 passages of seven words, and a query of three of them to each."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(WORDS, 7, replace=False).tolist() for _ in range(60)]
    corpus = {f"d{i}": {"title": words[0], "text": " ".join(words[1:])} for i, words in enumerate(drawn)}
    queries = {f"q{i}": " ".join(words[3:6]) for i, words in enumerate(drawn)}
    return corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(60)}


@pytest.fixture(scope="module")
def model(set_of_words):
    return Mafin(by_letters, LexicalBlock(dim=64)).fit(*set_of_words, form="black box + words")


@pytest.fixture(scope="module")
def task(set_of_words):
    """A retrieval task of MTEB that holds this set, and needs no network."""
    pytest.importorskip("mteb")
    import pyarrow
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    corpus, queries, qrels = set_of_words

    def of_rows(rows):
        # a fingerprint of its own: some pairs of pyarrow and dill cannot pickle the table for one
        return Dataset(pyarrow.Table.from_pylist(rows), fingerprint=f"rows{len(rows[0])}")

    class SetOfWords(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="SetOfWords", description="Passages by words of theirs", reference="https://example.org", type="Retrieval",
            category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
            dataset={"path": "none/none", "revision": "1"}, date=("2024-01-01", "2024-01-02"), domains=["Written"],
            task_subtypes=[], license="cc0-1.0", annotations_creators="derived", dialect=[], sample_creation="created",
            bibtex_citation="",
        )  # fmt: skip

        def load_data(self, *args, **options):
            self.dataset = {
                "default": {
                    "test": {
                        "corpus": of_rows([{"id": name, **passage} for name, passage in corpus.items()]),
                        "queries": of_rows([{"id": name, "text": text} for name, text in queries.items()]),
                        "relevant_docs": qrels,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return SetOfWords()


def ours(encode_query, model, set_of_words):
    corpus, queries, qrels = set_of_words
    texts = [text_of(passage) for passage in corpus.values()]
    run = exact_run(list(queries), encode_query(list(queries.values())), list(corpus), model.encode_document(texts))
    return evaluate(qrels, run).mean["nDCG@10"].value


def test_mteb_measures_what_we_measure(task, set_of_words):
    import mteb
    from mteb.models import EncoderProtocol

    model = Mafin(TwoKinds(), LexicalBlock(dim=64)).fit(*set_of_words, form="black box")
    encoder = model.as_mteb()
    assert isinstance(encoder, EncoderProtocol)
    expected = ours(model.encode_query, model, set_of_words)
    # a query that is embedded as a passage ranks otherwise
    assert abs(expected - ours(model.encode_document, model, set_of_words)) > 0.01
    for seen in (encoder, model.as_sentence_transformer()):
        found = mteb.evaluate(seen, task, cache=None, co2_tracker=False, show_progress_bar=False)
        assert found.task_results[0].get_score() == pytest.approx(expected, abs=1e-4)


def test_the_name_is_of_the_form_and_the_revision_of_its_numbers(model, set_of_words):
    pytest.importorskip("mteb")
    meta = model.as_mteb().mteb_model_meta
    assert meta.name.startswith("noisewise/black-box-words-on-")
    assert (meta.embed_dim, str(meta.similarity_fn_name.value)) == (27 + 64, "cosine")
    assert meta.revision == model.as_mteb().mteb_model_meta.revision
    corpus, queries, qrels = set_of_words
    other = Mafin(by_letters, LexicalBlock(dim=64, seed=1)).fit(corpus, queries, qrels, form="black box + words")
    assert other.as_mteb().mteb_model_meta.revision != meta.revision


def test_batches_become_rows_in_order_by_what_they_are(model):
    encoder = MtebEncoder(model, None)
    batches = [{"text": ["harbour violin", "cobalt"]}, {"text": ["walnut ember"]}]
    texts = [text for batch in batches for text in batch["text"]]
    where = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
    for kind, expected in (
        ("query", model.encode_query),
        ("document", model.encode_document),
        (None, model.encode_document),
    ):
        np.testing.assert_array_equal(encoder.encode(batches, prompt_type=kind, batch_size=2, **where), expected(texts))
    a, b = model.encode_query(texts), model.encode_document(texts)
    torch.testing.assert_close(encoder.similarity_pairwise(a, b), encoder.similarity(a, b).diagonal())
    np.testing.assert_allclose(encoder.similarity(a, b), a @ b.T, atol=1e-6)


def test_without_mteb_the_line_that_installs_it_is_said(model, monkeypatch):
    # None in sys.modules is how Python says that a module cannot be imported
    monkeypatch.setitem(__import__("sys").modules, "mteb.models.model_meta", None)
    with pytest.raises(MissingExtra, match=r"pip install 'noisewise\[mteb\]'"):
        model.as_mteb()
    with pytest.raises(InvalidInput, match="not fitted yet"):
        Mafin(by_letters).as_mteb()
