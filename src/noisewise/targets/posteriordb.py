"""A two-component mixture posterior from posteriordb, with reference draws: two label-symmetric modes on real data."""

import io
import json
import math
import zipfile
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["MixturePosterior", "OrderedMixturePosterior", "posteriordb_mixture"]

_PRIOR_VARIANCE = 4.0
_PARAMETERS = ("mu[1]", "mu[2]", "sigma[1]", "sigma[2]", "theta")


class MixturePosterior:
    """y ~ theta N(mu1, sigma1^2) + (1 - theta) N(mu2, sigma2^2), on the unconstrained scale.

    x = (mu1, mu2, log sigma1, log sigma2, logit theta), log-Jacobian included; priors mu ~ N(0, 4), sigma half-normal
    of scale 2, theta ~ Beta(5, 5); up to a constant. Swapping the labels changes nothing. `names` are those of
    `constrain`d draws. Made by `posteriordb_mixture`.
    Source: posteriordb, low_dim_gauss_mix_collapse on the data of low_dim_gauss_mix (BSD 3-clause).
    """

    dim = 5

    def __init__(self) -> None:
        self.names = list(_PARAMETERS)
        self.data = torch.tensor(_shipped("low_dim_gauss_mix.json.zip")["y"], dtype=torch.float64)
        self._cache: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def _rows(self, x: Tensor) -> Tensor:
        self._check_dim(x)
        return x.reshape(-1, self.dim)

    def _check_dim(self, x: Tensor) -> None:
        if x.shape[-1] != self.dim:
            raise InvalidInput(
                f"x has {x.shape[-1]} coordinates (shape {tuple(x.shape)}), the target has dim {self.dim}"
            )

    def _data(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data [N] and the moments (1, y) [N, 2] of the data, in the dtype of x."""
        key = (x.dtype, x.device)
        if key not in self._cache:
            moments = torch.stack([torch.ones_like(self.data), self.data], -1)
            self._cache[key] = (self.data.to(x), moments.to(x))
        return self._cache[key]

    def _log_density(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Log density [n], the peaks of both components [n, 2], their log terms [n, N], and exp of minus their distance."""
        data, _ = self._data(x)
        mu, log_sigma, logit = x[:, 0:2], x[:, 2:4], x[:, 4]
        sigma = log_sigma.exp()
        log_theta = torch.nn.functional.logsigmoid(torch.stack([logit, -logit], -1))
        # -z^2 / 2 of each component at each datum, then its weight and peak: differences first, exact for narrow ones
        scale = math.sqrt(0.5) / sigma
        peak = log_theta - log_sigma
        first, second = (
            torch.sub(
                peak[:, k].unsqueeze(-1),
                ((data - mu[:, k, None]) * scale[:, k, None]).square(),
            )
            for k in (0, 1)
        )
        smaller = _exp_of_minus_abs(first - second)
        log_likelihood = (torch.maximum(first, second) + smaller.log1p()).sum(-1)
        log_likelihood = log_likelihood - len(data) / 2 * math.log(2 * math.pi)
        log_prior = -(mu.square() + sigma.square()).sum(-1) / (2 * _PRIOR_VARIANCE) + 4 * log_theta.sum(-1)
        log_jacobian = log_sigma.sum(-1) + log_theta.sum(-1)
        return log_likelihood + log_prior + log_jacobian, peak, (first, second), smaller

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log posterior density of unconstrained parameters."""
        return self._log_density(self._rows(x))[0].reshape(x.shape[:-1])

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score in closed form, from the responsibilities of the data."""
        rows = self._rows(x)
        log_prob, peak, terms, smaller = self._log_density(rows)
        _, moments = self._data(x)
        # the smaller share is exact in smaller / (1 + smaller), the larger one is the rest
        share = torch.where(terms[0] >= terms[1], 1.0, smaller) / (1 + smaller)
        first = share @ moments
        count, total = torch.stack([first, moments.sum(0) - first], 1).unbind(-1)  # each [n, component]
        mu, sigma, theta = rows[:, 0:2], rows[:, 2:4].exp(), rows[:, 4].sigmoid()
        precision = 1 / sigma.square()
        score_mu = (total - mu * count) * precision - mu / _PRIOR_VARIANCE
        # sum of share z^2 out of the log terms: moments of the data would cancel in float32
        pull = torch.stack([torch.linalg.vecdot(r, t) for r, t in zip((share, 1 - share), terms, strict=True)], -1)
        spread = 2 * (peak * count - pull)
        score_log_sigma = spread - count + 1 - sigma.square() / _PRIOR_VARIANCE
        # Beta(5, 5) and the Jacobian together: 5 log theta + 5 log(1 - theta)
        score_logit = count[:, 0] - theta * len(moments) + 5 * (1 - 2 * theta)
        score = torch.cat([score_mu, score_log_sigma, score_logit.unsqueeze(-1)], -1)
        return log_prob.reshape(x.shape[:-1]), score.reshape(x.shape)

    def constrain(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """(mu1, mu2, sigma1, sigma2, theta) of unconstrained parameters."""
        return torch.cat([x[..., 0:2], x[..., 2:4].exp(), x[..., 4:].sigmoid()], -1)

    def unconstrain(self, parameters: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Inverse of `constrain`. Raises `InvalidInput` for a sigma <= 0 or a theta outside (0, 1)."""
        sigma, theta = parameters[..., 2:4], parameters[..., 4:]
        if not bool((sigma > 0).all()):
            raise InvalidInput(f"sigma must be above 0, got {sigma.min().item():.6g}")
        if not bool(((theta > 0) & (theta < 1)).all()):
            outside = theta[~((theta > 0) & (theta < 1))]
            raise InvalidInput(f"theta must lie in (0, 1), got {outside[0].item():.6g}")
        return torch.cat([parameters[..., 0:2], sigma.log(), theta.logit()], -1)

    def swap_labels(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The same mixture with its two components named the other way round."""
        return torch.stack([x[..., 1], x[..., 0], x[..., 3], x[..., 2], -x[..., 4]], -1)

    def reference(self, n: int, seed: int = 0) -> Float[Tensor, "n 5"]:
        """`n` of 10 000 exact draws (float64, unconstrained), in random order, each with its labels swapped at random.

        The ordered model's reference draws of posteriordb, on the same data, symmetrised: exact, as priors and
        likelihood do not see the labels. Raises `InvalidInput` for `n` above 10 000.
        """
        draws, generator = _ordered_draws(n, seed)
        x = self.unconstrain(draws)
        swapped = torch.rand(len(x), 1, generator=generator, dtype=torch.float64) < 0.5
        return torch.where(swapped, self.swap_labels(x), x)


class OrderedMixturePosterior(MixturePosterior):
    """The same posterior with mu1 < mu2, hence one mode; the second coordinate is log(mu2 - mu1).

    Source: posteriordb, low_dim_gauss_mix.
    """

    def _free(self, x: Tensor) -> Tensor:
        """Coordinates of the unordered model."""
        self._check_dim(x)
        return torch.cat([x[..., :1], x[..., :1] + x[..., 1:2].exp(), x[..., 2:]], -1)

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log posterior density of unconstrained parameters."""
        return super().log_prob(self._free(x)) + x[..., 1]

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score in closed form, from the responsibilities of the data."""
        log_prob, free = super().log_prob_and_score(self._free(x))
        score = torch.cat([free[..., :1] + free[..., 1:2], free[..., 1:2] * x[..., 1:2].exp() + 1, free[..., 2:]], -1)
        return log_prob + x[..., 1], score

    def constrain(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """(mu1, mu2, sigma1, sigma2, theta) of unconstrained parameters, mu1 < mu2."""
        return super().constrain(self._free(x))

    def unconstrain(self, parameters: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Inverse of `constrain`. Raises `InvalidInput` also where mu1 < mu2 does not hold."""
        step = parameters[..., 1:2] - parameters[..., 0:1]
        if not bool((step > 0).all()):
            raise InvalidInput(f"mu must be ordered, mu1 < mu2, but mu2 - mu1 is {step.min().item():.6g}")
        free = super().unconstrain(parameters)
        return torch.cat([free[..., :1], step.log(), free[..., 2:]], -1)

    def swap_labels(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Not defined: the order names the components. Raises `InvalidInput`."""
        raise InvalidInput("the ordered model has no label symmetry; use posteriordb_mixture(collapse=True)")

    def reference(self, n: int, seed: int = 0) -> Float[Tensor, "n 5"]:
        """`n` of the 10 000 reference draws of posteriordb (float64, unconstrained), in random order."""
        return self.unconstrain(_ordered_draws(n, seed)[0])


def _exp_of_minus_abs(gap: Tensor) -> Tensor:
    # cut above the subnormal numbers, on which exp and log1p are an order of magnitude slower
    return (-gap.abs()).clamp(min=0.92 * math.log(torch.finfo(gap.dtype).tiny)).exp()


def _shipped(name: str) -> Any:
    packed = (files("noisewise") / "data" / "posteriordb-gauss-mix" / name).read_bytes()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def _ordered_draws(n: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """Constrained draws of the ordered model, [n, 5], and the generator that chose them."""
    n = check_count("n", n)
    chains = _shipped("reference_draws.json.zip")
    draws = torch.tensor([[chain[name] for name in _PARAMETERS] for chain in chains], dtype=torch.float64)
    draws = draws.mT.reshape(-1, len(_PARAMETERS))
    if n > len(draws):
        raise InvalidInput(f"posteriordb holds {len(draws)} reference draws, {n} were asked for")
    generator = torch.Generator().manual_seed(seed)
    return draws[torch.randperm(len(draws), generator=generator)[:n]], generator


def posteriordb_mixture(collapse: bool = True) -> MixturePosterior:
    """A mixture posterior of posteriordb with two label-symmetric modes, or with `collapse=False` its ordered form.

    5 parameters, 1000 data; `reference(n)` gives exact draws of either.
    """
    return MixturePosterior() if collapse else OrderedMixturePosterior()
