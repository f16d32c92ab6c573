"""Langevin on a noisy density and jumps from it: their stationary laws on a Gaussian are known, bias included."""

import pytest
import torch
from every_kernel import seeded

from noisewise.denoising import Energy, Score
from noisewise.energy import EnergyNet
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.noise import Corruption
from noisewise.sampling import DenoisingGibbs, Draws, NoisyLangevin, WalkJump, sample


@pytest.mark.parametrize("noise", [Corruption(1.0, 0.5), Corruption(0.8, 0.6)])
def test_the_stationary_variances_are_those_of_theory(noise, shapes_unchecked):
    # x ~ N(0, c): x_t has variance v = a^2 c + s^2; the walk v / (1 - h / 2v); the jump shrinks by a c / v
    c, h = 2.0, 0.3
    v = noise.a**2 * c + noise.s**2
    walked = v / (1 - h / (2 * v))
    score = Score(lambda x: -x / v)
    for kernel, truth in ((NoisyLangevin, walked), (WalkJump, walked * (noise.a * c / v) ** 2)):
        run = sample(
            kernel(score, noise, step_size=h), init=torch.zeros(20_000, 1, dtype=torch.float64), draws=1, thin=60,
            progress=False,
        )  # fmt: skip
        square = run.positions[:, -1].square()
        assert float(square.mean()) == pytest.approx(truth, abs=4 * truth * (2 / 20_000) ** 0.5)
        assert run.cost.gradients == 20_000 * 61


def test_the_jump_is_the_denoised_mean_of_the_walk():
    noise, generator = Corruption(0.8, 0.6), seeded(1)
    kernel = WalkJump(Score(lambda x: -(x**3)), noise)
    state = kernel.init(torch.randn(50, 3, dtype=torch.float64, generator=seeded(0)))
    for _ in range(4):
        state, _ = kernel.step(state, generator)
        torch.testing.assert_close(state.position, (state.noisy - 0.36 * state.noisy**3) / 0.8)


@pytest.mark.parametrize("kernel", [NoisyLangevin, WalkJump])
def test_resumed_equals_one_longer_run(kernel, tmp_path):
    made = kernel(Score(lambda x: -x), Corruption(1.0, 0.5), step_size=0.05)
    init = torch.randn(6, 2, dtype=torch.float64, generator=seeded(0))
    whole = sample(made, init=init, draws=9, seed=3, progress=False)
    first = Draws.load(sample(made, init=init, draws=4, seed=3, progress=False).save(tmp_path / "run"))
    assert torch.equal(first.resume(made, 5, progress=False).positions, whole.positions)


def test_points_where_the_score_breaks_are_not_taken():
    noise = Corruption(1.0, 0.5)
    broken = Score(lambda x: torch.where(x.abs() < 0.5, -x, torch.nan))
    state, generator = WalkJump(broken, noise).init(torch.zeros(200, 1)), seeded(0)
    count = 0
    for _ in range(20):
        state, info = WalkJump(broken, noise).step(state, generator)
        count += int(info.nonfinite)
        assert bool((state.noisy.abs() < 0.5).all())
        assert bool(torch.isfinite(state.position).all())
    assert count > 100


def test_bad_arguments_are_refused(shapes_unchecked):
    with pytest.raises(InvalidInput, match="step_size must be finite and above 0"):
        WalkJump(Score(lambda x: -x), Corruption(1.0, 0.5), step_size=0.0)
    with pytest.raises(InvalidInput, match="Corruption"):
        NoisyLangevin(Score(lambda x: -x), 0.5)
    with pytest.raises(InvalidInput, match="wrap it"):
        WalkJump(lambda x: -x, Corruption(1.0, 0.5))


def test_a_walk_that_diverges_is_warned_of():
    # h = 50 on a unit score: each step multiplies the point by about -39
    kernel = WalkJump(Score(lambda x: -x / 1.25), Corruption(1.0, 0.5), step_size=50.0)
    with pytest.warns(NoisewiseWarning, match=r"4 of 4 chains have diverged.*lower step_size"):
        run = sample(kernel, init=torch.zeros(4, 2), draws=200, progress=False)
    assert any("diverged" in text for text in run.warnings)
    # resumed, the chains are still where they were
    with pytest.warns(NoisewiseWarning, match="diverged"):
        run.resume(kernel, 2, progress=False)


def test_another_noise_level_than_the_networks_is_refused_at_construction():
    net = EnergyNet(2, hidden=4)
    net.corruption = Corruption(1.0, 0.5)
    WalkJump(net, Corruption(1.0, 0.5))
    with pytest.raises(InvalidInput, match="trained at"):
        WalkJump(net, Corruption(1.0, 0.3))
    with pytest.raises(InvalidInput, match="trained at"):
        DenoisingGibbs(Energy(net), Corruption(1.0, 0.3))


def test_starts_that_do_not_fit_the_network_are_named(shapes_unchecked):
    net = Energy(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.SiLU(), torch.nn.Linear(4, 1), torch.nn.Flatten(0))
    )
    for kernel in (WalkJump(net, Corruption(1.0, 0.5)), DenoisingGibbs(net, Corruption(1.0, 0.5), correct=True)):
        with pytest.raises(InvalidInput, match=r"starts of shape \(5, 2\).*it must take \[chain, 2\]"):
            sample(kernel, init=torch.zeros(5, 2), draws=2, progress=False)
        with pytest.raises(InvalidInput, match=r"weights are torch.float32: give init=init.to\(torch.float32\)"):
            sample(kernel, init=torch.zeros(5, 3, dtype=torch.float64), draws=2, progress=False)
