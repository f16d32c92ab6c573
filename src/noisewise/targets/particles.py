"""Small clusters of particles, the usual bench for neural samplers: DW-4 and Lennard-Jones in any number."""

from collections.abc import Callable
from importlib.resources import as_file, files

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["DoubleWell4", "LennardJones", "LennardJones13", "double_well_4", "lennard_jones"]


# energy of a pair and its derivative, both as functions of the squared distance
_PairEnergy = Callable[[Tensor], tuple[Tensor, Tensor]]


class _ParticleCluster:
    """log p = -(sum over pairs of energy(d_ij^2) + trap / 2 sum_i |x_i - mean|^2 + tether n / 2 |mean|^2).

    With `tether` 0 the density does not change when all particles move together, as in the literature, so it has no
    finite integral; a positive tether makes it proper and leaves the law of relative positions as it was.
    """

    def __init__(self, particles: int, space: int, pair_energy: _PairEnergy, trap: float, tether: float) -> None:
        self.particles = particles
        self.dim = particles * space
        self.names = [f"{axis}{particle}" for particle in range(particles) for axis in "xyz"[:space]]
        self.tether = _checked_tether(tether)
        self._space = space
        self._pair_energy = pair_energy
        self._trap = trap
        first, second = torch.triu_indices(particles, particles, 1)
        incidence = torch.zeros(len(first), particles, dtype=torch.float64)
        incidence[torch.arange(len(first)), first] = 1
        incidence[torch.arange(len(first)), second] = -1
        self._incidence = incidence

    def _energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy [n] and its gradient as [particles, space * n]."""
        if x.shape[-1] != self.dim:
            raise InvalidInput(
                f"x has {x.shape[-1]} coordinates (shape {tuple(x.shape)}), the target has dim {self.dim}"
            )
        # one column per configuration: all differences are then one product, exact as every row of it is +1, -1 and 0
        position = x.reshape(-1, self.dim).T.reshape(self.particles, -1)
        incidence = self._incidence.to(position)
        difference = (incidence @ position).reshape(len(incidence), self._space, -1)
        energy, slope = self._pair_energy(difference.square().sum(1))
        gradient = incidence.T @ (2 * slope.unsqueeze(1) * difference).flatten(1)
        mean = position.mean(0)
        offset = position - mean
        force = self._trap * offset + self.tether * mean
        trapped = (self._trap * offset.square().sum(0) + self.tether * self.particles * mean.square()) / 2
        return energy.sum(0) + trapped.reshape(self._space, -1).sum(0), gradient + force

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log density, minus the energy at temperature 1."""
        return -self._energy(x)[0].reshape(x.shape[:-1])

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score (the forces), in closed form."""
        energy, gradient = self._energy(x)
        return -energy.reshape(x.shape[:-1]), -gradient.reshape(self.dim, -1).T.reshape(x.shape)

    def pair_distances(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch pairs"]:
        """Distances of all unordered pairs, the observable that sees neither rotation nor translation."""
        first, second = torch.triu_indices(self.particles, self.particles, 1, device=x.device)
        position = x.reshape(*x.shape[:-1], self.particles, self._space)
        return torch.linalg.vector_norm(position[..., first, :] - position[..., second, :], dim=-1)


class DoubleWell4(_ParticleCluster):
    """Four particles in the plane with pair energy 0.9 (d - 4)^4 - 4 (d - 4)^2, made by `double_well_4`."""

    def __init__(self, tether: float = 0.0) -> None:
        super().__init__(4, 2, _double_well_energy, trap=0.0, tether=tether)

    def reference(self, n: int, seed: int = 0) -> Float[Tensor, "n 8"]:
        """`n` of 10 000 shipped samples (float32, free of the centre of mass), in random order.

        Made by parallel tempering here, from two runs that agree: mean pair distance 4.0431 +- 0.0015, P(d < 4) 0.4954 +-
        0.0005, mean energy -22.5423 +- 0.0034. The split published with iDEM (arXiv 2402.06121) has 3.97 and
        is not used. Raises `InvalidInput` for `n` above 10 000.
        """
        return _shipped("dw4_pt.npy", n, seed)


class LennardJones(_ParticleCluster):
    """Particles in space: pair energy 2 (d^-12 - 2 d^-6) and a harmonic trap about the mean. Made by `lennard_jones`.

    The pair energy is the textbook one counted in both orders of a pair, as the neural-sampler literature does, so that
    the least energy of 13 particles is -88.65 plus the trap. Below d = 0.1 (energy above 10^12) it goes on as a
    parabola in d: coincident particles have a huge finite energy and a finite score.
    """

    def __init__(self, particles: int, tether: float = 0.0) -> None:
        super().__init__(particles, 3, _lennard_jones_energy, trap=1.0, tether=tether)


class LennardJones13(LennardJones):
    """Thirteen Lennard-Jones particles, with reference samples."""

    def __init__(self, tether: float = 0.0) -> None:
        super().__init__(13, tether)

    def reference(self, n: int, seed: int = 0) -> Float[Tensor, "n 39"]:
        """`n` of 10 000 shipped samples (float32), in random order; the chain behind them keeps particle labels.

        Source: iDEM validation split (arXiv 2402.06121), MIT licence. Raises `InvalidInput` for `n` above 10 000.
        """
        return _shipped("lj13_val.npy", n, seed)


def _double_well_energy(square: Tensor) -> tuple[Tensor, Tensor]:
    # the energy has a cusp at coincidence; the floor makes its score 0 there
    distance = square.clamp(min=1e-12).sqrt()
    offset = distance - 4
    return (0.9 * offset.square() - 4) * offset.square(), (1.8 * offset.square() - 4) * offset / distance


_CORE_SQUARE = 0.1**2


def _lennard_jones_energy(square: Tensor) -> tuple[Tensor, Tensor]:
    outside = square.clamp(min=_CORE_SQUARE)
    inverse_cube = outside.reciprocal() ** 3
    slope = 12 * (1 - inverse_cube) * inverse_cube / outside
    return 2 * (inverse_cube - 2) * inverse_cube + slope * (square - outside), slope


def _checked_tether(tether: float) -> float:
    if not isinstance(tether, int | float) or not 0 <= tether < float("inf"):
        raise InvalidInput(f"tether must be a finite number, 0 or above, got {tether!r}")
    return float(tether)


def _shipped(name: str, n: int, seed: int) -> Tensor:
    n = check_count("n", n)
    with as_file(files("noisewise") / "data" / "particles" / name) as path:
        samples = np.load(path, allow_pickle=False)
    if n > len(samples):
        raise InvalidInput(f"{name} holds {len(samples)} reference samples, {n} were asked for")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:n]
    return torch.from_numpy(samples)[order]


def double_well_4(tether: float = 0.0) -> DoubleWell4:
    """DW-4: four particles in the plane, dim 8, ordered (x0, y0, x1, y1, ...).

    `tether` (0 or above) holds the centre of mass: with 0, the literature's form, it is free and the density improper;
    give 1 to sample it in all 8 coordinates. Relative positions have the same law. Raises `InvalidInput`.
    Source: Köhler, Klein & Noé, ICML 2020; constants as in Akhound-Sadegh et al., ICML 2024.
    """
    return DoubleWell4(tether)


def lennard_jones(particles: int = 13, tether: float = 0.0) -> LennardJones:
    """LJ-n: `particles` (2 or more) in space, dim 3 n, ordered (x0, y0, z0, x1, ...); LJ-13 comes with `reference`.

    `tether` (0 or above) holds the centre of mass: with 0, the literature's form, it is free and the density improper;
    give 1 to sample it in all coordinates. Relative positions have the same law. Raises `InvalidInput`.
    Source: Köhler, Klein & Noé, ICML 2020; constants as in Akhound-Sadegh et al., ICML 2024.
    """
    particles = check_count("particles", particles, minimum=2)
    return LennardJones13(tether) if particles == 13 else LennardJones(particles, tether)
