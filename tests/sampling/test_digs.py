"""DiGS against its own mathematics: the Gaussian chain in closed form, its acceptance, its one parameter, its limits."""

import math

import pytest
import torch
from every_kernel import Counting, seeded
from torch.distributions import MultivariateNormal, Normal

from noisewise.metrics import mode_weights
from noisewise.noise import Corruption, NoiseSchedule
from noisewise.sampling import HMC, MALA, DiGS, sample
from noisewise.sampling.kernel import ChainState
from noisewise.targets import GaussianMixture, as_target, two_modes
from noisewise.targets.tilted import Tilt


def start(target, x):
    return ChainState(x, *target.log_prob_and_score(x))


@pytest.mark.parametrize("metric", [None, torch.tensor([2.0, 0.5])])
def test_on_a_gaussian_with_an_exact_denoiser_the_chain_is_autoregressive(metric):
    # oracle 1 of the specification: lag-one matrix A = (S^-1 + R^-1)^-1 R^-1, stationary covariance S
    n, r = 40_000, 1.3
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
    target = as_target(MultivariateNormal(mean, covariance))
    kernel = DiGS(target, Corruption(1.0, r), metric=metric, inner=HMC(target, leapfrogs=3, steps=15), step_size=0.4)
    generator = seeded(0)
    x = mean + torch.randn((n, 2), dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(covariance).T
    state, _ = kernel.step(start(target, x), generator)
    noise = torch.eye(2, dtype=torch.float64) * r**2 if metric is None else torch.diag(metric.double()) * r**2
    a = torch.linalg.inv(torch.linalg.inv(covariance) + torch.linalg.inv(noise)) @ torch.linalg.inv(noise)
    centred, moved = x - mean, state.position - mean
    lag = moved.T @ centred / n
    for estimate, exact in ((lag, a @ covariance), (moved.T @ moved / n, covariance)):
        # a product of two Gaussian coordinates has at most this standard deviation
        se = (2 * torch.outer(covariance.diagonal(), covariance.diagonal())).sqrt() / math.sqrt(n)
        assert bool(((estimate - exact).abs() < 4 * se).all()), (estimate, exact)
    assert float((state.position.mean(0) - mean).norm()) < 4 * math.sqrt(float(covariance.trace()) / n)


@pytest.mark.parametrize("seed", range(5))
def test_the_start_is_accepted_with_the_long_form_of_the_metropolis_ratio(seed):
    # equation 5: p(z) p(t|z) q(x|t) / (p(x) p(t|x) q(z|t)) = p(z) / p(x)
    generator = seeded(seed)
    alpha, sigma = (torch.rand(2, dtype=torch.float64, generator=generator) * 0.9 + 0.1).tolist()
    sigma *= 2 * alpha
    target = two_modes(3, separation=4.0, dtype=torch.float64)
    x = target.sample(200, generator)
    x_t = Corruption(alpha, sigma).corrupt(x, generator)
    z = (x_t + sigma * torch.randn(x.shape, dtype=x.dtype, generator=generator)) / alpha
    kernel = DiGS(target, Corruption(alpha, sigma))
    _, moved = kernel._start(start(target, x), z.unsqueeze(0), torch.rand(200, dtype=x.dtype), Tilt())

    def joint(point):
        return target.log_prob(point) + Normal(alpha * point, sigma).log_prob(x_t).sum(-1)

    def proposal(point):
        return Normal(x_t / alpha, sigma / alpha).log_prob(point).sum(-1)

    long_form = (joint(z) + proposal(x) - joint(x) - proposal(z)).clamp(max=0).exp()
    torch.testing.assert_close(moved.acceptance, long_form, rtol=1e-5, atol=1e-10)
    assert float(long_form.std()) > 0.1


def test_the_multiple_try_start_picks_each_candidate_with_its_share_of_the_density():
    target = two_modes(1, separation=3.0, dtype=torch.float64)
    candidates = torch.tensor([[0.3], [-1.5], [1.2], [9.0]], dtype=torch.float64)
    n = 200_000
    x, z = candidates[:1].expand(n, 1), candidates[1:].unsqueeze(1).expand(3, n, 1)
    kernel = DiGS(target, tries=3)
    uniform = torch.rand(n, dtype=torch.float64, generator=seeded(0))
    state, moved = kernel._multiple_try_start(start(target, x), z, uniform, Tilt())
    share = target.log_prob(candidates).softmax(0)
    counts = torch.stack([(state.position == candidate).all(-1).double().mean() for candidate in candidates])
    assert bool(((counts - share).abs() < 4 * (share * (1 - share) / n).sqrt() + 1e-12).all())
    torch.testing.assert_close(moved.acceptance, (1 - share[0]).expand(n))


@pytest.mark.parametrize("inner", [lambda t: MALA(t, steps=4), lambda t: HMC(t, leapfrogs=3)])
@pytest.mark.parametrize("tries", [1, 3])
def test_only_the_ratio_of_sigma_to_alpha_matters(inner, tries):
    target = two_modes(2, dtype=torch.float64)
    x = target.sample(20, seeded(1))
    paths = []
    for level in (Corruption(0.1, math.sqrt(1 - 0.1**2)), Corruption(1.0, math.sqrt(1 - 0.1**2) / 0.1)):
        kernel, generator = DiGS(target, level, inner=inner(target), tries=tries, step_size=0.2), seeded(2)
        state = kernel.init(x)
        for _ in range(50):
            state, _ = kernel.step(state, generator)
        paths.append(state.position)
    torch.testing.assert_close(paths[0], paths[1], rtol=0, atol=1e-9)
    assert float((paths[0] - x).abs().mean()) > 0.5


def test_with_vanishing_noise_the_chain_stays_and_starts_are_accepted():
    target = two_modes(2, dtype=torch.float64)
    x = target.sample(500, seeded(1))
    kernel = DiGS(target, Corruption(1.0, 1e-4))
    state, info = kernel.step(kernel.init(x), seeded(2))
    assert float((state.position - x).abs().max()) < 2e-3
    assert float(info.mwg_acceptance) > 0.999


def test_with_endless_noise_starts_are_refused_and_the_inner_steps_are_plain_mala():
    target = two_modes(3, dtype=torch.float64)
    x = target.sample(500, seeded(1))
    inner = MALA(target, step_size=0.3, steps=5)
    kernel = DiGS(target, Corruption(1e-3, 1e8), inner=inner)
    generator = seeded(2)
    noise = kernel.noise(x, generator)[0][0]
    state, started, _ = kernel.sweep(kernel.init(x), noise, kernel.levels[0].r, torch.tensor(0.3), Tilt())
    assert float(started.acceptance.max()) < 1e-12
    plain, _ = inner.advance(inner.init(x), noise.inner, torch.tensor(0.3), Tilt())
    torch.testing.assert_close(state.position, plain.position, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tries", [1, 4])
def test_a_run_costs_levels_times_sweeps_times_one_more_than_the_inner_steps(tries):
    target = Counting(two_modes(2))
    levels, sweeps, steps, chains, draws = 3, 2, 4, 5, 7
    kernel = DiGS(
        target,
        NoiseSchedule.from_scale(0.5, 4.0, levels),
        sweeps=sweeps,
        tries=tries,
        inner=MALA(target, steps=steps),
        step_size=0.1,
    )
    run = sample(kernel, chains=chains, draws=draws, progress=False)
    assert run.cost.gradients == chains * (1 + draws * levels * sweeps * (steps + 1))
    assert run.cost.energies == (chains * draws * levels * sweeps * tries if tries > 1 else 0)
    assert target.gradients == run.cost.gradients + 2
    assert target.energies == run.cost.energies


@pytest.mark.parametrize("dim", [1, 2])
def test_the_weight_of_the_lesser_mode_is_recovered_from_one_mode(dim, shapes_unchecked):
    target = two_modes(dim, dtype=torch.float64)
    kernel = DiGS(target, Corruption(1.0, 4.0), inner=MALA(target, steps=2), step_size=0.5)
    init = target.means[1].expand(200, -1)
    run = sample(kernel, init=init, draws=600, seed=3, progress=False)
    weights = mode_weights(run.positions[:, 150:], target.means)
    assert float(weights.se[0]) < 0.02
    assert abs(float(weights.weights[0]) - 0.3) < 4 * float(weights.se[0])


def test_tempered_moves_of_digs_widen_their_noise_as_the_modes_widen():
    # p^(1/4) of N(0, s^2) is N(0, (2s)^2): the tempered sweep is the plain one of the wider Gaussian, noise and all
    narrow = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), 1.0)
    wide = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), 4.0)
    x = 2 * torch.randn((30, 2), dtype=torch.float64, generator=seeded(0))
    paths = []
    for target, level, tilt in ((narrow, 1.5, Tilt(power=torch.tensor(0.25))), (wide, 3.0, Tilt())):
        kernel = DiGS(target, Corruption(1.0, level), inner=MALA(target, steps=3))
        state, _ = kernel.advance(kernel.init(x), kernel.noise(x, seeded(1)), torch.tensor(0.4), tilt)
        paths.append(state.position)
    torch.testing.assert_close(paths[0], paths[1], rtol=0, atol=1e-6)
    assert float((paths[0] - x).abs().mean()) > 0.5


def test_a_schedule_left_open_reaches_from_the_width_of_the_modes_to_the_spread_of_the_starts(shapes_unchecked):
    target = two_modes(2, separation=40.0, scales=(0.5, 0.5), dtype=torch.float64)
    init = target.sample(200, seeded(0))
    run = sample(DiGS(target), init=init, draws=5, warmup=30, seed=1, progress=False)
    r = run.settings["s"] / run.settings["a"]
    assert float(r[0]) == pytest.approx(0.5, rel=0.3)
    assert float(r[-1]) == pytest.approx(float(init.std(0).max()), rel=0.2)
    torch.testing.assert_close(r[1:] / r[:-1], (r[1] / r[0]).expand(len(r) - 1), rtol=1e-6, atol=0)
