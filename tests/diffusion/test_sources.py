"""Covariances of x0 against closed forms: the DCT's matrix, Lanczos' process on Gaussian data, probes on small networks."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_networks import GaussianNoise, conditional_unet, head_for, posterior_covariance, schedule, unet
from torch import nn

from noisewise.denoising.lanczos import KrylovCovariance
from noisewise.diffusion import (
    CovarianceHead,
    DctCovariance,
    DctSource,
    HeadSource,
    LanczosSource,
    NoiseLevels,
    ProbeSource,
    generate,
)
from noisewise.diffusion.model import DiffusionModel, as_diffusion_model
from noisewise.diffusion.sources import as_source, fit_spectrum
from noisewise.diffusion.targets import dct_basis, ocm_target, probed_diagonal
from noisewise.errors import InvalidInput

TURN = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
CORRELATED = TURN @ torch.tensor([2.0, 0.5, 0.05], dtype=torch.float64).diag() @ TURN.T
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Smooth(nn.Module):
    """A smooth map of events [dim] that depends on t, float64, whose derivative is not symmetric."""

    def __init__(self, dim=4):
        super().__init__()
        self.first = nn.Parameter(torch.randn(dim, 8, dtype=torch.float64, generator=seeded(1)) / 2)
        self.last = nn.Parameter(torch.randn(8, dim, dtype=torch.float64, generator=seeded(2)) / 2)

    def forward(self, x, t):
        return torch.tanh(x @ self.first + 0.1 * t[:, None]) @ self.last


class Wrapped(nn.Module):
    """The same prediction of noise in another form."""

    def __init__(self, net, levels, kind):
        super().__init__()
        self.net, self.levels, self.kind = net, levels, kind

    def forward(self, x, t):
        eps = self.net(x, t)
        a, s = self.levels.at(t, x)
        clean = (x - s * eps) / a
        return {"epsilon": eps, "sample": clean, "v_prediction": a * eps - s * clean, "flow_prediction": eps - clean}[
            self.kind
        ]


# --- the diagonal by probes


def test_r_does_not_depend_on_the_form_of_the_prediction():
    ramp = torch.arange(1, 21, dtype=torch.float64) / 21
    tables = {
        "variance preserving": (torch.cos(math.pi / 2 * ramp), torch.sin(math.pi / 2 * ramp)),
        "flow": (1 - ramp, ramp),
    }
    x, t = torch.randn(6, 4, dtype=torch.float64, generator=seeded()), torch.tensor([0, 1, 5, 10, 18, 19])
    for name, (a, s) in tables.items():
        kinds = ["epsilon", "sample", "flow_prediction"] + (["v_prediction"] if name != "flow" else [])
        found = []
        for kind in kinds:
            levels = NoiseLevels(a, s, kind)
            model = DiffusionModel(Wrapped(Smooth(), levels, kind), levels)
            found.append(probed_diagonal(model.predict(x, t, True), 3, seeded(5))[0])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_mean_over_all_signs_is_the_diagonal_of_the_derivative(kind):
    scheduler = schedule(prediction_type=kind)
    model = as_diffusion_model(Smooth(), scheduler)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    x, t = torch.randn(1, 4, dtype=torch.float64, generator=seeded()), 20
    prediction = model.predict(x.expand(16, 4), t, True)
    jacobian = torch.autograd.functional.jacobian(lambda x: Smooth()(x[None], torch.tensor([t]))[0], x[0])
    a, s = scheduler.levels.pair(t)
    eye = torch.eye(4, dtype=torch.float64)
    # r = 1 - s d eps; with v: a^2 - a s dv
    matrix = {"epsilon": eye - s * jacobian, "v_prediction": a**2 * eye - a * s * jacobian}[kind]
    products = signs * prediction.product(signs)
    torch.testing.assert_close(products.mean(0), matrix.diagonal(), rtol=1e-12, atol=1e-12)
    # and the variance of one probe is what is off the diagonal of its transpose
    off = (matrix - matrix.diagonal().diag()).square().sum(0)
    torch.testing.assert_close(products.var(0, correction=0), off, rtol=1e-10, atol=1e-12)


def test_probes_are_signs_and_their_errors_shrink_with_the_root_of_their_number():
    model = as_diffusion_model(Smooth(), schedule())
    x = torch.randn(1, 4, dtype=torch.float64, generator=seeded()).expand(2000, 4)
    prediction = model.predict(x, 20, True)
    found, signs = probed_diagonal(prediction, 2, seeded())
    assert bool((signs.abs() == 1).all())
    for draw, v in zip(found, signs, strict=True):
        torch.testing.assert_close(draw, v * prediction.product(v.double()))
    one, nine = (ocm_target(prediction, probes, seeded(probes)) for probes in (1, 9))
    # a variance from 2000 draws, of a sum of signs, has a relative standard error of at most sqrt(2 / 2000)
    assert bool(((one.var(0) / nine.var(0) / 9 - 1).abs() < 4 * math.sqrt(2 * 2 / 2000)).all())


def test_the_probe_source_is_exact_where_the_covariance_is_diagonal():
    levels = schedule().levels
    diagonal = torch.tensor([2.0, 0.5, 0.05], dtype=torch.float64).diag()
    model = DiffusionModel(GaussianNoise(levels, MEAN, diagonal), levels)
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    for t in (0, 20, 49):
        wanted = posterior_covariance(diagonal, *levels.pair(t)).diagonal().expand(4, 3)
        found = ProbeSource(1, seeded())(model.predict(x, t, True))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    with pytest.raises(InvalidInput, match="probes"):
        ProbeSource(0, seeded())(model.predict(x, 5, True))


# --- the whole matrix


def test_lanczos_is_the_closed_form_on_gaussian_data():
    levels = schedule().levels
    model = DiffusionModel(GaussianNoise(levels, MEAN, CORRELATED), levels)
    x = torch.randn(2, 3, dtype=torch.float64, generator=seeded())
    for t in (0, 20, 49):
        wanted = posterior_covariance(CORRELATED, *levels.pair(t)).expand(2, 3, 3)
        operator = LanczosSource(3, seeded())(model.predict(x, t, True))
        torch.testing.assert_close(operator.dense(), wanted, rtol=1e-5, atol=1e-5)
        many = LanczosSource(3, seeded())(model.predict(x[:1].expand(4000, 3), t, True)).sample(seeded(3))
        se = (wanted[0].square() + wanted[0].diagonal()[:, None] * wanted[0].diagonal()).sqrt() / math.sqrt(4000)
        assert bool(((many.T @ many / 4000 - wanted[0]).abs() < 4 * se).all())


def test_eigenvalues_are_cut_at_the_largest():
    matrix = torch.tensor([9.0, 1.0, 0.25], dtype=torch.float64).diag()
    like = torch.zeros(4000, 3, dtype=torch.float64)
    operator = KrylovCovariance(lambda v: v @ matrix, like, seeded(), 3, largest=2.0)
    draws = operator.sample(seeded(1))
    variance = torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64)
    assert bool(((draws.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / 4000)).all())
    v = torch.ones(4000, 3, dtype=torch.float64)
    torch.testing.assert_close(operator.mahalanobis(v)[0], (1 / variance).sum())
    # the source's own bound is the number of entries, the variance of one per pixel along one direction
    levels = schedule().levels
    model = DiffusionModel(GaussianNoise(levels, MEAN, 30 * CORRELATED), levels)
    prediction = model.predict(torch.zeros(1, 3, dtype=torch.float64), 49, True)
    for largest, bound in ((None, 3.0), (7, 7.0)):
        cut = LanczosSource(3, seeded(), largest)(prediction)
        values, vectors = torch.linalg.eigh(cut.dense())
        assert float(values.max()) > bound
        top = vectors[:, :, -1]
        torch.testing.assert_close(cut.mahalanobis(top), torch.tensor([1 / bound], dtype=torch.float64))


@pytest.mark.parametrize("eta", [None, 0])
def test_draws_with_the_whole_matrix_have_the_moments_of_gaussian_data(eta, shapes_unchecked):
    n = 4000
    scheduler = schedule(1000, beta_end=0.02, clip_sample=False, eta=eta)
    net = GaussianNoise(scheduler.levels, MEAN, CORRELATED)
    for steps in (2, 5):
        x = generate(net, scheduler, (n, 3), steps, "lanczos", rank=3)
        assert x.dtype == torch.float64
        variance = CORRELATED.diagonal()
        assert bool(((x.mean(0) - MEAN).abs() < 4 * (variance / n).sqrt()).all())
        se = ((CORRELATED.square() + variance[:, None] * variance) / n).sqrt()
        assert bool(((torch.cov(x.T) - CORRELATED).abs() < 4 * se).all())
    # without a covariance the same steps are far too narrow
    narrow = generate(net, scheduler, (n, 3), 5)
    assert float(torch.cov(narrow.T).trace()) < 0.9 * float(CORRELATED.trace())


@pytest.mark.parametrize("covariance", ["lanczos", "probes"])
def test_sampling_from_pure_noise_starts_with_the_variance_of_data(covariance):
    scheduler = schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    levels = scheduler.levels
    assert levels.pair(49) == (0.0, 1.0)

    class Velocity(GaussianNoise):
        def forward(self, x, t):
            a, s = levels.at(t, x)
            gain = a / (a**2 * 0.3 + s**2)
            return (a - gain * 0.3) / s * x  # v of N(0, 0.3 I): a eps - s x0

    net = Velocity(levels, torch.zeros(3), 0.3 * torch.eye(3))
    model = DiffusionModel(net, levels)
    prediction = model.predict(torch.ones(2, 3, dtype=torch.float64), 49, True)
    source = as_source(covariance, seeded())
    found = source(prediction)
    variances = found if isinstance(found, torch.Tensor) else found.dense().diagonal(dim1=1, dim2=2)
    assert torch.equal(variances, torch.ones(2, 3, dtype=torch.float64))
    n = 4000
    scheduler.set_timesteps(timesteps=list(range(49, -1, -1)))
    x = generate(net, scheduler, (n, 3), None, covariance, probes=1)
    assert bool(((x.var(0) / 0.3 - 1).abs() < 4 * math.sqrt(2 / n)).all())


@pytest.mark.parametrize("covariance", ["lanczos", "probes", "head", None])
def test_half_precision_networks_are_asked_in_their_own_precision(covariance):
    net, scheduler = unet(), schedule(clip_sample=False)
    head = head_for(net, scheduler)
    wide = generate(net, scheduler, (2, 1, 8, 8), 4, head if covariance == "head" else covariance, probes=1)
    half = generate(
        net.to(torch.bfloat16), scheduler, (2, 1, 8, 8), 4, head if covariance == "head" else covariance, probes=1
    )
    assert (wide.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert bool(torch.isfinite(half).all())


# --- the DCT


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_every_operation_of_the_dct_covariance_is_that_of_its_matrix(shape):
    variance = 0.1 + torch.rand(2, *shape, dtype=torch.float64, generator=seeded(1))
    spectrum = 0.05 + torch.rand(2, *shape, dtype=torch.float64, generator=seeded(2))
    found = DctCovariance(variance, spectrum)
    # the matrix from scratch, by Kronecker products
    transform = torch.ones(1, 1, dtype=torch.float64)
    for n in shape:
        transform = torch.kron(transform, dct_basis(n, variance))
    matrix = torch.stack([transform.T @ row.flatten().diag() @ transform for row in spectrum])
    scale = (variance.flatten(1) / matrix.diagonal(dim1=1, dim2=2)).sqrt()
    matrix = scale[:, :, None] * matrix * scale[:, None, :]
    torch.testing.assert_close(found.dense(), matrix)
    torch.testing.assert_close(found.diag(), variance.flatten(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.logdet(), torch.logdet(matrix))
    v = torch.randn(2, matrix.shape[1], dtype=torch.float64, generator=seeded(3))
    torch.testing.assert_close(found.matvec(v), (matrix @ v[..., None])[..., 0])
    torch.testing.assert_close(found.mahalanobis(v), (v * torch.linalg.solve(matrix, v)).sum(1))
    assert found.clipped.tolist() == [0, 0]
    n = 4000
    draws = DctCovariance(variance[:1].expand(n, *shape), spectrum[:1].expand(n, *shape)).sample(seeded(4))
    se = (matrix[0].square() + matrix[0].diagonal()[:, None] * matrix[0].diagonal()).div(n).sqrt()
    assert bool(((draws.T @ draws / n - matrix[0]).abs() < 4.5 * se).all())


def test_a_flat_spectrum_is_no_correlation_and_negative_variances_are_counted():
    variance = torch.rand(2, 3, 4, generator=seeded(1))
    found = DctCovariance(variance, torch.full((2, 3, 4), 0.7))
    torch.testing.assert_close(found.dense(), torch.diag_embed(variance.flatten(1)), rtol=1e-5, atol=1e-6)
    variance[1, 0, 0] = -1
    cut = DctCovariance(variance, torch.ones(2, 3, 4))
    assert cut.clipped.tolist() == [0, 1]
    assert float(cut.diag()[1, 0]) == 0


def test_the_spectrum_of_gaussian_data_is_found_and_has_mean_one():
    # data whose DCT coefficients are independent: errors of x0 are too, with the posterior variance of each
    levels = schedule().levels
    event = (1, 2, 2)
    basis = torch.kron(dct_basis(2, MEAN), dct_basis(2, MEAN))
    power = torch.tensor([2.0, 0.5, 0.5, 0.1], dtype=torch.float64)
    covariance = basis.T @ power.diag() @ basis
    net = GaussianNoise(levels, torch.zeros(4), covariance)

    # every entry of this basis is 1/2 or -1/2, so that the variances of all pixels are equal
    left = [posterior_covariance(covariance, *levels.pair(t)) for t in range(50)]
    head = CovarianceHead.for_model(net, noise_schedule=levels, site="end", event=event, features=1)
    head.residual.copy_(torch.stack([matrix[0, 0] for matrix in left]) / (1 + 1e-3))
    data = (torch.randn(2000, 4, dtype=torch.float64, generator=seeded()) * power.sqrt()) @ basis
    model = DiffusionModel(net, levels, "end")
    found = fit_spectrum(model, head, data.reshape(-1, *event).float(), levels=5, rows=2000)
    assert found.shape == (50, *event)
    torch.testing.assert_close(found.flatten(1)[[0, 12, 24, 37, 49]].mean(1), torch.ones(5))
    source = DctSource(head, found)
    for t in (0, 12, 49):
        operator = source(model.predict(torch.zeros(1, *event, dtype=torch.float64), t))
        torch.testing.assert_close(operator.diag()[0].double(), left[t].diagonal(), rtol=1e-5, atol=0)
        own, wanted = ((basis @ matrix.double() @ basis.T).diagonal() for matrix in (operator.dense()[0], left[t]))
        # mean squares of 2000 rows that are drawn from 2000
        assert bool(((own / wanted - 1).abs() < 4 * math.sqrt(2 * 2 / 2000)).all())


# --- generate


def test_generate_passes_conditions_and_leaves_the_network_as_it_was():
    net, scheduler = conditional_unet(), schedule(clip_sample=False)
    head = head_for(net, scheduler)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = torch.randn(2, 2, 3, 8, generator=seeded()).unbind()
    draws = [generate(net, scheduler, (2, 4, 8, 8), 3, head, encoder_hidden_states=h) for h in (first, second, first)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert net.training
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    other = generate(net, scheduler, (2, 4, 8, 8), 3, head, seed=1, encoder_hidden_states=first)
    assert not torch.equal(draws[0], other)


@pytest.mark.parametrize("event", [(3,), (1, 4), (2, 2, 3, 3)])
def test_a_head_with_the_exact_variance_draws_isotropic_gaussian_data(event, shapes_unchecked):
    # one variance for all: a head that says the mean of each level is exact
    scheduler = schedule(1000, beta_end=0.02, clip_sample=False)
    levels, dim, n = scheduler.levels, math.prod(event), 3000
    covariance = 0.3 * torch.eye(dim, dtype=torch.float64)
    net = GaussianNoise(levels, torch.full((dim,), 0.5), covariance)
    head = CovarianceHead.for_model(net, noise_schedule=scheduler, site="end", event=event, features=event[0])
    left = torch.stack([posterior_covariance(covariance, *levels.pair(t))[0, 0] for t in range(1000)])
    head.residual.copy_(left / (1 + 1e-3))
    for steps in (2, 5):
        x = generate(net, scheduler, (n, *event), steps, head).flatten(1)
        assert bool(((x.mean(0) - 0.5).abs() < 4 * math.sqrt(0.3 / n)).all())
        assert bool(((x.var(0) / 0.3 - 1).abs() < 4 * math.sqrt(2 / n)).all())


# --- choosing a source


def test_names_become_sources_and_what_is_none_is_refused():
    scheduler = schedule()
    head = head_for(unet(), scheduler)
    assert as_source(None, seeded()) is None
    assert isinstance(as_source(head, seeded()), HeadSource)
    assert isinstance(as_source("probes", seeded(), probes=2), ProbeSource)
    lanczos = as_source("lanczos", seeded(), rank=5)
    assert (type(lanczos), lanczos.rank, lanczos.graph) == (LanczosSource, 5, True)
    assert as_source(lanczos, seeded()) is lanczos
    for bad in ("diagonal", 3, torch.ones(2)):
        with pytest.raises(InvalidInput, match="covariance must be"):
            as_source(bad, seeded())


def test_a_head_of_a_range_and_a_spectrum_do_not_go_together():
    scheduler, net = schedule(), unet()
    head = head_for(net, scheduler)
    head.register_to_config(objective="vlb")
    prediction = as_diffusion_model(net, scheduler, head.config.site).predict(torch.zeros(1, 1, 8, 8), 20)
    with pytest.raises(InvalidInput, match="vlb"):
        DctSource(head, torch.ones(50, 1, 8, 8))(prediction, 10)


def test_generate_refuses_what_fits_no_network(shapes_unchecked):
    scheduler, net = schedule(), unet()
    with pytest.raises(InvalidInput, match="from_config"):
        generate(net, DDPMScheduler(), (1, 1, 8, 8), 3)
    head = head_for(net, schedule(beta_end=0.1))
    for covariance in (head, HeadSource(head)):
        with pytest.raises(InvalidInput, match="another noise schedule"):
            generate(net, scheduler, (1, 1, 8, 8), 3, covariance)


def test_events_of_another_shape_are_refused_before_the_network_sees_them():
    with pytest.raises(InvalidInput, match=r"\[batch, 1, \*space\], got x_t of shape \(2, 3, 8, 8\)"):
        generate(unet(), schedule(), (2, 3, 8, 8), 4)
    with pytest.raises(InvalidInput, match=r"\(batch, \*event\)"):
        generate(unet(), schedule(), (8,), 4)
