"""Warm-up: every step size reaches the acceptance it aims at, and the metric learns the scales of the coordinates."""

import pytest
import torch
from every_kernel import seeded

from noisewise.errors import InvalidInput
from noisewise.noise import NoiseSchedule
from noisewise.sampling import HMC, MALA, DiGS, ParallelTempering, sample
from noisewise.sampling.adaptation import dual_averaging, dual_averaging_start, score_metric
from noisewise.sampling.kernel import local_scale
from noisewise.targets import GaussianMixture, two_modes

GAUSSIAN = GaussianMixture(torch.zeros(1, 5), 1.0)


def test_dual_averaging_finds_the_root_of_a_noisy_acceptance():
    # acceptance 1 / (1 + h / h0): the target .8 is met at h = h0 / 4
    memory, generator = dual_averaging_start(torch.tensor([1e-3, 5.0])), seeded(0)
    centre = torch.tensor([0.4, 40.0], dtype=torch.float64)
    for _ in range(1500):
        noise = 0.05 * torch.randn(2, dtype=torch.float64, generator=generator)
        acceptance = 1 / (1 + memory["da_log"].exp() / centre) + noise
        memory = dual_averaging(memory, acceptance, 0.8)
    torch.testing.assert_close(memory["da_mean"].exp(), centre / 4, rtol=0.1, atol=0)


KERNELS = {
    "MALA": (lambda t: MALA(t), 0.574),
    "HMC": (lambda t: HMC(t, leapfrogs=4), 0.8),
    "DiGS": (lambda t: DiGS(t, NoiseSchedule.from_scale(0.3, 3.0, 3)), 0.574),
    "DiGS HMC": (lambda t: DiGS(t, NoiseSchedule.from_scale(0.3, 3.0, 3), inner=HMC(t, leapfrogs=3, steps=2)), 0.8),
    "PT": (lambda t: ParallelTempering(t, betas=[1.0, 0.5, 0.2]), 0.8),
    "PT MALA": (lambda t: ParallelTempering(t, betas=[1.0, 0.5, 0.2], inner=MALA(t, steps=2)), 0.574),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_step_size_reaches_its_acceptance(name, shapes_unchecked):
    build, wanted = KERNELS[name]
    run = sample(build(GAUSSIAN), chains=100, draws=100, warmup=250, seed=1, progress=False)
    reached = run.stats["acceptance"].double().mean(0)
    assert bool(((reached - wanted).abs() < 0.05).all()), reached
    assert run.settings["step_size"].numel() == len(reached)


# from one point, a hundred deviations off in one coordinate, Langevin steps travel for most of a short warm-up
@pytest.mark.parametrize(
    ("name", "start", "warmup", "condition"),
    [(name, "spread", 500, 1.1) for name in ("MALA", "HMC", "PT")]
    + [("HMC", "point", 500, 1.5), ("PT", "point", 500, 1.5), ("MALA", "point", 3000, 1.5)],
)
def test_the_metric_learns_scales_from_a_hundredth_to_a_hundred(name, start, warmup, condition, shapes_unchecked):
    scale = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    target = GaussianMixture(torch.zeros(1, 5, dtype=torch.float64), (scale**2).unsqueeze(0))
    n = 100
    init = scale * torch.randn((n, 5), dtype=torch.float64, generator=seeded(0)) if start == "spread" else None
    init = torch.ones((n, 5), dtype=torch.float64) if init is None else init
    run = sample(KERNELS[name][0](target), init=init, draws=200, warmup=warmup, seed=1, progress=False)
    relative = run.settings["metric"].sqrt() / scale
    assert float(relative.max() / relative.min()) < condition, relative
    second_half = run.positions[:, 100:]
    means = second_half.mean(1)
    assert bool((means.mean(0).abs() < 4 * means.std(0) / n**0.5).all())
    variances = second_half.square().mean(1)
    se = variances.std(0) / n**0.5
    assert bool(((variances.mean(0) - scale**2).abs() < 4 * se + 0.02 * scale**2).all()), variances.mean(0)


def test_the_metric_does_not_see_how_far_the_modes_are_apart():
    target = two_modes(3, separation=50.0, scales=(0.5, 0.5), dtype=torch.float64)
    score = target.score(target.sample(20_000, seeded(0)))
    torch.testing.assert_close(local_scale(score), torch.full((3,), 0.5, dtype=torch.float64), rtol=0.03, atol=0)
    metric = score_metric(score.square().sum(0), float(len(score)))
    torch.testing.assert_close(metric, torch.full((3,), 0.25, dtype=torch.float64), rtol=0.05, atol=0)


def test_settings_that_were_given_are_not_adapted():
    for kernel in (MALA(GAUSSIAN, step_size=0.123), HMC(GAUSSIAN, step_size=0.123)):
        run = sample(kernel, chains=10, draws=3, warmup=50, progress=False)
        assert float(run.settings["step_size"]) == pytest.approx(0.123)
        # the warm-up that was asked for is made all the same, and discarded
        assert run.cost.gradients == 10 * (1 + 53 * kernel.gradients_per_step)


def test_a_given_metric_is_kept_while_the_step_size_adapts():
    metric = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    run = sample(MALA(GAUSSIAN, metric=metric), chains=50, draws=3, warmup=100, progress=False)
    assert torch.equal(run.settings["metric"], metric)


def test_a_warm_up_that_adapts_nothing_still_forgets_the_starts():
    # from 100 deviations off, fixed steps of .5 need some hundred iterations
    run = sample(HMC(GAUSSIAN, step_size=0.5), init=torch.full((50, 5), 100.0), draws=20, warmup=300, progress=False)
    assert float(run.positions.abs().max()) < 10 * float(GAUSSIAN.covariance().diagonal().max().sqrt())


def test_step_sizes_that_were_given_stay_when_schedule_or_ladder_are_open():
    for kernel in (DiGS(GAUSSIAN, step_size=0.123), DiGS(GAUSSIAN, inner=MALA(GAUSSIAN, step_size=0.123))):
        run = sample(kernel, chains=10, draws=3, progress=False)
        assert bool((run.settings["step_size"] == 0.123).all())
        assert len(run.settings["a"]) == 4
    betas = [1.0, 0.25]
    run = sample(
        ParallelTempering(GAUSSIAN, betas=betas, inner=HMC(GAUSSIAN, step_size=0.1)), chains=10, draws=3, progress=False
    )
    # the step of the cold rung, growing as the tempered modes widen
    torch.testing.assert_close(run.settings["step_size"].double(), torch.tensor([0.1, 0.2], dtype=torch.float64))
    with pytest.raises(InvalidInput, match="the ladder is open"):
        ParallelTempering(GAUSSIAN, step_size=0.1)
