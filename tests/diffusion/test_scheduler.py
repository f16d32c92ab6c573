"""Steps of the scheduler against the published update rules, diffusers' own schedulers, and what must be refused."""

import itertools
import math
import warnings

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from tiny_networks import GaussianNoise, schedule

from noisewise.denoising.covariance import DiagonalCovariance
from noisewise.diffusion import CovarianceScheduler, generate
from noisewise.diffusion.steps import step_schedule
from noisewise.errors import InvalidInput, NoisewiseWarning

# states and networks at random are no images: their x0 is rightly cut, with a warning
pytestmark = pytest.mark.filterwarnings("ignore:x0 was cut:noisewise.errors.NoisewiseWarning")

T = 50
PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-10)]


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def state(dtype=torch.float64, shape=(4, 3, 2, 2), seed=0):
    return torch.randn(2, *shape, dtype=torch.float64, generator=seeded(seed)).to(dtype).unbind()


def ratio(scheduler, t, like, largest=1.3):
    """Random relative variances; those of x0 lie in 0 .. `largest`."""
    a, s = scheduler.levels.pair(int(t))
    clean = largest * torch.rand(like.shape, dtype=torch.float64, generator=seeded(3))
    return ((a / s) ** 2 * clean).to(like)


def published(scheduler, x, eps, t, s, eta, clip, r, noise):
    """Sections 4 of DDPM and DDIM with the variance of x0: from the table of alphas_cumprod alone, in float64."""
    x, eps, r, noise = (value.double() for value in (x, eps, r, noise))
    abar = scheduler.alphas_cumprod.double()
    a_t, a_s = abar[t], abar[s]
    b_t, b_s, jump = 1 - a_t, 1 - a_s, 1 - a_t / a_s
    clean = (x - b_t.sqrt() * eps) / a_t.sqrt()
    variance = b_t / a_t * r
    if clip:
        clean, variance = clean.clamp(-1, 1), variance.clamp(0, 1)
    posterior = jump * b_s / b_t
    if eta is None:
        mean = a_s.sqrt() * jump / b_t * clean + (1 - jump).sqrt() * b_s / b_t * x
        total = posterior + a_s * jump**2 / b_t**2 * variance
    else:
        lam = eta**2 * posterior
        mean = a_s.sqrt() * clean + (b_s - lam).sqrt() * eps
        total = lam + (a_s.sqrt() - ((b_s - lam) * a_t / b_t).sqrt()) ** 2 * variance
    return mean + total.sqrt() * noise, clean, total


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [None, 0, 0.5, 1])
def test_a_step_is_the_published_update(eta, clip, dtype, tolerance):
    scheduler = schedule(T, eta=eta, clip_sample=clip)
    scheduler.set_timesteps(5)
    x, eps = state(dtype)
    visited = scheduler.timesteps.tolist()
    for t, s in itertools.pairwise(visited):
        noise, r = randn_tensor(x.shape, generator=seeded(), dtype=dtype), ratio(scheduler, t, x)
        found = scheduler.step(eps, t, x, covariance=r, generator=seeded())
        wanted = published(scheduler, x, eps, t, s, eta, clip, r, noise)
        for value, truth in zip((found.prev_sample, found.pred_original_sample, found.variance), wanted, strict=True):
            # relative to the largest term: without clipping x0 is a difference of numbers of about 12
            torch.testing.assert_close(
                value.double(), truth, rtol=tolerance, atol=tolerance * max(1, truth.abs().max())
            )
    last = scheduler.step(eps, visited[-1], x, generator=seeded())
    torch.testing.assert_close(last.prev_sample, last.pred_original_sample, rtol=tolerance, atol=tolerance)
    assert last.variance is None


def test_the_noise_of_the_clipped_mean_is_recomputed_only_when_asked():
    scheduler = schedule(T, eta=0)
    scheduler.set_timesteps(5)
    x, eps = state()
    t, s = scheduler.timesteps.tolist()[:2]
    abar = scheduler.alphas_cumprod.double()
    clean = ((x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
    again = (x - abar[t].sqrt() * clean) / (1 - abar[t]).sqrt()
    for clipped, noise in ((False, eps), (True, again)):
        found = scheduler.step(eps, t, x, use_clipped_model_output=clipped).prev_sample
        torch.testing.assert_close(found, abar[s].sqrt() * clean + (1 - abar[s]).sqrt() * noise, rtol=0, atol=1e-10)


def test_eta_one_is_ddpm_in_mean_and_variance_without_clipping():
    scheduler = schedule(T, clip_sample=False)
    scheduler.set_timesteps(5)
    x, eps = state()
    r = torch.rand(x.shape, dtype=torch.float64, generator=seeded(3))
    for t in scheduler.timesteps:
        one, ddpm = (scheduler.step(eps, t, x, eta=eta, covariance=r, generator=seeded()) for eta in (1, None))
        torch.testing.assert_close(one.prev_sample, ddpm.prev_sample, rtol=1e-6, atol=1e-6)
        if ddpm.variance is not None:
            torch.testing.assert_close(one.variance, ddpm.variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", T), ("leading", 10), ("trailing", 10)])
@pytest.mark.parametrize("clip", [True, False])
def test_without_covariance_eta_zero_is_diffusers_ddim(spacing, steps, clip, dtype, tolerance):
    options = {"num_train_timesteps": T, "beta_end": 0.2, "clip_sample": clip, "timestep_spacing": spacing}
    theirs, ours = DDIMScheduler(set_alpha_to_one=True, **options), CovarianceScheduler(eta=0, **options)
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x, eps = state(dtype)
    tolerance = max(tolerance, 2e-6)  # theirs takes roots of its table in float32
    for t in theirs.timesteps:
        wanted = theirs.step(eps, t, x, eta=0.0).prev_sample
        found = ours.step(eps, t, x, covariance=torch.zeros_like(x)).prev_sample
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * max(1, wanted.abs().max()))
        torch.testing.assert_close(ours.step(eps, t, x).prev_sample, found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_all_steps_without_covariance_are_diffusers_ddpm(prediction, kind):
    options = {
        "num_train_timesteps": T, "beta_end": 0.2, "variance_type": kind, "prediction_type": prediction, "clip_sample": True,
    }  # fmt: skip
    theirs, ours = DDPMScheduler(**options), CovarianceScheduler(**options)
    theirs.set_timesteps(T)
    ours.set_timesteps(T)
    x, output = state(torch.float32)
    first, second = seeded(), seeded()
    mine = x
    for t in theirs.timesteps:
        x = theirs.step(output, t, x, generator=first).prev_sample
        given = torch.zeros_like(mine) if kind == "fixed_small" else None
        mine = ours.step(output, t, mine, covariance=given, generator=second).prev_sample
        torch.testing.assert_close(mine, x, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("eta", [None, 0, 0.5, 1])
def test_the_form_of_the_prediction_does_not_matter(eta):
    x, eps = state()
    found = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = schedule(T, prediction_type=kind, eta=eta)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps.tolist():
            abar = scheduler.alphas_cumprod[t].double()
            clean = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
            output = {"epsilon": eps, "sample": clean, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * clean}
            r = ratio(scheduler, t, x)
            step = scheduler.step(output[kind], t, x, covariance=r, generator=seeded())
            torch.testing.assert_close(step.prev_sample, found.setdefault(t, step.prev_sample), rtol=1e-10, atol=1e-10)


def test_the_share_of_noise_that_is_cut_is_in_grey_levels():
    scheduler = schedule(T, noise_clip=2)
    scheduler.set_timesteps(timesteps=[40, 20, 10])
    x, eps = state()
    r = torch.full_like(x, 0.05)
    free = scheduler.step(eps, 40, x, covariance=r, generator=seeded()).variance
    assert float(free.min()) > 0.05  # only the step into the last level before the data is cut
    cut = scheduler.step(eps, 20, x, covariance=r, generator=seeded()).variance
    # the mean absolute value of N(0, v) is sqrt(2 v / pi)
    grey = torch.full_like(cut, 2 * 2 / 255)
    torch.testing.assert_close((2 * cut / math.pi).sqrt(), grey, rtol=1e-12, atol=0)
    torch.testing.assert_close((2 * scheduler.step(eps, 20, x).variance / math.pi).sqrt(), grey, rtol=1e-12, atol=0)
    with pytest.raises(InvalidInput, match="noise_clip"):
        scheduler.step(eps, 40, x, covariance=DiagonalCovariance(r.flatten(1)), generator=seeded())


@pytest.mark.parametrize("eta", [None, 0, 1])
def test_from_pure_noise_the_variance_is_that_of_the_data_and_nothing_is_nan(eta):
    for options, wanted in (({}, 1.0), ({"clip_sample": False, "max_variance": 4}, 4.0), ({"clip_sample": False}, 1.0)):
        scheduler = schedule(T, rescale_betas_zero_snr=True, prediction_type="v_prediction", eta=eta, **options)
        assert float(scheduler.alphas_cumprod[-1]) == 0
        scheduler.set_timesteps(4)
        x, v = state(torch.float32)
        for t in scheduler.timesteps:
            step = scheduler.step(v, t, x, covariance=torch.full_like(x, 0.3), generator=seeded())
            assert bool(torch.isfinite(step.prev_sample).all())
            operator = DiagonalCovariance(torch.full_like(x, 0.3).flatten(1))
            assert bool(
                torch.isfinite(scheduler.step(v, t, x, covariance=operator, generator=seeded()).prev_sample).all()
            )
            if t == T - 1:
                torch.testing.assert_close(step.pred_original_sample, (-v).clamp(-1, 1) if not options else -v)
                a_s, s_s = scheduler.levels.pair(scheduler.previous_timestep(int(t)))
                noise = {None: s_s**2, 0: 0.0, 1: s_s**2}[eta]
                torch.testing.assert_close(step.variance, torch.full_like(x, noise + a_s**2 * wanted))
    with pytest.raises(InvalidInput, match="zero terminal SNR"):
        schedule(T, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [None, 0, 1])
def test_half_precision_comes_back_as_it_went_in_rounded_once(dtype, eta):
    scheduler = schedule(1000, beta_end=0.02, eta=eta)
    scheduler.set_timesteps(5)
    x, eps = state(dtype)
    for t in scheduler.timesteps:
        r = ratio(scheduler, t, x)
        found = scheduler.step(eps, t, x, covariance=r, generator=seeded()).prev_sample
        assert found.dtype == dtype
        assert bool(torch.isfinite(found).all())
        if scheduler.previous_timestep(int(t)) is None or eta == 0:
            # without noise, which is drawn in half precision: everything inside is float32
            found = scheduler.step(eps, t, x).prev_sample
            wide = scheduler.step(eps.float(), t, x.float()).prev_sample
            torch.testing.assert_close(found, wide.to(dtype), rtol=0, atol=0)


def test_relative_variances_have_a_floor_and_those_of_x0_a_bound():
    x, eps = state()
    for options, r, wanted in (
        ({"floor": 0.01, "clip_sample": False}, -3.0, lambda a, s: 0.01 * (s / a) ** 2),
        ({"floor": 0.01, "clip_sample": False}, 0.02, lambda a, s: 0.02 * (s / a) ** 2),
        ({"floor": 0.01, "max_variance": 0.25}, 50.0, lambda a, s: 0.25),
        ({"clip_sample_range": 2.0}, 50.0, lambda a, s: 4.0),
        ({"clip_sample": False}, 50.0, lambda a, s: 50 * (s / a) ** 2),
    ):
        scheduler = schedule(T, eta=0, **options)
        scheduler.set_timesteps(5)
        t, following = scheduler.timesteps.tolist()[:2]
        here, there = scheduler.levels.pair(t), scheduler.levels.pair(following)
        found = scheduler.step(eps, t, x, covariance=torch.full_like(x, r), generator=seeded()).variance
        gain = there[0] - there[1] * here[0] / here[1]
        torch.testing.assert_close(found, torch.full_like(x, gain**2 * wanted(*here)), rtol=1e-10, atol=0)


def test_an_operator_moves_like_its_matrix():
    scheduler = schedule(T, eta=0, clip_sample=False)
    scheduler.set_timesteps(5)
    n = 4000
    x, eps = (value.expand(n, -1) for value in state(shape=(1, 2)))
    r = torch.tensor([0.2, 0.7], dtype=torch.float64).expand(n, 2)
    t = scheduler.timesteps[1]
    by_matrix = scheduler.step(eps, t, x, covariance=DiagonalCovariance(r), generator=seeded()).prev_sample
    by_numbers = scheduler.step(eps, t, x, covariance=r, generator=seeded())
    for draws in (by_matrix, by_numbers.prev_sample):
        ratio = draws.var(0) / by_numbers.variance[0]
        assert bool(((ratio - 1).abs() < 4 * math.sqrt(2 / n)).all())
    gap = by_matrix.mean(0) - by_numbers.prev_sample.mean(0)
    assert bool((gap.abs() < 4 * (2 * by_numbers.variance[0] / n).sqrt()).all())
    with pytest.raises(InvalidInput, match="not a list"):
        scheduler.step(eps[:1], t, x[:1], covariance=DiagonalCovariance(r[:1]), generator=[seeded()])


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 7), (2, 3, 4, 4, 4)])
def test_events_of_any_rank_are_rows_of_pixels(shape):
    scheduler = schedule(T)
    scheduler.set_timesteps(5)
    x, eps = state(shape=shape)
    r = torch.rand(shape, dtype=torch.float64, generator=seeded(3))
    t = scheduler.timesteps[0]
    found = scheduler.step(eps, t, x, covariance=r, generator=seeded())
    flat = scheduler.step(eps.flatten(1), t, x.flatten(1), covariance=r.flatten(1), generator=seeded())
    torch.testing.assert_close(found.prev_sample.flatten(1), flat.prev_sample)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "linear", "power", "linear_ddim", "quad_ddim"])
def test_time_steps_are_those_of_the_schedule_counted_from_zero(spacing):
    scheduler = schedule(1000, beta_end=0.02, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    rising = [t + 1 for t in reversed(scheduler.timesteps.tolist())]
    assert rising == step_schedule(1000, 10, spacing)
    # every one is followed by the next, the last by the data
    follow = [scheduler.previous_timestep(t) for t in scheduler.timesteps.tolist()]
    assert follow == [*scheduler.timesteps.tolist()[1:], None]


def test_a_tuple_holds_the_state_and_x0():
    scheduler = schedule(T)
    scheduler.set_timesteps(5)
    x, eps = state()
    found = scheduler.step(eps, 49, x, generator=seeded())
    state_and_clean = scheduler.step(eps, 49, x, generator=seeded(), return_dict=False)
    assert torch.equal(state_and_clean[0], found.prev_sample)
    assert torch.equal(state_and_clean[1], found.pred_original_sample)


def test_dynamic_thresholding_is_diffusers_own():
    options = {"num_train_timesteps": T, "beta_end": 0.2, "thresholding": True, "dynamic_thresholding_ratio": 0.8}
    theirs, ours = DDPMScheduler(**options), CovarianceScheduler(**options)
    theirs.set_timesteps(T)
    ours.set_timesteps(T)
    x, eps = state(torch.float32)
    for t in (49, 20, 0):
        wanted = theirs.step(eps, t, x, generator=seeded())
        found = ours.step(eps, t, x, generator=seeded())
        torch.testing.assert_close(found.pred_original_sample, wanted.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.prev_sample, wanted.prev_sample, rtol=1e-5, atol=1e-5)


def test_generators_by_row_draw_what_each_row_draws_alone():
    scheduler = schedule(T)
    scheduler.set_timesteps(5)
    x, eps = state()
    together = scheduler.step(eps, 49, x, generator=[seeded(i) for i in range(4)]).prev_sample
    alone = [scheduler.step(eps[i : i + 1], 49, x[i : i + 1], generator=seeded(i)).prev_sample for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


# --- what is refused


@pytest.fixture
def five():
    scheduler = schedule(T)
    scheduler.set_timesteps(5)
    return scheduler


def test_twice_the_channels_need_a_configuration_that_explains_them(five):
    x, eps = state()
    both = torch.cat([eps, 9 * eps], 1)
    with pytest.raises(InvalidInput, match="learned_range"):
        five.step(both, 49, x)
    learned = schedule(T, variance_type="learned_range")
    learned.set_timesteps(5)
    found, wanted = learned.step(both, 49, x, generator=seeded()), five.step(eps, 49, x, generator=seeded())
    torch.testing.assert_close(found.prev_sample, wanted.prev_sample, rtol=0, atol=0)
    with pytest.raises(InvalidInput, match="shape of x_t"):
        learned.step(torch.cat([both, eps], 1), 49, x)


def test_covariances_that_do_not_fit_are_refused(five):
    x, eps = state()
    with pytest.raises(InvalidInput, match="shape of the sample"):
        five.step(eps, 49, x, covariance=torch.ones(4, 1, 2, 2))
    for bad in (math.nan, math.inf):
        with pytest.raises(InvalidInput, match="NaN or infinite"):
            five.step(eps, 49, x, covariance=torch.full_like(x, bad))
    needing = schedule(T, needs_covariance=True)
    needing.set_timesteps(5)
    with pytest.raises(InvalidInput, match="none is attached"):
        needing.step(eps, 49, x)
    # the last step needs none
    assert bool(torch.isfinite(needing.step(eps, 0, x).prev_sample).all())


def test_time_steps_that_were_not_set_are_refused(five):
    x, eps = state()
    with pytest.raises(InvalidInput, match="not among"):
        five.step(eps, 48, x)
    with pytest.raises(InvalidInput, match="must lie"):
        five.step(eps, T, x)
    with pytest.raises(InvalidInput, match="one time step for the whole batch"):
        five.step(eps, torch.tensor([49, 49, 37, 37]), x)
    with pytest.raises(InvalidInput, match="whole numbers"):
        five.step(eps, 48.5, x)
    for eta in (-1, 1.01, math.nan):
        with pytest.raises(InvalidInput, match="eta"):
            five.step(eps, 49, x, eta=eta)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_inference_steps": 1}, "num_steps"),
        ({"num_inference_steps": 0}, "num_steps"),
        ({"num_inference_steps": T + 1}, "at most num_train_timesteps"),
        ({"timesteps": [0, 10, 20]}, "that fall"),
        ({"timesteps": [20, 20, 0]}, "that fall"),
        ({"timesteps": [20]}, "at least two"),
        ({"timesteps": [T, 0]}, "that fall"),
        ({"timesteps": [10, -1]}, "that fall"),
        ({}, "either"),
        ({"num_inference_steps": 5, "timesteps": [10, 0]}, "either"),
    ],
)
def test_time_steps_that_make_no_chain_are_refused(five, options, match):
    with pytest.raises(InvalidInput, match=match):
        five.set_timesteps(**options)
    assert five.timesteps.tolist() == [49, 37, 24, 12, 0]  # as before


def test_an_offset_keeps_the_chain_falling():
    scheduler = schedule(T, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [46, 41, 36, 31, 26, 21, 16, 11, 6, 1]
    with pytest.raises(InvalidInput, match="steps_offset"):
        scheduler.set_timesteps(T)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"timestep_spacing": "karras"}, "timestep_spacing"),
        ({"variance_type": "optimal"}, "variance_type"),
        ({"prediction_type": "score"}, "prediction_type"),
        ({"beta_schedule": "sine"}, "beta_schedule"),
        ({"eta": 2}, "eta"),
        ({"eta": -0.5}, "eta"),
        ({"floor": -1}, "floor"),
        ({"noise_clip": math.nan}, "noise_clip"),
        ({"max_variance": 0}, "max_variance"),
    ],
)
def test_unknown_options_are_refused(options, match):
    with pytest.raises(InvalidInput, match=match):
        schedule(T, **options)


def test_configurations_of_other_families_are_refused():
    for other in (FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()):
        with pytest.raises(InvalidInput):
            CovarianceScheduler.from_config(other.config)
    with pytest.raises(InvalidInput, match="snr_shift_scale"):
        CovarianceScheduler.from_config(CogVideoXDDIMScheduler().config)
    with pytest.raises(InvalidInput, match="use_flow_sigmas"):
        CovarianceScheduler.from_config(DPMSolverMultistepScheduler(use_flow_sigmas=True).config)
    # a spacing of sampling; the levels of training are variance preserving
    CovarianceScheduler.from_config(DPMSolverMultistepScheduler(use_karras_sigmas=True).config)
    solver = CovarianceScheduler.from_config(DPMSolverMultistepScheduler(beta_end=0.03).config)
    assert (solver.config.beta_end, solver.config.variance_type) == (0.03, "fixed_small")
    read = CovarianceScheduler.from_config(DDIMScheduler(beta_end=0.03, clip_sample=False).config, eta=0.5)
    assert (read.config.beta_end, read.config.clip_sample, read.config.eta) == (0.03, False, 0.5)
    # DDIM's own default never visits the last level
    assert read.config.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    "kind",
    [
        DDPMScheduler,
        DDIMScheduler,
        PNDMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        UnCLIPScheduler,
    ],
)
def test_schedules_of_other_schedulers_are_read_to_the_last_bit_with_their_own_defaults(kind):
    changed = {"beta_start": 0.001, "beta_end": 0.03, "beta_schedule": "linear"}
    for options in ({},) if kind is UnCLIPScheduler else ({}, changed):
        other = kind(**options)
        read = CovarianceScheduler.from_config(other.config)
        assert torch.equal(read.alphas_cumprod, other.alphas_cumprod)
        assert read.config.prediction_type == other.config.prediction_type


def test_its_own_configuration_is_read_whole():
    scheduler = schedule(T, eta=0.5, timestep_spacing="power", noise_clip=1, variance_type="fixed_large")
    again = CovarianceScheduler.from_config(scheduler.config)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    changed = CovarianceScheduler.from_config(scheduler.config, eta=0, timestep_spacing="linear")
    assert (changed.config.eta, changed.config.timestep_spacing, changed.config.noise_clip) == (0, "linear", 1)


def test_variances_that_are_mostly_cut_are_reported(five):
    x, eps = state()
    for t in five.timesteps.tolist()[:-1]:
        five.step(eps, t, x, covariance=-torch.ones_like(x))
    with pytest.warns(NoisewiseWarning, match="100%"):
        five.step(eps, 0, x)
    five.step(eps, 0, x)  # once


@pytest.mark.parametrize("eta", [None, 0.0])
def test_samples_of_data_beyond_the_clip_are_reported_and_those_within_it_are_not(eta):
    for deviation, warned in ((3.0, True), (0.5, False)):
        scheduler = CovarianceScheduler(eta=eta)
        net = GaussianNoise(scheduler.levels, torch.zeros(2), deviation**2 * torch.eye(2)).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(net, scheduler, (2000, 2), 20)
            # diffusers' pipelines step by themselves
            x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
            scheduler.set_timesteps(20)
            for t in scheduler.timesteps.tolist():
                x = scheduler.step(net(x, torch.full((2000,), t)).detach(), t, x).prev_sample
        said = [str(one.message) for one in caught if one.category is NoisewiseWarning]
        assert len(said) == 2 * warned
        assert all("clip_sample_range 1, beyond which" in one and "clip_sample=False" in one for one in said)


# --- saving


def test_saving_keeps_every_registered_value(tmp_path):
    options = {
        "num_train_timesteps": 40, "beta_start": 0.002, "beta_end": 0.15, "beta_schedule": "scaled_linear",
        "variance_type": "fixed_large", "clip_sample": False, "prediction_type": "v_prediction", "thresholding": True,
        "dynamic_thresholding_ratio": 0.9, "clip_sample_range": 2.0, "sample_max_value": 1.5, "timestep_spacing": "power",
        "steps_offset": 1, "rescale_betas_zero_snr": True, "eta": 0.5, "max_variance": 3.0, "floor": 0.1, "noise_clip": 2.0,
        "needs_covariance": True,
    }  # fmt: skip
    scheduler = CovarianceScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    loaded = CovarianceScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in options} == options
    assert loaded.levels.digest == scheduler.levels.digest
    table = CovarianceScheduler(trained_betas=[0.01, 0.02, 0.05], num_train_timesteps=3)
    table.save_pretrained(tmp_path)
    assert torch.equal(CovarianceScheduler.from_pretrained(tmp_path).alphas_cumprod, table.alphas_cumprod)


def test_noise_is_added_as_the_levels_say():
    scheduler = schedule(T)
    x, eps = state()
    t = torch.tensor([0, 10, 30, 49])
    a, s = scheduler.levels.at(t, x)
    torch.testing.assert_close(scheduler.add_noise(x, eps, t), a * x + s * eps, rtol=1e-6, atol=1e-6)
