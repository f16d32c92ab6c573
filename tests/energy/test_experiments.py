"""`noisewise compare mmgibbs` and `compare mfd` at quick scale, and what their pieces promise."""

import math

import pytest
import torch

from noisewise.energy.experiments import mfd, mmgibbs
from noisewise.energy.experiments.mfd.bumps import _Bumps
from noisewise.energy.experiments.mfd.truths import Fitted, circles, four_clusters, judge, two_clusters
from noisewise.energy.experiments.mmgibbs.exact_score import exact_model
from noisewise.energy.experiments.mmgibbs.systems import Setup, exact_gibbs
from noisewise.energy.experiments.mmgibbs.toys import TOYS, four_gaussians
from noisewise.noise import Corruption
from noisewise.typing import Cost


@pytest.mark.slow
def test_mmgibbs_at_quick_scale_fills_every_row_and_a_second_call_runs_nothing(tmp_path, shapes_unchecked):
    results = mmgibbs.run("quick", out=tmp_path, progress=False)
    assert [len(results.systems(problem)) for problem in results.problems] == [9, 9, 3]
    rows = {(row.problem, row.system): row.measurements for row in results.rows}
    exact = "MoG4, exact score, sigma 0.5"
    # section 4A of the specification: the width is .2 for the exact posterior, wider for the Gaussian, widest for Langevin
    widths = [rows[exact, name]["width of a mode"].value for name in ("exact posterior", "full", "noisy Langevin")]
    assert widths == sorted(widths)
    assert widths[0] == pytest.approx(0.2, abs=0.02)
    # on two dimensions a Krylov space of rank two is the whole space
    assert rows[exact, "krylov, rank 2"]["MMD^2"].value == pytest.approx(rows[exact, "full"]["MMD^2"].value, abs=1e-4)
    krylov = rows["digits", "krylov, rank 8"]["gap to full"]
    assert krylov.value < 0.02 < krylov.floor
    assert "<figure>" in (tmp_path / "report.html").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    mmgibbs.run("quick", out=tmp_path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()} == stamps


@pytest.mark.slow
def test_mfd_at_quick_scale_recovers_the_weight_that_fd_misses(tmp_path, shapes_unchecked):
    results = mfd.run("quick", out=tmp_path, progress=False)
    assert [len(results.systems(problem)) for problem in results.problems] == [5, 3, 2]
    rows = {(row.problem, row.system): row.measurements for row in results.rows}
    for name in ("MFD, beta .8", "maximum likelihood"):
        weight = rows["modes at ±4, closed form", name]["weight of the least cluster"]
        assert weight.value == pytest.approx(weight.floor, abs=0.03)
    network = "modes at ±4, network"
    assert rows[network, "MFD, beta .8"]["TV of cluster weights"].value < 0.05
    assert rows[network, "FD"]["TV of cluster weights"].value > 0.05
    assert "<figure>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("make", [lambda: two_clusters(4.0), four_clusters, circles])
def test_the_truths_are_normalised_and_their_draws_have_their_weights(make):
    truth = make()
    nodes, volume = truth.grid()
    assert float(truth.log_prob(nodes).double().exp().sum() * volume) == pytest.approx(1, abs=2e-3)
    found = judge(Fitted(truth.log_prob, truth, Cost()))
    assert found["KL"].value == pytest.approx(0, abs=1e-6)
    assert found["TV of cluster weights"].value < 2e-3
    share = torch.bincount(truth.label(truth.sample(40_000, torch.Generator().manual_seed(0)))) / 40_000
    assert bool(((share - truth.weights).abs() < 4 * (truth.weights / 40_000).sqrt()).all())


def test_kl_and_weights_of_a_density_with_wrong_weights_are_those_of_the_formula():
    truth, wrong = two_clusters(6.0), torch.tensor([0.6, 0.4])
    means = torch.tensor([-6.0, 6.0])

    def log_q(x):
        return (wrong.log() - 0.5 * (x - means).square()).logsumexp(-1) + 3.0  # a constant must not matter

    found = judge(Fitted(log_q, truth, Cost()))
    assert found["KL"].value == pytest.approx(0.2 * math.log(0.2 / 0.6) + 0.8 * math.log(0.8 / 0.4), abs=1e-3)
    assert found["weight of the least cluster"].value == pytest.approx(0.6, abs=1e-3)
    assert found["TV of cluster weights"].value == pytest.approx(0.4, abs=1e-3)


def test_the_ridge_solution_is_a_stationary_point_of_the_score_matching_loss():
    truth = two_clusters(2.0)
    family = _Bumps(truth.reach)
    x, mean, variance = family._data(truth, 500, 0)
    fitted = family.score_matching(truth, 500, 0, 1.0, 1e-3)
    # recover theta from the fitted log density: it is linear in the bumps
    nodes = torch.linspace(-truth.reach, truth.reach, 400, dtype=torch.float64).unsqueeze(-1)
    phi = family._features(nodes[:, 0])[0]
    base = -(nodes[:, 0] - mean).square() / (2 * variance)
    theta = torch.linalg.lstsq(phi, (fitted.log_density(nodes) - base).unsqueeze(-1)).solution[:, 0]

    def loss(t):
        _, first, second = family._features(x)
        score = first @ t - (x - mean) / variance
        return (0.5 * score.square() + second @ t - 1 / variance).mean() + 0.5e-3 * t.square().sum()

    gradient = torch.autograd.grad(loss(theta.requires_grad_(True)), theta)[0]
    assert float(gradient.abs().max()) < 1e-6


def test_the_exact_gibbs_sampler_leaves_the_four_gaussians_as_they_are():
    target, noise = four_gaussians(), Corruption(1.0, 0.8)
    start = target.sample(20_000, torch.Generator().manual_seed(0))
    system = exact_gibbs(target, lambda seed: Setup(exact_model(target, noise), noise, start, start, seed))
    x = system.draw(6, 1).positions[-1]
    labels = target.component(x)
    width = (x - target.means[labels]).square().mean().sqrt()
    assert float(width) == pytest.approx(0.2, abs=5 * 0.2 / 80_000**0.5)
    assert bool(((torch.bincount(labels) / 20_000 - 0.25).abs() < 4 * (0.25 * 0.75 / 20_000) ** 0.5).all())


def test_the_toys_are_those_of_the_paper():
    draws = {toy.name: toy.sample(20_000, torch.Generator().manual_seed(0)) for toy in TOYS}
    radius = draws["rings"].norm(dim=-1)
    assert float((radius > 0.975).double().mean()) == pytest.approx(0.5, abs=0.02)
    # 1.3 times circles of radius 1 and .5 with noise .05 in each coordinate
    assert float(radius[radius > 0.975].mean()) == pytest.approx(1.3, abs=0.01)
    assert float(radius[radius > 0.975].std()) == pytest.approx(0.065, abs=0.003)
    board = draws["checkerboard"]
    assert bool((board.abs() <= 2).all())
    square = (board + 2).floor().clamp(0, 3).long()
    assert bool(((square.sum(-1) % 2) == 0).all())
    assert bool(((torch.bincount(square[:, 0] * 4 + square[:, 1], minlength=16) > 0).sum() == 8).all())
