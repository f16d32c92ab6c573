"""Sampling p(x | y): closed forms on Gaussians and mixtures, unbiased weights, invariance, and an exact bill."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from noisewise.denoising import mixed_score
from noisewise.errors import InvalidInput
from noisewise.neural import PosteriorDraws, PosteriorSampler, StepSizes, fitted_variance
from noisewise.targets import GaussianMixture, TorchTarget, double_well_4, gmm40
from noisewise.typing import Cost

F64 = torch.float64
# s / a of the levels of the table in the method's notes
LEVELS = torch.tensor([0.158, 0.68, 1.5, 3.3, 6.7, 16.0, 46.0, 170.0], dtype=F64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=seeded(seed))


def gaussian(variance=2.0, dim=2):
    return GaussianMixture(torch.full((1, dim), 1.0, dtype=F64), variance)


def noisy_points(target, sigma, seed=0):
    """Points of the diffused target, one for each sigma, and the clean ones they were made of."""
    generator = seeded(seed)
    clean = target.sample(len(sigma), generator)
    return clean + sigma.unsqueeze(-1) * torch.randn(clean.shape, dtype=F64, generator=generator), clean


def exact_score(target, noisy, sigma):
    score = torch.empty_like(noisy)
    for level in sigma.unique().tolist():
        rows = sigma == level
        score[rows] = target.noisy(1.0, level).score(noisy[rows])
    return score


def by_level(values, sigma):
    return torch.stack([values[sigma == level].mean() for level in LEVELS])


def relative_error(target, sampler, points=150, seed=0, identity="mixed", steps=None, start=False):
    """RMSE of the noisy score over its RMS, for each of LEVELS."""
    sigma = LEVELS.repeat_interleave(points)
    noisy, clean = noisy_points(target, sigma, seed)
    steps = StepSizes.per_level(LEVELS, math.log1p(math.e), 2) if steps is None else steps
    draws = sampler.draw(target, noisy, sigma, steps, seeded(seed + 100), clean if start else None)
    exact = exact_score(target, noisy, sigma)
    error = (draws.noisy_score(identity) - exact).square().sum(-1)
    return (by_level(error, sigma) / by_level(exact.square().sum(-1), sigma)).sqrt()


class Counting:
    """A target that counts its rows."""

    def __init__(self, target):
        self.target, self.dim = target, target.dim
        self.energies = self.gradients = 0

    def log_prob(self, x):
        self.energies += x.reshape(-1, self.dim).shape[0]
        return self.target.log_prob(x)

    def log_prob_and_score(self, x):
        self.gradients += x.reshape(-1, self.dim).shape[0]
        return self.target.log_prob_and_score(x)


def wrapped(positions, target, noisy, sigma):
    """Draws from elsewhere, as a sampler would hand them back."""
    log_prob, score = target.log_prob_and_score(positions)
    batch = torch.ones_like(sigma)
    return PosteriorDraws(
        noisy, sigma, positions.mean(0), score.mean(0), batch * len(positions), batch > 0, None, None, Cost(),
        positions, log_prob, score, torch.zeros_like(log_prob),
    )  # fmt: skip


def exact_gaussian_draws(n, variance, noisy, sigma, seed=0):
    precision = (1 / variance + sigma**-2).unsqueeze(-1)
    mean = (1.0 / variance + noisy * sigma.unsqueeze(-1) ** -2) / precision
    return mean + precision.rsqrt() * normal(n, *noisy.shape, seed=seed)


@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_on_a_gaussian_exact_draws_give_the_closed_form_by_every_identity(variance):
    n, sigma = 4000, torch.tensor([0.05, 0.7, 3.0, 50.0], dtype=F64)
    target = gaussian(variance)
    noisy, _ = noisy_points(target, sigma)
    draws = wrapped(exact_gaussian_draws(n, variance, noisy, sigma), target, noisy, sigma)
    exact = -(noisy - 1.0) / (variance + sigma**2).unsqueeze(-1)
    deviation = (1 / variance + sigma**-2).rsqrt().unsqueeze(-1) / math.sqrt(n)
    standard_errors = {
        "denoising": deviation * sigma.unsqueeze(-1) ** -2,
        "target": deviation / variance,
        "mixed": deviation * abs(1 - 1 / variance) / (1 + sigma.unsqueeze(-1) ** 2),
    }
    for identity, se in standard_errors.items():
        assert bool(((draws.noisy_score(identity) - exact).abs() <= 4 * se + 1e-12).all()), identity
    # told the variance, the mixed identity has none: a few draws of anything give the closed form
    few = wrapped(normal(3, 4, 2), target, noisy, sigma)
    torch.testing.assert_close(few.noisy_score(variance=variance), exact)
    torch.testing.assert_close(few.noisy_score(variance=torch.full_like(sigma, variance)), exact)


@pytest.mark.parametrize(("kernel", "stages"), [("hmc", 1), ("hmc", 5), ("hmc", 15), ("mala", 5), ("mala", 15)])
def test_weights_estimate_the_density_of_the_noisy_point_without_bias(kernel, stages):
    target, sigma = gaussian(0.5), torch.tensor([0.3, 1.0, 3.0], dtype=F64)
    noisy = torch.tensor([[1.5, 0.0], [3.0, 1.0], [-2.0, 4.0]], dtype=F64)
    sampler = PosteriorSampler("annealed", particles=4000, anneal_steps=stages, kernel=kernel)
    draws = sampler.draw(target, noisy, sigma, StepSizes.per_level([0.3, 1.0, 3.0], 0.5**0.5, 2), seeded(stages))
    exact = torch.stack([target.noisy(1.0, float(s)).log_prob(y) for y, s in zip(noisy, sigma, strict=True)])
    ratio = (draws.log_weights - exact).exp()
    se = ratio.std(0) / math.sqrt(len(ratio))
    assert bool(((ratio.mean(0) - 1).abs() < 4 * se).all()), (ratio.mean(0), se)
    assert bool((se < 0.1).all())


def test_annealing_lowers_the_spread_of_the_weights():
    target = gaussian(0.1, dim=4)
    sigma = torch.ones(20, dtype=F64)
    noisy, _ = noisy_points(target, sigma)
    shares = []
    for stages in (1, 5, 25):
        sampler = PosteriorSampler("annealed", particles=200, anneal_steps=stages)
        draws = sampler.draw(target, noisy, sigma, StepSizes.per_level([1.0], 0.1**0.5, 4), seeded())
        shares.append(draws.ess.mean().item() / 200)
    assert shares[0] < shares[1] < shares[2], shares
    assert shares[2] > 5 * shares[0], shares


def test_the_truncated_proposal_is_the_truncated_normal_and_its_weights_stay_unbiased():
    flat = TorchTarget(lambda x: 0 * x.sum(-1), dim=1)
    box, n = 1.0, 4000
    sigma = torch.tensor([0.5, 2.0, 0.5, 1.0], dtype=F64)
    noisy = torch.tensor([[0.8], [-3.0], [4.0], [-9.0]], dtype=F64)  # the last two 6 and 8 sigma outside
    draws = PosteriorSampler(particles=n, box=box).draw(flat, noisy, sigma, None, seeded())
    for row, (y, s) in enumerate(zip(noisy[:, 0].tolist(), sigma.tolist(), strict=True)):
        law = stats.truncnorm((-box - y) / s, (box - y) / s, y, s)
        assert stats.kstest(draws.positions[:, row, 0].numpy(), law.cdf).pvalue > 1e-4
        mass = stats.norm(abs(y), s).cdf(box) - stats.norm(abs(y), s).cdf(-box)
        assert draws.log_weights[:, row].exp().mean().item() == pytest.approx(mass, rel=1e-9)


def test_moves_do_not_leave_the_box():
    sigma = torch.ones(50, dtype=F64)
    noisy = torch.full((50, 1), 0.9, dtype=F64)
    sampler = PosteriorSampler("annealed", particles=20, anneal_steps=5, langevin_steps=5, box=1.0)
    draws = sampler.draw(gaussian(1.0, dim=1), noisy, sigma, StepSizes.per_level([1.0], 1.0, 1), seeded())
    assert draws.positions.abs().max() <= 1.0
    law = stats.truncnorm((-1 - 0.95) * 2**0.5, (1 - 0.95) * 2**0.5, 0.95, 0.5**0.5)
    # 1000 weighted draws of a law with deviation 0.3 or so: 4 standard errors
    assert draws.mean_position.mean().item() == pytest.approx(law.mean(), abs=4 * law.std() / math.sqrt(500))


@pytest.mark.parametrize("method", ["digs", "annealed"])
def test_langevin_moves_leave_the_posterior_of_a_mixture_as_it_is(method):
    target = GaussianMixture(torch.tensor([[-1.5], [1.5]], dtype=F64), 0.5)
    batch, sigma, y = 4000, 1.0, 0.4
    weights, means, covariances = target.posterior_components(torch.tensor([y], dtype=F64), 1.0, sigma)
    posterior = GaussianMixture(means, covariances, weights)
    exact = posterior.sample(batch, seeded())

    def cdf(x):
        deviation = posterior.full_covariances[:, 0, 0].sqrt().numpy()
        parts = stats.norm.cdf((x[:, None] - means[:, 0].numpy()) / deviation)
        return parts @ weights.numpy()

    noisy, sigmas = torch.full((batch, 1), y, dtype=F64), torch.full((batch,), sigma, dtype=F64)
    steps = StepSizes.per_level([sigma], 0.5**0.5, 1)
    if method == "digs":
        sampler = PosteriorSampler("digs", particles=1, langevin_steps=4)
        draws = sampler.draw(target, noisy, sigmas, steps, seeded(1), exact)
        assert 0.3 < draws.langevin_acceptance.mean() < 0.99
        assert (draws.positions[0] != exact).double().mean() > 0.9
        slow = replace(steps, log_langevin=steps.log_langevin - 6)
        assert sampler.draw(target, noisy, sigmas, slow, seeded(1), exact).langevin_acceptance.min() > 0.95
    else:
        # no start: one of many weighted draws, close enough to exact that 4000 cannot tell
        sampler = PosteriorSampler("annealed", particles=100, anneal_steps=3, resample=True, langevin_steps=2)
        draws = sampler.draw(target, noisy, sigmas, steps, seeded(1))
    assert stats.kstest(draws.positions[0, :, 0].numpy(), cdf).pvalue > 1e-3


def test_averaged_states_are_the_last_ones_of_the_chain():
    target, sigma = gaussian(), torch.full((5,), 0.5, dtype=F64)
    noisy, clean = noisy_points(target, sigma)
    steps = StepSizes.per_level([0.5], 1.0, 2)
    last = PosteriorSampler("digs", 1, langevin_steps=6).draw(target, noisy, sigma, steps, seeded(), clean)
    three = PosteriorSampler("digs", 1, langevin_steps=6, averaged=3).draw(target, noisy, sigma, steps, seeded(), clean)
    assert three.positions.shape[0] == 3
    torch.testing.assert_close(three.positions[-1:], last.positions)
    torch.testing.assert_close(three.mean_position, three.positions.mean(0))
    assert three.cost == last.cost == Cost(gradients=5 * 7)


@pytest.mark.parametrize("method", ["importance", "pool"])
def test_resampling_follows_the_weights(method):
    # four points carry all the mass that the proposals can see; the posterior's shares are known
    target = GaussianMixture(
        torch.tensor([[-2.0], [0.0], [1.0], [3.0]], dtype=F64), 1e-2, torch.tensor([0.1, 0.2, 0.3, 0.4])
    )
    batch = 3000
    noisy, sigma = torch.full((batch, 1), 0.5, dtype=F64), torch.full((batch,), 2.0, dtype=F64)
    particles = 400 if method == "importance" else 3
    draws = PosteriorSampler(method, particles, resample=True).draw(target, noisy, sigma, None, seeded(3))
    assert draws.positions.shape == (1, batch, 1)
    expected = target.posterior_components(torch.tensor([0.5], dtype=F64), 1.0, 2.0)[0]
    counts = torch.bincount(target.component(draws.positions[0]), minlength=4)
    if method == "importance":
        assert stats.chisquare(counts.numpy(), batch * expected.numpy()).pvalue > 1e-3
    else:  # one pool of 9000 for all, so its own shares are off by their standard error of about 2 %
        torch.testing.assert_close(counts / batch, expected.float(), atol=0.06, rtol=0)


def test_gumbel_max_picks_with_the_frequencies_of_the_softmax():
    # the same five particles for every row: a lattice, through a target that ignores all else
    weights = torch.tensor([0.05, 0.1, 0.2, 0.25, 0.4], dtype=F64)
    noisy, sigma = torch.zeros((20_000, 1), dtype=F64), torch.ones(20_000, dtype=F64)
    # the bins of the proposal N(0, 1) have probability 1/5 each, so with many particles shares are exactly `weights`
    edges = torch.special.ndtri(torch.arange(1, 5, dtype=F64) / 5)
    target = TorchTarget(lambda x: weights.log()[torch.bucketize(x[:, 0].detach(), edges)] + 0 * x[:, 0], dim=1)
    all_draws = PosteriorSampler(particles=5).draw(target, noisy, sigma, None, seeded(5))
    one = PosteriorSampler(particles=5, resample=True).draw(target, noisy, sigma, None, seeded(5))
    picked = torch.bucketize(one.positions[0, :, 0], edges)
    # given its particles each row picks by their softmax: the expected counts are the sums of those
    share = all_draws.log_weights.softmax(0)
    cell = torch.bucketize(all_draws.positions[..., 0], edges)
    expected = torch.stack([(share * (cell == k)).sum() for k in range(5)])
    counts = torch.bincount(picked, minlength=5)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3
    # an independent check on one particle's identity: it is one of the row's own
    assert bool((one.positions == all_draws.positions).any(0).all())


def test_more_particles_lower_the_error_at_every_level_of_forty_modes():
    few, many, most = (relative_error(gmm40(F64), PosteriorSampler(particles=n)) for n in (8, 64, 512))
    assert bool((many < few).all()), (few, many)
    assert bool((most < many).all()), (many, most)
    # the table of the notes has 0.01, 0.04, 0.09, 0.21, 0.40, 0.44, 0.31, 0.16 for 150 particles
    table = torch.tensor([0.01, 0.04, 0.09, 0.21, 0.40, 0.44, 0.31, 0.16], dtype=F64)
    at_150 = relative_error(gmm40(F64), PosteriorSampler(particles=150))
    assert bool((at_150 < 1.3 * table + 0.01).all()), at_150


def test_all_weighted_particles_beat_one_of_them():
    sampler = PosteriorSampler("annealed", particles=10, anneal_steps=15)
    all_of_them = relative_error(gmm40(F64), sampler)
    one_of_them = relative_error(gmm40(F64), replace(sampler, resample=True))
    assert bool((all_of_them < one_of_them).all())
    assert bool((all_of_them[:4] < 0.7 * one_of_them[:4]).all())


def test_mixing_beats_both_parents_on_forty_modes():
    sampler = PosteriorSampler(particles=64)
    mixed, denoising, clean = (
        relative_error(gmm40(F64), sampler, identity=name) for name in ("mixed", "denoising", "target")
    )
    assert bool((mixed < 1.05 * torch.minimum(denoising, clean)).all())


def test_a_shared_pool_sees_what_the_same_number_of_own_draws_cannot():
    pool = relative_error(gmm40(F64), PosteriorSampler("pool", particles=8))
    own = relative_error(gmm40(F64), PosteriorSampler(particles=8))
    assert bool((pool[2:] < 0.5 * own[2:]).all()), (pool, own)
    assert bool((pool < 0.2).all()), pool


def test_the_pool_is_the_same_in_one_chunk_and_in_many(monkeypatch):
    target, sigma = gmm40(F64), LEVELS.repeat_interleave(5)
    noisy, _ = noisy_points(target, sigma)
    whole = PosteriorSampler("pool", particles=4).draw(target, noisy, sigma, None, seeded())
    monkeypatch.setattr("noisewise.neural.posterior._PAIRS", 7 * len(sigma))
    parts = PosteriorSampler("pool", particles=4).draw(target, noisy, sigma, None, seeded())
    for name in ("mean_position", "mean_score", "ess"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    # and it is the formula
    eps = torch.randn((4, *noisy.shape), dtype=F64, generator=seeded())
    x = (noisy + sigma.unsqueeze(-1) * eps).reshape(-1, 2)
    log_kernel = torch.distributions.Normal(noisy, sigma.unsqueeze(-1)).log_prob(x.unsqueeze(1)).sum(-1)
    weights = (target.log_prob(x).unsqueeze(-1) - log_kernel.logsumexp(1, keepdim=True) + log_kernel).softmax(0)
    torch.testing.assert_close(whole.mean_position, weights.T @ x)
    torch.testing.assert_close(whole.mean_score, weights.T @ target.score(x))
    torch.testing.assert_close(whole.ess, weights.square().sum(0).reciprocal())


def test_draws_from_the_clean_point_are_exact_when_it_follows_the_target():
    # the mean over points of (estimate - exact) is 0 for every level: a posterior draw at y has mean E[x | y]
    target, points = gmm40(F64), 400
    sigma = LEVELS.repeat_interleave(points)
    noisy, clean = noisy_points(target, sigma)
    steps = StepSizes.per_level(LEVELS, 1.313, 2)
    draws = PosteriorSampler("digs", 1, langevin_steps=2).draw(target, noisy, sigma, steps, seeded(1), clean)
    gap = draws.noisy_score() - exact_score(target, noisy, sigma)
    for level in LEVELS:
        rows = gap[sigma == level]
        assert bool((rows.mean(0).abs() < 4 * rows.std(0) / math.sqrt(points)).all()), level


def adapted(steps, sampler, rounds, seed=0):
    target, sigma = gmm40(F64), LEVELS.repeat_interleave(40)
    for index in range(rounds):
        noisy, _ = noisy_points(target, sigma, seed + index)
        draws = sampler.draw(target, noisy, sigma, steps, seeded(seed + 1000 + index))
        rates = draws.langevin_acceptance, draws.anneal_acceptance
        steps = steps.adapted(sigma, *rates)
    return steps, *(by_level(rate, sigma) for rate in rates)


@pytest.mark.parametrize("kernel", ["hmc", "mala"])
def test_steps_per_level_reach_good_acceptance_at_every_level_where_one_step_for_all_does_not(kernel):
    sampler = PosteriorSampler("annealed", particles=8, anneal_steps=5, kernel=kernel, resample=True, langevin_steps=4)
    start = StepSizes.per_level(LEVELS, math.log1p(math.e), 2)
    steps, *rates = adapted(start, sampler, 25)
    for rate in rates:
        assert bool(((rate > 0.5) & (rate < 0.9)).all()), rate
    assert steps.from_state(steps.state()).log_langevin.equal(steps.log_langevin)
    # one step for all levels, by the rule of the official code
    _, langevin, anneal = adapted(StepSizes.published(0.01, 1.0, "paper"), sampler, 25)
    assert langevin.min() < 0.5 or langevin.max() > 0.9
    assert anneal.min() < 0.5 or anneal.max() > 0.9


def test_the_published_rule_multiplies_by_one_and_a_half():
    steps = StepSizes.published(0.01, 1.0, "paper")
    sigma = torch.tensor([0.1, 10.0], dtype=F64)

    def after(*rates):
        return steps.adapted(sigma, torch.tensor(rates, dtype=F64)).langevin(sigma).square()

    for rates, factor in (((0.7, 0.6), 1.5), ((0.2, 0.4), 1 / 1.5), ((0.5, 0.6), 1.0), ((0.9, math.nan), 1.5)):
        torch.testing.assert_close(after(*rates), torch.full_like(sigma, 0.01 * factor))
    assert StepSizes.published(0.01, 1.0).adapted(sigma, sigma * 0).langevin(sigma)[0].item() == pytest.approx(0.1)
    assert StepSizes.published(0.01, 0.04, squared=True).anneal(sigma)[0].item() == pytest.approx(0.2)


def test_lengths_are_those_of_the_posterior_and_bins_are_adapted_alone():
    steps = StepSizes.spaced(0.1, 100.0, 3, scale=2.0, dim=1)
    torch.testing.assert_close(steps.levels, torch.tensor([10**-0.5, 10**0.5, 10**1.5], dtype=F64))
    sigma = torch.tensor([0.2, 0.9, 1.1, 9.0, 11.0, 1e4, 1e-4], dtype=F64)
    assert steps.bins(sigma).tolist() == [0, 0, 1, 1, 2, 2, 0]
    torch.testing.assert_close(steps.langevin(sigma), (0.25 + sigma**-2).rsqrt())
    torch.testing.assert_close(steps.anneal(sigma, 0.5), (0.125 + sigma**-2).rsqrt())
    next_one = steps.adapted(sigma[:4], torch.tensor([0.9, 0.9, 0.2, 0.4], dtype=F64))
    assert next_one.log_langevin[0] > 0 > next_one.log_langevin[1]
    assert next_one.log_langevin[2] == 0
    assert next_one.log_anneal.equal(steps.log_anneal)


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        ({}, Cost(gradients=40)),
        ({"resample": True}, Cost(gradients=5, energies=40)),
        ({"resample": True, "langevin_steps": 3}, Cost(gradients=5 + 15, energies=40)),
        ({"langevin_steps": 3, "averaged": 2}, Cost(gradients=40 + 120)),
        ({"method": "annealed", "anneal_steps": 4, "leapfrog": 2}, Cost(gradients=40 * 7)),
        ({"method": "annealed", "anneal_steps": 4, "leapfrog": 2, "kernel": "mala", "resample": True, "langevin_steps": 1},
         Cost(gradients=40 * 7 + 5)),
        ({"method": "pool"}, Cost(gradients=40)),
        ({"method": "pool", "resample": True, "langevin_steps": 2}, Cost(gradients=40 + 10)),
        ({"method": "digs", "langevin_steps": 2}, Cost(gradients=5 + 80)),
        ({"method": "digs", "langevin_steps": 2, "resample": True}, Cost(gradients=5 + 10)),
    ],
)  # fmt: skip
def test_every_call_is_counted(options, cost):
    target, sigma = Counting(gaussian()), torch.full((5,), 0.5, dtype=F64)
    noisy, clean = noisy_points(target.target, sigma)
    steps = StepSizes.per_level([0.5], 1.0, 2)
    start = clean if options.get("method") == "digs" else None
    draws = PosteriorSampler(**options).draw(target, noisy, sigma, steps, seeded(), start)
    assert (target.gradients, target.energies) == (cost.gradients, cost.energies)
    assert draws.cost == cost


class HalfLine:
    """N(0, 1) on x > 0; elsewhere the density is 0 and the score is NaN."""

    dim = 1

    def log_prob(self, x):
        return self.log_prob_and_score(x)[0]

    def log_prob_and_score(self, x):
        return torch.where(x > 0, -0.5 * x.square(), -torch.inf)[..., 0], torch.where(x > 0, -x, torch.nan)


HALF_LINE_MEAN = math.sqrt(2 / math.pi * 0.2)  # E[x | y = 0] at sigma 0.5: a half normal of variance 1 / (1 + 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resample": True},
        {"langevin_steps": 3},
        {"method": "annealed", "anneal_steps": 5},
        {"method": "annealed", "anneal_steps": 5, "kernel": "mala", "resample": True, "langevin_steps": 3},
    ],
)
def test_regions_without_density_have_no_weight_and_a_point_that_sees_nothing_else_is_flagged(options):
    sigma, noisy = torch.full((400,), 0.5, dtype=F64), torch.zeros((400, 1), dtype=F64)
    noisy[0] = -80.0
    steps = StepSizes.per_level([0.5], 1.0, 1)
    draws = PosteriorSampler(**options, particles=60).draw(HalfLine(), noisy, sigma, steps, seeded())
    assert draws.valid.tolist() == [False] + [True] * 399
    assert draws.ess[0] == 0
    assert draws.noisy_score()[0].item() == 0
    for rates in (draws.anneal_acceptance, draws.langevin_acceptance):
        assert rates is None or torch.isnan(rates).tolist() == [True] + [False] * 399
    assert draws.cost.nonfinite > 0
    assert bool(torch.isfinite(draws.mean_position).all() & torch.isfinite(draws.mean_score).all())
    values = draws.mean_position[1:, 0]
    bias = HALF_LINE_MEAN / 30  # of self-normalised weights, 1 / (draws that count)
    assert values.mean().item() == pytest.approx(HALF_LINE_MEAN, abs=4 * values.std().item() / math.sqrt(399) + bias)


@pytest.mark.parametrize("resample", [False, True])
def test_a_pool_without_any_density_is_flagged_and_one_with_some_serves_all(resample):
    sampler = PosteriorSampler("pool", 8, resample=resample)
    sigma, noisy = torch.full((400,), 0.5, dtype=F64), torch.zeros((400, 1), dtype=F64)
    draws = sampler.draw(HalfLine(), noisy, sigma, None, seeded())
    assert bool(draws.valid.all())
    # 3200 draws of deviation 0.27 in common, and 400 picks of them
    assert draws.mean_position.mean().item() == pytest.approx(HALF_LINE_MEAN, abs=4 * 0.27 / math.sqrt(350))
    nothing = sampler.draw(HalfLine(), noisy - 80, sigma, None, seeded())
    assert not bool(nothing.valid.any())
    assert nothing.noisy_score().tolist() == (0 * noisy).tolist()
    assert nothing.cost.nonfinite == 3200


def test_infinite_and_nan_values_are_rejections_and_counted():
    class Rough(HalfLine):
        def log_prob_and_score(self, x):
            value = torch.where(x < -1, torch.nan, torch.where(x > 1, torch.inf, -0.5 * x.square()))
            return value[..., 0], -x

    sigma, noisy = torch.ones(50, dtype=F64), torch.zeros((50, 1), dtype=F64)
    sampler = PosteriorSampler("annealed", 10, anneal_steps=4, langevin_steps=3)
    draws = sampler.draw(Rough(), noisy, sigma, StepSizes.per_level([1.0], 1.0, 1), seeded())
    alive = torch.isfinite(draws.log_weights)
    assert bool((draws.positions[..., 0].abs()[alive] <= 1).all())
    assert bool(torch.isfinite(draws.mean_score).all() & draws.valid.all())
    assert draws.cost.nonfinite > 100


def test_a_projected_target_is_sampled_in_its_subspace():
    target = double_well_4()

    def project(x):
        return (x.unflatten(-1, (4, 2)) - x.unflatten(-1, (4, 2)).mean(-2, keepdim=True)).flatten(-2)

    generator = seeded()
    noisy = 2 * torch.randn((30, 8), dtype=F64, generator=generator) + 5
    sigma = torch.linspace(0.2, 2.0, 30, dtype=F64)
    steps = StepSizes.spaced(0.2, 2.0, 3, 0.3, 6)
    for options in ({}, {"anneal_steps": 4}, {"anneal_steps": 4, "kernel": "mala"}):
        sampler = PosteriorSampler("annealed", langevin_steps=2, **options)
        draws = sampler.draw(target, noisy, sigma, steps, seeded(1), project=project)
        for part in (draws.noisy, draws.positions, draws.score, draws.mean_position, draws.noisy_score()):
            torch.testing.assert_close(project(part), part)


def test_the_normaliser_in_a_subspace_is_that_of_the_subspace():
    # exp(-|x|^2 / 2) on mean-free x: E[exp(log w)] is the density N(0, (1 + sigma^2) I) of the rank 2 subspace, times (2 pi)
    target = TorchTarget(lambda x: -0.5 * x.square().sum(-1), dim=3)

    def project(x):
        return x - x.mean(-1, keepdim=True)

    noisy, sigma = project(normal(4, 3)), torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=F64)
    sampler = PosteriorSampler("annealed", 4000, anneal_steps=5)
    draws = sampler.draw(target, noisy, sigma, StepSizes.per_level([1.0], 1.0, 2), seeded(), project=project)
    total = 1 + sigma**2
    exact = -0.5 * noisy.square().sum(-1) / total - total.log()
    ratio = (draws.log_weights - exact).exp()
    assert bool(((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(4000)).all())
    # the pool's kernels have the dimension of the subspace too: with sigmas mixed, a wrong one shifts the weights
    batch = 300
    noisy, sigma = project(2 * normal(batch, 3, seed=1)), torch.linspace(0.5, 4, batch, dtype=F64)
    pooled = PosteriorSampler("pool", 8).draw(target, noisy, sigma, None, seeded(), project=project)
    error = pooled.mean_position - noisy / (1 + sigma**2).unsqueeze(-1)
    assert error.square().mean().sqrt() < 0.06


@pytest.mark.parametrize("variance", [0.2, 5.0])
def test_the_fitted_variance_of_a_gaussian_is_its_own(variance):
    target, sigma = gaussian(variance), torch.logspace(-1, 1, 60, dtype=F64)
    noisy, _ = noisy_points(target, sigma)
    draws = wrapped(exact_gaussian_draws(50, variance, noisy, sigma), target, noisy, sigma)
    steps = StepSizes.spaced(0.1, 10.0, 5, 1.0, 2)
    torch.testing.assert_close(fitted_variance(draws, steps), torch.full((5,), variance, dtype=F64))
    # resampled draws, one for each point, say nothing of a variance
    one = PosteriorSampler(resample=True).draw(target, noisy, sigma, None, seeded())
    torch.testing.assert_close(fitted_variance(one, steps, 3.0), torch.full((5,), 3.0, dtype=F64))


@pytest.mark.parametrize("given", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("levels", ["shared", "spread"])
def test_the_fitted_variance_is_never_worse_than_the_given_one(given, levels):
    target, steps = gmm40(F64), StepSizes.per_level(LEVELS, 1.313, 2)
    sigma = LEVELS.repeat_interleave(40)
    if levels == "spread":
        sigma = sigma * torch.linspace(0.7, 1.4, 40, dtype=F64).repeat(len(LEVELS))
    noisy, _ = noisy_points(target, sigma)
    draws = PosteriorSampler(particles=32).draw(target, noisy, sigma, None, seeded())

    def variances(v):
        se = mixed_score(draws.positions, draws.score, noisy, sigma, draws.log_weights, v).se
        return torch.zeros(len(LEVELS), dtype=F64).index_add_(0, steps.bins(sigma), se.square().sum(-1))

    fitted = fitted_variance(draws, steps, given)
    least = variances(fitted[steps.bins(sigma)])
    assert bool((least <= variances(torch.full_like(sigma, given)) * (1 + 1e-9)).all())
    if levels == "shared":
        # a grid of constants in the range of the search finds nothing better
        for v in given * torch.logspace(-3, 3, 41, dtype=F64):
            assert bool((least <= variances(torch.full_like(sigma, float(v))) * (1 + 1e-6)).all())


def test_fresh_draws_profit_from_a_variance_fitted_to_others():
    target, steps = gmm40(F64), StepSizes.per_level(LEVELS, 1.313, 2)
    sigma = LEVELS.repeat_interleave(100)
    log_variance = []
    for seed in range(4):
        noisy, _ = noisy_points(target, sigma, seed)
        draws = PosteriorSampler(particles=32).draw(target, noisy, sigma, None, seeded(seed))
        log_variance.append(fitted_variance(draws, steps).log())
    fitted = torch.stack(log_variance).mean(0).exp()[steps.bins(sigma)]
    noisy, _ = noisy_points(target, sigma, 9)
    draws = PosteriorSampler(particles=32).draw(target, noisy, sigma, None, seeded(9))
    exact = exact_score(target, noisy, sigma)
    errors = [by_level((draws.noisy_score(variance=v) - exact).square().sum(-1), sigma) for v in (1.0, fitted)]
    # further out one draw of the 32 has nearly all the weight, and there is no spread to fit
    telling = by_level(draws.ess, sigma) > 2
    assert telling.sum() == 6
    assert bool((errors[1] < 1.05 * errors[0])[telling].all()), errors
    # at small noise modes are Gaussians of variance 1.72, which 1 is not
    assert errors[1][0] < 0.2 * errors[0][0]


def test_the_same_seed_gives_the_same_draws_and_nothing_carries_a_gradient():
    target, sigma = gmm40(torch.float32), torch.full((6,), 3.0)
    noisy = torch.randn((6, 2), generator=seeded()).requires_grad_(True)
    sampler = PosteriorSampler("annealed", anneal_steps=3, resample=True, langevin_steps=2)
    steps = StepSizes.per_level([3.0], 1.3, 2)
    first, again = (sampler.draw(target, noisy, sigma, steps, seeded(7)) for _ in range(2))
    assert torch.equal(first.positions, again.positions)
    assert first.noisy_score().dtype == torch.float32
    assert not first.noisy_score().requires_grad


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"method": "gibbs"}, "'gibbs'"),
        ({"kernel": "nuts"}, "'nuts'"),
        ({"particles": 0}, "particles"),
        ({"anneal_steps": 3}, "anneal_steps=3 needs method='annealed'"),
        ({"averaged": 2}, "averaged=2"),
        ({"method": "digs"}, "langevin_steps"),
        ({"method": "pool", "langevin_steps": 1}, "resample=True"),
        ({"method": "pool", "box": 1.0}, "box"),
        ({"box": -1.0}, "box"),
    ],
)
def test_settings_that_cannot_work_are_named(options, quoted):
    with pytest.raises(InvalidInput, match=quoted):
        PosteriorSampler(**options)


def test_inputs_that_cannot_work_are_named():
    target, noisy, sigma = gaussian(), torch.zeros((3, 2), dtype=F64), torch.ones(3, dtype=F64)
    plain, moving = PosteriorSampler(), PosteriorSampler(langevin_steps=1)
    with pytest.raises(InvalidInput, match="3 coordinates"):
        plain.draw(target, torch.zeros((3, 3), dtype=F64), sigma, None, seeded())
    with pytest.raises(InvalidInput, match=r"sigma must be .* got 0\.0 in row 1"):
        plain.draw(target, noisy, torch.tensor([1.0, 0.0, 1.0], dtype=F64), None, seeded())
    with pytest.raises(InvalidInput, match=r"noisy must be finite, got \[nan"):
        plain.draw(target, noisy * torch.nan, sigma, None, seeded())
    with pytest.raises(InvalidInput, match="give steps"):
        moving.draw(target, noisy, sigma, None, seeded())
    with pytest.raises(InvalidInput, match="start is for"):
        plain.draw(target, noisy, sigma, None, seeded(), noisy)
    with pytest.raises(InvalidInput, match="exclude each other"):
        PosteriorSampler(box=2.0).draw(target, noisy, sigma, None, seeded(), project=lambda x: x)
    draws = plain.draw(target, noisy, sigma, None, seeded())
    with pytest.raises(InvalidInput, match="'fisher'"):
        draws.noisy_score("fisher")
    with pytest.raises(InvalidInput, match=r"variance .* got 0\.0"):
        draws.noisy_score(variance=0.0)
    pooled = PosteriorSampler("pool").draw(target, noisy, sigma, None, seeded())
    with pytest.raises(InvalidInput, match="has none"):
        fitted_variance(pooled, StepSizes.per_level([1.0], 1.0, 2))
    for build, quoted in (
        (lambda: StepSizes.per_level([1.0, 1.0], 1.0, 2), "must increase"),
        (lambda: StepSizes.per_level([], 1.0, 2), "noise level"),
        (lambda: StepSizes.spaced(2.0, 1.0, 3, 1.0, 2), "lo must be below hi"),
        (lambda: StepSizes.published(rule="fast"), "'fast'"),
        (lambda: StepSizes.per_level([1.0], 0.0, 2), "scale"),
    ):
        with pytest.raises(InvalidInput, match=quoted):
            build()
