"""The training of a noise network, and the calls that read it: MSE at uniform t, cosine learning rate, averaged weights."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from noisewise.noise import NoiseSchedule

__all__ = ["NoisePlan", "corrupt", "linear_alphas_cumprod", "noise_loss", "predict_noise", "seeded", "train_noise"]

_WARM_UP = 50
_CLIP = 1.0


@dataclass(frozen=True)
class NoisePlan:
    """`steps` of Adam on batches of `batch`; `ema`: share of the averaged weights that stays at each step."""

    steps: int
    batch: int
    learning_rate: float | int
    ema: float | int = 0.999


def linear_alphas_cumprod(levels: int = 1000) -> Float[Tensor, " levels"]:
    """abar_t of the linear schedule, beta from 1e-4 to .02, float64; entry 0 is the cleanest noisy level (Ho et al. 2020)."""
    return torch.tensor(NoiseSchedule.vp_beta(levels=levels).a, dtype=torch.float64).square()


def corrupt(
    x: Float[Tensor, "batch *event"],
    t: Int[Tensor, "batch"],
    alphas_cumprod: Float[Tensor, " levels"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
    """x_t = sqrt(abar) x + sqrt(1 - abar) eps, and eps; `t` counts from 0. The draws are made on the CPU."""
    eps = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
    # 1 - abar must be formed in float64
    abar = alphas_cumprod.to(t.device)[t].reshape(-1, *[1] * (x.ndim - 1))
    return abar.sqrt().to(x) * x + (1 - abar).sqrt().to(x) * eps, eps


def predict_noise(
    net: Any, x_t: Float[Tensor, "batch *event"], t: Int[Tensor, "*batch"]
) -> Float[Tensor, "batch *event"]:
    """The noise as `net` sees it; networks of diffusers wrap theirs."""
    output = net(x_t, t)
    return output if isinstance(output, Tensor) else output.sample


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator, which constructors and dropout draw from, starts from `seed` inside and is put back after."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def train_noise(
    net: nn.Module,
    data: Callable[[int, torch.Generator], Tensor],
    alphas_cumprod: Float[Tensor, " levels"],
    plan: NoisePlan,
    seed: int,
    device: str = "cpu",
) -> nn.Module:
    """The network of averaged weights, in eval mode and frozen. `data(n, generator)`: [n, *event], clean, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    net = net.to(device).train()
    averaged = AveragedModel(net, multi_avg_fn=_ramped_average(plan.ema), use_buffers=False)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.learning_rate, fused=True)
    with seeded(seed):
        for step in range(plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * _share(step, plan.steps)
            x = data(plan.batch, generator).to(device)
            t = torch.randint(len(alphas_cumprod), (len(x),), generator=generator).to(device)
            x_t, eps = corrupt(x, t, alphas_cumprod, generator)
            loss = (predict_noise(net, x_t, t) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            # a rare large step at the low noise levels would throw the averaged weights back
            nn.utils.clip_grad_norm_(net.parameters(), _CLIP)
            optimizer.step()
            averaged.update_parameters(net)
    return averaged.module.eval().requires_grad_(False)


@torch.no_grad()
def noise_loss(
    net: Any,
    x: Float[Tensor, "row *event"],
    alphas_cumprod: Float[Tensor, " levels"],
    seed: int = 0,
    repeats: int = 4,
) -> float:
    """Mean square error of the predicted noise over `repeats` draws of t and eps for each row of `x`."""
    generator, device = torch.Generator().manual_seed(seed), next(net.parameters()).device
    losses = []
    for _ in range(repeats):
        t = torch.randint(len(alphas_cumprod), (len(x),), generator=generator).to(device)
        x_t, eps = corrupt(x.to(device), t, alphas_cumprod, generator)
        losses.append(float((predict_noise(net, x_t, t) - eps).square().mean()))
    return math.fsum(losses) / repeats


def _share(step: int, steps: int) -> float:
    """Of the learning rate: up in a few steps, then down along a cosine to 0."""
    return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def _ramped_average(ema: float | int) -> Callable[..., None]:
    """A moving average whose first steps forget the initial weights sooner."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], number: Tensor | int) -> None:
        n = float(number)
        torch._foreach_lerp_(averaged, current, 1 - min(ema, (1 + n) / (10 + n)))

    return update
