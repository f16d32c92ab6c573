"""DiKL: the gradient is that of the divergence, the fit keeps both modes, resumes to the same numbers, and says what is wrong."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning, RunFolderError
from noisewise.neural import DiKLSampler, PosteriorSampler
from noisewise.neural.levels import Levels
from noisewise.neural.training import Rates
from noisewise.noise import NoiseSchedule
from noisewise.targets import GaussianMixture, double_well_4, lennard_jones, many_well

F64 = torch.float64
FAST = Rates(3e-3, 2e-3, 128, 128, 2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def two_modes():
    return GaussianMixture(torch.tensor([[-4.0], [4.0]]), 1.0)


class Affine(nn.Module):
    """x = m + z L^T."""

    def __init__(self, dim, mean=0.0, scale=1.0):
        super().__init__()
        self.m = nn.Parameter(torch.full((dim,), float(mean)))
        self.L = nn.Parameter(scale * torch.eye(dim))

    def forward(self, z):
        return self.m + z @ self.L.T


class ExactScore:
    """The noisy score of a mixture in closed form, in the place of a `PosteriorSampler`."""

    method = "exact"

    def draw(self, target, noisy, sigma, steps, generator, start=None, project=None):
        from noisewise.neural.posterior import PosteriorDraws
        from noisewise.typing import Cost

        mixture, scale = target.target, target.scale
        x, out = target.to_x(noisy), torch.empty_like(noisy)
        for level in sigma.unique().tolist():
            at = sigma == level
            out[at] = mixture.noisy(1.0, level * float(scale[0])).score(x[at])
        # E[x | y] on the standardised scale
        mean = target.to_u(x + (sigma.unsqueeze(-1) * scale) ** 2 * out)
        ones = torch.ones(len(noisy))
        return PosteriorDraws(noisy, sigma, mean, 0 * mean, ones * 9, ones > 0, None, None, Cost())


def gaussian_kl(m, L, mean, covariance, sigma):
    """KL of N(m, L L^T + sigma^2) from N(mean, covariance + sigma^2)."""
    eye = torch.eye(len(m), dtype=m.dtype)
    p, q = (
        torch.distributions.MultivariateNormal(a, b + sigma**2 * eye) for a, b in ((m, L @ L.T), (mean, covariance))
    )
    return torch.distributions.kl_divergence(p, q)


def test_the_surrogate_has_the_gradient_of_the_divergence():
    # oracle 6: exact scores of an affine generator and a Gaussian target; <sg(w D), x> against sum of w KL
    dim, levels = 2, Levels(0.5, 2.0, "uniform", 0.0, (0.5, 2.0))
    mean, covariance = torch.tensor([1.0, -1.0], dtype=F64), torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    g = Affine(dim, 0.3, 0.8).to(F64)
    truth = sum(0.5 * gaussian_kl(g.m, g.L, mean, covariance, s) for s in (0.5, 2.0))
    exact = torch.autograd.grad(truth, [g.m, g.L])
    n, eye = 400_000, torch.eye(dim, dtype=F64)
    x = g(torch.randn(n, dim, generator=seeded(0), dtype=F64))
    sigma, weight = (t.to(F64) for t in levels.draw(n, seeded(1)))
    y = (x + sigma[:, None] * torch.randn(n, dim, generator=seeded(2), dtype=F64)).detach()
    gap = torch.empty_like(y)
    for s in (0.5, 2.0):
        at = (sigma - s).abs() < 1e-6
        model = -torch.linalg.solve(g.L @ g.L.T + s**2 * eye, (y[at] - g.m).T).T
        gap[at] = (model + torch.linalg.solve(covariance + s**2 * eye, (y[at] - mean).T).T).detach()
    loss = (weight[:, None] * gap * x).sum(-1).mean()
    found = torch.autograd.grad(loss, [g.m, g.L])
    for one, other in zip(found, exact, strict=True):
        assert torch.allclose(one, other, atol=0.01)


def test_the_divergence_falls_with_the_noise_and_is_zero_only_for_equal_densities():
    # oracle 8, on Gaussians
    mean, covariance = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    m, L = torch.tensor([1.0, 0.5], dtype=F64), torch.diag(torch.tensor([0.5, 2.0], dtype=F64))
    values = [float(gaussian_kl(m, L, mean, covariance, s)) for s in (0.1, 0.5, 1.0, 3.0, 10.0)]
    assert all(a > b > 0 for a, b in itertools.pairwise(values))
    assert float(gaussian_kl(mean, covariance, mean, covariance, 0.5)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("weight", ["uniform", "1/a", "s2/a", "s2/a2"])
def test_weights_are_those_of_the_paper_for_the_variance_preserving_form(weight):
    sigma, found = Levels(0.1, 10.0, weight, 0.0).draw(1000, seeded(0))
    a = 1 / (1 + sigma**2).sqrt()
    s = sigma * a
    truth = {"uniform": torch.ones(1000), "1/a": 1 / a, "s2/a": s**2 / a, "s2/a2": s**2 / a**2}[weight]
    assert torch.allclose(found, truth, rtol=1e-5)


def test_a_ramped_weight_goes_from_denoised_means_to_scores():
    levels = Levels(0.1, 10.0, "ramped", 0.0)
    # until 60 % of a run the gradient is a difference of denoised means, at its end of scores, half-way in between of both
    for done, power in ((0.0, 2.0), (0.6, 2.0), (0.8, 1.0), (1.0, 0.0)):
        sigma, weight = levels.draw(500, seeded(0), done)
        assert torch.allclose(weight, sigma**power, rtol=1e-5)


def test_levels_are_log_uniform_and_fall_to_the_lowest():
    levels = Levels(0.01, 3.0, annealed=0.5)
    early, late = levels.draw(4000, seeded(0), 0.0).sigma, levels.draw(4000, seeded(0), 0.7).sigma
    assert early.min() == pytest.approx(0.9, rel=0.01)
    assert late.min() == pytest.approx(0.01, rel=0.02)
    # uniform on the log scale: mean and variance of log sigma
    logs = (late.log() - math.log(0.01)) / math.log(300)
    assert float(logs.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5)


@pytest.mark.slow
def test_an_affine_generator_learns_a_gaussian():
    # oracle 7: the mean and the covariance within 2 % of the scale, from exact scores of the target
    target = GaussianMixture(torch.tensor([[3.0, -2.0]]), torch.tensor([[[2.0, 0.8], [0.8, 1.0]]]))
    sampler = DiKLSampler(
        target,
        Affine(2),
        posterior=ExactScore(),
        estimator="denoising",
        schedule=NoiseSchedule.from_scale(0.3, 1.5, 4),
        hidden=64,
        depth=2,
        rates=Rates(1e-2, 5e-3, 256, 256, 4),
        standardize=False,
    ).fit(max_steps=1500)
    net = sampler.net_.net
    covariance = (net.L @ net.L.T).detach()
    assert torch.allclose(net.m, torch.tensor([3.0, -2.0]), atol=0.06)
    assert torch.allclose(covariance, torch.tensor([[2.0, 0.8], [0.8, 1.0]]), atol=0.08)


def weights_of(sampler):
    return float((sampler.sample(4000)[:, 0] > 0).double().mean())


@pytest.mark.slow
def test_reverse_kl_keeps_one_mode_where_dikl_has_both():
    # oracle 14: from a generator that begins off centre; the same object, and only the levels differ
    class OffCentre(nn.Module):
        latent_dim = 2

        def __init__(self):
            super().__init__()
            from noisewise.networks import MLP

            self.net = MLP(2, 1, 64, 2, seed=3)

        def forward(self, z):
            return 3.0 + z[:, :1] + self.net(z)

    common = {"posterior": PosteriorSampler("importance", particles=64), "hidden": 64, "depth": 2, "standardize": False}
    rates = Rates(2e-3, 3e-3, 256, 256, 4)
    one = DiKLSampler(two_modes(), OffCentre(), schedule=NoiseSchedule.from_scale(0.3, 0.31, 2), rates=rates, **common)
    all_levels = DiKLSampler(
        two_modes(), OffCentre(), schedule=NoiseSchedule.from_scale(0.3, 8.0, 12), rates=rates, **common
    )
    with _quiet():
        one.fit(max_steps=800)
        all_levels.fit(max_steps=800)
    assert weights_of(one) > 0.98
    assert weights_of(all_levels) == pytest.approx(0.5, abs=0.1)


class _quiet:
    """Fits this short are warned of; that is not what these tests are about."""

    def __enter__(self):
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore", NoisewiseWarning)

    def __exit__(self, *error):
        self.caught.__exit__(*error)


def tiny(seed=0, **options):
    options = {"rates": FAST, "hidden": 32, "depth": 2, "categories": 8, "seed": seed} | options
    return DiKLSampler(two_modes(), **options)


@pytest.mark.parametrize("options", [{}, {"posterior": PosteriorSampler("digs", particles=2, langevin_steps=2)}])
def test_same_seed_same_sampler_and_another_seed_another(options):
    with _quiet():
        first, again, other = (tiny(s, **options).fit(max_steps=15, max_gradients=60_000) for s in (0, 0, 1))
    assert torch.equal(first.sample(50, seed=5), again.sample(50, seed=5))
    assert not torch.equal(first.sample(50, seed=5), other.sample(50, seed=5))


@pytest.mark.parametrize("options", [{}, {"posterior": PosteriorSampler("digs", particles=2, langevin_steps=2)}])
def test_a_killed_fit_goes_on_to_the_same_sampler(tmp_path, options, monkeypatch):
    from noisewise.neural import dikl, training

    monkeypatch.setattr(dikl, "_CHECKPOINT_SECONDS", 0.0)
    with _quiet():
        whole = tiny(**options).fit(max_steps=12, max_gradients=60_000)
        for last, method in ((9, "learn_target"), (5, "advance")):
            if options and method == "learn_target":
                continue
            real, calls = getattr(training.Training, method), [0]

            def dying(self, done, real=real, calls=calls, last=last):
                calls[0] += 1
                if calls[0] == last:
                    raise KeyboardInterrupt
                real(self, done)

            monkeypatch.setattr(training.Training, method, dying)
            with pytest.raises(KeyboardInterrupt):
                tiny(**options).fit(max_steps=12, max_gradients=60_000, resume=tmp_path / "run")
            monkeypatch.setattr(training.Training, method, real)
        resumed = tiny(**options).fit(max_steps=12, max_gradients=60_000, resume=tmp_path / "run")
    assert torch.equal(whole.sample(50), resumed.sample(50))
    assert whole.cost.gradients == resumed.cost.gradients
    with pytest.raises(RunFolderError, match="seed"):
        tiny(seed=3, **options).fit(max_steps=12, max_gradients=60_000, resume=tmp_path / "run")


def test_the_bill_counts_every_call():
    calls = [0]

    def log_prob(x):
        calls[0] += len(x)
        return -x.square().sum(-1) / 2

    with _quiet():
        sampler = DiKLSampler(
            log_prob, dim=2, rates=FAST, hidden=16, depth=1, posterior=PosteriorSampler("importance", particles=3)
        ).fit(max_steps=10)
    # the checks of starts, of a first call and the timing of it are not billed
    unbilled = calls[0] - sampler.cost.gradients - sampler.cost.energies
    assert 0 <= unbilled <= 4 * 256 + 20_000
    before, calls[0] = sampler.cost, 0
    sampler.sample(100, refine_steps=9)
    billed = sampler.cost.gradients - before.gradients + sampler.cost.energies - before.energies
    assert billed == pytest.approx(calls[0], abs=2)


def test_a_generator_that_is_not_there_yet_is_named():
    # modes of width 1 at +-40: three steps of a network leave the draws between them
    target = GaussianMixture(torch.tensor([[-40.0], [40.0]]), 1.0)
    with _quiet():
        short = DiKLSampler(target, rates=FAST, hidden=16, depth=1).fit(max_steps=3, max_gradients=60_000)
    said = [text for text in short.warnings_ if "less likely than 99%" in text]
    assert len(said) == 1
    x = short.sample(2048)
    exact = target.log_prob(target.sample(20_000, seeded(0))).quantile(0.01)
    share = float((target.log_prob(x) < exact).double().mean())
    assert float(said[0].split("%")[0]) == pytest.approx(100 * share, abs=10)
    # each look at a draw is a call without gradient
    assert short.cost.energies == 2048


def exponential(x):
    """Density exp(-sum x) where all x > 0."""
    return torch.where((x > 0).all(-1), -x.sum(-1), torch.tensor(-torch.inf))


def test_draws_outside_the_support_are_named_and_never_refined_from():
    with _quiet():
        sampler = DiKLSampler(
            exponential, dim=2, rates=FAST, hidden=16, depth=1, init=torch.rand(16, 2, generator=seeded(0)) + 0.5
        ).fit(max_steps=5, max_gradients=60_000)
    outside = float((sampler.sample(2048) <= 0).any(-1).double().mean())
    said = [text for text in sampler.warnings_ if "have density 0" in text]
    assert float(said[0].split("%")[0]) == pytest.approx(100 * outside, abs=8)
    assert "logit" in said[0]
    with pytest.warns(NoisewiseWarning, match="of 200 draws had density 0"):
        refined = sampler.sample(200, refine_steps=6)
    assert (refined > 0).all()


@pytest.mark.parametrize(
    ("log_prob", "init", "said"),
    [
        # a walk with nothing to hold it; a hill without a top; modes that float32 cannot resolve, unmet and met
        (lambda x: 0 * x.sum(-1), None, "finite integral"),
        (lambda x: x.square().sum(-1) / 2, None, "are lost"),
        (lambda x: -((x - 1e4) / 1e-3).square().sum(-1) / 2, None, "still rose"),
        (lambda x: -((x - 1e4) / 1e-3).square().sum(-1) / 2, 1e4 + torch.zeros(16, 2), "shift the target to around 0"),
    ],
)
def test_chains_that_find_no_modes_end_the_fit_with_their_reason(log_prob, init, said, shapes_unchecked):
    with _quiet(), pytest.raises(InvalidInput, match=said):
        DiKLSampler(log_prob, dim=2, rates=FAST, hidden=16, depth=1, init=init).fit(max_steps=2, max_gradients=60_000)


def test_a_constant_too_large_for_float32_is_named(shapes_unchecked):
    target = two_modes()
    with _quiet():
        sampler = DiKLSampler(lambda x: target.log_prob(x) + 1e8, dim=1, rates=FAST, hidden=16, depth=1).fit(
            max_steps=2, max_gradients=60_000
        )
    assert any("1e+08" in text and "subtract a constant" in text for text in sampler.warnings_)


def test_weighted_draws_of_next_to_no_worth_are_named():
    # modes of width 0.01: hardly any Gaussian around a draw of an untrained network touches one
    target = GaussianMixture(torch.tensor([[-4.0] * 6, [4.0] * 6]), 1e-4)
    with _quiet():
        sampler = DiKLSampler(target, rates=FAST, hidden=16, depth=1).fit(max_steps=2, max_gradients=60_000)
    with pytest.warns(NoisewiseWarning, match="weighted draws are worth"):
        found = sampler.weighted(2000)
    assert found.ess < 50


def test_what_the_chains_found_is_kept_with_the_sampler(tmp_path):
    target = two_modes()
    with _quiet():
        sampler = tiny().fit(max_steps=5, max_gradients=60_000)
    draws = sampler.chain_draws_
    assert 1000 < len(draws) <= 5000
    # both modes hold half
    assert float((draws > 0).double().mean()) == pytest.approx(0.5, abs=0.1)
    sampler.save_pretrained(tmp_path)
    assert torch.equal(DiKLSampler.from_pretrained(tmp_path, target).chain_draws_, draws)


def test_a_score_network_that_diverged_is_named():
    with _quiet():
        wild = DiKLSampler(two_modes(), rates=Rates(3e-3, 30.0, 64, 64, 5), hidden=16, depth=1).fit(
            max_steps=5, max_gradients=60_000
        )
    assert any("network ended at" in text for text in wild.warnings_)


@pytest.mark.parametrize("own", [False, True])
def test_saved_and_loaded_it_draws_the_same(tmp_path, own):
    target = two_modes()
    options = {"generator": Affine(1)} if own else {}
    with _quiet():
        sampler = tiny(**options).fit(max_steps=5, max_gradients=60_000)
    sampler.save_pretrained(tmp_path)
    loaded = DiKLSampler.from_pretrained(tmp_path, target, generator=Affine(1) if own else None)
    assert torch.equal(loaded.sample(64, seed=3), sampler.sample(64, seed=3))
    assert loaded.cost == sampler.cost
    with pytest.raises(RunFolderError, match="dim"):
        DiKLSampler.from_pretrained(tmp_path, many_well(2), generator=Affine(2) if own else None)
    if own:
        with pytest.raises(RunFolderError, match="Affine"):
            DiKLSampler.from_pretrained(tmp_path, target)


@pytest.mark.slow
def test_moving_and_shrinking_the_target_moves_and_shrinks_the_draws():
    # the preset sees a standardised target: the same modes, wherever they lie and however small they are
    shift = torch.tensor([100.0, -60.0])
    means = torch.tensor([[-6.0, 0.0], [6.0, 0.0], [0.0, 9.0]])
    found = []
    for factor, offset in ((1.0, 0 * shift), (0.1, shift)):
        target = GaussianMixture(factor * means + offset, factor**2)
        starts = factor * 5 * torch.randn(128, 2, generator=seeded(0)) + offset
        with _quiet():
            sampler = DiKLSampler(target, rates=Rates(3e-3, 2e-3, 256, 256, 4), init=starts).fit(
                max_steps=300, max_gradients=100_000
            )
        x = sampler.sample(4000)
        share = torch.bincount(target.component(x), minlength=3) / 4000
        assert float((share - 1 / 3).abs().max()) < 0.08
        within = (x - target.means[target.component(x)]).square().sum(-1).sqrt() / factor
        found.append(float((within < 3).double().mean()))
    assert min(found) > 0.8
    assert found[0] == pytest.approx(found[1], abs=0.1)


@pytest.mark.slow
def test_a_cluster_of_particles_is_drawn_without_its_centre_of_mass():
    target = double_well_4()
    with _quiet():
        sampler = DiKLSampler(target, "egnn", hidden=16, depth=2, rates=FAST).fit(max_steps=5, max_gradients=60_000)
    x = sampler.sample(100)
    assert float(x.unflatten(-1, (4, 2)).mean(1).abs().max()) < 1e-5
    refined = sampler.sample(100, refine_steps=30)
    assert float(refined.unflatten(-1, (4, 2)).mean(1).abs().max()) < 1e-5
    # the moves are those of the density: energies fall to where it lies
    assert float(-target.log_prob(refined).mean()) < float(-target.log_prob(x).mean())


@pytest.mark.slow
def test_thirteen_lennard_jones_atoms_at_a_small_scale():
    # far too short to be right, and it must say so; what is kept at any scale: finite draws without centre of mass, and moves
    # that go down in energy
    target = lennard_jones(13)
    with _quiet():
        sampler = DiKLSampler(target, "egnn", hidden=16, depth=2, rates=FAST).fit(max_steps=10, max_gradients=60_000)
    assert any("chains" in text for text in sampler.warnings_)
    x, refined = sampler.sample(100), sampler.sample(100, refine_steps=60)
    for draws in (x, refined):
        assert torch.isfinite(target.log_prob(draws)).all()
        assert float(draws.unflatten(-1, (13, 3)).mean(1).abs().max()) < 1e-5
    assert float(target.log_prob(refined).median()) > float(target.log_prob(x).median())
    # far below 13 atoms at random, whose energies overlap
    assert float(-target.log_prob(sampler.chain_draws_).median()) < 50


def nan_outside(x):
    return torch.where(x.norm(dim=-1) < 3, -x.square().sum(-1) / 2, math.nan)


def test_a_density_that_is_no_number_outside_a_ball_is_survived(shapes_unchecked):
    starts = 0.5 * torch.randn(64, 2, generator=seeded(0))
    with _quiet():
        sampler = DiKLSampler(nan_outside, dim=2, init=starts, rates=FAST, hidden=16, depth=1).fit(
            max_steps=10, max_gradients=40_000
        )
    assert bool(torch.isfinite(sampler.sample(100)).all())


@pytest.mark.parametrize(
    ("log_prob", "said"),
    [
        (lambda x: -x.square().sum(), "over the batch"),
        (lambda x: -x.square(), "sum over the last axis"),
        (lambda x: -x.detach().square().sum(-1), "without a gradient"),
        (lambda x: -torch.inf * x.square().sum(-1), "inside the support"),
        (lambda x: torch.as_tensor(np.asarray(x.detach()) ** 2).sum(-1), "without a gradient"),
    ],
)
def test_a_target_that_cannot_work_is_named_before_any_work(log_prob, said, shapes_unchecked):
    with pytest.raises(InvalidInput, match=said):
        DiKLSampler(log_prob, dim=2).fit(max_steps=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "gpu"}, "'gpu'"),
        ({"generator": "resnet"}, "'resnet'"),
        ({"generator": "egnn"}, "has none"),
        ({"latent": "uniform"}, "'uniform'"),
        ({"estimator": "msi"}, "'msi'"),
        ({"posterior": "ais"}, "'ais'"),
        ({"categories": 1}, "categories"),
        ({"weight": "a"}, "weight must be one of"),
        ({"hidden": 0}, "hidden"),
        ({"standardize": "no"}, "standardize must be a bool, got 'no'"),
        ({"rates": 3}, "rates must be a Rates, got 3"),
        ({"schedule": [0.1]}, "schedule must be a NoiseSchedule"),
        ({"init": torch.zeros(3)}, r"init must have shape \[chain, 1\], got \(3,\)"),
        ({"generator": nn.Linear(5, 1)}, r"z of shape \[2, 1\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, said, shapes_unchecked):
    with pytest.raises(InvalidInput, match=said):
        DiKLSampler(two_modes(), **options).make_generator(False)


def test_what_fit_and_sample_need_is_said(shapes_unchecked):
    with pytest.raises(InvalidInput, match="declare what a fit may use"):
        tiny().fit()
    with pytest.raises(InvalidInput, match="max_seconds"):
        tiny().fit(max_seconds=-1)
    with pytest.raises(InvalidInput, match="not fitted yet"):
        tiny().sample(10)
    with pytest.raises(InvalidInput, match=r"must map \[n, 1\] to \[n, 1\]"):
        tiny(generator=nn.Linear(1, 3)).fit(max_steps=1)
    with pytest.raises(InvalidInput, match="go from clean to noisy"):
        NoiseSchedule(list(NoiseSchedule.from_scale(0.1, 1.0, 3))[::-1])


def test_a_score_that_stays_infinite_ends_the_fit_with_its_reason():
    class Broken:
        method = "broken"

        def draw(self, target, noisy, sigma, steps, generator, start=None, project=None):
            raise NoisewiseError("the force field is gone")

    with pytest.raises(NoisewiseError, match="force field is gone"):
        tiny(posterior=Broken()).fit(max_steps=2, max_gradients=60_000)


def test_weights_mend_a_generator_that_is_wrong():
    # modes of weights .2 and .8 and a density of known integral; the generator has hardly learned
    target = GaussianMixture(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 1.0, torch.tensor([0.2, 0.8]))

    def log_prob(x):
        return target.log_prob(x) + 1.5

    with _quiet():
        sampler = DiKLSampler(log_prob, dim=2, rates=FAST, hidden=32, depth=2, seed=1).fit(
            max_steps=60, max_gradients=60_000
        )
    found = sampler.weighted(20_000)
    assert found.ess > 200
    assert abs(found.log_normalizer - 1.5) < 4 * found.log_normalizer_se
    right = (found.positions[:, 0] > 0).double()
    weight = found.log_weights.softmax(0)
    share = float(weight @ right)
    # self-normalised: se^2 = sum w^2 (f - mean)^2
    se = float((weight.square() * (right - share).square()).sum().sqrt())
    assert abs(share - float(target.weights[1])) < 4 * se + 0.002
    assert found.cost.energies == 20_000


def test_the_proposal_of_weighted_draws_integrates_to_one():
    from noisewise.neural.correction import _Mixture

    centre = torch.randn(200, 1, generator=seeded(0), dtype=F64)
    mixture = _Mixture.around(centre, torch.randn(500, 1, generator=seeded(1), dtype=F64))
    grid = torch.linspace(-120, 120, 240_001, dtype=F64).unsqueeze(-1)
    assert float(mixture.log_prob(grid).exp().sum() * 1e-3) == pytest.approx(1, abs=1e-6)
    x = mixture.sample(100_000, seeded(2))[:, 0]
    cumulative = mixture.log_prob(grid).exp().cumsum(0) * 1e-3
    at = torch.searchsorted(grid[:, 0], x).clamp(max=240_000)
    # uniform under its own distribution function
    assert float(cumulative[at].mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 100_000) ** 0.5)
