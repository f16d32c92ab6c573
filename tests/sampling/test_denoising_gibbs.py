"""Denoising Gibbs: exact on Gaussians, biased as theory says elsewhere, exact for the noisy model with the correction."""

import math

import pytest
import torch
from every_kernel import seeded
from scipy.linalg import solve_discrete_lyapunov
from scipy.stats import ks_2samp

from noisewise.denoising import Energy, Score, gaussian_posterior
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.noise import Corruption
from noisewise.sampling import DenoisingGibbs, Draws, sample
from noisewise.targets import GaussianMixture

NOISE = Corruption(1.0, 0.5)
F64 = torch.float64


def gaussian(covariance) -> GaussianMixture:
    covariance = torch.as_tensor(covariance, dtype=F64)
    return GaussianMixture(torch.zeros(1, len(covariance), dtype=F64), covariance.unsqueeze(0))


def exact_model(target: GaussianMixture, noise: Corruption) -> Energy:
    """The true energy of the noisy density."""
    noisy = target.noisy(noise.a, noise.s)
    return Energy(lambda x: -noisy.log_prob_and_score(x)[0] if x.requires_grad else -noisy.log_prob(x))


def four_modes() -> GaussianMixture:
    means = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=F64)
    return GaussianMixture(means, 0.04, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64))


def moments_within(x, mean, covariance, errors=4.5):
    n = len(x)
    spread = covariance.diagonal().sqrt()
    assert bool(((x.mean(0) - mean).abs() < errors * spread / n**0.5).all())
    products = torch.einsum("ni,nj->nij", x - mean, x - mean)
    assert bool(((products.mean(0) - covariance).abs() < errors * products.std(0) / n**0.5).all())


@pytest.mark.parametrize("noise", [NOISE, Corruption(0.8, 0.6), Corruption(0.5, 2.0)])
@pytest.mark.parametrize("correct", [False, True])
def test_the_full_covariance_leaves_a_gaussian_as_it_is(noise, correct, shapes_unchecked):
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)
    target = gaussian(covariance)
    kernel = DenoisingGibbs(exact_model(target, noise), noise, correct=correct)
    state, generator = kernel.init(target.sample(40_000, seeded(0))), seeded(1)
    if correct:  # begins at a x; one draw of the noisy density is its start
        state, _ = kernel._corrected(target.noisy(noise.a, noise.s).sample(40_000, seeded(2)))
    for _ in range(3):
        state, info = kernel.step(state, generator)
        moments_within(state.position, torch.zeros(2, dtype=F64), covariance)
        if correct:
            # noise and denoising are then the two halves of an exact Gibbs sampler, which is reversible
            assert float(info.acceptance) == pytest.approx(1, abs=1e-9)


# KL(N(0, S) || N(0, C)) of the stationary law, unit variances, sigma = .5: section 5.3 of the specification
ORACLE = {
    0.5: {"full": 0.0, "diagonal": 0.0027, "isotropic": 0.0027, "none": 0.2755},
    0.9: {"full": 0.0, "diagonal": 0.1184, "isotropic": 0.1184, "none": 0.4761},
    0.99: {"full": 0.0, "diagonal": 4.11, "isotropic": 4.11, "none": 1.28},
}


@pytest.mark.parametrize("rho", ORACLE)
@pytest.mark.parametrize("covariance", ["full", "diagonal", "isotropic", "none"])
def test_the_stationary_law_on_a_correlated_gaussian_is_the_one_of_theory(rho, covariance):
    c = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=F64)
    model = exact_model(gaussian(c), NOISE)
    exact = NOISE.s**2 * c @ torch.linalg.inv(c + NOISE.s**2 * torch.eye(2, dtype=F64))
    variance = float(exact.trace() / 2) if covariance == "isotropic" else None
    # the chain is linear, x' = A (x + s eps) + noise of the covariance in use: both read off the object under test
    posterior = gaussian_posterior(model, torch.eye(2, dtype=F64), NOISE, covariance=covariance, variance=variance)
    a, used = posterior.mean.mT, posterior.covariance.dense()[0]
    stationary = torch.as_tensor(solve_discrete_lyapunov(a.numpy(), (NOISE.s**2 * a @ a.mT + used).numpy()))
    ratio = torch.linalg.solve(c, stationary)
    kl = 0.5 * float(ratio.trace() - 2 - torch.logdet(ratio))
    assert kl == pytest.approx(ORACLE[rho][covariance], abs=6e-5 if rho < 0.95 else 6e-3)
    if (rho, covariance) in ((0.9, "diagonal"), (0.5, "none")):
        kernel = DenoisingGibbs(model, NOISE, covariance=covariance)
        state, generator = kernel.init(gaussian(stationary).sample(20_000, seeded(0))), seeded(1)
        for _ in range(5):
            state, _ = kernel.step(state, generator)
        moments_within(state.position, torch.zeros(2, dtype=F64), stationary)


def test_neighbouring_draws_are_correlated_by_c_over_c_plus_sigma_squared(shapes_unchecked):
    # integrated autocorrelation time 1 + 2 c / sigma^2 = 33 at c = 4, sigma = .5
    target = gaussian([[4.0]])
    kernel = DenoisingGibbs(exact_model(target, NOISE), NOISE)
    x = target.sample(50_000, seeded(0))
    state, _ = kernel.step(kernel.init(x), seeded(1))
    product = x * state.position / 4
    assert float(product.mean()) == pytest.approx(4 / 4.25, abs=4 * float(product.std()) / 50_000**0.5)


def test_the_mean_alone_is_drawn_too_narrow_and_the_chain_of_final_mean_is_not(shapes_unchecked):
    target = gaussian([[1.0]])
    model = exact_model(target, NOISE)
    run = sample(
        DenoisingGibbs(model, NOISE, covariance="none"),
        init=torch.zeros(20_000, 1, dtype=F64),
        draws=30,
        progress=False,
    )
    variance = run.positions[:, -1].square()
    assert float(variance.mean()) == pytest.approx(0.4444, abs=4 * float(variance.std()) / 20_000**0.5)
    # final="mean" shows E[x | x_t], of variance c^2 / (c + sigma^2), and goes on from the sample, of variance c
    kernel = DenoisingGibbs(model, NOISE, final="mean")
    state, generator = kernel.init(target.sample(40_000, seeded(0))), seeded(1)
    for _ in range(3):
        state, _ = kernel.step(state, generator)
    for x, truth in ((state.position, 0.8), (state.clean, 1.0)):
        assert float(x.square().mean()) == pytest.approx(truth, abs=4 * truth * (2 / 40_000) ** 0.5)


def noisy_draws_after_a_step(kernel, target, n=60_000):
    exact = target.noisy(kernel.corruption.a, kernel.corruption.s)
    state, _ = kernel._corrected(exact.sample(n, seeded(0)))
    after, info = kernel.step(state, seeded(1))
    return after.noisy, exact.sample(n, seeded(2)), info


@pytest.mark.parametrize(
    "options", [{}, {"covariance": "diagonal"}, {"covariance": "isotropic", "variance": 0.2}, {"covariance": "none"}]
)
@pytest.mark.parametrize("noise", [Corruption(1.0, 0.6), Corruption(0.7, 0.5)])
def test_the_correction_leaves_the_noisy_density_as_it_is_whatever_the_proposal(noise, options, shapes_unchecked):
    target = four_modes()
    kernel = DenoisingGibbs(exact_model(target, noise), noise, correct=True, **options)
    noisy, fresh, info = noisy_draws_after_a_step(kernel, target)
    assert 0.05 < float(info.acceptance) < 0.999
    for direction in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])):
        assert ks_2samp((noisy @ direction.double()).numpy(), (fresh @ direction.double()).numpy()).pvalue > 1e-4
    share = target.noisy(noise.a, noise.s).responsibilities(noisy).mean(0)
    assert bool(((share - target.weights).abs() < 4 * (target.weights / len(noisy)).sqrt()).all())


def test_a_proposal_where_the_model_is_not_finite_is_rejected_and_counted(shapes_unchecked):
    # an energy that is not a number in half of the plane: the corrected chain is that of the other half, renormalised
    target, noise = gaussian([[1.0, 0.0], [0.0, 1.0]]), Corruption(1.0, 0.6)
    noisy = target.noisy(1.0, 0.6)
    wall = Energy(lambda x: 0 * x[:, 0].sqrt() - noisy.log_prob_and_score(x)[0])
    kernel = DenoisingGibbs(wall, noise, correct=True)
    start = noisy.sample(40_000, seeded(0))
    start[:, 0] = start[:, 0].abs()
    state, _ = kernel._corrected(start)
    generator, refused = seeded(1), 0
    for _ in range(3):
        state, info = kernel.step(state, generator)
        refused += int(info.nonfinite)
    assert refused > 1000
    assert bool((state.noisy[:, 0] >= 0).all())
    fresh = noisy.sample(40_000, seeded(2))[:, 0].abs()
    assert ks_2samp(state.noisy[:, 0].numpy(), fresh.numpy()).pvalue > 1e-4
    with pytest.raises(InvalidInput, match="not finite"):
        kernel._corrected(-start)


def test_without_the_correction_a_wrong_proposal_does_not(shapes_unchecked):
    target, noise = four_modes(), Corruption(1.0, 0.6)
    kernel = DenoisingGibbs(exact_model(target, noise), noise, correct=True, covariance="isotropic", variance=0.2)
    state, _ = kernel._corrected(target.noisy(1.0, 0.6).sample(60_000, seeded(0)))
    moved = kernel._transition(state).sample(seeded(1))
    fresh = target.noisy(1.0, 0.6).sample(60_000, seeded(2))
    assert ks_2samp(moved[:, 0].numpy(), fresh[:, 0].numpy()).pvalue < 1e-4


def test_small_noise_keeps_a_mixture_and_large_noise_widens_its_modes(shapes_unchecked):
    # section 4A of the specification: within-mode deviations .200 at sigma .2 and about .316 at sigma .5, truth .200
    target = GaussianMixture(four_modes().means, 0.04)
    found = {}
    for s in (0.2, 0.5):
        noise = Corruption(1.0, s)
        kernel = DenoisingGibbs(exact_model(target, noise), noise)
        run = sample(kernel, init=target.sample(2000, seeded(0)), draws=1, thin=60, progress=False)
        x = run.positions[:, -1]
        found[s] = float((x - target.means[target.component(x)]).square().mean().sqrt())
    assert found[0.2] == pytest.approx(0.2, abs=4 * 0.2 / 8000**0.5)
    assert found[0.5] == pytest.approx(0.316, abs=0.02)


CASES = {
    "full": {},
    "diagonal": {"covariance": "diagonal"},
    "hutchinson": {"covariance": "hutchinson", "probes": 2},
    "isotropic": {"covariance": "isotropic", "variance": 0.03},
    "krylov": {"covariance": "krylov", "rank": 2},
    "krylov of higher rank": {"covariance": "krylov", "rank": 20},
    "none": {"covariance": "none"},
    "mean": {"final": "mean"},
    "corrected": {"correct": True},
    "corrected diagonal": {"correct": True, "covariance": "diagonal"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_resumed_equals_one_longer_run(name, dtype, tmp_path):
    noise = Corruption(0.9, 0.3)
    kernel = DenoisingGibbs(exact_model(four_modes(), noise), noise, **CASES[name])
    init = four_modes().sample(8, seeded(0)).to(dtype)
    whole = sample(kernel, init=init, draws=7, seed=3, progress=False)
    first = Draws.load(sample(kernel, init=init, draws=3, seed=3, progress=False).save(tmp_path / "run"))
    resumed = first.resume(kernel, 4, progress=False)
    assert whole.positions.dtype == dtype
    assert torch.equal(resumed.positions, whole.positions)
    assert resumed.cost.gradients == whole.cost.gradients
    # and through a folder
    for draws in (3, 7):
        stored = sample(kernel, init=init, draws=draws, seed=3, checkpoint=tmp_path / "folder", progress=False)
    assert torch.equal(stored.positions, whole.positions)


@pytest.mark.parametrize(
    ("name", "products"),
    [("isotropic", 0), ("none", 0), ("hutchinson", 2), ("krylov", 2), ("krylov of higher rank", 2), ("full", 2)],
)
def test_the_bill_is_one_score_and_the_products_of_each_step(name, products):
    calls = [0]
    noisy = four_modes().noisy(1.0, 0.3)

    def score(x):
        calls[0] += len(x)
        return noisy.score(x)

    run = sample(
        DenoisingGibbs(Score(score), Corruption(1.0, 0.3), **CASES[name]),
        init=torch.zeros(10, 2, dtype=F64), draws=5, progress=False,
    )  # fmt: skip
    assert calls[0] == 10 * (1 + 5)
    assert run.cost.gradients == 10 * (1 + 5 * (1 + products))
    assert "log_prob" not in run.stats


def test_a_run_has_a_summary_a_report_and_a_budget(tmp_path):
    noise = Corruption(1.0, 0.3)
    kernel = DenoisingGibbs(exact_model(four_modes(), noise), noise)
    run = sample(kernel, init=four_modes().sample(20, seeded(0)), budget=20 * 301, progress=False)
    assert run.cost.gradients <= 20 * 301
    assert run.positions.shape == (20, 100, 2)
    assert "Energy" in run.report(tmp_path / "report.html").read_text()
    assert run.to_arviz().posterior["x"].shape == (20, 100, 2)
    assert math.isfinite(float(run.summary().r_hat[0]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"covariance": "banded"}, "'banded'"),
        ({"covariance": "isotropic"}, "calibrate first"),
        ({"variance": 0.1}, "belongs to covariance='isotropic'"),
        ({"final": "median"}, "'median'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"correct": True, "covariance": "krylov"}, "exact density"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, said):
    with pytest.raises(InvalidInput, match=said):
        DenoisingGibbs(exact_model(four_modes(), NOISE), NOISE, **options)


def test_models_that_cannot_work_are_refused(shapes_unchecked):
    with pytest.raises(InvalidInput, match="needs an Energy"):
        DenoisingGibbs(Score(lambda x: -x), NOISE, correct=True)
    with pytest.raises(InvalidInput, match="wrap it"):
        DenoisingGibbs(lambda x: -x, NOISE)
    with pytest.raises(InvalidInput, match="Corruption"):
        DenoisingGibbs(Score(lambda x: -x), 0.5)
    with pytest.raises(InvalidInput, match="does not know its dimension"):
        sample(DenoisingGibbs(Score(lambda x: -x), NOISE), chains=3, draws=2)
    with pytest.raises(InvalidInput, match="shape"):
        sample(DenoisingGibbs(Score(lambda x: x[:, :1]), NOISE), chains=3, draws=2, dim=2)
    with pytest.raises(InvalidInput, match="start of chain 1 is not finite"):
        sample(DenoisingGibbs(Score(lambda x: -x), NOISE), init=torch.tensor([[0.0], [math.nan]]), draws=2)


def test_a_score_of_no_density_diverges_and_is_warned_of():
    # the mean is x_t (1 + 5 s^2), so that the chain grows by 2.25 a step
    kernel = DenoisingGibbs(Score(lambda x: 5 * x), NOISE)
    init = torch.randn(6, 2, generator=seeded(0))
    with pytest.warns(NoisewiseWarning, match=r"6 of 6 chains have diverged.*check the sign"):
        run = sample(kernel, init=init, draws=40, progress=False)
    assert "diverged" in run.warnings[0]
    with pytest.raises(InvalidInput, match="the chains have diverged"):
        sample(kernel, init=init, draws=200, progress=False)
