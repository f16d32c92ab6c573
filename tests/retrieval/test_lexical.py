"""One cosine ranks as embedding plus g times BM25; what does not fit exactly is unbiased; nothing changes when read back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import noisewise.retrieval.lexical as lexical
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.retrieval.beir import load_beir, text_of
from noisewise.retrieval.bm25 import BM25
from noisewise.retrieval.lexical import LexicalBlock

SYLLABLES = ["ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pa", "ro", "si", "tu"]


def invented(passages=60, words=40, seed=0, vocabulary=300):
    """Passages and queries of invented words of Zipf's frequencies; a query is five words of a passage and a stranger."""
    generator = np.random.default_rng(seed)
    names = ["".join(SYLLABLES[i // 12**j % 12] for j in range(3)) for i in range(12**3)]
    names = [str(name) for name in generator.permutation(names)[:vocabulary]]
    shares = 1 / np.arange(1, vocabulary + 1)
    drawn = generator.choice(names, size=(passages, words), p=shares / shares.sum())
    lengths = generator.integers(words // 4, words + 1, size=passages)
    texts = [" ".join(row[:length]) for row, length in zip(drawn, lengths, strict=True)]
    queries = [" ".join([*generator.choice(text.split(), 5), "stranger"]) for text in texts]
    return texts, queries


def top(scores, k=10):
    return np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :k]


def unit(rows, dim, seed):
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def joined_and_apart(block, texts, queries, document_vectors, query_vectors, g):
    """Cosines of the joint vectors, and the scores that they stand for."""
    documents = torch.cat([document_vectors, g**0.5 * block.encode_document(texts)], 1).double()
    asked = torch.cat([query_vectors, g**0.5 * block.encode_query(queries)], 1).double()
    cosines = normalize(asked, dim=1) @ normalize(documents, dim=1).T
    scores = query_vectors.double() @ document_vectors.double().T + g * torch.tensor(block.bm25_.scores(queries, texts))
    return cosines, scores, asked @ documents.T


@pytest.mark.parametrize("g", [0.3, 3.0])
def test_one_cosine_ranks_as_black_box_plus_bm25(g):
    texts, queries = invented()
    block = LexicalBlock(dim=len(texts) + 1, language=None).fit(texts)
    cosines, scores, products = joined_and_apart(block, texts, queries, unit(60, 16, 0), unit(60, 16, 1), g)
    assert np.array_equal(top(cosines), top(scores))
    torch.testing.assert_close(products, scores, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dim", [61, 62, 100, 400])
def test_product_is_bm25_wherever_all_passages_fit(dim):
    texts, queries = invented()
    block = LexicalBlock(dim=dim, language=None).fit(texts)
    product = block.encode_query(queries) @ block.encode_document(texts).T
    np.testing.assert_allclose(product, BM25.of(texts, language=None).scores(queries), atol=2e-6)


def test_few_terms_are_exact_for_new_passages_too():
    texts, queries = invented(vocabulary=30)
    block = LexicalBlock(dim=32, language=None).fit(texts[:50])
    product = block.encode_query(queries) @ block.encode_document(texts[50:]).T
    np.testing.assert_allclose(product, block.bm25_.scores(queries, texts[50:]), atol=2e-6)


def test_repeated_passages_and_short_ones_are_exact():
    # a Gram matrix without full rank, and a passage without a word
    texts = ["heron river", "river heron", "heron river", "bridge", "", "bridge bridge river"] * 3
    block = LexicalBlock(dim=20, language=None).fit(texts)
    queries = ["heron", "bridge river", "zeppelin"]
    product = block.encode_query(queries) @ block.encode_document(texts).T
    np.testing.assert_allclose(product, block.bm25_.scores(queries), atol=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 16, 100])
def test_all_documents_are_unit_rows_and_the_longest_has_no_slack(dim):
    texts, queries = invented()
    block = LexicalBlock(dim=dim, language=None).fit(texts)
    documents = block.encode_document([*texts, "", "stranger"])
    assert documents.shape == (62, dim)
    assert documents.dtype == torch.float32
    torch.testing.assert_close(documents.norm(dim=1), torch.ones(62), rtol=0, atol=1e-6)
    assert documents[:60, -1].min() < 2e-3
    assert torch.equal(documents[60:], torch.eye(dim)[-1:].repeat(2, 1))
    asked = block.encode_query([*queries, "", "stranger"])
    assert not asked[:, -1].any()
    assert not asked[60:].any()


def test_what_does_not_fit_is_unbiased():
    # 200 seeds of the signs: the mean product is within 4 standard errors of BM25 for all but .5 % of the pairs
    texts, queries = invented(passages=30, seed=3)
    products = []
    for seed in range(200):
        block = LexicalBlock(dim=17, language=None, seed=seed).fit(texts)
        products.append((block.encode_query(queries) @ block.encode_document(texts).T).numpy())
    error = np.mean(products, 0) - block.bm25_.scores(queries)
    se = np.std(products, 0, ddof=1) / 200**0.5
    assert np.mean(np.abs(error) < 4 * se + 1e-6) > 0.995


def test_words_that_the_singular_vectors_leave_out_survive():
    # fitted on passages of one half, "heron" and "zeppelin" always come together: only the signs can tell them apart
    texts = ["heron zeppelin", "heron zeppelin river", "river bridge", "bridge bridge river"]
    block = LexicalBlock(dim=256, language=None).fit(texts)
    apart = block.encode_query(["heron"]) @ block.encode_document(["heron", "zeppelin"]).T
    assert apart[0, 0] > 2 * apart[0, 1].abs()


def test_less_of_what_only_queries_have_is_less_noise(monkeypatch):
    texts, queries = invented(passages=200, vocabulary=1500)
    errors = []
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(lexical, "_OUTSIDE", share)
        blocks = [LexicalBlock(dim=65, language=None, seed=seed).fit(texts) for seed in range(5)]
        products = [(block.encode_query(queries) @ block.encode_document(texts).T).numpy() for block in blocks]
        errors.append(np.mean([np.square(product - blocks[0].bm25_.scores(queries)).mean() for product in products]))
    assert errors == sorted(errors)


def test_more_coordinates_are_nearer():
    texts, queries = invented(passages=200, vocabulary=600)
    exact = BM25.of(texts, language=None).scores(queries)
    errors = []
    for dim in (16, 48, 144, 201):
        block = LexicalBlock(dim=dim, language=None).fit(texts)
        errors.append(
            float(np.square((block.encode_query(queries) @ block.encode_document(texts).T).numpy() - exact).mean())
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_the_randomised_decomposition_keeps_as_much(monkeypatch):
    texts, _ = invented(passages=200, vocabulary=600)
    weights = BM25.of(texts, language=None).corpus
    exact = lexical._right_singular_vectors(weights, 20, 0)
    monkeypatch.setattr(lexical, "_EXACT_SVD", 100)
    randomised = lexical._right_singular_vectors(weights, 20, 0)
    for basis in (exact, randomised):
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    # Eckart and Young: no 20 directions keep more than the exact ones
    most, kept = (float(np.square(weights @ basis).sum()) for basis in (exact, randomised))
    values = np.linalg.svd(weights.toarray(), compute_uv=False)
    assert most == pytest.approx(float(np.square(values[:20]).sum()))
    assert 0.999 * most < kept <= most * (1 + 1e-12)
    assert np.array_equal(randomised, lexical._right_singular_vectors(weights, 20, 0))


def test_a_far_heavier_passage_is_scaled_down_and_said():
    # different words add up at right angles, a repeated one saturates
    words = ["heron", "river", "bridge", "wind"]
    block = LexicalBlock(dim=5).fit([" ".join([word] * 4) for word in words])
    with pytest.warns(NoisewiseWarning, match=r"1 of 2 passages weigh more .*up to 1\.\d+ times.* fit it again"):
        rows = block.encode_document([" ".join(words * 4), "heron heron heron heron"])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)
    assert not rows[:, -1].any()


def test_batches_and_order_do_not_matter():
    texts, queries = invented()
    block = LexicalBlock(dim=50, language=None).fit(texts)
    for encode, rows in ((block.encode_document, texts), (block.encode_query, queries)):
        whole = encode(rows)
        torch.testing.assert_close(torch.cat([encode([row]) for row in rows]), whole, rtol=0, atol=1e-7)
        torch.testing.assert_close(encode(rows[::-1]).flip(0), whole, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dim", [24, 100])
def test_same_seed_same_vectors_also_when_read_back(dim):
    texts, queries = invented()
    blocks = [LexicalBlock(dim=dim, seed=7).fit(texts) for _ in range(2)]
    config = json.loads(json.dumps(blocks[0].config()))
    blocks.append(LexicalBlock.from_saved(config, blocks[0].tensors()))
    for block in blocks[1:]:
        assert torch.equal(block.encode_document(texts), blocks[0].encode_document(texts))
        assert torch.equal(block.encode_query(queries), blocks[0].encode_query(queries))
        assert block.config() == blocks[0].config()
    other = LexicalBlock(dim=dim, seed=8).fit(texts)
    assert not torch.equal(other.encode_query(queries), blocks[0].encode_query(queries))


def test_the_signs_are_what_they_were():
    # an index lives longer than a version of numpy; recorded with numpy 2.4
    assert lexical._sign_bits(3, 16, 0).tolist() == [[95, 130], [194, 217], [207, 235]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 1}, "dim must be at least 2, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"language": "klingon"}, "no stemmer for the language 'klingon'"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_fit(arguments, message):
    block = LexicalBlock(**arguments)
    with pytest.raises(InvalidInput, match=message):
        block.fit(["heron river"])


def test_it_must_be_fitted_first():
    for method in ("encode_document", "encode_query"):
        with pytest.raises(InvalidInput, match=r"has seen no passages; call fit\(documents\) first"):
            getattr(LexicalBlock(), method)(["heron"])
    with pytest.raises(InvalidInput, match="without a single word"):
        LexicalBlock().fit([])


@pytest.mark.slow
@pytest.mark.parametrize("g", [1.0, 3.0])
def test_all_top_ten_lists_of_a_real_set_are_identical(g):
    folder = Path(os.environ.get("NOISEWISE_DATA", "")) / "tenk-uber"
    if not os.environ.get("NOISEWISE_DATA") or not folder.is_dir():
        pytest.skip("set NOISEWISE_DATA to a folder that holds tenk-uber, a data set in the layout of BEIR")
    corpus, queries, _ = load_beir(folder)
    texts, asked = [text_of(document) for document in corpus.values()], list(queries.values())
    block = LexicalBlock(dim=1024).fit(texts)
    vectors = unit(len(texts), 384, 0), unit(len(asked), 384, 1)
    cosines, scores, _ = joined_and_apart(block, texts, asked, *vectors, g)
    assert len(asked) == 790
    assert np.array_equal(top(cosines), top(scores))
