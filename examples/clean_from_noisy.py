"""Clean samples from a model of noisy data: train one energy on noisy rings, then sample the rings that it implies."""

import torch

from noisewise.denoising import Energy
from noisewise.energy import EnergyNet, fit_energy
from noisewise.noise import Corruption
from noisewise.sampling import DenoisingGibbs, WalkJump, sample


def rings(n: int, generator: torch.Generator) -> torch.Tensor:
    """Two thin circles of radii .65 and 1.3."""
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    radius = torch.where(torch.rand(n, generator=generator) < 0.5, 0.65, 1.3) + 0.05 * torch.randn(
        n, generator=generator
    )
    return radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)


def main(steps: int = 2000, chains: int = 1000) -> dict[str, torch.Tensor]:
    """`steps`: of training. Returns the last states of both samplers and of the noisy data, [chain, 2]."""
    generator, noise = torch.Generator().manual_seed(0), Corruption(a=1.0, s=0.2)
    data = rings(10_000, generator)
    net = EnergyNet(2)
    fit_energy(net, data, "dsm", noise, steps=steps, learning_rate=2e-3)

    start = torch.randn(chains, 2, generator=generator)
    found = {"noisy data": noise.corrupt(data[:chains], generator)}
    for name, kernel in {
        "denoising Gibbs": DenoisingGibbs(Energy(net), noise),
        "walk-jump": WalkJump(Energy(net), noise),
    }.items():
        found[name] = sample(kernel, init=start, draws=1, thin=60, progress=False).positions[:, -1]
    for name, x in found.items():
        radius = x.norm(dim=-1)
        off = torch.minimum((radius - 0.65).abs(), (radius - 1.3).abs())
        print(f"{name:16} mean distance to the nearest ring {float(off.mean()):.3f} (data: 0.040)")
    return found


if __name__ == "__main__":
    main()
