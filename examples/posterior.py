"""A posterior on real data with two label-symmetric modes, sampled by the default kernel and set against its reference."""

from noisewise import sample
from noisewise.sampling import Draws
from noisewise.targets import posteriordb_mixture


def main(budget: float = 6e5, chains: int = 20) -> Draws:
    """`budget`: value-and-gradient calls over all chains, warm-up included."""
    target = posteriordb_mixture()
    # starts are spread out (standard normal, the default): no sampler finds a mode that its warm-up never met
    draws = sample(target, chains=chains, budget=budget)

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
