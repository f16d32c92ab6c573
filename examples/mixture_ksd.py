"""An experiment: does mixing with a known density let a kernel Stein test see wrong mode weights? At a fitting scale, partly."""

import torch

from noisewise.energy import gaussian_reference
from noisewise.targets import GaussianMixture


def two_modes(half: float, left: float) -> GaussianMixture:
    """Normals of deviation 1 at -half and half; `left`: weight of the first."""
    return GaussianMixture(torch.tensor([[-half], [half]]), 1.0, torch.tensor([left, 1 - left]))


def ksd_p_value(
    x: torch.Tensor, score: torch.Tensor, scale: float, generator: torch.Generator, bootstraps: int = 300
) -> float:
    """Kernel Stein discrepancy with the kernel (scale^2 + |x - y|^2)^(-1/2), its p value by a wild bootstrap of signs.

    `x`, `score`: [n, dim], the draws under test and the score of the hypothesis there.
    Source: Liu, Lee & Jordan, ICML 2016; Chwialkowski, Strathmann & Gretton, ICML 2016.
    """
    r = x[:, None] - x[None, :]
    square = r.square().sum(-1)
    q = scale**2 + square
    cross = (r * (score[:, None] - score[None, :])).sum(-1)
    stein = (score @ score.mT) * q**-0.5 + cross * q**-1.5 + x.shape[1] * q**-1.5 - 3 * square * q**-2.5
    signs = torch.randint(2, (bootstraps, len(x)), generator=generator).to(x) * 2 - 1
    replicates = ((signs @ stein) * signs).mean(1)
    return float((replicates >= stein.mean(1).sum()).double().mean())


def p_values(half: float, left: float, scale: float, n: int, beta: float, seed: int) -> tuple[float, float]:
    """Plain and mixed test of `n` draws with weight `left` against weights of one half each."""
    generator = torch.Generator().manual_seed(seed)
    x, hypothesis = two_modes(half, left).sample(n, generator), two_modes(half, 0.5)
    plain = ksd_p_value(x, hypothesis.score(x), scale, generator)
    m = gaussian_reference(x)
    mixed = torch.cat([x[: round(beta * n)], m.sample(n - round(beta * n), generator)])
    leaf = mixed.requires_grad_(True)
    log_mixture = torch.logaddexp(
        torch.tensor(beta).log() + hypothesis.log_prob(leaf), torch.tensor(1 - beta).log() + m.log_prob(leaf)
    )
    (score,) = torch.autograd.grad(log_mixture.sum(), leaf)
    return plain, ksd_p_value(mixed.detach(), score, scale, generator)


def main(repeats: int = 20, n: int = 600) -> dict[tuple[float, float, float], tuple[float, float]]:
    """Share of rejections at the 5 % level, plain and mixed, by (half distance, kernel scale, true left weight)."""
    found = {}
    print(f"{'modes':>8} {'kernel scale':>13} {'true weight':>12} {'plain':>7} {'mixed':>7}")
    for half, scale in ((3.0, 1.0), (3.0, 3.0), (6.0, 6.0)):
        for left in (0.5, 0.25):
            pairs = torch.tensor([p_values(half, left, scale, n, 0.5, seed) for seed in range(repeats)])
            plain, mixed = (pairs < 0.05).double().mean(0).tolist()
            found[half, scale, left] = (plain, mixed)
            print(f"{f'±{half:g}':>8} {scale:13g} {left:12g} {plain:7.2f} {mixed:7.2f}")
    return found


if __name__ == "__main__":
    main()
