"""The fitted denoiser: its exact acceptance, its proposals, its fit, and what it does when the fit is hopeless."""

import math

import numpy as np
import pytest
import torch
from every_kernel import seeded, tempered, wrong_reference
from scipy.stats import ks_2samp, multivariate_t
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.metrics import mode_weights
from noisewise.sampling import FittedDiGS, ParallelTempering, sample
from noisewise.sampling.importance import effective_share, largest_power
from noisewise.sampling.kernel import ChainState
from noisewise.sampling.mixture_fit import StudentMixture, fit_mixture, fit_possible, reweighted, tempered_weights
from noisewise.targets import GaussianMixture, gmm40, posteriordb_mixture, two_bananas, two_modes


def skewed_reference() -> GaussianMixture:
    covariances = torch.tensor([[[1.5, 0.4], [0.4, 1.0]], [[0.6, -0.2], [-0.2, 0.9]]], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
    return GaussianMixture(means, covariances, torch.tensor([0.4, 0.6], dtype=torch.float64))


class FromScratch:
    """q(z | t) and R of the specification, section 13.1, by torch.distributions alone."""

    def __init__(self, q0: GaussianMixture, r: float) -> None:
        m, s, w = q0.means, q0.full_covariances, q0.weights
        mean = (w[:, None] * m).sum(0)
        total = sum(w[k] * (s[k] + torch.outer(m[k] - mean, m[k] - mean)) for k in range(len(w)))
        self.noise = r**2 * total
        self.m, self.s, self.w = m, s, w
        self.gain = torch.stack([sk @ torch.linalg.inv(sk + self.noise) for sk in s])

    def forward(self, x: torch.Tensor) -> MultivariateNormal:
        return MultivariateNormal(x, self.noise)

    def denoised(self, t: torch.Tensor) -> MixtureSameFamily:
        rho = torch.stack(
            [
                self.w[k].log() + MultivariateNormal(self.m[k], self.s[k] + self.noise).log_prob(t)
                for k in range(len(self.w))
            ],
            -1,
        )
        means = torch.stack([self.m[k] + (t - self.m[k]) @ self.gain[k].T for k in range(len(self.w))], -2)
        covariances = torch.stack([self.s[k] - self.gain[k] @ self.s[k] for k in range(len(self.w))])
        return MixtureSameFamily(Categorical(logits=rho), MultivariateNormal(means, covariances))


@pytest.mark.parametrize("r", [0.3, 1.0, 3.0])
def test_fitted_moves_are_accepted_with_the_long_form_of_the_metropolis_ratio(r):
    # equation 6: p(z) p(t|z) q(x|t) / (p(x) p(t|x) q(z|t)) = p(z) q0(x) / (p(x) q0(z))
    target, q0 = two_modes(2, separation=3.0, dtype=torch.float64), skewed_reference()
    kernel, exact = FittedDiGS(target, tempering=tempered(target), reference=q0, r=r, ladder=False), FromScratch(q0, r)
    x = target.sample(500, seeded(1))
    z = kernel._denoiser.propose(x, seeded(2))
    # the noisy variable of that proposal: its first normals, coloured by the noise covariance
    t = x + torch.randn((2, *x.shape), dtype=x.dtype, generator=seeded(2))[0] @ torch.linalg.cholesky(exact.noise).T
    _, acceptance, _ = kernel._fitted_move(ChainState(x, *target.log_prob_and_score(x)), seeded(2))
    q = exact.denoised(t)
    forward = target.log_prob(z) + exact.forward(z).log_prob(t) + q.log_prob(x)
    backward = target.log_prob(x) + exact.forward(x).log_prob(t) + q.log_prob(z)
    torch.testing.assert_close(acceptance, (forward - backward).clamp(max=0).exp(), rtol=1e-5, atol=1e-10)
    assert float(acceptance.std()) > 0.1


@pytest.mark.parametrize("r", [0.3, 1.0])
def test_proposals_are_noised_then_denoised_by_the_reference(r):
    n, q0 = 40_000, skewed_reference()
    target = two_modes(2, dtype=torch.float64)
    x = torch.tensor([0.7, -1.2], dtype=torch.float64).expand(n, 2)
    exact = FromScratch(q0, r)
    z = FittedDiGS(target, tempering=tempered(target), reference=q0, r=r)._denoiser.propose(x, seeded(3))
    with torch.random.fork_rng(devices=[]):  # torch.distributions know no generator
        torch.manual_seed(4)
        independent = exact.denoised(exact.forward(x).sample()).sample()
    for direction in torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64):
        assert ks_2samp((z @ direction).numpy(), (independent @ direction).numpy()).pvalue > 1e-4


def test_an_independence_move_is_accepted_with_the_ratio_of_the_weights():
    target, q0 = two_modes(2, separation=3.0, dtype=torch.float64), skewed_reference()
    kernel = FittedDiGS(target, tempering=tempered(target), reference=q0, ladder=False)
    x = target.sample(500, seeded(1))
    z = q0.sample(500, seeded(2))
    _, acceptance, _ = kernel._fitted_move(ChainState(x, *target.log_prob_and_score(x)), seeded(2))
    weights = [target.log_prob(v) - q0.log_prob(v) for v in (x, z)]
    torch.testing.assert_close(acceptance, (weights[1] - weights[0]).clamp(max=0).exp())


def test_a_perfect_fit_is_always_accepted():
    target = two_modes(3, dtype=torch.float64)
    for r in (math.inf, 1.0):
        kernel = FittedDiGS(target, tempering=tempered(target), reference=target, r=r, ladder=False)
        _, acceptance, _ = kernel._fitted_move(kernel.init(target.sample(200, seeded(0))), seeded(1))
        torch.testing.assert_close(acceptance, torch.ones_like(acceptance))


@pytest.mark.parametrize("covariances", [2.0, [0.5, 2.0], [[0.5, 1.0], [2.0, 1.5]]])
def test_a_reference_of_your_own_may_have_covariances_of_any_form(covariances):
    target = two_modes(2, dtype=torch.float64)
    form = covariances if isinstance(covariances, float) else torch.tensor(covariances, dtype=torch.float64)
    loose = GaussianMixture(target.means, form)
    full = GaussianMixture(target.means, loose.full_covariances)
    for options in ({"r": 0.7}, {"components": "t"}):
        paths = []
        for q0 in (loose, full):
            kernel = FittedDiGS(target, tempering=tempered(target), reference=q0, ladder=False, **options)
            state, _ = kernel.step(kernel.init(target.sample(50, seeded(0))), seeded(1))
            paths.append(state.position)
        torch.testing.assert_close(paths[0], paths[1])


def test_a_known_mixture_is_found_from_its_draws():
    covariances = torch.tensor([[[1.0, 0.8], [0.8, 1.0]], [[0.5, 0.0], [0.0, 2.0]], [[0.2, 0.0], [0.0, 0.2]]])
    means = torch.tensor([[-5.0, 0.0], [5.0, 1.0], [0.0, 8.0]])
    truth = GaussianMixture(means, covariances, torch.tensor([0.2, 0.5, 0.3]))
    fit = fit_mixture(truth.sample(20_000, seeded(0)), seed=1)
    assert len(fit.means) == 3
    order = torch.cdist(truth.means, fit.means).argmin(1)
    torch.testing.assert_close(fit.means[order], means, rtol=0, atol=0.06)
    torch.testing.assert_close(fit.weights[order], truth.weights, rtol=0, atol=0.015)
    # covariances are widened by 5 %
    torch.testing.assert_close(fit.full_covariances[order] / 1.05, covariances, rtol=0.06, atol=0.04)


def test_a_fit_does_not_depend_on_scale_seed_state_or_dtype():
    x = two_modes(2, dtype=torch.float64).sample(1500, seeded(0))
    scale = torch.tensor([1e-6, 1e5], dtype=torch.float64)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is checked
    plain, scaled = fit_mixture(x, seed=0), fit_mixture(x * scale, seed=0)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    torch.testing.assert_close(scaled.means / scale, plain.means, rtol=1e-6, atol=1e-8)
    assert fit_mixture(x.float(), seed=0).means.dtype == torch.float32


def test_a_narrow_mode_of_few_draws_stays_narrow_beside_wide_ones():
    truth = GaussianMixture(
        torch.tensor([[-20.0] * 5, [20.0] * 5]), torch.tensor([9.0, 1e-4]), torch.tensor([0.97, 0.03])
    )
    fit = fit_mixture(truth.sample(3000, seeded(0)).double(), seed=0)
    narrow = fit.full_covariances[fit.means[:, 0].argmax()]
    torch.testing.assert_close(narrow.diagonal(), torch.full((5,), 1.05e-4, dtype=torch.float64), rtol=0.6, atol=0)


def test_places_where_chains_were_stuck_are_told_from_modes_and_left_out():
    target = two_modes(4, dtype=torch.float64)
    # what is stuck is as narrow and as frequent as a mode, 200 nats below
    stuck = 0.1 * torch.randn((800, 4), dtype=torch.float64, generator=seeded(1))
    stuck[:, 0] += 20.0
    draws = torch.cat([target.sample(1200, seeded(0)), stuck])
    mixture, possible = fit_possible(draws, target.log_prob(draws), seed=0)
    assert not bool(possible[1200:].any())
    assert float(possible[:1200].double().mean()) > 0.998
    assert float(mixture.log_prob(stuck).max()) < float(mixture.log_prob(draws[:1200]).min()) - 10
    torch.testing.assert_close(mixture.mean(), target.mean(), rtol=0, atol=0.5)


def test_importance_sampling_sets_right_the_weights_of_a_fit():
    target = two_modes(3, dtype=torch.float64)
    wrong = GaussianMixture(target.means, 1.2 * target.covariances, torch.tensor([0.9, 0.1], dtype=torch.float64))
    draws = wrong.sample(20_000, seeded(0))
    weight = tempered_weights(target.log_prob(draws) - wrong.log_prob(draws))
    # about 2000 draws fall into the heavy mode, each with an importance weight of relative variance below 1
    assert float(reweighted(wrong, draws, weight).weights[1]) == pytest.approx(0.7, abs=4 * 0.21 * (2 / 2000) ** 0.5)


def test_weights_are_cut_just_so_far_that_the_share_asked_for_counts():
    log_weight = 30 * torch.randn(5000, dtype=torch.float64, generator=seeded(0))
    log_weight[::7] = -torch.inf
    power = largest_power(log_weight, 0.1)
    assert 0 < float(power) < 1
    cut = torch.where(torch.isfinite(log_weight), power * log_weight, -torch.inf)
    assert float(effective_share(cut)) == pytest.approx(0.1, rel=1e-6)
    # by its definition, with plain weights
    weight = cut.exp()
    assert float(weight.sum() ** 2 / weight.square().sum() / 5000) == pytest.approx(0.1, rel=1e-6)
    assert float(largest_power(0.01 * log_weight, 0.1)) == 1


@pytest.mark.parametrize("draws", [torch.zeros(1, 2), torch.tensor([[0.0, 1.0], [math.nan, 0.0]])])
def test_a_fit_refuses_too_few_or_broken_draws(draws):
    with pytest.raises(InvalidInput, match="two finite draws"):
        fit_mixture(draws, seed=0)


def test_the_student_mixture_has_the_density_of_scipy():
    q0 = skewed_reference()
    student = StudentMixture(q0, degrees=3.5)
    x = 4 * torch.randn((50, 2), dtype=torch.float64, generator=seeded(0))
    parts = [
        w * multivariate_t(m, s, df=3.5).pdf(x.numpy())
        for m, s, w in zip(q0.means.numpy(), q0.covariances.numpy(), q0.weights.tolist(), strict=True)
    ]
    torch.testing.assert_close(student.log_prob(x), torch.as_tensor(sum(parts)).log())


def test_draws_of_the_student_mixture_have_its_moments_and_its_law():
    q0, n, nu = skewed_reference(), 60_000, 8.0
    x = StudentMixture(q0, degrees=nu).sample(n, seeded(0))
    within = torch.einsum("k,kij->ij", q0.weights, q0.covariances) * nu / (nu - 2)
    centred = q0.means - q0.mean()
    covariance = within + torch.einsum("k,ki,kj->ij", q0.weights, centred, centred)
    assert bool(((x.mean(0) - q0.mean()).abs() < 4 * (covariance.diagonal() / n).sqrt()).all())
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.05, atol=0.03)
    rng = np.random.default_rng(1)
    label = rng.choice(2, n, p=q0.weights.numpy())
    exact = np.stack([multivariate_t(q0.means[k].numpy(), q0.covariances[k].numpy(), nu).rvs(n, rng) for k in (0, 1)])
    assert ks_2samp(x[:, 0].numpy(), exact[label, np.arange(n), 0]).pvalue > 1e-4
    assert ks_2samp(x.sum(1).numpy(), exact[label, np.arange(n)].sum(1)).pvalue > 1e-4


def from_one_mode(target, chains=100):
    return target.mode_means[0].expand(chains, -1).contiguous()


def assert_weight(run, target, true=0.7, most=0.02):
    weights = mode_weights(run.positions, target.mode_means)
    assert float(weights.se[1]) < most
    assert abs(float(weights.weights[1]) - true) < 4 * float(weights.se[1]), weights


@pytest.mark.parametrize("dim", [2, 10, pytest.param(20, marks=pytest.mark.slow)])
def test_no_kernel_given_finds_and_weighs_both_modes_from_one(dim, shapes_unchecked):
    target = two_modes(dim)
    run = sample(target, init=from_one_mode(target), budget=2e5, seed=dim, progress=False)
    assert run.config["kernel"]["kernel"] == "FittedDiGS"
    assert run.cost.gradients <= 2e5
    assert run.warnings == ()
    assert float(run.stats["fitted_acceptance"].mean()) > 0.2
    assert_weight(run, target)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"ladder": False}, {"r": 1.0}, {"components": "t"}])
def test_its_variants_weigh_both_modes_too(options, shapes_unchecked):
    target = two_modes(5)
    run = sample(FittedDiGS(target, **options), init=from_one_mode(target), budget=2e5, seed=1, progress=False)
    assert_weight(run, target)


@pytest.mark.slow
def test_bananas_and_modes_of_unequal_width_are_weighed(shapes_unchecked):
    for target in (two_bananas(5), two_modes(5, scales=(1.0, 0.5))):
        init = target.mode_means[torch.arange(100) % 2]
        run = sample(target, init=init, budget=4e5, seed=2, progress=False)
        assert_weight(run, target, most=0.04)


def test_a_hopeless_reference_is_dropped_with_a_warning_and_tempering_goes_on(shapes_unchecked):
    target = two_modes(2)
    hopeless = GaussianMixture(torch.full((1, 2), 100.0), 0.01)
    for ladder in (True, False):
        kernel = FittedDiGS(target, reference=hopeless, ladder=ladder)
        with pytest.warns(NoisewiseWarning, match=r"accepted only 0\.00% .* parallel\s+tempering alone"):
            run = sample(kernel, init=from_one_mode(target), draws=250, warmup=40, seed=1, progress=False)
        assert any("parallel tempering alone" in text for text in run.warnings)
        assert "reference_means" not in run.settings
        assert float(run.stats["fitted_acceptance"].max()) == 0
        assert_weight(run, target, most=0.04)


def test_a_mode_that_the_fit_does_not_cover_is_warned_of(shapes_unchecked):
    target = two_modes(2)
    one = GaussianMixture(target.means[:1], 1.1)
    init = target.mode_means[torch.arange(40) % 2]
    kernel = FittedDiGS(target, reference=one)
    with pytest.warns(NoisewiseWarning, match="next to\\s+no mass"):
        sample(kernel, init=init, draws=200, warmup=50, seed=1, progress=False)
    # also where most draws are in the missed mode, and lie out of proportion themselves
    heavy = two_modes(3, weights=(0.1, 0.9), scales=(1.0, 0.4))
    kernel = FittedDiGS(heavy, reference=GaussianMixture(heavy.means[:1], 1.1))
    with pytest.warns(NoisewiseWarning, match="next to\\s+no mass"):
        sample(
            kernel, init=heavy.mode_means[(torch.arange(40) > 3).long()], draws=200, warmup=50, seed=1, progress=False
        )
    whole = FittedDiGS(target, reference=GaussianMixture(target.means, 1.1, target.weights))
    assert sample(whole, init=init, draws=200, warmup=50, seed=1, progress=False).warnings == ()


@pytest.mark.slow
def test_a_posterior_with_a_wide_basin_of_no_weight_is_left_for_its_two_modes(shapes_unchecked):
    # beside its modes, this posterior holds chains in a basin some 400 nats below: one component takes all data
    target = posteriordb_mixture()
    reference = target.reference(1000)
    run = sample(target, chains=20, budget=2e5, seed=0, progress=False)
    share = (run.positions[..., 0] < run.positions[..., 1]).double().mean(1)
    se = float(share.std()) / 20**0.5
    assert abs(float(share.mean()) - 0.5) < 4 * se
    assert se < 0.02
    assert float(run.stats["log_prob"].min()) > float(target.log_prob(reference).min()) - 20


def test_a_refit_is_a_new_kernel_with_a_frozen_reference():
    target = two_modes(2)
    kernel = FittedDiGS(target)
    refit = kernel.fitted_to(target.sample(2000, seeded(0)), seed=1)
    assert kernel.reference is None
    assert len(refit.reference.means) == 2
    assert refit.gradients_per_step == kernel.gradients_per_step + kernel.moves


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0.0}, "r must be above 0"),
        ({"r": math.nan}, "r must be above 0"),
        ({"components": "cauchy"}, "'gaussian' or 't'"),
        ({"components": "t", "r": 1.0}, "r=inf"),
        ({"moves": 0}, "moves must be at least 1"),
        ({"reference": wrong_reference(two_modes(3))}, "reference has dim 3"),
        ({"tempering": ParallelTempering(two_modes(2))}, "same target object"),
        ({"components": "t", "degrees": -1.0, "reference": wrong_reference(two_modes(2))}, "degrees"),
    ],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(InvalidInput, match=said):
        FittedDiGS(two_modes(2), **options)


@pytest.mark.slow
def test_forty_modes_are_all_found_and_evenly_weighed(shapes_unchecked):
    target = gmm40()
    run = sample(target, init=torch.zeros(100, 2), budget=6e5, seed=0, progress=False)
    weights = mode_weights(run.positions, target.means).weights
    assert int((weights > 0).sum()) == 40
    assert 0.5 * float((weights - 1 / 40).abs().sum()) < 0.06
