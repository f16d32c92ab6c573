"""What a head is fitted on: clean events with their conditions, or noisy ones out of the model's own trajectories."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noisewise.diffusion.model import DiffusionModel
from noisewise.diffusion.reverse import reverse_step
from noisewise.errors import InvalidInput
from noisewise.training import fingerprint

__all__ = ["Rows", "Trajectories", "as_rows"]

# trajectories kept: their steps, and the most numbers of them
_STEPS, _MOST = 50, 2**27
_CHAINS = 256
_KEYS = ("x", "images", "pixel_values", "image")


@dataclass
class Rows:
    """A batch: `x` [batch, *event], clean, or noisy at `t` [batch]; `conditions`: what else the network takes, by name."""

    x: Tensor
    t: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Kept:
    """Events in memory."""

    x: Tensor
    conditions: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Rows:
        device, index = index.device, index.to(self.x.device)
        picked = {name: value[index].to(device) for name, value in self.conditions.items()}
        return Rows(self.x[index].to(device), None, picked)

    def name(self, numbers: int) -> float:
        """One number that other data do not have."""
        return _name(self.x, numbers)


@dataclass
class _Dataset:
    """A map-style dataset, read item by item."""

    items: Any
    event: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Tensor) -> Rows:
        parts = [_parts(self.items[int(i)]) for i in index]
        x = torch.stack([torch.as_tensor(part[0], dtype=torch.float32) for part in parts])
        _check_events(x, self.event)
        conditions = {name: torch.stack([torch.as_tensor(part[1][name]) for part in parts]) for name in parts[0][1]}
        return Rows(x.to(index.device), None, {name: value.to(index.device) for name, value in conditions.items()})

    def name(self, numbers: int) -> float:
        """One number, from the first rows."""
        return _name(self[torch.arange(min(len(self), 8))].x, numbers)


def as_rows(data: Any, event: tuple[int, ...], device: torch.device) -> Any:
    """`data` as something with a length that gives `Rows` for indices.

    Raises `InvalidInput` for events of another shape, NaN, and fewer than 8 rows.
    """
    conditions: dict[str, Tensor] = {}
    if isinstance(data, str | Path):
        raise InvalidInput(
            f"data must be tensors or a Dataset, got the path {str(data)!r}: read_images(path, channels, size)"
        )
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        conditions, data = {"class_labels": torch.as_tensor(data[1])}, data[0]
    if not isinstance(data, Tensor) and hasattr(data, "__array__"):
        data = torch.as_tensor(data)
    if isinstance(data, Tensor):
        rows: Any = _Kept(data.detach().to(device, torch.float32), conditions)
        _check_events(rows.x, event)
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        rows = _Dataset(data, event)
        _check_events(rows[torch.arange(min(len(data), 2))].x, event)
    else:
        raise InvalidInput(f"data must be a tensor [row, *event] or a Dataset with a length, got {type(data).__name__}")
    if len(rows) < 8:
        raise InvalidInput(f"a fit needs at least 8 rows of data, got {len(rows)}")
    return rows


def _check_events(x: Tensor, event: tuple[int, ...]) -> None:
    if tuple(x.shape[1:]) != event:
        raise InvalidInput(
            f"events of data must have shape {event}, as the head was made for, got {tuple(x.shape[1:])}"
        )
    bad = (~torch.isfinite(x)).flatten(1).any(1)
    if bool(bad.any()):
        raise InvalidInput(
            f"{int(bad.sum())} of {len(x)} rows of data are not finite, the first is {int(bad.nonzero()[0])}"
        )


def _parts(item: Any) -> tuple[Any, dict[str, Any]]:
    """The event of an item, and what else it holds."""
    if isinstance(item, Mapping):
        name = next((key for key in _KEYS if key in item), None)
        if name is None:
            raise InvalidInput(f"an item of data must hold one of {_KEYS}, got {sorted(item)}")
        return item[name], {key: value for key, value in item.items() if key != name}
    if isinstance(item, tuple | list):
        return item[0], {"class_labels": item[1]} if len(item) > 1 else {}
    return item, {}


def _name(x: Tensor, numbers: int) -> float:
    flat = x.flatten()
    return fingerprint([flat[:: max(1, len(flat) // numbers)]])


@dataclass
class Trajectories:
    """States x_t at their t, of chains that the model itself made from noise by DDPM steps with the smaller fixed variance."""

    x: Tensor
    t: Tensor

    @classmethod
    def of(cls, model: DiffusionModel, event: tuple[int, ...], generator: torch.Generator) -> "Trajectories":
        """Some chains of 50 steps, each group of them with an offset of its own, so that every level is visited."""
        size = int(torch.tensor(event).prod())
        chains = max(8, min(_CHAINS, _MOST // (_STEPS * size)))
        groups, levels = 8, len(model.levels)
        states, times = [], []
        steps = min(_STEPS, levels)
        for group in range(groups):
            x = torch.randn(max(1, chains // groups), *event, device=generator.device, generator=generator)
            offset = (group + 0.5) / groups
            path = [int((place + offset) * levels / steps) for place in range(steps)]
            visited: list[int | None] = [None, *sorted({min(t, levels - 1) for t in path} | {levels - 1})]
            for place in range(len(visited) - 1, 0, -1):
                t = visited[place]
                assert t is not None
                states.append(x)
                times.append(torch.full((len(x),), t, device=x.device))
                with torch.no_grad():
                    prediction = model.predict(x, t)
                step = reverse_step(model.levels.pair(t), model.levels.pair(visited[place - 1]))
                noise = torch.randn(x.shape, device=x.device, generator=generator)
                x = step.mean(prediction.clean, prediction.eps, x) + step.variance**0.5 * noise
        made = cls(torch.cat(states), torch.cat(times))
        if not bool(torch.isfinite(made.x).all()):
            raise InvalidInput("the model's own trajectories are not finite: check noise_schedule and prediction_type")
        return made

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(self.x[index], self.t[index])

    def near(self, t: int, rows: int) -> Rows:
        """The states whose level is nearest to t."""
        return self[(self.t - t).abs().argsort(stable=True)[:rows]]

    def name(self, numbers: int) -> float:
        """One number that other trajectories do not have."""
        return _name(self.x, numbers)
