"""Started from exact draws, one step of any kernel leaves exact draws; biased moves are found out by the same test."""

from dataclasses import dataclass

import pytest
import torch
from every_kernel import BETAS, EVERY, LADDERS, SINGLE, Line, at, fitted, ladder_at, seeded, two_bumps
from scipy.stats import chi2_contingency, ks_2samp

from noisewise.noise import Corruption
from noisewise.sampling import HMC, MALA, ULA, DiGS, FittedDiGS
from noisewise.sampling.kernel import ChainState, Moved, finite, select
from noisewise.targets import GaussianMixture, two_modes
from noisewise.targets.tilted import Tilt

N = 100_000
LEVEL = 1e-4  # of each test; the seeds are fixed


def p_values(moved: torch.Tensor, fresh: torch.Tensor, target: GaussianMixture) -> dict[str, float]:
    """Two samples of one law? Mode counts, radius about the nearest mode, and projections on fixed directions."""
    labels = [target.component(x) for x in (moved, fresh)]
    counts = torch.stack([torch.bincount(label, minlength=len(target.means)) for label in labels])
    values = {"modes": float(chi2_contingency(counts.numpy()).pvalue)}
    radii = [(x - target.means[label].to(x)).norm(dim=-1) for x, label in zip((moved, fresh), labels, strict=True)]
    values["radius"] = ks(radii[0], radii[1])
    directions = torch.randn((target.dim, 3), generator=seeded(99), dtype=moved.dtype)
    directions = torch.cat([torch.eye(target.dim, dtype=moved.dtype)[:, :1], directions], 1)
    for index, (a, b) in enumerate(zip((moved @ directions).T, (fresh @ directions).T, strict=True)):
        values[f"projection {index}"] = ks(a, b)
    return values


def ks(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(ks_2samp(a.numpy(), b.numpy(), method="asymp").pvalue)


def one_step(kernel, dim: int, seed: int, dtype=torch.float32) -> dict[str, float]:
    target = two_modes(dim, separation=5.0, scales=(1.0, 0.5), dtype=dtype)
    generator = seeded(seed)
    state = at(kernel(target), target.sample(N, generator))
    state, _ = kernel(target).step(state, generator)
    return p_values(state.position, target.sample(N, generator), target)


@pytest.mark.parametrize("dim", [2, 10])
@pytest.mark.parametrize("name", SINGLE)
def test_one_step_from_exact_draws_of_two_unequal_modes_leaves_exact_draws(name, dim):
    values = one_step(SINGLE[name], dim, seed=len(name) + dim)
    assert min(values.values()) > LEVEL, values


@pytest.mark.parametrize("tries", [1, 8])
@pytest.mark.parametrize("dim", [2, 10])
def test_the_metropolis_start_alone_leaves_exact_draws(tries, dim):
    @dataclass(frozen=True)
    class NoInnerSteps(MALA):
        def advance(self, state, noise, step_size, tilt):
            return state, Moved(torch.ones_like(state.log_prob), torch.zeros((), dtype=torch.long))

    values = one_step(lambda t: DiGS(t, Corruption(1.0, 2.0), tries=tries, inner=NoInnerSteps(t)), dim, seed=7)
    assert min(values.values()) > LEVEL, values


def accept_all(state, proposed):
    valid = finite(proposed.log_prob, proposed.score)
    return select(valid, proposed, state), Moved(valid.to(proposed.log_prob), (~valid).sum())


class StartsAnywhere(DiGS):
    """The start at t/alpha without its acceptance step, a known mistake."""

    def _start(self, state, z, uniform, tilt):
        return accept_all(state, ChainState(z[0], *self.target.log_prob_and_score(z[0])))


class BelievesItsFit(FittedDiGS):
    """Fitted moves without their acceptance step."""

    def _fitted_move(self, state, generator):
        z = self._denoiser.propose(state.position, generator)
        state, moved = accept_all(state, ChainState(z, *self.target.log_prob_and_score(z)))
        return state, moved.acceptance, moved.nonfinite


BIASED = {
    "ULA with a coarse step": lambda t: ULA(t, step_size=0.3, steps=2),
    "start without acceptance": lambda t: StartsAnywhere(
        t, Corruption(1.0, 2.0), inner=MALA(t, steps=5), step_size=0.05
    ),
    "fitted r=inf without acceptance": lambda t: BelievesItsFit(**vars_of(fitted(t, ladder=False))),
    "fitted r=1 without acceptance": lambda t: BelievesItsFit(**vars_of(fitted(t, ladder=False, r=1.0))),
}


def vars_of(kernel):
    return {name: getattr(kernel, name) for name in kernel.__dataclass_fields__}


@pytest.mark.parametrize("dim", [2, 10])
@pytest.mark.parametrize("name", BIASED)
def test_a_biased_move_fails_the_same_test(name, dim):
    values = one_step(BIASED[name], dim, seed=3)
    assert min(values.values()) < LEVEL / 1e3, values
    if "without acceptance" in name:
        assert values["modes"] < LEVEL, values


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("name", LADDERS)
def test_a_ladder_leaves_every_power_of_a_bimodal_density_exact_and_independent(name, parity):
    target = Line(two_bumps, -40.0, 40.0)
    kernel = LADDERS[name](target)
    generator = seeded(11 + parity)

    def draws():
        return torch.stack([target.draw(N, generator, beta) for beta in BETAS])

    state, info = kernel.step(ladder_at(kernel, draws(), parity), generator)
    assert int(state.parity) == 1 - parity
    assert bool((info.swap_acceptance > 0.3).all())
    assert_same_ladder(state.replica.squeeze(-1), draws().squeeze(-1))


def assert_same_ladder(moved: torch.Tensor, fresh: torch.Tensor):
    """Every rung has its law, and neighbours are independent: sums and differences, and signs together."""
    values = {}
    for rung in range(len(moved)):
        values[f"rung {rung}"] = ks(moved[rung], fresh[rung])
        for other in range(rung):
            values[f"difference {rung} {other}"] = ks(moved[rung] - moved[other], fresh[rung] - fresh[other])
            values[f"sum {rung} {other}"] = ks(moved[rung] + moved[other], fresh[rung] + fresh[other])
    powers = 2 ** torch.arange(len(moved)).unsqueeze(-1)
    counts = torch.stack([torch.bincount(((x > 0) * powers).sum(0), minlength=2 ** len(moved)) for x in (moved, fresh)])
    values["signs"] = float(chi2_contingency(counts.numpy()).pvalue)
    assert min(values.values()) > LEVEL, values


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("name", LADDERS)
def test_a_ladder_leaves_every_power_of_a_gaussian_in_ten_dimensions_exact(name, parity):
    # p^beta of a Gaussian is a Gaussian of covariance S / beta
    dim, scale = 10, torch.linspace(0.6, 1.4, 10)
    target = GaussianMixture(torch.zeros(1, dim), (scale**2).unsqueeze(0))
    kernel = LADDERS[name](target)
    generator = seeded(23 + parity)
    root = torch.tensor(BETAS).rsqrt().reshape(-1, 1, 1)
    n = N // 2

    def draws():
        return root * scale * torch.randn((len(BETAS), n, dim), generator=generator)

    state, _ = kernel.step(ladder_at(kernel, draws(), parity), generator)
    fresh = draws()
    direction = torch.randn(dim, generator=seeded(99)) / scale
    values = {}
    for rung, (a, b) in enumerate(zip(state.replica, fresh, strict=True)):
        values[f"energy {rung}"] = ks((a / scale).norm(dim=-1), (b / scale).norm(dim=-1))
        values[f"projection {rung}"] = ks(a @ direction, b @ direction)
    # swaps correlate energies of neighbours unless the product law is kept
    energy, energy_fresh = state.log_prob, target.log_prob(fresh)
    for rung in range(len(BETAS) - 1):
        values[f"gap {rung}"] = ks(energy[rung] - energy[rung + 1], energy_fresh[rung] - energy_fresh[rung + 1])
    assert min(values.values()) > LEVEL, values


def test_hmc_at_a_power_leaves_that_power_exact():
    target, generator = Line(two_bumps, -40.0, 40.0), seeded(5)
    kernel = HMC(target, step_size=0.6, leapfrogs=4, power=0.2)
    state, _ = kernel.step(kernel.init(target.draw(N, generator, 0.2)), generator)
    assert ks(state.position.squeeze(-1), target.draw(N, generator, 0.2).squeeze(-1)) > LEVEL


@pytest.mark.parametrize("name", ["MALA", "HMC"])
def test_detailed_balance_on_a_double_well(name):
    assert flow_imbalance(SINGLE[name]) > LEVEL


def test_detailed_balance_fails_without_the_correction():
    assert flow_imbalance(lambda t: ULA(t, step_size=0.2)) < LEVEL


def flow_imbalance(kernel) -> float:
    """p-value of the hypothesis that as many chains go from bin i to bin j as from j to i, in equilibrium."""
    target, generator = Line(lambda x: -((x**2 - 1) ** 2) * 2, -4.0, 4.0), seeded(17)
    x = target.draw(4 * N, generator)
    state, _ = kernel(target).step(kernel(target).init(x), generator)
    edges = torch.linspace(-1.6, 1.6, 13, dtype=torch.float64)
    bins = len(edges) + 1
    start, end = (torch.bucketize(v.squeeze(-1).contiguous(), edges) for v in (x, state.position))
    flow = torch.bincount(start * bins + end, minlength=bins**2).reshape(bins, bins).double()
    both = torch.triu(flow + flow.T, 1)
    used = both > 20
    statistic = ((flow - flow.T).square()[used] / both[used]).sum()
    # each pair is a fair coin under reversibility: a chi-square with one degree of freedom per pair
    return float(torch.special.gammaincc(used.sum().double() / 2, statistic / 2))


@pytest.mark.parametrize("name", EVERY)
def test_cached_values_stay_those_of_a_fresh_evaluation(name):
    target = two_modes(2, separation=5.0, scales=(1.0, 0.5), dtype=torch.float64)
    kernel, generator = EVERY[name](target), seeded(1)
    state = at(kernel, target.sample(6, generator))
    cycles = 1000 if name == "DiGS L=1" else 50
    for _ in range(cycles):
        state, _ = kernel.step(state, generator)
    position = state.replica if hasattr(state, "replica") else state.position
    value, score = target.log_prob_and_score(position.reshape(-1, 2))
    torch.testing.assert_close(state.log_prob.reshape(-1), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.score.reshape(-1, 2), score, rtol=1e-12, atol=1e-12)


def test_a_tilt_is_the_product_of_density_and_gaussian():
    target = two_modes(2, dtype=torch.float64)
    x = torch.randn((5, 2), dtype=torch.float64, generator=seeded(0), requires_grad=True)
    value, score = Tilt(0.5, 2.0, 1.0)(x, *target.log_prob_and_score(x))
    direct = 0.5 * target.log_prob(x) - (x - 1).square().sum(-1)
    torch.testing.assert_close(value, direct)
    torch.testing.assert_close(score, torch.autograd.grad(direct.sum(), x)[0])
