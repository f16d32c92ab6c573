"""The first run: forty modes in the plane, sampled by the default kernel, and what the run says of itself."""

import rich

from noisewise import sample
from noisewise.sampling import Draws
from noisewise.targets import gmm40


def main(budget: float = 4e5) -> Draws:
    """`budget`: value-and-gradient calls over all chains, warm-up included."""
    target = gmm40()
    draws = sample(target, chains=50, budget=budget)
    # without centres the modes are looked for in the draws, and neighbours that overlap count as one
    rich.print(draws.summary(target.mode_means).table())
    return draws


if __name__ == "__main__":
    main()
