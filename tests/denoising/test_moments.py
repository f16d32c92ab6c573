"""The Gaussian posterior against closed forms: Gaussians and mixtures, far tails, both ends of the noise, any a."""

import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from noisewise.denoising import (
    Denoiser,
    Energy,
    FullCovariance,
    Score,
    gaussian_posterior,
    isotropic_variance,
)
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.noise import Corruption
from noisewise.targets import GaussianMixture

LEVELS = [Corruption(1.0, 0.5), Corruption(0.6, 0.8), Corruption(0.3, 2.0)]
MIXTURE = GaussianMixture(
    torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.0, 2.0], [2.0, 2.0, 0.0]], dtype=torch.float64),
    torch.stack(
        [
            torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.8, 0.1], [0.0, 0.1, 0.3]], dtype=torch.float64),
            torch.eye(3, dtype=torch.float64) * 0.4,
            torch.tensor([[0.5, 0.0, -0.3], [0.0, 0.2, 0.0], [-0.3, 0.0, 0.6]], dtype=torch.float64),
        ]
    ),
    torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def score_of(target, corruption):
    return Score(target.noisy(corruption.a, corruption.s).score)


def models_of(target, corruption):
    """The same noisy density in every form that a model may have."""
    noisy = target.noisy(corruption.a, corruption.s)
    a, s = corruption.a, corruption.s

    def mean(x_t):
        return target.posterior(x_t, a, s)[0]

    def eps(x_t):
        return (x_t - a * mean(x_t)) / s

    return {
        "energy": Energy(lambda x_t: -noisy.log_prob(x_t)),
        "score": Score(noisy.score),
        "x0": Denoiser(mean),
        "epsilon": Denoiser(eps, "epsilon"),
        "v": Denoiser(lambda x_t: a * eps(x_t) - s * mean(x_t), "v"),
    }


@pytest.mark.parametrize("corruption", LEVELS)
@pytest.mark.parametrize("name", ["energy", "score", "x0", "epsilon", "v"])
def test_moments_of_a_mixture_are_exact_also_in_far_tails(name, corruption):
    x_t = torch.randn((6, 3), dtype=torch.float64, generator=seeded())
    x_t = torch.cat([3 * x_t, 100 * x_t[:2]])
    posterior = gaussian_posterior(models_of(MIXTURE, corruption)[name], x_t, corruption)
    mean, covariance = MIXTURE.posterior(x_t, corruption.a, corruption.s)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.covariance.dense(), covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.variance, covariance.diagonal(dim1=-2, dim2=-1), rtol=1e-10, atol=1e-10)
    assert posterior.clipped.tolist() == [0] * 8
    x = mean + torch.randn(mean.shape, dtype=torch.float64, generator=seeded(1))
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    torch.testing.assert_close(posterior.log_prob(x), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("corruption", LEVELS)
def test_every_covariance_is_its_own_part_of_the_exact_one(corruption):
    x_t = 2 * torch.randn((4, 3), dtype=torch.float64, generator=seeded(2))
    model = score_of(MIXTURE, corruption)
    mean, exact = MIXTURE.posterior(x_t, corruption.a, corruption.s)
    by_name = {
        name: gaussian_posterior(model, x_t, corruption, name, rank=3, probes=4000 if name == "hutchinson" else 1)
        for name in ("full", "diagonal", "hutchinson", "krylov", "none")
    }
    by_name["isotropic"] = gaussian_posterior(model, x_t, corruption, "isotropic", variance=0.37)
    for posterior in by_name.values():
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-10, atol=1e-10)
    variance = exact.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(by_name["diagonal"].covariance.dense(), torch.diag_embed(variance))
    off = (exact.square().sum(-1) - variance.square()).sqrt()
    assert bool(((by_name["hutchinson"].variance - variance).abs() <= 4 * off / math.sqrt(4000) + 1e-12).all())
    torch.testing.assert_close(by_name["krylov"].covariance.dense(), exact)
    torch.testing.assert_close(by_name["krylov"].sample(seeded(3)), by_name["full"].sample(seeded(3)))
    torch.testing.assert_close(by_name["isotropic"].variance, torch.full_like(mean, 0.37))
    torch.testing.assert_close(by_name["none"].sample(seeded(3)), mean)
    assert bool(torch.isneginf(by_name["none"].log_prob(mean)).all())


CORRELATED = torch.tensor([[2.0, 1.2, 0.3], [1.2, 1.0, 0.0], [0.3, 0.0, 0.5]], dtype=torch.float64)
GAUSSIAN = GaussianMixture(torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), CORRELATED.unsqueeze(0))


@pytest.mark.parametrize("corruption", LEVELS)
def test_noise_and_denoise_with_the_full_covariance_leave_a_gaussian_exactly_invariant(corruption):
    # x' = G (a x + s eps) + const + N(0, Sigma): S = a^2 G C G^T + s^2 G G^T + Sigma must be C again
    x_t = torch.zeros((1, 3), dtype=torch.float64)
    posterior = gaussian_posterior(score_of(GAUSSIAN, corruption), x_t, corruption)
    a, s = corruption.a, corruption.s
    gain = a * CORRELATED @ torch.linalg.inv(a**2 * CORRELATED + s**2 * torch.eye(3, dtype=torch.float64))
    stationary = a**2 * gain @ CORRELATED @ gain.T + s**2 * gain @ gain.T + posterior.covariance.dense()[0]
    torch.testing.assert_close(stationary, CORRELATED, rtol=1e-12, atol=1e-12)
    m = GAUSSIAN.means[0]
    torch.testing.assert_close(posterior.mean[0], m + gain @ (x_t[0] - a * m), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("correlation", "diagonal", "none"), [(0.5, 0.0027, 0.2755), (0.9, 0.1184, 0.4761), (0.99, 4.11, 1.28)]
)
def test_what_the_diagonal_and_the_mean_alone_lose_on_correlated_data(correlation, diagonal, none):
    # KL(N(0, S) || N(0, C)) of the stationary S = A S A^T + sigma^2 A A^T + Sigma used, as tabulated in the design
    corruption = Corruption(1.0, 0.5)
    c = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    target = GaussianMixture(torch.zeros((1, 2), dtype=torch.float64), c.unsqueeze(0))
    eye = torch.eye(2, dtype=torch.float64)
    gain = c @ torch.linalg.inv(c + 0.25 * eye)
    x_t = torch.ones((1, 2), dtype=torch.float64)
    for name, expected in {"full": 0.0, "krylov": 0.0, "diagonal": diagonal, "none": none}.items():
        used = gaussian_posterior(score_of(target, corruption), x_t, corruption, name).covariance.dense()[0]
        kron = torch.eye(4, dtype=torch.float64) - torch.kron(gain, gain)
        stationary = torch.linalg.solve(kron, (0.25 * gain @ gain.T + used).flatten()).reshape(2, 2)
        ratio = torch.linalg.solve(c, stationary)
        kl = 0.5 * (ratio.trace() - 2 - torch.logdet(ratio))
        assert float(kl) == pytest.approx(expected, rel=5e-3, abs=5e-5), name


def test_without_noise_the_posterior_is_the_noise_and_with_much_it_is_the_data():
    x_t = torch.randn((5, 3), dtype=torch.float64, generator=seeded(5))
    faint = Corruption(1.0, 1e-3)
    small = gaussian_posterior(score_of(MIXTURE, faint), x_t, faint)
    eye = torch.eye(3, dtype=torch.float64).expand(5, 3, 3)
    torch.testing.assert_close(small.covariance.dense() / faint.s**2, eye, rtol=0, atol=1e-4)
    torch.testing.assert_close(small.mean, x_t, rtol=0, atol=1e-4)
    loud = Corruption(1.0, 1e3)
    for model in models_of(MIXTURE, loud).values():
        large = gaussian_posterior(model, x_t, loud)
        torch.testing.assert_close(large.mean, MIXTURE.mean().expand(5, 3), rtol=0, atol=1e-4)
        torch.testing.assert_close(large.covariance.dense(), MIXTURE.covariance().expand(5, 3, 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("corruption", LEVELS)
def test_total_variance_is_what_the_isotropic_estimate_and_the_posteriors_share(corruption):
    # E[trace Cov[x | x_t]] + trace Cov[E[x | x_t]] = trace Cov[x], and the first part is dim * c
    generator = seeded(6)
    x = MIXTURE.sample(20_000, generator)
    model = score_of(MIXTURE, corruption)
    x_t = corruption.corrupt(x, generator)
    posterior = gaussian_posterior(model, x_t, corruption)
    values = FullCovariance.eigenvalues.fget(posterior.covariance)
    assert bool((values > 0).all())
    within = posterior.variance.sum(-1)
    between = (posterior.mean - MIXTURE.mean()).square().sum(-1)
    total = within + between
    se = float(total.std()) / math.sqrt(len(x))
    assert abs(float(total.mean() - MIXTURE.covariance().trace())) < 4 * se
    c = isotropic_variance(model, x, corruption, generator)
    # both sides are estimates; the larger error is that of the squared score
    squares = corruption.r**2 * corruption.s**2 * model.score(x_t, corruption).square().sum(-1)
    error = math.hypot(float(within.std()), float(squares.std())) / math.sqrt(len(x))
    assert abs(3 * c - float(within.mean())) < 4 * error


class Net(torch.nn.Module):
    """A small random energy, sum of the outputs of a network."""

    def __init__(self, dim, activation, width=16, seed=0):
        super().__init__()
        generator = seeded(seed)
        self.first = torch.nn.Parameter(torch.randn((width, dim), generator=generator, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.randn((dim, width), generator=generator, dtype=torch.float64) / 4)
        self.activation = activation

    def forward(self, x):
        return (self.activation(x.flatten(1) @ self.first.T) @ self.second.T).sum(1)


SMOOTH = {"silu": torch.nn.functional.silu, "softplus": torch.nn.functional.softplus, "tanh": torch.tanh}


@pytest.mark.parametrize("name", SMOOTH)
def test_the_hessian_of_a_network_is_symmetric_and_that_of_finite_differences(name):
    net, corruption = Net(4, SMOOTH[name]), Corruption(0.9, 0.05)
    x_t = torch.randn((3, 2, 2), dtype=torch.float64, generator=seeded(7))
    posterior = gaussian_posterior(Energy(net), x_t, corruption)
    energy = Energy(net)
    columns = []
    for unit in torch.eye(4, dtype=torch.float64).reshape(4, 2, 2):
        with torch.no_grad():
            up, down = (energy.mean(x_t + sign * 1e-5 * unit, corruption) for sign in (1, -1))
        columns.append((up - down).flatten(1) / 2e-5)
    exact = corruption.s**2 / corruption.a * torch.stack(columns, -1)
    torch.testing.assert_close(posterior.covariance.dense(), exact, rtol=1e-6, atol=1e-9)
    assert posterior.mean.shape == posterior.variance.shape == posterior.sample(seeded()).shape == x_t.shape


@pytest.mark.parametrize("covariance", ["full", "diagonal", "hutchinson", "krylov"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, torch.nn.functional.leaky_relu])
def test_a_relu_energy_is_refused(activation, frozen, covariance):
    net = Net(4, activation).requires_grad_(not frozen)
    x_t = torch.randn((3, 4), dtype=torch.float64, generator=seeded(7))
    with pytest.raises(InvalidInput, match=r"activation not twice differentiable.*SiLU, softplus or tanh"):
        gaussian_posterior(Energy(net), x_t, Corruption(1.0, 0.3), covariance).sample(seeded())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("covariance", ["full", "diagonal", "hutchinson", "krylov", "none"])
def test_it_works_in_every_grad_mode_and_leaves_no_graph(covariance, mode):
    corruption, energy = Corruption(0.8, 0.6), Energy(Net(3, torch.tanh))
    with mode():
        x_t = torch.randn((4, 3), dtype=torch.float64, generator=seeded(8))
        posterior = gaussian_posterior(energy, x_t, corruption, covariance)
        parts = [posterior.mean, posterior.variance, posterior.sample(seeded(1)), posterior.log_prob(x_t)]
    assert not any(part.requires_grad for part in parts)
    again = gaussian_posterior(energy, x_t.clone(), corruption, covariance)
    torch.testing.assert_close(posterior.sample(seeded(1)), again.sample(seeded(1)))


def test_an_asymmetric_score_warns_and_its_symmetric_part_is_used():
    matrix = torch.tensor([[-1.0, 0.4], [0.0, -2.0]], dtype=torch.float64)
    corruption, x_t = Corruption(1.0, 0.5), torch.ones((3, 2), dtype=torch.float64)
    with pytest.warns(NoisewiseWarning, match="asymmetric"):
        posterior = gaussian_posterior(Score(lambda x: x @ matrix.T), x_t, corruption)
    hessian = (matrix + matrix.T) / 2
    exact = 0.25 * torch.eye(2, dtype=torch.float64) + 0.0625 * hessian
    torch.testing.assert_close(posterior.covariance.dense(), exact.expand(3, 2, 2))
    nearly = hessian + 0.004 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gaussian_posterior(Score(lambda x: x @ nearly.T), x_t, corruption)


def test_a_model_that_is_no_noisy_density_is_clipped_by_state():
    # at s = 1 a true noisy density has Hessian above -1; here it is -x^2, so rows beyond 1 are clipped
    score = Score(lambda x: -(x**3) / 3)
    x_t = torch.tensor([[0.5, 0.5], [0.5, 2.0], [2.0, -3.0]], dtype=torch.float64)
    for covariance in ("full", "diagonal", "hutchinson", "krylov"):
        posterior = gaussian_posterior(score, x_t, Corruption(1.0, 1.0), covariance)
        draw = posterior.sample(seeded())
        assert posterior.clipped.tolist() == [0, 1, 2], covariance
        assert bool(torch.isfinite(draw).all())
        assert torch.isfinite(posterior.log_prob(draw)).tolist() == [True, False, False]
        torch.testing.assert_close(posterior.variance, (1 - x_t**2).clamp(min=0))


class Watching(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_krylov_takes_one_score_and_rank_products_and_no_matrix_at_4096_dimensions():
    dim, batch, rank, calls, pulls = 4096, 2, 8, [], []
    scales = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)

    def score(x_t):
        calls.append(len(x_t))
        value = -x_t.flatten(1) / (scales + 1)
        if value.requires_grad:
            value.register_hook(lambda _: pulls.append(1))
        return value.reshape(x_t.shape)

    x_t = torch.ones((batch, 64, 64), dtype=torch.float64)
    with Watching() as watching:
        posterior = gaussian_posterior(Score(score), x_t, Corruption(1.0, 1.0), "krylov", rank=rank)
        draw = posterior.sample(seeded())
    assert calls == [batch]
    assert len(pulls) == rank
    assert watching.largest <= batch * dim * (rank + 1)  # the basis, never dim x dim = 16 million
    # the covariance is diagonal, scales / (scales + 1), and its root is known
    z = torch.randn((batch, dim), dtype=torch.float64, generator=seeded())
    exact = posterior.mean.flatten(1) + (scales / (scales + 1)).sqrt() * z
    torch.testing.assert_close(draw.flatten(1), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.variance.flatten(1), (scales / (scales + 1)).expand(batch, dim))


def test_full_is_refused_above_4096_dimensions_unless_forced():
    with pytest.raises(InvalidInput, match=r"4,097.*'krylov'.*force=True"):
        gaussian_posterior(Score(torch.neg), torch.zeros((1, 4097)), Corruption(1.0, 1.0))


class NoBatches(torch.autograd.Function):
    """A square whose derivative, like a foreign kernel's, cannot be batched over cotangents."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if not bool((grad == grad).all()):  # data-dependent: refused under vmap
            raise ValueError
        return 2 * x * grad


def test_operations_that_cannot_be_batched_are_taken_one_by_one():
    x_t = torch.randn((3, 4), dtype=torch.float64, generator=seeded(9))
    corruption = Corruption(1.0, 0.3)
    posterior = gaussian_posterior(Score(lambda x: -NoBatches.apply(x)), x_t, corruption)
    exact = gaussian_posterior(Score(lambda x: -(x**2)), x_t, corruption)
    torch.testing.assert_close(posterior.covariance.dense(), exact.covariance.dense())


def test_chunks_of_the_derivative_do_not_show(monkeypatch):
    corruption = Corruption(0.6, 0.8)
    x_t = torch.randn((5, 3), dtype=torch.float64, generator=seeded(10))
    whole = {
        name: gaussian_posterior(score_of(MIXTURE, corruption), x_t, corruption, name) for name in ("full", "diagonal")
    }
    for entries in (1, 30):
        monkeypatch.setattr("noisewise.denoising.moments._CHUNK_ENTRIES", entries)
        for name, posterior in whole.items():
            part = gaussian_posterior(score_of(MIXTURE, corruption), x_t, corruption, name)
            torch.testing.assert_close(part.covariance.dense(), posterior.covariance.dense())


def test_float32_stays_float32():
    x_t = torch.randn((5, 3), generator=seeded(11))
    for covariance in ("full", "diagonal", "hutchinson", "krylov", "none"):
        corruption = Corruption(0.6, 0.8)
        posterior = gaussian_posterior(score_of(MIXTURE, corruption), x_t, corruption, covariance)
        for part in (posterior.mean, posterior.variance, posterior.sample(seeded()), posterior.log_prob(x_t)):
            assert part.dtype == torch.float32
        exact = MIXTURE.posterior(x_t.double(), 0.6, 0.8)[0].float()
        torch.testing.assert_close(posterior.mean, exact, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_is_named_by_row():
    x_t = torch.ones((4, 2))
    corruption = Corruption(1.0, 0.5)

    def broken(x):
        return torch.where(torch.arange(len(x)).unsqueeze(-1) == 2, torch.nan, -x)

    for covariance in ("full", "krylov", "none"):
        with pytest.raises(InvalidInput, match=r"output is not finite in 1 of 4 rows: 2"):
            gaussian_posterior(Score(broken), x_t, corruption, covariance)
    with pytest.raises(InvalidInput, match=r"output is not finite in 1 of 4 rows: 2"):
        isotropic_variance(Score(broken), x_t, corruption, seeded())
    # a finite score with an infinite slope
    with pytest.raises(
        InvalidInput, match=r"derivative of the model's output is not finite in 4 of 4 rows: 0, 1, 2, 3"
    ):
        gaussian_posterior(Score(lambda x: -(x - x.detach()).abs().sqrt() - x), x_t, corruption)
    x_t[3, 0] = torch.inf
    with pytest.raises(InvalidInput, match="x_t is not finite in 1 of 4 rows: 3"):
        gaussian_posterior(Score(torch.neg), x_t, corruption)


def test_arguments_that_do_not_fit_are_refused():
    x_t, corruption, score = torch.ones((4, 2)), Corruption(1.0, 0.5), Score(torch.neg)
    with pytest.raises(InvalidInput, match="calibrate first"):
        gaussian_posterior(score, x_t, corruption, "isotropic")
    with pytest.raises(InvalidInput, match="variance must be"):
        gaussian_posterior(score, x_t, corruption, "isotropic", variance=-1.0)
    with pytest.raises(InvalidInput, match="belongs to"):
        gaussian_posterior(score, x_t, corruption, "full", variance=1.0)
    with pytest.raises(InvalidInput, match="'diag'"):
        gaussian_posterior(score, x_t, corruption, "diag")
    with pytest.raises(InvalidInput, match=r"Score\(fn\)"):
        gaussian_posterior(torch.neg, x_t, corruption)
    with pytest.raises(InvalidInput, match="rank"):
        gaussian_posterior(score, x_t, corruption, "krylov", rank=0)
    with pytest.raises(InvalidInput, match=r"\(2,\)"):
        gaussian_posterior(score, x_t[0], corruption)
    with pytest.raises(InvalidInput, match="no derivative"):
        gaussian_posterior(Score(lambda x: -x.detach()), x_t, corruption)
    with pytest.raises(InvalidInput, match="isotropic variance comes out as -"):
        isotropic_variance(Score(lambda x: -9 * x), torch.randn((50, 2), generator=seeded()), corruption, seeded())


@pytest.mark.gpu
@pytest.mark.parametrize("covariance", ["full", "diagonal", "hutchinson", "krylov", "none"])
def test_a_gpu_gives_what_the_cpu_gives(covariance):
    corruption, net = Corruption(0.6, 0.8), Net(3, torch.tanh)
    x_t = torch.randn((5, 3), dtype=torch.float64, generator=seeded(12))
    here = gaussian_posterior(Energy(net), x_t, corruption, covariance)
    there = gaussian_posterior(Energy(net.cuda()), x_t.cuda(), corruption, covariance)
    torch.testing.assert_close(there.mean.cpu(), here.mean)
    if covariance != "hutchinson":  # whose signs differ between devices
        torch.testing.assert_close(there.covariance.dense().cpu(), here.covariance.dense())
    assert there.sample(torch.Generator("cuda").manual_seed(0)).device.type == "cuda"


def test_an_array_is_refused_by_name(shapes_unchecked):
    with pytest.raises(InvalidInput, match=r"got ndarray: torch.as_tensor\(x_t\)"):
        gaussian_posterior(Score(lambda x: -x), torch.zeros(3, 2).numpy(), LEVELS[0])
