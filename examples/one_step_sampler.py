"""A network that samples a density in one step: trained on the density alone, then measured against exact draws."""

import rich
import torch
from rich.table import Table

from noisewise.metrics import Measurement
from noisewise.neural import DiKLSampler, evaluate
from noisewise.targets import GaussianMixture

# three modes of unequal weight; put your own log density here: DiKLSampler(log_prob, dim=2)
TARGET = GaussianMixture(torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 6.0]]), 1.0, torch.tensor([0.5, 0.3, 0.2]))


def main(steps: int = 500, calls: float = 3e5) -> tuple[DiKLSampler, dict[str, Measurement]]:
    """`steps`: of the generator, so that every machine makes the same sampler; `calls`: of the density, by the chains."""
    sampler = DiKLSampler(TARGET, hidden=64, depth=3).fit(max_steps=steps, max_gradients=calls)
    # the density is not called any more: draws cost one network evaluation each
    draws = sampler.sample(2_000)
    found = evaluate(draws, TARGET)
    table = Table("measurement", "value", "what perfect samples score")
    for name, one in found.items():
        table.add_row(name, f"{float(one):.4g}", f"{float(one.floor or 0):.4g}")
    rich.print(table)
    rich.print(f"training: {sampler.cost.gradients} calls of the density, {sampler.cost.seconds:.1f} s")
    return sampler, found


if __name__ == "__main__":
    main()
