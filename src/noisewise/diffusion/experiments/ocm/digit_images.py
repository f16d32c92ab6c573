"""Protocol B: scikit-learn's digits as 8 x 8 images, and a diffusers UNet trained on them."""

import functools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.diffusion.experiments.ocm.noise_training import (
    NoisePlan,
    linear_alphas_cumprod,
    seeded,
    train_noise,
)
from noisewise.errors import require

__all__ = ["digit_images", "digit_labels", "digits_net", "image_unet"]

_HELD_OUT = 297
_CHANNELS = {"quick": (16, 32), "cpu": (32, 64), "paper": (64, 128)}
_PLANS = {
    "quick": NoisePlan(60, 64, 2e-3, ema=0.95),
    "cpu": NoisePlan(2800, 64, 2e-3, ema=0.998),
    "paper": NoisePlan(30_000, 128, 1e-3, ema=0.9995),
}


@functools.lru_cache(maxsize=1)
def _shuffled() -> tuple[Tensor, Tensor]:
    bunch = require("sklearn.datasets", "diffusion").load_digits()
    order = torch.randperm(len(bunch.data), generator=torch.Generator().manual_seed(0))
    # 17 grey levels, 0 to 16
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[order], torch.as_tensor(bunch.target)[order]


def digit_images() -> tuple[Float[Tensor, "1500 1 8 8"], Float[Tensor, "297 1 8 8"]]:
    """Training and held-out images in [-1, 1], by a fixed shuffle."""
    images, _ = _shuffled()
    return images[_HELD_OUT:], images[:_HELD_OUT]


def digit_labels() -> tuple[Tensor, Tensor]:
    """The digits 0 to 9 that the training and the held-out images show, [n] each."""
    _, labels = _shuffled()
    return labels[_HELD_OUT:], labels[:_HELD_OUT]


def image_unet(side: int, channels: tuple[int, ...]) -> nn.Module:
    """A diffusers UNet2DModel for grey images of `side` pixels: one block to a level, no attention, dropout .1."""
    levels = len(channels)
    return require("diffusers", "diffusion").UNet2DModel(
        sample_size=side,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        add_attention=False,
        dropout=0.1,
        # groups of a single channel would take the mean out of each
        norm_num_groups=8,
    )


@functools.lru_cache(maxsize=8)
def digits_net(seed: int, scale: str, device: str = "cpu") -> nn.Module:
    """A UNet2DModel trained on the training images; float32, averaged weights, eval mode, frozen."""
    train, _ = digit_images()

    def batch(n: int, generator: torch.Generator) -> Tensor:
        return train[torch.randint(len(train), (n,), generator=generator)]

    with seeded(seed):
        net = image_unet(8, _CHANNELS[scale])
    return train_noise(net, batch, linear_alphas_cumprod(), _PLANS[scale], seed, device)
