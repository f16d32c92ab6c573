"""Tempered SMC: resampling, the normaliser in closed form, the weights of modes, and an annealing cut short."""

import math

import pytest
import torch
from every_kernel import Counting, seeded

from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.metrics import mode_weights
from noisewise.sampling import TemperedSMC, sample
from noisewise.sampling.smc import _systematic
from noisewise.targets import GaussianMixture, as_target, two_modes


def test_systematic_resampling_copies_each_particle_as_its_weight_says():
    weight = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3], dtype=torch.float64)
    counts = torch.stack(
        [torch.bincount(_systematic(weight, seeded(seed)), minlength=5).double() for seed in range(2000)]
    )
    assert bool(((counts - 5 * weight).abs() < 1 + 1e-9).all())  # never off by a whole copy
    assert float(counts[:, 2].max()) == 0
    torch.testing.assert_close(counts.mean(0), 5 * weight, rtol=0, atol=4 * 0.5 / math.sqrt(2000))
    assert torch.equal(_systematic(torch.full((64,), 1 / 64), seeded(0)), torch.arange(64))


def test_the_normaliser_of_a_wide_density_is_found_in_closed_form(shapes_unchecked):
    # exp(3 - x^T S^-1 x / 2) integrates to exp(3) (2 pi)^(d/2) |S|^(1/2)
    scale = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    target = as_target(lambda x: 3 - 0.5 * ((x - 1) / scale.to(x)).square().sum(-1), dim=3)
    exact = 3 + 1.5 * math.log(2 * math.pi) + float(scale.log().sum())
    kernel = TemperedSMC(target, mean=0.0, scale=2.5, moves=2, leapfrogs=4)
    estimates = torch.tensor(
        [
            sample(kernel, chains=300, draws=1, seed=seed, progress=False).final.state["log_normalizer"].item()
            for seed in range(8)
        ]
    ).double()
    # Z itself is estimated without bias; log Z is then low by half its variance
    se = float(estimates.std()) / math.sqrt(len(estimates))
    assert se < 0.1
    assert abs(float(estimates.mean() + estimates.var() / 2) - exact) < 4 * se


@pytest.mark.parametrize("dim", [1, 2])
def test_the_lesser_mode_gets_its_weight(dim, shapes_unchecked):
    target = two_modes(dim, dtype=torch.float64)
    kernel = TemperedSMC(target, mean=0.0, scale=5.0, moves=2)
    estimates = torch.tensor(
        [
            float(
                mode_weights(
                    sample(
                        kernel,
                        init=torch.zeros(400, dim, dtype=torch.float64),
                        draws=1,
                        seed=seed,
                        progress=False,
                    ).positions,
                    target.means,
                ).weights[0]
            )
            for seed in range(10)
        ]
    )
    se = float(estimates.std()) / math.sqrt(len(estimates))
    assert se < 0.03
    assert abs(float(estimates.mean()) - 0.3) < 4 * se


def test_the_reference_left_open_is_the_spread_of_the_starts():
    target = two_modes(2, dtype=torch.float64)
    init = 4 * torch.randn((200, 2), dtype=torch.float64, generator=seeded(0)) + 1
    run = sample(TemperedSMC(target), init=init, draws=2, progress=False)
    torch.testing.assert_close(run.settings["mean"], init.mean(0))
    torch.testing.assert_close(run.settings["scale"], init.std(0, correction=0))
    assert float(run.final.state["beta"]) == 1


def test_a_step_keeps_the_effective_share_that_was_asked_for():
    target = two_modes(2, dtype=torch.float64)
    kernel = TemperedSMC(target, mean=0.0, scale=5.0, ess=0.7, step_size=0.5)
    state = kernel.init(5 * torch.randn((2000, 2), dtype=torch.float64, generator=seeded(0)))
    shares = []
    while float(state.beta) < 1:
        state, info = kernel.step(state, seeded(len(shares)))
        shares.append(float(info.ess))
    assert len(shares) >= 2
    assert all(share == pytest.approx(0.7, abs=1e-6) for share in shares[:-1])
    assert shares[-1] >= 0.7


def test_an_annealing_cut_short_says_so():
    target = GaussianMixture(torch.full((1, 10), 20.0), 0.01)
    with (
        pytest.warns(NoisewiseWarning, match="reached beta = .*not 1"),
        pytest.warns(NoisewiseWarning, match="there are no draws"),
    ):
        run = sample(TemperedSMC(target, mean=0.0, scale=1.0), chains=20, budget=20 * 100, progress=False)
    assert float(run.final.state["beta"]) < 1
    assert run.cost.gradients <= 2000


def test_the_bill_counts_the_particles_drawn_from_the_reference():
    target = Counting(two_modes(2))
    run = sample(TemperedSMC(target, mean=0.0, scale=5.0), chains=30, draws=3, progress=False)
    assert target.gradients == run.cost.gradients + 2
    assert target.energies == run.cost.energies == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ess": 1.0}, "ess"), ({"ess": 0.0}, "ess"), ({"scale": -1.0}, "scale"), ({"moves": 0}, "steps")],
)
def test_settings_out_of_range_are_refused(options, said):
    with pytest.raises(InvalidInput, match=said):
        TemperedSMC(two_modes(2), **options)


def test_particles_outside_the_support_are_left_behind(shapes_unchecked):
    # N(0, 1) particles for Beta(2, 2) on the unit interval: two thirds of them have no density
    def log_prob(x):
        x = x[..., 0]
        inside = (x > 0) & (x < 1)
        safe = torch.where(inside, x, 0.5)
        return torch.where(inside, (6 * safe * (1 - safe)).log(), -torch.inf)

    target = as_target(log_prob, dim=1)
    run = sample(TemperedSMC(target, mean=0.0, scale=1.0), init=torch.full((2000, 1), 0.5), draws=3, progress=False)
    assert float(run.final.state["beta"]) == 1
    x = run.positions[:, -1, 0]
    assert bool(((x > 0) & (x < 1)).all())
    assert float(x.mean()) == pytest.approx(0.5, abs=5 * (1 / 20 / 2000) ** 0.5)
    # log of the integral of a normalised density
    assert float(run.final.state["log_normalizer"]) == pytest.approx(0, abs=0.2)
