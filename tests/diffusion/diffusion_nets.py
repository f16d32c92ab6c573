"""Small noise networks whose scores are known, for the tests of this folder."""

import torch
from torch import nn

from noisewise.diffusion import NoiseLevels


def linear_levels(steps=1000, prediction="epsilon"):
    return NoiseLevels.from_alphas_cumprod(
        torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0), prediction
    )


class GaussianNoise(nn.Module):
    """The exact noise prediction for data N(mean, covariance) on vectors; `out` is the feature site, 16 wide."""

    def __init__(self, covariance, mean=None, levels=None):
        super().__init__()
        self.register_buffer("covariance", torch.as_tensor(covariance, dtype=torch.float64))
        dim = len(self.covariance)
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64) if mean is None else mean.double())
        self.levels = levels or linear_levels()
        self.out = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, t):
        index = torch.as_tensor(t).expand(len(x)).long()
        a, s = (table[index].unsqueeze(-1) for table in (self.levels.a, self.levels.s))
        eye = torch.eye(len(self.covariance), dtype=torch.float64)
        matrix = a.unsqueeze(-1) ** 2 * self.covariance + s.unsqueeze(-1) ** 2 * eye
        features = torch.cat([x, torch.linspace(-1, 1, 16 - x.shape[1]).to(x).expand(len(x), -1)], -1)
        offset = self.dropout(self.out(features)[:, : x.shape[1]].double() - a * self.mean)
        eps = s * torch.linalg.solve(matrix, offset.unsqueeze(-1)).squeeze(-1)
        return (self.scale * eps).to(x.dtype)

    def relative(self, t):
        """R at level t, [dim, dim]."""
        a, s = self.levels.pair(t)
        inner = a**2 * self.covariance
        return inner @ torch.linalg.inv(inner + s**2 * torch.eye(len(inner), dtype=torch.float64))
