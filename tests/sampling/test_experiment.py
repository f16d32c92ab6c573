"""`noisewise compare digs` at quick scale: complete rows, equal bills, resumption, and what its pieces promise."""

import json

import pytest
import torch

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.results import Results
from noisewise.sampling.experiment import Outcome, Problem, System, comparison, run
from noisewise.sampling.experiment.forty_modes import bulk_ess
from noisewise.sampling.experiment.problem import TUNING_SEED, thinned
from noisewise.targets.gaussian_mixture import gmm40
from noisewise.typing import Cost


def toy(calls, fail_at=None):
    """A problem whose draws are standard normal times a setting: the mean square tells the setting."""

    def draw(budget, seed, width=1.0):
        if fail_at is not None and len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append((seed, width))
        x = width * torch.randn(4, 50, 1, generator=torch.Generator().manual_seed(seed))
        return Outcome(x, Cost(gradients=int(budget)))

    def measure(outcome):
        return {"gap": Measurement(abs(float(outcome.positions.square().mean()) - 1))}

    systems = (System("plain", draw), System("tuned", draw, ({"width": 3.0}, {"width": 1.0}, {"width": 0.2})))
    return Problem("A", "toy", 1000, systems, measure, "gap")


@pytest.mark.slow
def test_quick_scale_fills_every_row_within_budget_and_a_second_call_runs_nothing(tmp_path):
    first = run("quick", out=tmp_path, progress=False)
    rows = {(row.problem, row.system): row for row in first.rows}
    assert [len(first.systems(problem)) for problem in first.problems] == [4, 3, 2]
    budgets = {"GMM-40": 1e5, "two modes, d=10": 1.5e5, "posteriordb mixture": 3e4}
    for (problem, _), row in rows.items():
        # the loop stops before it would exceed the budget, and within one iteration of it
        assert 0.9 * budgets[problem] < row.cost.gradients <= budgets[problem]
        assert set(row.measurements) == set(first.measurement_names(problem))
    ours = rows["two modes, d=10", "noisewise.sample (FittedDiGS)"].measurements
    digs = rows["two modes, d=10", "DiGS (5 VP levels, L=10)"].measurements
    assert ours["standard errors off"].value < 4
    assert digs["|w - .7|"].value > 0.3  # plain DiGS stays where it began (section 4 of the specification)
    found = rows["GMM-40", "noisewise.sample (FittedDiGS)"].measurements["modes found"]
    assert found.value == 40
    page = (tmp_path / "report.html").read_text()
    assert "Two modes" in page
    assert page.count("<figure>") >= 12

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    second = run("quick", out=tmp_path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == stamps
    assert second.rows == first.rows == Results.load(tmp_path / "results.json").rows


def test_rows_finished_before_an_interruption_are_kept(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(comparison, "_problems", lambda scale, device: (toy(calls, fail_at=2),))
    with pytest.raises(KeyboardInterrupt):
        run("quick", seeds=3, out=tmp_path, protocols=["A"], progress=False)
    assert len(list((tmp_path / "rows").iterdir())) == 2
    again = []
    monkeypatch.setattr(comparison, "_problems", lambda scale, device: (toy(again),))
    results = run("quick", seeds=3, out=tmp_path, protocols=["A"], progress=False)
    assert [seed for seed, _ in calls + again] == [0, 1, 2, 0, 1, 2]
    assert [(row.system, row.seed) for row in results.rows] == [(s, k) for s in ("plain", "tuned") for k in range(3)]


def test_tuning_takes_the_best_setting_on_its_own_seed_and_says_what_it_tried(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(comparison, "_problems", lambda scale, device: (toy(calls),))
    results = run("cpu", seeds=1, out=tmp_path, protocols=["A"], progress=False)
    assert calls == [(0, 1.0), *[(TUNING_SEED, width) for width in (3.0, 1.0, 0.2)], (0, 1.0)]
    note = next(note for note in results.notes if note.startswith("tuned on toy"))
    assert "3 settings" in note
    assert "chosen by gap: width 1 (" in note


def test_torch_has_its_threads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_problems", lambda scale, device: (toy([]),))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run("quick", out=tmp_path, protocols=["A"], progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "huge"}, "'huge'"),
        ({"protocols": ("A", "Z")}, "A, Z"),
        ({"protocols": ()}, "none"),
        ({"seeds": (TUNING_SEED,)}, "tuning seed"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(InvalidInput, match=message):
        run(out=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_damaged_row_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_problems", lambda scale, device: (toy([]),))
    run("quick", out=tmp_path, protocols=["A"], progress=False)
    row = next((tmp_path / "rows").iterdir())
    row.write_text(json.dumps({})[:1])
    with pytest.raises(RunFolderError, match=row.name):
        run("quick", out=tmp_path, protocols=["A"], progress=False)


def test_thinning_keeps_every_chain_and_the_whole_length():
    positions = torch.arange(20.0).reshape(2, 10, 1)
    assert thinned(positions, 4).flatten().tolist() == [0, 9, 10, 19]
    assert torch.equal(thinned(positions, 100), positions.reshape(-1, 1))


def test_bulk_ess_of_independent_draws_is_their_number():
    draws = gmm40().sample(10_000, torch.Generator().manual_seed(1)).reshape(20, 500, 2)
    assert 0.9 < bulk_ess(draws) / 10_000 < 1.1


@pytest.mark.bench
@pytest.mark.slow
def test_blackjax_peers_pay_exactly_for_their_leapfrogs_and_sample_the_mixture():
    pytest.importorskip("blackjax")
    from noisewise.sampling import blackjax_peers

    means = torch.tensor([[-1.5, 0.0], [1.5, 0.0]])
    density = blackjax_peers.gaussian_mixture(means.numpy(), 1.0)
    nuts = blackjax_peers.nuts(density, torch.zeros(20, 2).numpy(), 6e4, 0)
    smc = blackjax_peers.tempered_smc(density, 2, 3.0, 200, 6e4, 0)
    for outcome in (nuts, smc):
        assert 5.5e4 < outcome.cost.gradients <= 6e4
        first = outcome.positions[..., 0]
        se = first.mean(1).std() / len(first) ** 0.5
        assert abs(float(first.mean())) < 4 * float(se)
        # second moment of the mixture: 1 + 1.5^2
        square = first.square().mean(1)
        assert abs(float(square.mean()) - 3.25) < 4 * float(square.std()) / len(first) ** 0.5
