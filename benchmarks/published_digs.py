"""DiGS as published, without caching: what `noisewise.sampling.DiGS` is timed against.

Written anew from the algorithm (Chen et al., ICML 2024, arXiv 2402.03008). Like the authors' program it knows the target
through an energy function and autograd, evaluates the acceptance of the Metropolis-within-Gibbs start in its long form
with two energy calls of its own, and begins each denoising chain with a fresh value and gradient: L + 3 calls per sweep.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

Energy = Callable[[Tensor], Tensor]


class MixtureEnergy:
    """GMM-40 through torch.distributions with full covariance factors, in the authors' form.

    `rebuild`: make the distribution at every call, as their program does. `calls` counts evaluations of a batch.
    """

    def __init__(self, means: Tensor, deviation: float, rebuild: bool) -> None:
        self._means = means
        self._factors = torch.diag_embed(torch.full_like(means, deviation))
        self._rebuild = rebuild
        self._built = self._build()
        self.calls = 0

    def _build(self) -> MixtureSameFamily:
        return MixtureSameFamily(
            Categorical(torch.ones(len(self._means))),
            MultivariateNormal(self._means, scale_tril=self._factors, validate_args=False),
            validate_args=False,
        )

    def log_prob(self, x: Tensor) -> Tensor:
        self.calls += 1
        value = (self._build() if self._rebuild else self._built).log_prob(x)
        return torch.where(value < -1e4, -torch.inf, value)

    def __call__(self, x: Tensor) -> Tensor:
        return -self.log_prob(x)


class Langevin:
    """MALA on an energy function, one gradient per step and one to begin with; drift h grad, noise sqrt(2 h)."""

    def __init__(self, position: Tensor, energy: Energy, step_size: float) -> None:
        self._energy = energy
        self._step_size = step_size
        self.position = position
        self._value, self._slope = self._value_and_slope(position)

    def _value_and_slope(self, position: Tensor) -> tuple[Tensor, Tensor]:
        leaf = position.detach().requires_grad_(True)
        value = self._energy(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    def step(self, generator: torch.Generator) -> None:
        x, h = self.position, self._step_size
        proposed = x - h * self._slope + math.sqrt(2 * h) * torch.randn(x.shape, generator=generator)
        value, slope = self._value_and_slope(proposed)
        forward = -self._value - (proposed - x + h * self._slope).square().sum(-1) / (4 * h)
        backward = -value - (x - proposed + h * slope).square().sum(-1) / (4 * h)
        accept = torch.rand(len(x), generator=generator).log() <= backward - forward
        self.position = torch.where(accept.unsqueeze(-1), proposed, x)
        self._value = torch.where(accept, value, self._value)
        self._slope = torch.where(accept.unsqueeze(-1), slope, self._slope)


def published_digs(
    x: Tensor,
    energy: Energy,
    alpha: float,
    sigma: float,
    sweeps: int,
    steps: int,
    step_size: float,
    generator: torch.Generator,
) -> Tensor:
    """`sweeps` sweeps of every chain of x [chain, dim] at one noise level, `steps` MALA steps in each."""
    for _ in range(sweeps):
        noisy = alpha * x + sigma * torch.randn(x.shape, generator=generator)
        z = noisy / alpha + sigma / alpha * torch.randn(x.shape, generator=generator)

        def noise_energy(x: Tensor, noisy: Tensor = noisy) -> Tensor:
            return (noisy - alpha * x).square().sum(-1) / (2 * sigma**2)

        def proposal_energy(x: Tensor, noisy: Tensor = noisy) -> Tensor:
            return (x - noisy / alpha).square().sum(-1) / (2 * (sigma / alpha) ** 2)

        to_z = -energy(z) - noise_energy(z) - proposal_energy(x)
        to_x = -energy(x) - noise_energy(x) - proposal_energy(z)
        accept = torch.rand(len(x), generator=generator).log() <= to_z - to_x
        start = torch.where(accept.unsqueeze(-1), z, x)
        chain = Langevin(start, lambda x, noise_energy=noise_energy: energy(x) + noise_energy(x), step_size)
        for _ in range(steps):
            chain.step(generator)
        x = chain.position
    return x
