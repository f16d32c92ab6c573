"""The definition of a multi-resolution convolution, by torch alone: every branch convolved and batch-normalised by itself."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional

from noisewise.sequence import MRConv


class Branches(NamedTuple):
    """Output, and what the running statistics become."""

    y: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor


def layer(kind="fourier", length=24, kernel_size=4, d_model=3, seed=0, dtype=torch.float64, **options):
    """A layer whose weights are random, of either sign, and whose running statistics are not those of its start."""
    made = MRConv(d_model, length, kind, kernel_size, seed=seed, **options).to(dtype)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for value in (made.alpha, *((made.weight, made.bias) if made.norm == "batch" else ())):
            value.copy_(torch.randn(value.shape, generator=generator))
        if made.norm == "batch":
            made.running_mean.copy_(torch.randn(made.alpha.shape, generator=generator))
            made.running_var.copy_(0.3 + torch.rand(made.alpha.shape, generator=generator))
            made.num_batches_tracked += 1
    return made


def signal(rows=3, length=24, d_model=3, seed=0, dtype=torch.float64):
    return torch.randn(rows, d_model, length, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_kernels(module):
    """The sub-kernels [direction, channel, lag] as functions of the parameters, by sums of cosines and by placing taps."""
    own, made = module.kernels, []
    for i in range(len(module.alpha)):
        period = own.resolutions[0].period * 2**i
        support, parts = min(period, module.length), []
        for part in module.kind.split("+"):
            weights = getattr(own, f"{part}_{i}")
            if part == "fourier":
                n, t = torch.arange(weights.shape[-2]), torch.arange(support)
                angle = 2 * math.pi * (n.unsqueeze(-1) * t % period).to(weights) / period
                twice = torch.where((n == 0) | (2 * n == period), 1.0, 2.0).to(weights)
                unit = (2 * weights.shape[-2] * period) ** -0.5
                parts.append(unit * ((weights[..., 0] * twice) @ angle.cos() - (weights[..., 1] * twice) @ angle.sin()))
            elif part == "dense":
                parts.append(weights)
            else:
                lags = 2**i * torch.arange(weights.shape[-1]) if part == "dilated" else getattr(own, f"lags_{i}")
                place = functional.one_hot(lags.expand(weights.shape), support).to(weights)
                parts.append((weights.unsqueeze(-1) * place).sum(-2))
        made.append(parts[0] if len(parts) == 1 else own.mix[0, i] * parts[0] + own.mix[1, i] * parts[1])
    return made


def convolve(u, kernel, ahead=False):
    """By torch's own convolution; `ahead`: sum_j k[j] u[t + j]."""
    last = kernel.shape[-1] - 1
    if ahead:
        return functional.conv1d(functional.pad(u, (0, last)), kernel.unsqueeze(1), groups=len(kernel))
    return functional.conv1d(functional.pad(u, (last, 0)), kernel.flip(-1).unsqueeze(1), groups=len(kernel))


def by_branches(module, u, lengths=None):
    """y = sum_i alpha_i BN_i(u * k_i) + D u, BN by torch.nn.functional.batch_norm over all valid steps of all rows."""
    valid = torch.ones(len(u), u.shape[-1], dtype=torch.bool)
    if lengths is not None:
        valid = torch.arange(u.shape[-1]) < lengths.unsqueeze(-1)
        u = torch.where(valid.unsqueeze(1), u, 0.0)
    y = torch.zeros_like(u) if module.skip is None else module.skip.unsqueeze(-1) * u
    batch = module.norm == "batch"
    mean, var = (module.running_mean.clone(), module.running_var.clone()) if batch else (torch.empty(0),) * 2
    for i, kernels in enumerate(dense_kernels(module)):
        for way, kernel in enumerate(kernels):
            if not batch:
                kernel = kernel / (kernel.norm(dim=-1, keepdim=True) + module.eps)
            branch = convolve(u, kernel, ahead=way == 1)
            if batch:
                weights = (module.weight[i, way], module.bias[i, way])
                flat = functional.batch_norm(
                    branch.mT[valid], mean[i, way], var[i, way], *weights, module.training, module.momentum, module.eps
                )
                branch = torch.zeros_like(branch.mT).masked_scatter(valid.unsqueeze(-1), flat).mT
            y = y + module.alpha[i, way].unsqueeze(-1) * branch
    return Branches(torch.where(valid.unsqueeze(1), y, 0.0), mean, var)


def gradients(y, u, module):
    """Of a random functional of y, with respect to u and to every parameter, by name."""
    weights = signal(*y.shape[::2], y.shape[1], seed=9).to(y)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad((weights * y).sum(), (u, *parameters), allow_unused=True, materialize_grads=True)
    return dict(zip(("u", *names), found, strict=True))
