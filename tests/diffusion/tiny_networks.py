"""Small random networks of diffusers, exact networks of Gaussian data, and heads that need no fit."""

import torch
from torch import nn

from noisewise.diffusion import CovarianceHead, CovarianceScheduler


def unet(seed=0, channels=1, out_channels=None, size=8):
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=out_channels or channels, block_out_channels=(8,),
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        add_attention=False,
    ).eval()  # fmt: skip


def conditional_unet(seed=0):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
        norm_num_groups=4,
    ).eval()  # fmt: skip


def dit(seed=0, out_channels=8):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return net.eval()


def schedule(steps=50, **options):
    # ends with abar = 0.006
    return CovarianceScheduler(**{"num_train_timesteps": steps, "beta_end": 0.2, **options})


def fitted(head, seed=1, scale=0.3):
    """`head` with random weights in its last layer and a table of mean variances, as after a fit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (head.out.weight, head.out.bias):
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    head.residual.copy_(0.3 * head.s**2 / (0.3 * head.a**2 + head.s**2))
    head.gamma.copy_(0.5 * torch.ones_like(head.gamma))
    return head.eval()


def head_for(net, scheduler, **options):
    return fitted(CovarianceHead.for_model(net, noise_schedule=scheduler, **options))


class GaussianNoise(nn.Module):
    """The exact noise prediction of data N(mean, covariance), float64, flattened events of any shape."""

    def __init__(self, levels, mean, covariance):
        super().__init__()
        self.levels = levels
        self.mean = nn.Parameter(mean.double())
        self.covariance = nn.Parameter(covariance.double())
        self.end = nn.Identity()  # a site

    def forward(self, x, t):
        flat = x.flatten(1).double()
        a, s = self.levels.at(t, flat)
        eye = torch.eye(flat.shape[1], dtype=torch.float64)
        noisy = a[..., None] ** 2 * self.covariance + s[..., None] ** 2 * eye
        return self.end((s * torch.linalg.solve(noisy, flat - a * self.mean)).reshape(x.shape).to(x))


def posterior_covariance(covariance, a, s):
    """Cov[x0 | x_t] of N(., covariance)."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    noisy = a**2 * covariance + s**2 * eye
    return covariance - a**2 * covariance @ torch.linalg.solve(noisy, covariance)
