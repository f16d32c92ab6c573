"""Moments of Gaussian data, propagated through the coefficients of a reverse step: nothing is sampled."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_networks import posterior_covariance

from noisewise.diffusion.levels import NoiseLevels
from noisewise.diffusion.model import as_diffusion_model
from noisewise.diffusion.reverse import reverse_step
from noisewise.diffusion.steps import step_schedule
from noisewise.errors import InvalidInput

T = 1000
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
RAMP = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
LEVELS = {
    "variance preserving": NoiseLevels.from_alphas_cumprod(ABAR),
    "flow": NoiseLevels(1 - RAMP, RAMP, "flow_prediction"),
    "exploding": NoiseLevels(torch.ones(T), 0.01 * 8000**RAMP, "sample"),
}
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
TURN = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
SPECTRUM = torch.tensor([4.0, 0.5, 0.01], dtype=torch.float64)
COVARIANCES = {
    "isotropic": 0.3 * torch.eye(3, dtype=torch.float64),
    "diagonal": SPECTRUM.diag(),
    "full": TURN @ SPECTRUM.diag() @ TURN.T,
}


def moved(step, here, mean, covariance, data):
    """Moments after a step with the exact network of N(MEAN, data), whose map of x_t is affine."""
    a, s = here
    noisy = a**2 * data + s**2 * torch.eye(3, dtype=torch.float64)

    def kernel_mean(x):
        clean = MEAN + a * torch.linalg.solve(noisy, x.T - a * MEAN[:, None]).T @ data
        return step.mean(clean, (x - a * clean) / s, x)

    offset = kernel_mean(torch.zeros(1, 3, dtype=torch.float64))
    linear = (kernel_mean(torch.eye(3, dtype=torch.float64)) - offset).T
    return offset[0] + linear @ mean, linear @ covariance @ linear.T


@pytest.mark.parametrize("family", LEVELS)
@pytest.mark.parametrize("eta", [None, 0, 0.5, 1])
@pytest.mark.parametrize("shape", COVARIANCES)
def test_a_chain_with_the_exact_covariance_keeps_every_marginal_of_gaussian_data(shape, eta, family):
    levels, data = LEVELS[family], COVARIANCES[shape]
    eye = torch.eye(3, dtype=torch.float64)
    for steps in (2, 3, 5):
        visited = [t - 1 for t in reversed(step_schedule(T, steps))]
        a, s = levels.pair(visited[0])
        mean, covariance = a * MEAN, a**2 * data + s**2 * eye
        for t, following in zip(visited, [*visited[1:], None], strict=True):
            here, there = levels.pair(t), levels.pair(following)
            step = reverse_step(here, there, eta)
            left = posterior_covariance(data, *here)
            mean, covariance = moved(step, here, mean, covariance, data)
            expected = there[0] ** 2 * data + there[1] ** 2 * eye
            if following is None:
                # the last step gives E[x0 | x_1], whose variance falls short by what is left
                expected = expected - left
            else:
                covariance = covariance + step.variance * eye + step.gain**2 * left
            torch.testing.assert_close(mean, there[0] * MEAN, rtol=0, atol=1e-6)
            torch.testing.assert_close(covariance, expected, rtol=1e-6, atol=1e-6)


def test_eta_one_is_the_law_of_ddpm_and_the_ends_of_eta_are_ordered():
    levels = LEVELS["variance preserving"]
    x, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    for t, s in ((999, 500), (500, 10), (10, 9), (9, None)):
        (a, sigma), there = levels.pair(t), levels.pair(s)
        clean = (x - sigma * eps) / a
        one, ddpm, zero = (reverse_step((a, sigma), there, eta) for eta in (1, None, 0))
        torch.testing.assert_close(one.mean(clean, eps, x), ddpm.mean(clean, eps, x), rtol=1e-9, atol=1e-9)
        assert one.variance == pytest.approx(ddpm.variance, rel=1e-12)
        assert one.gain == pytest.approx(ddpm.gain, rel=1e-9)
        assert zero.variance == 0 <= ddpm.variance <= ddpm.large
        half = reverse_step((a, sigma), there, 0.5)
        assert half.variance == pytest.approx(ddpm.variance / 4, rel=1e-12)


def test_the_step_is_ddpms_posterior_of_the_published_formulas():
    for t, s in ((999, 700), (3, 1)):
        a_t, a_s = float(ABAR[t]), float(ABAR[s])
        beta = 1 - a_t / a_s
        step = reverse_step(LEVELS["variance preserving"].pair(t), LEVELS["variance preserving"].pair(s))
        assert step.clean == pytest.approx(math.sqrt(a_s) * beta / (1 - a_t), rel=1e-10)
        assert step.state == pytest.approx(math.sqrt(1 - beta) * (1 - a_s) / (1 - a_t), rel=1e-10)
        assert step.variance == pytest.approx(beta * (1 - a_s) / (1 - a_t), rel=1e-10)
        assert step.large == pytest.approx(beta, rel=1e-10)


def test_a_step_from_pure_noise_has_finite_coefficients():
    for eta in (None, 0, 1):
        step = reverse_step((0.0, 1.0), (0.6, 0.8), eta)
        assert all(math.isfinite(number) for number in step)
        # nothing of x0 was known: the gain is all of a_s
        assert step.gain == pytest.approx(0.6)


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan, True])
def test_eta_outside_its_interval_is_refused(eta):
    with pytest.raises(InvalidInput, match="eta must lie"):
        reverse_step((0.6, 0.8), (0.8, 0.6), eta)


def test_a_step_towards_more_noise_is_refused(shapes_unchecked):
    with pytest.raises(InvalidInput, match="cleaner level"):
        reverse_step((0.8, 0.6), (0.6, 0.8))
    with pytest.raises(InvalidInput, match="cleaner level"):
        reverse_step((0.8, 0.6), (0.8, 0.6))
    with pytest.raises(InvalidInput, match="eta must lie"):
        reverse_step((0.6, 0.8), (0.8, 0.6), "ddim")


@pytest.mark.parametrize(
    ("a", "s", "match"),
    [
        ([0.9, 0.8, 0.85], [0.1, 0.3, 0.2], "clean to noisy"),
        ([0.9, 0.8], [0.1, 0.2, 0.3], "equal length"),
        ([0.9, math.nan], [0.1, 0.2], "finite"),
        ([0.9, 0.8], [0.0, 0.2], "finite"),
        ([0.9, 0.0], [0.1, 1.0], "zero terminal SNR"),
        ([0.9], [0.1], "equal length"),
    ],
)
def test_tables_that_are_no_noise_levels_are_refused(a, s, match, shapes_unchecked):
    with pytest.raises(InvalidInput, match=match):
        NoiseLevels(torch.tensor(a), torch.tensor(s))


def test_levels_know_their_time_steps_and_their_name():
    levels = LEVELS["variance preserving"]
    for bad, match in ((T, "must lie"), (-1, "must lie"), (3.5, "whole"), (torch.tensor([1, 2]), "one time step or")):
        with pytest.raises(InvalidInput, match=match):
            levels.index(bad, 3, torch.device("cpu"))
    assert levels.index(torch.tensor([3.0]), 2, torch.device("cpu")).tolist() == [3, 3]
    with pytest.raises(InvalidInput, match="prediction_type"):
        NoiseLevels(torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.3]), "score")
    assert NoiseLevels.from_alphas_cumprod(ABAR.clone()).digest == levels.digest
    assert NoiseLevels.from_alphas_cumprod(ABAR, "v_prediction").digest != levels.digest
    assert NoiseLevels.from_alphas_cumprod(ABAR**1.01).digest != levels.digest


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_network_is_told_the_times_of_its_own_scheduler(shift, shapes_unchecked):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=shift)
    levels = NoiseLevels.from_scheduler(scheduler)
    torch.testing.assert_close(levels.s.flip(0).float(), scheduler.sigmas)
    torch.testing.assert_close(levels.a, 1 - levels.s)
    index = torch.arange(99, -1, -1)
    torch.testing.assert_close(levels.told(index), scheduler.timesteps)
    heard = []

    class Net(torch.nn.Module):
        def forward(self, x, t):
            heard.append(t)
            return x

    as_diffusion_model(Net(), scheduler).predict(torch.zeros(2, 3), torch.tensor([99, 10]))
    torch.testing.assert_close(heard[0], scheduler.timesteps[[0, 89]])
    with pytest.raises(InvalidInput, match="dynamic shifting"):
        NoiseLevels.from_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(InvalidInput, match="one entry a level"):
        NoiseLevels(torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.3]), times=torch.arange(3.0))
