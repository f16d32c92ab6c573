"""A posterior on real data with two label-symmetric modes, from starts that are all in one of them, against its reference."""

import torch

from noisewise import sample
from noisewise.sampling import Draws
from noisewise.targets import posteriordb_mixture


def main(budget: float = 6e5, chains: int = 50) -> Draws:
    """`budget`: value-and-gradient calls over all chains, warm-up included."""
    target = posteriordb_mixture()
    one_mode = target.unconstrain(torch.tensor([-2.0, 2.0, 1.0, 1.0, 0.5])).expand(chains, -1)
    spread = 0.1 * torch.randn(chains, target.dim, generator=torch.Generator().manual_seed(0))
    draws = sample(target, init=one_mode + spread, budget=budget)

    # draws are on the unconstrained scale; means are compared on the scale of the model
    ours, reference = target.constrain(draws.positions), target.constrain(target.reference(10_000))
    se = ours.mean(1).std(0) / chains**0.5
    print(f"{'parameter':10} {'mean':>8} {'± se':>8} {'reference':>10}")
    for index, name in enumerate(target.names):
        mean, exact = float(ours[..., index].mean()), float(reference[:, index].mean())
        print(f"{name:10} {mean:8.3f} {float(se[index]):8.3f} {exact:10.3f}")
    ordered = (ours[..., 0] < ours[..., 1]).float().mean(1)
    print(f"P(mu1 < mu2) = {float(ordered.mean()):.3f} ± {float(ordered.std()) / chains**0.5:.3f}, by symmetry 0.5")
    return draws


if __name__ == "__main__":
    main()
