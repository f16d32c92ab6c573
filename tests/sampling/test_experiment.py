"""`noisewise compare digs` at quick scale: complete rows, equal bills, resumption, and what its pieces promise."""

import pytest
import torch

from noisewise.metrics.results import Results
from noisewise.sampling.experiments.digs import run
from noisewise.sampling.experiments.digs.forty_modes import bulk_ess
from noisewise.sampling.experiments.digs.problem import thinned
from noisewise.targets.gaussian_mixture import gmm40


@pytest.mark.slow
def test_quick_scale_fills_every_row_within_budget_and_a_second_call_runs_nothing(tmp_path):
    first = run("quick", out=tmp_path, progress=False)
    rows = {(row.problem, row.system): row for row in first.rows}
    assert [len(first.systems(problem)) for problem in first.problems] == [4, 3, 2]
    budgets = {"GMM-40": 1e5, "two modes, d=10": 1.5e5, "posteriordb mixture": 2e5}
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
