"""Samplers of diffusers beside ours on one network: bound, distance to images, network calls and seconds."""

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noisewise.command import read_json
from noisewise.diffusion.fitting import frozen
from noisewise.diffusion.generate import generate
from noisewise.diffusion.head import CovarianceHead
from noisewise.diffusion.head_fits import BOUNDED, FIXED
from noisewise.diffusion.keeping import RESULTS
from noisewise.diffusion.likelihood import vlb_bits_per_dim
from noisewise.diffusion.loaded import Loaded
from noisewise.diffusion.model import declares_variance, first_channels, tensor_of
from noisewise.diffusion.scheduler import CovarianceScheduler
from noisewise.errors import require
from noisewise.files import write_atomically
from noisewise.metrics.distances import mmd2
from noisewise.metrics.floors import sample_floor
from noisewise.metrics.measurement import Measurement
from noisewise.progress import Reporter

__all__ = ["BATCH", "Distance", "compare", "ours", "seed_of", "theirs"]

# images drawn at once
BATCH = 64
# the samplers of diffusers: class, variance, spacing. DDIM steps by T // K whatever it visits, which only "trailing" suits
_PEERS = {
    "DDPM, beta~": ("DDPMScheduler", "fixed_small", "linspace"),
    "DDPM, beta": ("DDPMScheduler", "fixed_large", "linspace"),
    "DDIM": ("DDIMScheduler", "fixed_small", "trailing"),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", "fixed_small", "linspace"),
    "UniPC": ("UniPCMultistepScheduler", "fixed_small", "linspace"),
}

Draw = Callable[[int, int, int], torch.Tensor]


def compare(
    loaded: Loaded, head: CovarianceHead, images: torch.Tensor, counts: list[int], n: int, seeds: int, seed: int,
    out: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each sampler and number of steps; finished rows are read from `out`."""
    kept = {} if out is None or not (out / RESULTS).is_file() else read_json(out / RESULTS)
    samplers = _samplers(loaded, head)
    distance = Distance.of(images, n, seed)
    rows: list[dict[str, Any]] = []
    with Reporter(True) as reporter:
        for count in counts:
            for name, (draw, bounded) in samplers.items():
                key = f"{name}, {count}"
                if key not in kept:
                    reporter.show("rows", len(rows), len(counts) * len(samplers), key)
                    row = _row(loaded, draw, distance, count, n, seeds, seed)
                    if bounded:
                        row["bits_per_dim"] = _bound(loaded, images[:BOUNDED], bounded[0], count, seed)
                    kept[key] = {"sampler": name, "steps": count, **row}
                    if out is not None:
                        write_atomically(out / RESULTS, json.dumps(kept, indent=2))
                rows.append(kept[key])
    return rows


def seed_of(seed: int, first: int) -> int:
    """A seed of its own for each batch."""
    return seed * 1_000_003 + first


def ours(loaded: Loaded, scheduler: Any, covariance: Any, n: int, steps: int, seed: int) -> torch.Tensor:
    """Images by a scheduler of ours."""
    return generate(loaded.network, scheduler, (n, *loaded.event), steps, covariance, seed=seed)


def theirs(loaded: Loaded, name: str, n: int, steps: int, seed: int) -> torch.Tensor:
    """Images by a sampler of diffusers."""
    scheduler = _peer(loaded, name)
    scheduler.set_timesteps(steps, device=loaded.device)
    generator = torch.Generator(loaded.device).manual_seed(seed)
    random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = torch.randn((n, *loaded.event), device=loaded.device, generator=generator) * scheduler.init_noise_sigma
    with frozen(loaded.network), torch.no_grad():
        for t in scheduler.timesteps:
            # 2C channels would silently be taken for a larger image
            learned = loaded.levels.learned_variance or declares_variance(loaded.network, x)
            output = first_channels(tensor_of(loaded.network(scheduler.scale_model_input(x, t), t)), x, learned)
            x = scheduler.step(output, t, x, **random).prev_sample
    return x


def _peer(loaded: Loaded, name: str) -> Any:
    kind, variance, spacing = _PEERS[name]
    config = dict(loaded.pipeline.scheduler.config)
    config |= {"timestep_spacing": spacing, "variance_type": variance, "_class_name": kind}
    return getattr(require("diffusers", "diffusion"), kind).from_config(config)


def _samplers(loaded: Loaded, head: CovarianceHead) -> dict[str, tuple[Draw, tuple[Any, ...]]]:
    """`draw(n, steps, seed)` of each sampler, and the variance of its bound where it has one."""

    def peer(name: str) -> Draw:
        return lambda n, steps, seed: theirs(loaded, name, n, steps, seed)

    def own(eta: float | None) -> Draw:
        scheduler = CovarianceScheduler.from_config(loaded.pipeline.scheduler.config, eta=eta)
        return lambda n, steps, seed: ours(loaded, scheduler, head, n, steps, seed)

    found: dict[str, tuple[Draw, tuple[Any, ...]]] = {}
    for name in _PEERS:
        fixed = name.removeprefix("DDPM, ")
        found[name] = (peer(name), (FIXED[fixed],) if fixed in FIXED else ())
    found["head, DDPM"] = (own(None), (head,))
    found["head, eta 0"] = (own(0.0), ())
    return found


@dataclass(frozen=True)
class Distance:
    """Squared MMD of pixels to some images, one bandwidth for all, and the score of as many other images."""

    reference: torch.Tensor
    bandwidth: float
    floor: float

    @classmethod
    def of(cls, images: torch.Tensor, n: int, seed: int) -> "Distance":
        """Of n images at a time, to the rest of `images`."""
        flat = images.flatten(1).double().cpu()
        # mean squared distance of two different images
        bandwidth = max(float(2 * flat.var(0).sum()), 1e-12)
        floor = sample_floor(lambda x, y: mmd2(x, y, bandwidth=bandwidth), flat, n, seed=seed)
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
        return cls(flat[order[: len(flat) - n]], bandwidth, floor.mean)

    def __call__(self, x: torch.Tensor) -> float:
        """Of images on [-1, 1], clipped as a file would be."""
        drawn = x.flatten(1).double().cpu().clamp(-1, 1)
        return float(mmd2(drawn, self.reference, bandwidth=self.bandwidth))


def _row(loaded: Loaded, draw: Draw, distance: Distance, steps: int, n: int, seeds: int, seed: int) -> dict[str, Any]:
    """Distance, calls and seconds of one sampler, over seeds."""
    calls = 0

    def count(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal calls
        calls += len(inputs[0])

    hook = loaded.network.register_forward_hook(count)
    start = time.perf_counter()
    try:
        values = []
        for repeat in range(seeds):
            starts = range(0, n, BATCH)
            drawn = [draw(min(BATCH, n - first), steps, seed_of(seed + repeat, first)) for first in starts]
            values.append(distance(torch.cat(drawn)))
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    found = torch.tensor(values, dtype=torch.float64)
    se = float(found.std() / seeds**0.5) if seeds > 1 else None
    measured = Measurement(float(found.mean()), se, distance.floor, n=n)
    return {"mmd2": measured.to_dict(), "calls_per_image": calls / (n * seeds), "seconds": seconds / seeds}


def _bound(loaded: Loaded, images: torch.Tensor, covariance: Any, steps: int, seed: int) -> dict[str, Any]:
    return vlb_bits_per_dim(
        loaded.network, images, covariance, steps, noise_schedule=loaded.levels, seed=seed
    ).to_dict()
