"""A small classifier of the digit images: its last features are where samples are compared, its labels their balance."""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.diffusion.experiments.ocm.digit_images import digit_images, digit_labels
from noisewise.diffusion.experiments.ocm.noise_training import seeded

__all__ = ["DigitClassifier", "digit_classifier"]

_SEED, _EPOCHS, _BATCH, _RATE = 0, 30, 50, 3e-3


class DigitClassifier(nn.Module):
    """Two convolutions and 32 features. Weights are drawn from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * 4 * 4, 32),
            nn.SiLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 10"]:
        """Logits of the ten digits."""
        return self.head(self.trunk(x))

    @torch.no_grad()
    def features(self, x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 32"]:
        """What the last layer reads."""
        return self.trunk(x.to(self.head.weight))

    @torch.no_grad()
    def probabilities(self, x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 10"]:
        """Of the ten digits; rows sum to 1."""
        return self(x.to(self.head.weight)).softmax(-1)

    def labels(self, x: Float[Tensor, "n 1 8 8"]) -> Int[Tensor, "n"]:
        """The most probable digit."""
        return self.probabilities(x).argmax(-1)


@functools.lru_cache(maxsize=1)
def digit_classifier() -> DigitClassifier:
    """The one that all comparisons share: trained on the training images, shifted by up to a pixel; seconds; frozen."""
    (images, _), (labels, _) = digit_images(), digit_labels()
    generator = torch.Generator().manual_seed(_SEED)
    with seeded(_SEED):
        net = DigitClassifier()
        optimizer = torch.optim.Adam(net.parameters(), lr=_RATE, fused=True)
        steps = _EPOCHS * (len(images) // _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(images), generator=generator).split(_BATCH):
                loss = nn.functional.cross_entropy(net(_shifted(images[rows], generator)), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval().requires_grad_(False)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch moved by -1, 0 or 1 pixel in each direction, with background where it moved away."""
    top, left = torch.randint(3, (2,), generator=generator).tolist()
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]
