"""Protocol C: Omniglot's characters, a diffusers UNet trained on them, and a classifier of their alphabets."""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.diffusion.experiments.ocm.digit_classifier import train_classifier
from noisewise.diffusion.experiments.ocm.digit_images import image_unet
from noisewise.diffusion.experiments.ocm.measures import LabelledImages
from noisewise.diffusion.experiments.ocm.noise_training import NoisePlan, linear_alphas_cumprod, seeded, train_noise
from noisewise.diffusion.experiments.ocm.omniglot import find_omniglot, omniglot

__all__ = ["labelled_omniglot", "omniglot_net"]

# the resolution of the images is dear on one core, so the first level is narrow
_CHANNELS = {"quick": (16, 16), "cpu": (16, 16, 32), "paper": (64, 128, 128)}
# on one core 4 minutes for the second
_PLANS = {
    "quick": NoisePlan(30, 16, 2e-3, ema=0.9),
    "cpu": NoisePlan(2000, 32, 2e-3, ema=0.998),
    "paper": NoisePlan(50_000, 128, 1e-3, ema=0.9995),
}


@functools.lru_cache(maxsize=1)
def labelled_omniglot() -> LabelledImages:
    """Training and held-out drawers, each in a fixed random order, with a classifier of alphabets for the training ones.

    Raises `InvalidInput` where the data are not at hand.
    """
    data = omniglot(find_omniglot())
    generator = torch.Generator().manual_seed(0)
    train, labels = _shuffled(data.train, data.train_labels, generator)
    held_out, others = _shuffled(data.held_out, data.held_out_labels, generator)
    classifier = train_classifier(train, labels, reach=2, classes=len(data.alphabets), stride=2)
    return LabelledImages(classifier, train, held_out, torch.cat([labels, others]))


@functools.lru_cache(maxsize=8)
def omniglot_net(seed: int, scale: str, device: str = "cpu") -> nn.Module:
    """A UNet2DModel trained on the training drawers; float32, averaged weights, eval mode, frozen."""
    train = labelled_omniglot().train

    def batch(n: int, generator: torch.Generator) -> Tensor:
        return train[torch.randint(len(train), (n,), generator=generator)]

    with seeded(seed):
        net = image_unet(28, _CHANNELS[scale])
    return train_noise(net, batch, linear_alphas_cumprod(), _PLANS[scale], seed, device)


def _shuffled(
    images: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, "n"], generator: torch.Generator
) -> tuple[Float[Tensor, "n 1 28 28"], Int[Tensor, "n"]]:
    order = torch.randperm(len(images), generator=generator)
    return images[order], labels[order]
