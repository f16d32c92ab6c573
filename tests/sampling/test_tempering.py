"""Parallel tempering: swaps permute replicas, ladders are evenly spaced, and the scout finds how hot they must be."""

import itertools
import math

import pytest
import torch
from every_kernel import ladder_at, seeded
from scipy.stats import gamma

from noisewise.errors import InvalidInput
from noisewise.metrics import mode_weights
from noisewise.sampling import HMC, MALA, ParallelTempering, sample
from noisewise.sampling.ladder import even_ladder, geometric_ladder, swap_distance
from noisewise.targets import GaussianMixture, two_modes


@pytest.mark.parametrize("parity", [0, 1])
def test_swaps_exchange_whole_replicas_of_the_pairs_whose_turn_it_is(parity):
    target = two_modes(2, separation=4.0, dtype=torch.float64)
    betas = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
    kernel = ParallelTempering(target, betas=betas, step_size=0.1)
    before = ladder_at(kernel, torch.randn((4, 5000, 2), dtype=torch.float64, generator=seeded(0)) * 3, parity)
    after, acceptance = kernel._swap(before, seeded(1))
    # values travel with their replicas
    value, score = target.log_prob_and_score(after.replica)
    torch.testing.assert_close(after.log_prob, value)
    torch.testing.assert_close(after.score, score)
    # each replica is where it was or where its partner was, and pairs whose turn it is not stay
    partner = [1, 0, 3, 2] if parity == 0 else [0, 2, 1, 3]
    moved = (after.replica != before.replica).any(-1)
    for rung, other in enumerate(partner):
        exchanged = torch.where(moved[rung].unsqueeze(-1), before.replica[other], before.replica[rung])
        assert torch.equal(after.replica[rung], exchanged)
        assert torch.equal(moved[rung], moved[other])
    assert int(after.parity) == 1 - parity
    # Metropolis: exp((beta_i - beta_j) (log p_j - log p_i)), averaged over chains, is how many moved
    for pair in range(parity, 3, 2):
        gap = betas[pair] - betas[pair + 1]
        chance = (gap * (before.log_prob[pair + 1] - before.log_prob[pair])).clamp(max=0).exp()
        assert float(acceptance[pair]) == pytest.approx(float(chance.mean()), rel=1e-12)
        se = float((chance * (1 - chance)).mean()) ** 0.5 / math.sqrt(5000)
        assert abs(float(moved[pair].double().mean() - chance.mean())) < 4 * se


def test_parities_take_turns_so_that_replicas_travel():
    target = GaussianMixture(torch.zeros(1, 1), 1.0)
    # nearly equal temperatures accept every swap: each step moves a replica one rung, as on a conveyor
    kernel = ParallelTempering(target, betas=[1.0, 0.9999, 0.9998, 0.9997], step_size=1e-6)
    state = ladder_at(kernel, torch.arange(4.0).reshape(4, 1, 1).expand(4, 3, 1).contiguous(), 0)
    seen = []
    for _ in range(8):
        state, _ = kernel.step(state, seeded(0))
        seen.append(int(state.replica[0, 0, 0].round()))
    assert set(seen) == {0, 1, 2, 3}


def test_replicas_at_one_point_always_swap():
    kernel = ParallelTempering(two_modes(2), betas=[1.0, 0.5], step_size=0.1)
    state = kernel.init(torch.zeros(10, 2))
    _, acceptance = kernel._swap(state, seeded(0))
    assert float(acceptance) == 1.0


def gaussian_swap_acceptance(hot: float, cold: float, dim: int) -> float:
    """Closed form by quadrature: energies of N(0, 1/beta)^dim are Gamma(dim/2, beta)."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    quantile = torch.as_tensor(gamma.ppf(u.numpy(), dim / 2))
    gap = (cold - hot) * (quantile[:, None] / cold - quantile[None, :] / hot)
    return float(gap.clamp(max=0).exp().mean())


def test_even_ladder_equalises_the_swaps_of_a_gaussian():
    dim = 8
    rough = torch.tensor([1.0, 0.9, 0.5, 0.45, 0.1, 0.05, 0.02], dtype=torch.float64)

    def acceptance(betas):
        values = [gaussian_swap_acceptance(float(h), float(c), dim) for c, h in itertools.pairwise(betas)]
        return torch.tensor(values, dtype=torch.float64)

    assert float(acceptance(rough).std()) > 0.2
    betas = even_ladder(rough, acceptance(rough), len(rough))
    assert float(betas[0]) == 1.0
    assert float(betas[-1]) == 0.02
    assert float(acceptance(betas).std()) < 0.03
    # on a Gaussian the even ladder is the geometric one
    torch.testing.assert_close(betas, geometric_ladder(0.02, 7), rtol=0.12, atol=0)


def test_swap_distance_is_the_half_spread_of_a_gaussian_log_ratio_and_adds_up():
    # E[min(1, exp D)] = 2 Phi(-s / 2) for D ~ N(-s^2 / 2, s^2), as a swap in equilibrium has it
    for s in (0.2, 1.0, 3.0):
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        acceptance = (torch.special.ndtri(u) * s - s**2 / 2).clamp(max=0).exp().mean()
        assert float(swap_distance(acceptance)) == pytest.approx(s / 2, rel=1e-3)
    betas = [1.0, 0.8, 0.64, 0.512]
    steps = [gaussian_swap_acceptance(h, c, 20) for c, h in itertools.pairwise(betas)]
    whole = gaussian_swap_acceptance(betas[-1], betas[0], 20)
    total = float(swap_distance(torch.tensor(steps)).sum())
    assert float(swap_distance(torch.tensor(whole))) == pytest.approx(total, rel=0.03)


@pytest.mark.parametrize("dim", [1, 5])
def test_the_scout_heats_until_modes_ten_deviations_apart_are_crossed(dim, shapes_unchecked):
    target = two_modes(dim)
    init = target.means[0].expand(128, -1)
    run = sample(ParallelTempering(target), init=init, draws=500, warmup=150, seed=dim, progress=False)
    betas = run.settings["betas"]
    # the barrier is (separation / 2)^2 / 2 = 12.5: it must shrink to a few units, and needs no more than that
    assert 0.02 < float(betas[-1]) < 0.4
    assert float(betas[0]) == 1.0
    weights = mode_weights(run.positions[:, 100:], target.means)
    assert float(weights.se[0]) < 0.03
    assert abs(float(weights.weights[0]) - 0.3) < 4 * float(weights.se[0])


def test_the_scout_leaves_a_short_ladder_for_one_mode(shapes_unchecked):
    target = GaussianMixture(torch.zeros(1, 2), 1.0)
    run = sample(ParallelTempering(target), chains=64, draws=10, warmup=60, progress=False)
    assert float(run.settings["betas"][-1]) > 0.3
    assert len(run.settings["betas"]) <= 3


@pytest.mark.parametrize(
    ("betas", "said"),
    [([1.0], "at least two"), ([0.9, 0.5], "from 1"), ([1.0, 0.5, 0.5], "strictly"), ([1.0, 0.0], "above 0")],
)
def test_a_ladder_that_does_not_fall_from_one_is_refused(betas, said):
    with pytest.raises(InvalidInput, match=said):
        ParallelTempering(two_modes(2), betas=betas)


def test_an_inner_kernel_of_another_target_is_refused():
    with pytest.raises(InvalidInput, match="same target object"):
        ParallelTempering(two_modes(2), inner=HMC(two_modes(2)))
    with pytest.raises(InvalidInput, match="HMC, MALA or DiGS"):
        ParallelTempering(two_modes(2), inner="hmc")


@pytest.mark.slow
@pytest.mark.parametrize("inner", [lambda t: None, lambda t: MALA(t, steps=2)])
def test_the_adapted_ladder_swaps_evenly(inner, shapes_unchecked):
    target = two_modes(3)
    kernel = ParallelTempering(target, inner=inner(target))
    run = sample(kernel, chains=64, draws=300, warmup=400, seed=1, progress=False)
    swaps = run.stats["swap_acceptance"].double().mean(0)
    assert float(swaps.max() - swaps.min()) < 0.25
    assert float(swaps.min()) > 0.15
