"""What a covariance is worth to a diffusion model in few steps: a small UNet of digits, and the bound with and without a head."""

import sys
from pathlib import Path

import rich
import torch
from diffusers import DDPMScheduler, UNet2DModel
from rich.table import Table
from sklearn.datasets import load_digits

from noisewise.diffusion import CovarianceHead, CovarianceScheduler, fit_covariance, generate, vlb_bits_per_dim
from noisewise.diffusion.images import contact_sheet, write_images
from noisewise.metrics import Measurement

HELD_OUT, STEPS, GREY_LEVELS = 100, (5, 10, 20), 17


def digits() -> torch.Tensor:
    """[1797, 1, 8, 8] in [-1, 1], shuffled."""
    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def train(data: torch.Tensor, schedule: DDPMScheduler, steps: int) -> UNet2DModel:
    """The noise network as usual; you would load yours: DDPMPipeline.from_pretrained(...).unet"""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = data[torch.randint(len(data), (64,))]
        t, eps = torch.randint(1000, (64,)), torch.randn(x.shape)
        loss = (unet(schedule.add_noise(x, eps, t), t).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return unet.eval()


def main(
    folder: str | Path = "runs/fewer-steps", steps: int = 400, head_steps: int = 150
) -> dict[int, dict[str, Measurement]]:
    """`folder`: for a sheet of images. `steps`, `head_steps`: of the network's training and of the head's."""
    x, schedule = digits(), DDPMScheduler(num_train_timesteps=1000)
    held, data = x[:HELD_OUT], x[HELD_OUT:]
    unet = train(data, schedule, steps)

    # the network stays as it is; the head is a thousandth of its size
    head = CovarianceHead.for_model(unet, noise_schedule=schedule)
    fit_covariance(unet, head, data, noise_schedule=schedule, steps=head_steps, batch_size=64)

    choices = {"beta~, fixed": None, "beta, fixed": "large", "head": head}
    table = Table("steps", *choices, title="bits/dim of held-out digits, lower is better", title_justify="left")
    found = {}
    for count in STEPS:
        found[count] = {
            name: vlb_bits_per_dim(unet, held, covariance, count, noise_schedule=schedule, levels=GREY_LEVELS)
            for name, covariance in choices.items()
        }
        table.add_row(f"{count}", *(f"{one.value:.2f} ± {one.se:.2f}" for one in found[count].values()))
    rich.print(table)

    # rows of eight: with the fixed variance, then with the head, from the same noise
    scheduler = CovarianceScheduler.from_config(schedule.config)
    sheets = [generate(unet, scheduler, (16, 1, 8, 8), 10, covariance) for covariance in (None, head)]
    (path,) = write_images(folder, contact_sheet(torch.cat(sheets)))
    rich.print(f"images in 10 steps, two rows with the fixed variance, two with the head: {path}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
