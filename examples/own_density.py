"""A density of your own: two far modes in ten dimensions, where plain DiGS is stuck and says so, and the default is right."""

import torch
from torch import Tensor

from noisewise import as_target, sample
from noisewise.metrics import mode_weights
from noisewise.sampling import DiGS, Draws

DIM, RIGHT_SHARE = 10, 0.7
RIGHT = torch.full((DIM,), 5 / DIM**0.5)  # the modes are ten standard deviations apart


def log_prob(x: Tensor) -> Tensor:
    """[batch, 10] -> [batch]; any constant may be missing. Plain torch: the gradient is found by autograd."""
    left = -(x + RIGHT).square().sum(-1) / 2
    right = -(x - RIGHT).square().sum(-1) / 2
    shares = torch.tensor([1 - RIGHT_SHARE, RIGHT_SHARE]).log()
    return torch.logaddexp(left + shares[0], right + shares[1])


def main(budget: float = 3e5) -> tuple[Draws, Draws]:
    """The same budget in value-and-gradient calls for both; every chain starts in the left mode, the lighter one."""
    target = as_target(log_prob, dim=DIM)
    # a warning is coming: the noise that would reach the other mode is never accepted in ten dimensions
    plain = sample(DiGS(target), init=-RIGHT, chains=20, budget=budget)
    default = sample(target, init=-RIGHT, chains=20, budget=budget)
    for name, draws in (("plain DiGS", plain), ("sample(target)", default)):
        weights = mode_weights(draws.positions, torch.stack([-RIGHT, RIGHT]))
        share, se = float(weights.weights[1]), float(weights.se[1])
        print(f"{name:15} weight of the right mode {share:.3f} ± {se:.3f}, truth {RIGHT_SHARE}")
    return plain, default


if __name__ == "__main__":
    main()
