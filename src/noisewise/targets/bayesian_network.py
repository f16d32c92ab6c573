"""The posterior of a small Bayesian neural network on synthetic data: 550 weights, batched over chains."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["BayesianNetwork", "Data", "bnn"]

_INPUTS, _HIDDEN, _ROWS = 20, 25, 500
_BIAS_SCALE, _NOISE = 0.1, 0.1
# the first layer's weights, then its biases: as one [inputs + 1, hidden] matrix they meet rows extended by a constant
_FIRST = (_INPUTS + 1) * _HIDDEN


class Data(NamedTuple):
    """Inputs and responses of a regression."""

    x: Float[Tensor, "row input"]
    y: Float[Tensor, " row"]


class BayesianNetwork:
    """Posterior over theta = (W1, b1, w2) of y = relu(x W1 / sqrt(20) + b1 / 10) . w2 / 5 + 0.1 eps, prior N(0, I).

    500 training and 500 test points from a network drawn from the prior; `train`, `test` (x, y), `true_parameters`
    [550]. Made by `bnn`. The density is unnormalised: minus squared error / (2 * 0.01) minus |theta|^2 / 2.
    Source: Chen et al., ICML 2024, arXiv 2402.03008, section 5.2 (the layout; numbers drawn from our own seed).
    """

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(check_count("seed", seed, minimum=0))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.dim = _FIRST + _HIDDEN
        self.names = [
            *(f"W1[{i},{j}]" for i in range(_INPUTS) for j in range(_HIDDEN)),
            *(f"b1[{j}]" for j in range(_HIDDEN)),
            *(f"w2[{j}]" for j in range(_HIDDEN)),
        ]
        teacher = normal(self.dim)
        self.true_parameters = teacher.to(dtype)
        inputs = normal(2, _ROWS, _INPUTS)
        responses = torch.stack([self._outputs(teacher.unsqueeze(0), _extended(x))[0][0] for x in inputs])
        responses = responses + _NOISE * normal(2, _ROWS)
        self.train, self.test = (Data(x.to(dtype), y.to(dtype)) for x, y in zip(inputs, responses, strict=True))
        self._extended_train = _extended(self.train.x)
        self._extended_test = _extended(self.test.x)

    def _rows(self, theta: Tensor) -> Tensor:
        if theta.shape[-1] != self.dim:
            raise InvalidInput(
                f"theta has {theta.shape[-1]} parameters (shape {tuple(theta.shape)}), the network has {self.dim}"
            )
        return theta.reshape(-1, self.dim)

    @staticmethod
    def _outputs(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Network outputs [n, row] and hidden activities [n, row, hidden]."""
        first = theta[:, :_FIRST].reshape(-1, _INPUTS + 1, _HIDDEN)
        hidden = (rows @ first).relu_()
        return torch.bmm(hidden, theta[:, _FIRST:].unsqueeze(-1)).squeeze(-1) / math.sqrt(_HIDDEN), hidden

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log posterior of the weights `x`."""
        theta = self._rows(x)
        error = self._outputs(theta, self._extended_train.to(x))[0] - self.train.y.to(x)
        return self._log_posterior(theta, error).reshape(x.shape[:-1])

    @staticmethod
    def _log_posterior(theta: Tensor, error: Tensor) -> Tensor:
        return -error.square().sum(-1) / (2 * _NOISE**2) - theta.square().sum(-1) / 2

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log posterior and score, by back-propagation written out."""
        theta, rows = self._rows(x), self._extended_train.to(x)
        output, hidden = self._outputs(theta, rows)
        error = output - self.train.y.to(x)
        log_prob = self._log_posterior(theta, error)
        pull = error * (-1 / (_NOISE**2 * math.sqrt(_HIDDEN)))
        last = torch.bmm(pull.unsqueeze(1), hidden).squeeze(1)
        # relu's gate is where the activity is positive; w2 is the same for all rows and multiplies after their sum
        gated = pull.unsqueeze(-1) * (hidden > 0)
        first = (rows.T @ gated) * theta[:, _FIRST:].unsqueeze(1)
        score = torch.cat([first.flatten(1), last], 1) - theta
        return log_prob.reshape(x.shape[:-1]), score.reshape(x.shape)

    def _test_log_likelihood(self, theta: Float[Tensor, "n dim"]) -> Float[Tensor, "n row"]:
        rows, y = self._extended_test.to(theta), self.test.y.to(theta)
        # 256 draws at a time: the activities of one draw take 50 kB
        output = torch.cat([self._outputs(part, rows)[0] for part in self._rows(theta).split(256)])
        return -(output - y).square() / (2 * _NOISE**2) - math.log(_NOISE) - math.log(2 * math.pi) / 2

    def test_nll(self, theta: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Mean Gaussian negative log-likelihood of the test points under each single draw."""
        return -self._test_log_likelihood(theta).mean(-1)

    def log_predictive(self, theta: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Mean over test points of the log of the likelihood averaged over all draws: the posterior predictive."""
        return (self._test_log_likelihood(theta).logsumexp(0) - math.log(len(theta))).mean()


def _extended(x: Tensor) -> Tensor:
    """Scaled inputs with a last column that carries the bias."""
    return torch.cat([x / math.sqrt(_INPUTS), torch.full_like(x[:, :1], _BIAS_SCALE)], 1)


def bnn(seed: int = 0, dtype: torch.dtype = torch.float32) -> BayesianNetwork:
    """The posterior of a 20-25-1 ReLU regression network with 550 weights; `seed` draws network and data.

    `dtype` is that of the stored data; log densities follow the dtype of their argument. Raises `InvalidInput`.
    """
    return BayesianNetwork(seed, dtype)
