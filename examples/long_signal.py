"""A long memory from little data: learn an unknown filter of 1024 lags, merge what was learned, and stream it.

Eight channels are filtered by smooth responses that ring for some hundred steps, and noise is added. MRConv is fitted to it,
and a free kernel with a weight for every lag. With two signals to learn from the free kernel learns their noise. With twelve it
has seen enough, and is the better one: no prior beats data.
"""

import math

import rich
import torch
from rich.table import Table
from torch import Tensor, nn

from noisewise.sequence import LongConv, MRConv, long_conv

CHANNELS, LENGTH = 8, 1024


class FreeKernel(nn.Module):
    """A weight for every lag."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(CHANNELS, LENGTH))

    def forward(self, u: Tensor) -> Tensor:
        return long_conv(u, self.kernel)


def response(generator: torch.Generator) -> Tensor:
    """The truth: four damped waves in each channel, of unit energy."""
    lag = torch.arange(LENGTH)
    decay = torch.exp(torch.empty(CHANNELS, 4, 1).uniform_(math.log(10), math.log(500), generator=generator))
    frequency = 0.1 * torch.rand(CHANNELS, 4, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(CHANNELS, 4, 1, generator=generator)
    kernel = (torch.exp(-lag / decay) * torch.cos(frequency * lag + phase)).sum(1)
    return kernel / kernel.norm(dim=-1, keepdim=True)


def fit(model: nn.Module, u: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(u) - y).square().mean().backward()
        optimizer.step()
        rates.step()
    with torch.no_grad():
        # weights do not move any more, and running statistics catch up with them
        for _ in range(60):
            model(u)
    model.eval()


def main(steps: int = 200) -> dict[str, dict[str, float]]:
    """Squared error on new signals without noise, in units of their variance; `steps`: of each fit."""
    generator = torch.Generator().manual_seed(0)
    truth = response(generator)
    new = torch.randn(16, CHANNELS, LENGTH, generator=generator)
    clean = long_conv(new, truth)
    table = Table("trained on", "MRConv", "a free kernel", title="error on new signals (1: as bad as silence)")
    found: dict[str, dict[str, float]] = {}
    layers = {}
    for rows, noise in ((2, 0.5), (12, 0.3)):
        u = torch.randn(rows, CHANNELS, LENGTH, generator=generator)
        y = long_conv(u, truth) + noise * torch.randn(u.shape, generator=generator)
        models = {"MRConv": MRConv(CHANNELS, LENGTH), "a free kernel": FreeKernel()}
        name = f"{rows} signals, noise {noise}"
        found[name] = {}
        for kind, model in models.items():
            fit(model, u, y, steps)
            with torch.no_grad():
                found[name][kind] = float((model(new) - clean).square().mean() / clean.var())
        layers[name] = models["MRConv"]
        table.add_row(name, *(f"{error:.3f}" for error in found[name].values()))
    rich.print(table)

    # seven branches, one kernel: what is shipped
    layer = layers["2 signals, noise 0.5"]
    merged: LongConv = layer.merge()
    with torch.no_grad():
        offline = layer(new[:1])
        gap = float((merged(new[:1]) - offline).abs().max())
    # one input at a time: hear the first half at once, then go on step by step
    y, state = layer.prefill(new[:1, :, :512])
    outputs = [y]
    for u_t in new[:1, :, 512:].unbind(-1):
        y_t, state = layer.step(u_t, state)
        outputs.append(y_t.unsqueeze(-1))
    drift = float((torch.cat(outputs, -1) - offline).abs().max())
    print(f"merged against the layer: {gap:.1e}; streamed against the layer: {drift:.1e}")
    found["gaps"] = {"merged": gap, "streamed": drift}
    return found


if __name__ == "__main__":
    main()
