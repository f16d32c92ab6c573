"""A small classifier of images: its last features are where samples are compared, its labels their balance."""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.diffusion.experiments.ocm.digit_images import digit_images, digit_labels
from noisewise.diffusion.experiments.ocm.noise_training import seeded

__all__ = ["ImageClassifier", "digit_classifier", "train_classifier"]

_SEED, _EPOCHS, _BATCH, _RATE = 0, 30, 50, 3e-3


class ImageClassifier(nn.Module):
    """Two convolutions, the first with `stride`, and 2 `width` features. Weights are drawn from the global generator.

    `side`: of the images, which have one channel; a multiple of 2 `stride`.
    """

    def __init__(self, side: int = 8, classes: int = 10, width: int = 16, stride: int = 1) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, stride, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * (side // stride // 2) ** 2, 2 * width),
            nn.SiLU(),
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Float[Tensor, "n 1 side side"]) -> Float[Tensor, "n classes"]:
        """Logits of the classes."""
        return self.head(self.trunk(x))

    @torch.no_grad()
    def features(self, x: Float[Tensor, "n 1 side side"]) -> Float[Tensor, "n features"]:
        """What the last layer reads."""
        return self.trunk(x.to(self.head.weight))

    @torch.no_grad()
    def probabilities(self, x: Float[Tensor, "n 1 side side"]) -> Float[Tensor, "n classes"]:
        """Of the classes; rows sum to 1."""
        return self(x.to(self.head.weight)).softmax(-1)

    def labels(self, x: Float[Tensor, "n 1 side side"]) -> Int[Tensor, "n"]:
        """The most probable class."""
        return self.probabilities(x).argmax(-1)


def train_classifier(
    images: Float[Tensor, "n 1 side side"], labels: Int[Tensor, "n"], reach: int = 1, **options: int
) -> ImageClassifier:
    """Trained on the images, shifted by up to `reach` pixels, from a fixed seed; seconds; frozen. `options`: of the class."""
    generator = torch.Generator().manual_seed(_SEED)
    with seeded(_SEED):
        net = ImageClassifier(images.shape[-1], **options)
        optimizer = torch.optim.Adam(net.parameters(), lr=_RATE, fused=True)
        steps = _EPOCHS * -(-len(images) // _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(images), generator=generator).split(_BATCH):
                loss = nn.functional.cross_entropy(net(_shifted(images[rows], reach, generator)), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def digit_classifier() -> ImageClassifier:
    """The one that all comparisons on digits share."""
    return train_classifier(digit_images()[0], digit_labels()[0])


def _shifted(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """A batch moved by up to `reach` pixels in each direction, with background where it moved away."""
    top, left = torch.randint(2 * reach + 1, (2,), generator=generator).tolist()
    padded = nn.functional.pad(images, (reach,) * 4, value=-1.0)
    return padded[..., top : top + images.shape[-2], left : left + images.shape[-1]]
