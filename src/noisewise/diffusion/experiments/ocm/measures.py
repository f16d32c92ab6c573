"""What is measured on draws and on relative variances, each with the score of perfect ones."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.comparison import TUNING_SEED
from noisewise.diffusion.experiments.ocm.digit_classifier import ImageClassifier, digit_classifier
from noisewise.diffusion.experiments.ocm.digit_images import digit_images, digit_labels
from noisewise.diffusion.experiments.ocm.mixtures import C_MAX, mixture, relative_variance
from noisewise.diffusion.experiments.ocm.noise_training import corrupt, linear_alphas_cumprod
from noisewise.metrics.distances import mmd2, wasserstein2
from noisewise.metrics.floors import sample_floor
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.modes import total_variation

__all__ = [
    "LEVELS",
    "LabelledImages",
    "RelativeVariance",
    "covariance_errors",
    "digit_measurements",
    "image_measurements",
    "labelled_digits",
    "mixture_measurements",
    "share_not_positive",
]

# (x_t [batch, *event], t [batch] counted from 0) -> r, [batch, *event]
RelativeVariance = Callable[[Tensor, Tensor], Tensor]

# t = 10, 40, ..., 1000 of 1000, counted from 0
LEVELS = tuple(range(9, 1000, 30))
_STATES = 2000
_IMAGE_STATES = 64
_TRANSPORTED = 2000
# a reference of the draws' own number would add as much noise as they have
_REFERENCE = 5000
_STATE_SEED, _REFERENCE_SEED = 1000, 2000
_MMD, _W2, _WITHIN, _BALANCE = "1000 MMD^2", "W2", "share within 3 sd", "TV of labels"


def mixture_measurements(name: str, draws: Float[Tensor, "n 2"], seed: int = 0) -> dict[str, Measurement]:
    """1000 MMD^2 (unbiased) of `draws` from 5000 fresh draws of the mixture, which `seed` chooses, and W2 from as many.

    The kernel's bandwidth is the mixture's mean squared distance, whatever the draws. W2 looks at the first 2000. Both see
    above all how many draws each mode has; "share within 3 sd" of the most probable mode sees those between and around them.
    Floors are those of exact draws. Raises `InvalidInput` for draws that are not finite.
    """
    n, transported = len(draws), min(len(draws), _TRANSPORTED)
    fresh = mixture(name).sample(max(n, _REFERENCE), torch.Generator().manual_seed(_REFERENCE_SEED + seed))
    floor_mmd, floor_w2 = _mixture_floors(name, n)
    x = draws.detach().double().cpu()
    return {
        _MMD: _in_thousandths(mmd2(x, fresh, biased=False, bandwidth=_bandwidth(name), floor=floor_mmd)),
        _W2: wasserstein2(x[:transported], fresh[:transported], floor=floor_w2),
        _WITHIN: _share_within(name, x),
    }


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Where draws of images are compared: a frozen `classifier`, and the images and labels that it was made for."""

    classifier: ImageClassifier
    train: Float[Tensor, "n 1 side side"]
    held_out: Float[Tensor, "m 1 side side"]
    labels: Int[Tensor, " image"]

    @functools.cached_property
    def shares(self) -> Float[Tensor, " label"]:
        """Of the true `labels` of all images."""
        return torch.bincount(self.labels, minlength=self.classes).double() / len(self.labels)

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return self.classifier.head.out_features


def image_measurements(
    images: LabelledImages, draws: Float[Tensor, "n 1 side side"], seed: int = 0
) -> dict[str, Measurement]:
    """1000 MMD^2 (unbiased) from the held-out images in the classifier's features, and the total variation of label shares.

    The bandwidth is the mean squared distance within the held-out features. Seeds of tuning are judged by as many training
    images instead. Floors: for MMD^2 that of training images; for labels the mean of as many labels drawn from the data's.
    Raises `InvalidInput` for draws that are not finite.
    """
    net = images.classifier
    reference, width, floor = _image_reference(images, seed >= TUNING_SEED)
    x = draws.detach().to("cpu", torch.float32)
    # labels would hide NaN, features do not
    mmd = mmd2(net.features(x), reference, biased=False, bandwidth=width, floor=floor)
    shares = torch.bincount(net.labels(x), minlength=images.classes).double() / len(x)
    balance = total_variation(shares, images.shares, floor=_balance_floor(images, len(x)))
    return {_MMD: _in_thousandths(mmd), _BALANCE: dataclasses.replace(balance, n=len(x))}


@functools.lru_cache(maxsize=1)
def labelled_digits() -> LabelledImages:
    """The digits."""
    return LabelledImages(digit_classifier(), *digit_images(), torch.cat(digit_labels()))


def digit_measurements(draws: Float[Tensor, "n 1 8 8"], seed: int = 0) -> dict[str, Measurement]:
    """`image_measurements` on the digits."""
    return image_measurements(labelled_digits(), draws, seed)


def covariance_errors(r: RelativeVariance, name: str) -> dict[str, Measurement]:
    """How far `r` is from the mixture's exact diagonal, over the same 2000 draws of q(x_t) at each of `LEVELS`.

    "r-MSE": mean square error of r as it is given; "x0-MSE": that of C = (1 - abar) / abar r clipped to [0, `C_MAX`], in
    units of x0; "share of r <= 0": of entries. Standard errors are those over states.
    """
    states, exact = _mixture_states(name)
    ratio = _signal_to_noise()
    squares, clipped, below = [], [], []
    for level, x_t, truth, snr in zip(LEVELS, states, exact, ratio, strict=True):
        found = _called(r, x_t, level).to(truth)
        squares.append((found - truth).square().mean(-1))
        clipped.append(((found / snr).clamp(0, C_MAX) - (truth / snr).clamp(0, C_MAX)).square().mean(-1))
        below.append((found <= 0).double().mean(-1))
    columns = {"r-MSE": squares, "x0-MSE": clipped, "share of r <= 0": below}
    return {column: _mean_over_states(torch.stack(values).mean(0)) for column, values in columns.items()}


def share_not_positive(r: RelativeVariance, images: Float[Tensor, "n *event"], seed: int = 0) -> Measurement:
    """Share of entries of r that are 0 or less, over `LEVELS` and at most 64 noisy `images` at each."""
    generator = torch.Generator().manual_seed(_STATE_SEED + seed)
    x, shares = images[:_IMAGE_STATES], []
    for level in LEVELS:
        x_t, _ = corrupt(x, torch.full((len(x),), level), linear_alphas_cumprod(), generator)
        shares.append((_called(r, x_t, level) <= 0).double().flatten(1).mean(-1))
    return _mean_over_states(torch.stack(shares).mean(0))


def _called(r: RelativeVariance, x_t: Tensor, level: int) -> Tensor:
    # networks are float32, and some need a level for each row
    return r(x_t, torch.full((len(x_t),), level)).detach().cpu()


def _mean_over_states(values: Float[Tensor, " state"]) -> Measurement:
    return Measurement(float(values.mean()), float(values.std()) / math.sqrt(len(values)), floor=0.0, n=len(values))


def _signal_to_noise() -> list[float]:
    abar = linear_alphas_cumprod()[list(LEVELS)]
    return (abar / (1 - abar)).tolist()


@functools.lru_cache(maxsize=4)
def _mixture_states(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Draws of q(x_t), float32, and the exact r there, float64; [level][state, 2]."""
    generator = torch.Generator().manual_seed(_STATE_SEED)
    states, exact = [], []
    for level in LEVELS:
        x = mixture(name).sample(_STATES, generator)
        x_t = corrupt(x, torch.full((_STATES,), level), linear_alphas_cumprod(), generator)[0].float()
        states.append(x_t)
        exact.append(relative_variance(name, x_t.double(), level))
    return states, exact


def _bandwidth(name: str) -> float:
    return 2 * float(mixture(name).covariance().trace())


def _share_within(name: str, x: Tensor) -> Measurement:
    target = mixture(name)
    mode = target.component(x)
    factor = torch.linalg.cholesky(target.full_covariances)[mode]
    offset = (x - target.means[mode]).unsqueeze(-1)
    distance = torch.linalg.solve_triangular(factor, offset, upper=False).square().sum((-2, -1))
    share, n = float((distance < 9).double().mean()), len(x)
    # of a Gaussian in the plane 1 - exp(-9 / 2); modes are too far apart to matter
    return Measurement(share, math.sqrt(share * (1 - share) / n), floor=-math.expm1(-4.5), n=n, better="higher")


@functools.lru_cache(maxsize=8)
def _mixture_floors(name: str, n: int) -> tuple[float, float]:
    draw = mixture(name).sample
    mmd = functools.partial(mmd2, biased=False, bandwidth=_bandwidth(name))
    floor = sample_floor(mmd, draw, n, n_reference=max(n, _REFERENCE), repeats=4)
    return floor.mean, sample_floor(wasserstein2, draw, min(n, _TRANSPORTED), repeats=4).mean


@functools.lru_cache(maxsize=4)
def _image_reference(images: LabelledImages, tuning: bool) -> tuple[Tensor, float, float]:
    """Features that draws are compared with, the bandwidth, and the score of training images that are not among them."""
    train, held_out = (images.classifier.features(x) for x in (images.train, images.held_out))
    reference, others = (train[: len(held_out)], train[len(held_out) :]) if tuning else (held_out, train)
    width = 2 * float(held_out.double().var(0).sum())
    return reference, width, float(mmd2(others, reference, biased=False, bandwidth=width))


@functools.lru_cache(maxsize=8)
def _balance_floor(images: LabelledImages, n: int, repeats: int = 200) -> float:
    generator = torch.Generator().manual_seed(_REFERENCE_SEED)
    shares = images.shares
    labels = torch.multinomial(shares, n * repeats, replacement=True, generator=generator).reshape(repeats, n)
    counted = torch.nn.functional.one_hot(labels, len(shares)).double().mean(1)
    return float((counted - shares).abs().sum(-1).mean()) / 2


def _in_thousandths(measurement: Measurement) -> Measurement:
    floor = None if measurement.floor is None else 1000 * measurement.floor
    return dataclasses.replace(measurement, value=1000 * measurement.value, floor=floor)
