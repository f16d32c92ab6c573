"""Protocol D: three classes of digits in their first three principal components, made unbalanced: are shares recovered?"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from noisewise.comparison import Problem
from noisewise.energy.experiments.mfd.fits import Density, density_systems
from noisewise.energy.reference import gaussian_reference
from noisewise.errors import require
from noisewise.metrics.measurement import Measurement
from noisewise.typing import Cost

__all__ = ["digit_classes"]

# classes that lie apart in three components, with the rows that are kept of each
_CLASSES = {0: 20, 4: 60, 6: 160}
_STEPS = {"quick": 150, "cpu": 400, "paper": 5000}
_DRAWS = 100_000
_QUICK = ("MFD, beta .8", "FD")


@dataclass(frozen=True)
class _Fit:
    density: Density
    seed: int

    @property
    def cost(self) -> Cost:
        return self.density.cost

    @property
    def notes(self) -> tuple[str, ...]:
        return self.density.notes


def digit_classes(scale: str) -> Problem:
    """The unbalanced digits at `scale`."""

    def data(seed: int) -> Tensor:
        return _rows(seed)[0]

    systems = density_systems(data, 64, _Fit, _mode_width(), None, with_one_stage=scale != "quick")
    if scale == "quick":
        systems = tuple(system for system in systems if system.name in _QUICK)
    kept = ", ".join(f"{rows} of digit {digit}" for digit, rows in _CLASSES.items())
    return Problem(
        protocol="D",
        name="unbalanced digits",
        budget=_STEPS[scale],
        systems=systems,
        measure=_measure,
        criterion="TV of class shares",
        notes=(
            f"unbalanced digits: {kept}, drawn anew for each seed, in three principal components; {_STEPS[scale]} training "
            "steps. Space is divided by a linear discriminant of all rows of these classes; shares and normalisers by "
            f"importance weights of {_DRAWS:,} draws of a wide Gaussian. Held out: the rows that were not kept, "
            "reweighted to the same shares.",
        ),
    )


@functools.lru_cache(maxsize=1)
def _components() -> tuple[Tensor, Tensor]:
    """All rows of the classes in three components of unit total scale, float32, and their class index."""
    bunch = require("sklearn.datasets", "sampling").load_digits()
    digit = torch.as_tensor(bunch.target)
    kept = torch.isin(digit, torch.tensor(list(_CLASSES)))
    x = torch.as_tensor(bunch.data[kept.numpy()])
    projected = require("sklearn.decomposition", "sampling").PCA(3, random_state=0).fit_transform(x.numpy())
    projected = torch.as_tensor(projected, dtype=torch.float32)
    label = torch.searchsorted(torch.tensor(sorted(_CLASSES)), digit[kept])
    return projected / projected.std(), label


@functools.lru_cache(maxsize=1)
def _discriminant() -> Tensor:
    """Linear discriminant: rows of [class, 1 + 3] with the intercept first."""
    x, label = _components()
    lda = require("sklearn.discriminant_analysis", "sampling").LinearDiscriminantAnalysis(priors=[1 / 3] * 3)
    lda.fit(x.numpy(), label.numpy())
    return torch.cat([torch.as_tensor(lda.intercept_).unsqueeze(1), torch.as_tensor(lda.coef_)], 1).float()


def _classify(x: Tensor) -> Tensor:
    plane = _discriminant()
    return (plane[:, 0] + x @ plane[:, 1:].T).argmax(1)


def _mode_width() -> float:
    x, label = _components()
    return float(torch.stack([x[label == k].std(0).mean() for k in range(len(_CLASSES))]).mean())


@functools.lru_cache(maxsize=8)
def _rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Kept rows in random order; the others; the class of the others."""
    x, label = _components()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    chosen = torch.cat(
        [order[label[order] == k][:rows] for k, rows in enumerate(_CLASSES[digit] for digit in sorted(_CLASSES))]
    )
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[chosen] = False
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    return x[chosen], x[rest], label[rest]


def _measure(fit: _Fit) -> dict[str, Measurement]:
    kept, rest, rest_class = _rows(fit.seed)
    truth = torch.bincount(_classify(kept), minlength=3) / len(kept)
    wide = gaussian_reference(kept, inflate=1.5)
    drawn = wide.sample(_DRAWS, torch.Generator().manual_seed(fit.seed + 5)).to(kept)
    with torch.no_grad():
        log_ratio = (fit.density.log_density(drawn) - wide.log_prob(drawn)).double()
        log_z = float(log_ratio.logsumexp(0)) - torch.tensor(float(_DRAWS)).log()
        held_out = fit.density.log_density(rest).double() - log_z
    weight = log_ratio.softmax(0)
    shares = weight @ torch.nn.functional.one_hot(_classify(drawn), 3).double()
    # the rest has other shares than the kept rows: each class counts by its share among the latter
    per_class = torch.stack([held_out[rest_class == k].mean() for k in range(3)])
    counts = torch.tensor([_CLASSES[digit] for digit in sorted(_CLASSES)], dtype=torch.float64)
    return {
        "TV of class shares": Measurement(float((shares - truth).abs().sum() / 2), floor=0.0, n=len(kept)),
        "share of the rarest class": Measurement(
            float(shares[0]), floor=float(truth[0]), n=len(kept), better="neither"
        ),
        "held-out log density": Measurement(
            float(per_class @ counts / counts.sum()), n=len(rest), unit="nats", better="higher"
        ),
    }
