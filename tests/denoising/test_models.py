"""One noisy Gaussian seen as an energy, a score and three predictions: all give the same score and mean."""

import pytest
import torch

from noisewise.denoising import Denoiser, Energy, Score, as_model
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption
from noisewise.targets import GaussianMixture

CORRUPTION = Corruption(0.8, 0.6 * 1.3)  # not variance preserving, so that no a^2 + s^2 = 1 hides a mistake
MIXTURE = GaussianMixture(
    torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.0, 2.0]], dtype=torch.float64),
    torch.tensor([[0.3, 1.0, 0.5], [1.5, 0.2, 0.7]], dtype=torch.float64),
    torch.tensor([0.3, 0.7], dtype=torch.float64),
)
NOISY = MIXTURE.noisy(CORRUPTION.a, CORRUPTION.s)


def posterior_mean(x_t):
    return MIXTURE.posterior(x_t, CORRUPTION.a, CORRUPTION.s)[0]


def posterior_eps(x_t):
    return (x_t - CORRUPTION.a * posterior_mean(x_t)) / CORRUPTION.s


MODELS = {
    "energy": Energy(lambda x_t: -NOISY.log_prob(x_t)),
    "score": Score(NOISY.score),
    "x0": Denoiser(posterior_mean),
    "epsilon": Denoiser(posterior_eps, "epsilon"),
    "v": Denoiser(lambda x_t: CORRUPTION.a * posterior_eps(x_t) - CORRUPTION.s * posterior_mean(x_t), "v"),
}


def points(n=7, scale=3.0):
    return scale * torch.randn((n, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_wrapper_gives_the_score_and_the_mean_of_one_density(name, grad):
    with torch.set_grad_enabled(grad):
        x_t = points()
        score, mean = MODELS[name].score(x_t, CORRUPTION), MODELS[name].mean(x_t, CORRUPTION)
    torch.testing.assert_close(score.detach(), NOISY.score(x_t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean.detach(), posterior_mean(x_t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_the_score_can_be_differentiated_to_the_closed_form_covariance(name):
    x_t = points().requires_grad_(True)
    mean = MODELS[name].mean(x_t, CORRUPTION)
    rows = [torch.autograd.grad(mean[:, i].sum(), x_t, retain_graph=True)[0] for i in range(3)]
    exact = MIXTURE.posterior(x_t.detach(), CORRUPTION.a, CORRUPTION.s)[1]
    torch.testing.assert_close(CORRUPTION.s**2 / CORRUPTION.a * torch.stack(rows, 1), exact)


class Quadratic(torch.nn.Module):
    """The energy of N(0, v I) in images of any shape."""

    def __init__(self, variance=2.0, corruption=None):
        super().__init__()
        self.log_variance = torch.nn.Parameter(torch.tensor(variance).log())
        if corruption is not None:
            self.corruption = corruption

    def forward(self, x):
        return 0.5 * x.square().flatten(1).sum(1) / self.log_variance.exp()

    energy = forward


def test_under_grad_mode_a_loss_on_the_score_trains_the_energy():
    # E||score||^2 of -x / v is known in v: its derivative in log v is -2 times itself
    net, x = Quadratic(), torch.randn((5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    loss = Energy(net).score(x, CORRUPTION).square().sum()
    loss.backward()
    torch.testing.assert_close(net.log_variance.grad, -2 * loss.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_an_energy_still_has_a_score_and_it_is_plain(mode):
    with mode():
        x = torch.randn((5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
        score = Energy(Quadratic()).score(x, CORRUPTION)
    assert not score.requires_grad
    torch.testing.assert_close(score, -x / 2)


def test_log_prob_is_minus_the_energy():
    x = points()
    torch.testing.assert_close(MODELS["energy"].log_prob(x), NOISY.log_prob(x))


def test_a_model_refuses_another_noise_level_than_its_own():
    own, other = Corruption(1.0, 0.3), Corruption(1.0, 0.31)
    x = torch.zeros((2, 3))
    for model in (
        Energy(Quadratic(corruption=own)),
        Energy(Quadratic(), own),
        Score(torch.neg, own),
        Denoiser(torch.neg, corruption=own),
        as_model(Quadratic(corruption=own)),
    ):
        model.score(x, own)
        model.score(x, Corruption(1.0, 0.3 * (1 + 1e-9)))
        with pytest.raises(InvalidInput, match=r"s=0\.3\).*s=0\.31\)"):
            model.mean(x, other)
    with pytest.raises(InvalidInput, match="trained at"):
        Energy(Quadratic(corruption=own), other)


def test_outputs_of_the_wrong_shape_are_refused_by_their_shape():
    x = torch.zeros((4, 3))
    with pytest.raises(InvalidInput, match=r"\(4, 1\)"):
        Energy(lambda x: x.sum(-1, keepdim=True)).score(x, CORRUPTION)
    with pytest.raises(InvalidInput, match=r"\(\)"):
        Energy(lambda x: x.sum()).log_prob(x)
    with pytest.raises(InvalidInput, match=r"\(4, 2\)"):
        Score(lambda x: x[:, :2]).mean(x, CORRUPTION)
    with pytest.raises(InvalidInput, match="tuple"):
        Denoiser(lambda x: (x, x)).mean(x, CORRUPTION)


def test_what_cannot_be_a_model_is_refused():
    with pytest.raises(InvalidInput, match=r"wrap it: Energy\(fn\), Score\(fn\) or Denoiser\(fn\)"):
        as_model(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="prediction"):
        Denoiser(torch.neg, "x_0")
    with pytest.raises(InvalidInput, match="callable, got 3"):
        Score(3)
    with pytest.raises(InvalidInput, match="does not depend on x_t"):
        Energy(lambda x: x.detach().sum(-1)).score(torch.zeros((4, 3)), CORRUPTION)
    assert as_model(MODELS["v"]) is MODELS["v"]
    assert isinstance(as_model(Quadratic()), Energy)
