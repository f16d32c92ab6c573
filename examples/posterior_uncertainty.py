"""How sure is a denoiser? Handwritten digits under noise, with an error bar for every pixel and its calibration."""

from typing import NamedTuple

import rich
import torch
from rich.table import Table
from sklearn.datasets import load_digits

from noisewise.denoising import GaussianPosterior, Score, gaussian_posterior, isotropic_variance
from noisewise.noise import Corruption
from noisewise.targets import GaussianMixture


class Calibration(NamedTuple):
    """Held-out digits: mean squared error, the same over the mean variance (1 is right), log density per pixel."""

    error: float
    ratio: float
    log_prob: float


def main(rows: int = 200, noise: float = 0.3) -> dict[str, Calibration]:
    """`rows`: held-out digits; `noise`: standard deviation, pixels lie in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    x, label = torch.from_numpy(pixels) / 16, torch.from_numpy(labels)
    model = digits_model(x[:-rows], label[:-rows], noise)
    # what follows only sees a score of noisy data; put your own network's here: Score(net), Energy(net), Denoiser(net)
    corruption, generator = Corruption(1.0, noise), torch.Generator().manual_seed(0)
    clean = x[-rows:].reshape(-1, 8, 8)
    x_t = corruption.corrupt(clean, generator)
    c = isotropic_variance(model, x[:-rows].reshape(-1, 8, 8), corruption, generator)
    posteriors = {
        "isotropic": gaussian_posterior(model, x_t, corruption, "isotropic", variance=c),
        "diagonal": gaussian_posterior(model, x_t, corruption, "diagonal"),
        "full": gaussian_posterior(model, x_t, corruption, "full"),
    }
    found = {name: calibration(posterior, clean) for name, posterior in posteriors.items()}
    table = Table("covariance", "squared error", "error / variance", "log density per pixel")
    for name, row in found.items():
        table.add_row(name, *(f"{value:.4f}" for value in row))
    rich.print(table)
    rich.print("standard deviation of each pixel of the first digit:", posteriors["full"].variance[0].sqrt())
    return found


def digits_model(x: torch.Tensor, label: torch.Tensor, noise: float) -> Score:
    """The score of noisy digits when each class is a Gaussian; noise of 0.05 keeps pixels that never vary alive."""
    classes = [x[label == digit] for digit in range(10)]
    covariances = torch.stack([rows.T.cov() + 0.05**2 * torch.eye(64, dtype=x.dtype) for rows in classes])
    mixture = GaussianMixture(torch.stack([rows.mean(0) for rows in classes]), covariances)
    noisy = mixture.noisy(1.0, noise)
    return Score(lambda x_t: noisy.score(x_t.flatten(1)).reshape(x_t.shape))


def calibration(posterior: GaussianPosterior, clean: torch.Tensor) -> Calibration:
    squared = (clean - posterior.mean).square()
    ratio = squared.mean() / posterior.variance.mean()
    return Calibration(float(squared.mean()), float(ratio), float(posterior.log_prob(clean).mean() / 64))


if __name__ == "__main__":
    main()
