"""A joint encoder learns what neither part has, loses nothing of the black box, repeats its bits and resumes exactly."""

import math

import pytest
import torch
from lookup_augment import Lookup
from torch import nn
from torch.nn import functional

from noisewise import training
from noisewise.errors import InvalidInput, RunFolderError
from noisewise.retrieval.bm25 import BM25
from noisewise.retrieval.distillation import distil_bm25, drawn_queries
from noisewise.retrieval.fitting import RankingData, fit_joint
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.pairs import Pairs, ndcg, split_by_passage
from noisewise.retrieval.table import WordPieceTable

BLACK = 24


def words(n, seed):
    """Different words of six letters."""
    drawn = torch.randint(97, 123, (n, 6), generator=torch.Generator().manual_seed(seed))
    return ["".join(map(chr, row)) for row in drawn.tolist()]


def topics(a=30, b=8, both=True, queries=3, seed=0):
    """Passages that name a topic of each kind; the black box sees the first kind alone, relevance asks for `both`."""
    generator = torch.Generator().manual_seed(seed)
    which = [(i, j) for i in range(a) for j in range(b)] if both else [(i, i % b) for i in range(a)]
    # a text says the first topic in words of its own, which only the black box knows; the second in three common ones,
    # of which queries have others than passages, so that what belongs together has to be learned
    picked = [at for at in range(len(which)) for _ in range(queries)]
    own, second, second_asked = words(len(which) + len(picked), 1), words(3 * b, 2), words(3 * b, 3)
    documents = [" ".join([own[at], *second[3 * j : 3 * j + 3]]) for at, (_, j) in enumerate(which)]
    topic = [which[at][1] for at in picked]
    asked = [" ".join([own[len(which) + n], *second_asked[3 * j : 3 * j + 3]]) for n, j in enumerate(topic)]
    seen = torch.randn(a, BLACK, generator=generator)

    def black(of):
        # a little noise, so that ties of the black box are broken at random
        return seen[of] + 1e-4 * torch.randn(len(of), BLACK, generator=generator)

    firsts = torch.tensor([i for i, _ in which])
    pairs = Pairs(torch.arange(len(picked)), torch.tensor(picked), torch.ones(len(picked)))
    return RankingData(asked, documents, black(firsts[picked]), black(firsts), pairs)


def recall_at_1(model, data, pairs):
    queries = pairs.query.unique()
    q = model.encode([data.queries[i] for i in queries.tolist()], data.query_vectors[queries], "query")
    scores = q @ model.encode(data.documents, data.document_vectors, "document").T
    return float((pairs.grades(queries, scores.argmax(1)).diagonal() > 0).float().mean())


def table(documents, dim=32, seed=0):
    made = WordPieceTable(dim, seed=seed)
    made.prepare(documents)
    return made


def parts(n=60, seed=0):
    """Random black-box vectors, and an augment that has one free vector for each text."""
    generator = torch.Generator().manual_seed(seed)
    q, d = (torch.randn(n, BLACK, generator=generator) for _ in range(2))
    pairs = Pairs(torch.arange(n), torch.arange(n), torch.ones(n))
    numbers = [str(i) for i in range(n)]
    return RankingData(numbers, numbers, q, d, pairs)


def lookup(weighting="lambda", seed=0):
    return JointEncoder(Lookup(60, 6, seed), BLACK, weighting)


SHORT = {"epochs": 5, "batch_size": 16, "lr": 1e-2}


@pytest.mark.slow
def test_together_they_find_what_neither_finds_alone(shapes_unchecked):
    data = topics()
    known, held = split_by_passage(data.pairs, 0.3, seed=1)
    known = RankingData(**{**vars(data), "pairs": known})
    found = {}
    for weighting in ("equal", "lambda", 1e4):
        model = JointEncoder(table(data.documents + data.queries), BLACK, weighting)
        fit_joint(model, known, lr=1e-2, batch_size=64, epochs=40)
        found[weighting] = recall_at_1(model, data, held)
    black = recall_at_1(JointEncoder(table(data.documents), BLACK, 0.0), data, held)
    # three queries of a passage have one black-box vector but for the noise: a third of them are independent
    assert abs(black - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / (len(held) / 3))
    assert min(found["equal"], found["lambda"]) > 0.75
    # nothing but the small part has a weight
    assert found[1e4] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["equal", "lambda"])
def test_nothing_is_lost_where_the_black_box_knows_all(weighting, shapes_unchecked):
    data = topics(a=60, both=False, queries=6)
    known, held = split_by_passage(data.pairs, 0.3, seed=1)
    model = JointEncoder(table(data.documents + data.queries), BLACK, weighting)
    black = recall_at_1(JointEncoder(table(data.documents), BLACK, 0.0), data, held)
    assert black == 1
    fit_joint(model, RankingData(**{**vars(data), "pairs": known}), lr=1e-2)
    assert recall_at_1(model, data, held) >= black - 0.01


@pytest.mark.parametrize("weighting", ["equal", "lambda"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(weighting):
    fits = [lookup(weighting) for _ in range(3)]
    for model, seed in zip(fits, (0, 0, 1), strict=True):
        result = fit_joint(model, parts(), **SHORT, seed=seed, hard_negatives=2)
        assert result.net is model
        assert not model.training
    first, again, other = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in fits)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_global_random_number_is_read():
    before = torch.get_rng_state()
    data = topics(a=6, b=3)
    made = JointEncoder(WordPieceTable(8), BLACK)
    made.augment.prepare(data.documents)
    fit_joint(made, data, **SHORT)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_start_is_kept_where_training_makes_it_worse():
    data = parts()
    # the black box is right about everything, and a huge rate ruins what is beside it
    data = RankingData(**{**vars(data), "document_vectors": data.query_vectors})
    model = JointEncoder(Lookup(60, 6), BLACK, 1.0)
    start = [p.detach().clone() for p in model.parameters()]
    result = fit_joint(model, data, lr=10.0, epochs=3, dev=0.3)
    assert result.start.value >= 0.99
    if result.best_step == 0:
        assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    assert result.dev.value >= result.start.value


def test_reported_ndcg_is_that_of_the_returned_weights():
    data = parts()
    training_pairs, dev = split_by_passage(data.pairs, 0.2)
    model = lookup()
    before = [model.encode(data.texts(kind), data.vectors(kind), kind) for kind in ("query", "document")]
    result = fit_joint(model, RankingData(**{**vars(data), "pairs": training_pairs}), dev=dev, **SHORT)
    after = [model.encode(data.texts(kind), data.vectors(kind), kind) for kind in ("query", "document")]
    queries = dev.query.unique()
    grades = dev.grades(queries, torch.arange(60))
    for (q, d), measured in ((before, result.start), (after, result.dev)):
        values = ndcg(q[queries] @ d.T, grades)
        assert measured.value == pytest.approx(float(values.mean()), abs=1e-6)
        assert measured.n == len(dev)
        assert measured.se == pytest.approx(float(values.std()) / math.sqrt(len(values)), abs=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_chunks_change_the_memory_and_not_the_gradient(dropout):
    class Dropping(Lookup):
        def forward(self, features):
            return functional.normalize(functional.dropout(super().forward(features), dropout, self.training), dim=1)

    models = []
    for chunk in (None, 5):
        model = JointEncoder(Dropping(60, 6), BLACK, "lambda")
        fit_joint(model, parts(), dev=0.2, epochs=1, batch_size=64, lr=1e-2, ema=0.0, chunk=chunk)
        models.append(model)
    weights = [[p.detach() for p in model.parameters()] for model in models]
    if dropout:
        # other random numbers, but recomputed with the same ones: the fit is finite and differs from the start
        assert not torch.equal(weights[1][1], Lookup(60, 6).table)
        return
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    options = {**SHORT, "learn_scale": True}
    whole = lookup()
    expected = fit_joint(whole, parts(), **options)
    steps = []

    class Stop(Exception):
        pass

    advance = training.Fit._advance

    def stopping(fit):
        if len(steps) == 7:
            raise Stop
        steps.append(1)
        advance(fit)

    monkeypatch.setattr(training.Fit, "_advance", stopping)
    with pytest.raises(Stop):
        fit_joint(lookup(), parts(), **options, resume=tmp_path)
    monkeypatch.setattr(training.Fit, "_advance", advance)
    resumed = lookup()
    result = fit_joint(resumed, parts(), **options, resume=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert result.history == expected.history
    with pytest.raises(RunFolderError):
        fit_joint(lookup(), parts(seed=1), **options, resume=tmp_path)


def test_hard_negatives_join_the_candidates(monkeypatch):
    seen = []
    from noisewise.retrieval import fitting

    def spy(scores, target, **options):
        # not those of looks at dev queries, which rank all passages
        if scores.requires_grad:
            seen.append(scores.shape[1])
        return loss(scores, target, **options)

    loss = fitting.ranking_loss
    monkeypatch.setattr(fitting, "ranking_loss", spy)
    for k in (0, 3):
        fit_joint(lookup(), parts(), dev=0.2, epochs=1, batch_size=8, hard_negatives=k)
    half = len(seen) // 2
    assert max(seen[:half]) <= 8 < min(seen[half:])


def test_a_learned_scale_moves_and_leaves_the_joint_encoder_as_it_is():
    model = lookup()
    names = [name for name, _ in model.named_parameters()]
    fit_joint(model, parts(), **SHORT, learn_scale=True)
    assert [name for name, _ in model.named_parameters()] == names


def test_what_cannot_work_is_refused_before_long_work(shapes_unchecked):
    data = parts()
    with pytest.raises(InvalidInput, match="built for"):
        fit_joint(JointEncoder(Lookup(60, 6), 5), data)
    bad = data.document_vectors.clone()
    bad[3] = math.nan
    with pytest.raises(InvalidInput, match="vector 3"):
        fit_joint(lookup(), RankingData(**{**vars(data), "document_vectors": bad}))
    with pytest.raises(InvalidInput, match="60 pairs to train on and 0"):
        fit_joint(lookup(), data, dev=data.pairs[torch.arange(0)])
    with pytest.raises(InvalidInput, match="5 dev pairs"):
        fit_joint(lookup(), data, dev=data.pairs[torch.arange(5)])
    with pytest.raises(InvalidInput, match="59 query texts"):
        RankingData(**{**vars(data), "queries": data.queries[1:]})
    with pytest.raises(InvalidInput, match="document 60"):
        RankingData(**{**vars(data), "pairs": Pairs(torch.tensor([0]), torch.tensor([60]), torch.ones(1))})
    for options in ({"epochs": 0}, {"lr": -1.0}, {"smoothing": 1.0}, {"ema": 1.0}, {"chunk": 0}, {"scale": 1000}):
        with pytest.raises(InvalidInput, match=next(iter(options))):
            fit_joint(lookup(), data, **options)


# ---- without labels


def passages(n=60, seed=5):
    """Of eight words each, out of 60."""
    vocabulary = words(60, seed)
    drawn = torch.rand(n, 60, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :8]
    return [" ".join(vocabulary[at] for at in row) for row in drawn.tolist()]


def test_distilled_tables_rank_as_bm25_does_and_repeat_their_bits(shapes_unchecked):
    documents = passages()
    bm25 = BM25.of(documents)
    asked, _ = drawn_queries(documents, bm25, 80, seed=9)
    teacher = (20 * torch.from_numpy(bm25.scores(asked))).softmax(1)

    def divergence(net):
        with torch.no_grad():
            scores = net(net.features(asked, "query")) @ net(net.features(documents, "document")).T
        return float((teacher * (teacher.log() - (20 * scores.double()).log_softmax(1))).sum(1).mean())

    nets = [table(documents, dim=32).eval() for _ in range(2)]
    before = divergence(nets[0])
    results = [distil_bm25(net, bm25, documents, steps=150, batch_size=32) for net in nets]
    assert results[0].net is nets[0]
    assert not nets[0].training
    # of queries that it was not trained on, over the whole corpus
    assert divergence(nets[0]) < before / 2
    assert torch.equal(nets[0].table, nets[1].table)


def test_drawn_queries_are_words_of_their_passage_the_rare_ones_more_often():
    common = words(12, 1)
    documents = [" ".join([*common, *words(12, 100 + i)]) for i in range(30)]
    asked, source = drawn_queries(documents, BM25.of(documents), 240, seed=1)
    assert len(asked) == len(source) == 240
    drawn = [(word, index) for text, index in zip(asked, source.tolist(), strict=True) for word in text.split()]
    for text, index in zip(asked, source.tolist(), strict=True):
        assert 4 <= len(text.split()) <= 10
        assert len(set(text.split())) == len(text.split())
        assert set(text.split()) <= set(documents[index].split())
    # idf of what is in all 30 passages: log(1 + .5 / 30.5), of what is in one: log(1 + 29.5 / 1.5)
    assert sum(word in common for word, _ in drawn) < 0.05 * len(drawn)
    assert drawn_queries(documents, BM25.of(documents), 240, seed=1)[0] == asked


def test_distillation_needs_two_passages_with_words():
    documents = ["one passage of words", "one passage of words", "..."]
    with pytest.raises(InvalidInput, match="2 passages"):
        distil_bm25(table(documents, dim=4), BM25.of(documents), documents)


def test_scripts_without_spaces_give_queries_too():
    documents = ["东京是日本的首都", "北京是中国的首都", "巴黎是法国的首都"]
    asked, source = drawn_queries(documents, BM25.of(documents, language=None), 9)
    assert all(
        word in documents[index] for text, index in zip(asked, source.tolist(), strict=True) for word in text.split()
    )


def test_any_module_that_keeps_the_protocol_is_an_augment():
    assert isinstance(JointEncoder(Lookup(3, 2), 4).augment, nn.Module)
