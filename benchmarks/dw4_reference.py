"""Make src/noisewise/data/particles/dw4_pt.npy, the reference sample of DW-4: some minutes on one core.

    python benchmarks/dw4_reference.py src/noisewise/data/particles/dw4_pt.npy

Two parallel-tempering runs that share nothing, 125 chains each, from starts four times as wide as the density. Their
agreement and the R-hat of quantities that see no symmetry copy are printed, with standard errors from chain means. Rows
far apart in each chain are kept; each is then turned and relabelled at random, which the density does not see and chains
do slowly, and its centre of mass is removed.
"""

import sys
from pathlib import Path

import arviz
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.metrics import symmetrised
from noisewise.sampling import ParallelTempering, sample
from noisewise.targets import double_well_4

CHAINS, DRAWS, THIN = 125, 1600, 20
ROWS = 10_000


def run(seed: int) -> Float[Tensor, "chain draw 8"]:
    """Cold draws of all chains, a burn-in after the adaptation left out."""
    target = double_well_4(tether=1.0)
    # two seeds may not share starts either
    generator = torch.Generator().manual_seed(1000 + seed)
    init = 8 * torch.randn(CHAINS, 8, generator=generator, dtype=torch.float64)
    drawn = sample(ParallelTempering(target), init=init, draws=DRAWS, thin=THIN, warmup=4000, seed=seed, progress=False)
    print(f"seed {seed}: {drawn.cost}, {len(drawn.settings['betas'])} temperatures, warnings {drawn.warnings}")
    return drawn.positions


def observables(x: Float[Tensor, "chain draw 8"]) -> dict[str, Float[Tensor, "chain draw"]]:
    """Energy without the tether's, mean pair distance, share of pairs nearer than 4."""
    free = double_well_4()
    distances = free.pair_distances(x)
    return {
        "energy": -free.log_prob(x),
        "mean pair distance": distances.mean(-1),
        "P(d < 4)": (distances < 4).double().mean(-1),
        "largest distance": distances.amax(-1),
    }


def main() -> None:
    halves = [run(seed) for seed in (0, 1)]
    for name in observables(halves[0][:1]):
        values = [observables(x)[name] for x in halves]
        means = [float(value.mean()) for value in values]
        errors = [float(value.mean(1).std()) / CHAINS**0.5 for value in values]
        both = torch.cat(values)
        gap = (means[0] - means[1]) / (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        print(
            f"{name}: {float(both.mean()):.4f} +- {float(both.mean(1).std()) / len(both) ** 0.5:.4f} "
            f"(halves {means[0]:.4f} +- {errors[0]:.4f}, {means[1]:.4f} +- {errors[1]:.4f}, {gap:+.1f} s.e.), "
            f"R-hat {float(arviz.rhat(both.numpy())):.4f}"
        )
    every = torch.cat(halves)
    step = DRAWS * len(every) // ROWS
    kept = every[:, step - 1 :: step].reshape(-1, 8)
    assert len(kept) == ROWS
    rows = symmetrised(kept, 4, 2, torch.Generator().manual_seed(2))
    rows = rows[torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))]
    np.save(Path(sys.argv[1]), rows.numpy().astype(np.float32))
    for name, values in observables(rows[None]).items():
        print(f"kept rows, {name}: {float(values.mean()):.4f} +- {float(values.std()) / ROWS**0.5:.4f}")


if __name__ == "__main__":
    main()
