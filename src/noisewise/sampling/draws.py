"""What a sampling run returns: positions, statistics and the bill, with diagnostics, persistence and resumption."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, RunFolderError, require
from noisewise.runs import RunFolder
from noisewise.typing import Cost

__all__ = ["KIND", "Draws", "Final", "pack", "part", "unpack"]

KIND = "sampling"


@dataclass(frozen=True)
class Final:
    """Where a run stopped: all that is needed to go on to the same draws as a longer run."""

    state: dict[str, Tensor]
    settings: dict[str, Tensor]
    generator: Tensor


@dataclass(frozen=True)
class Draws:
    """Draws of a sampling run.

    `positions`: [chain, draw, dim]. `stats`: by name, first axis the draw: `log_prob` [draw, chain] of the target (none for
    a model's kernel), and the kernel's acceptances (mean over chains and the iterations between draws) [draw, level].
    `cost`: the bill, warm-up
    included. `names`: one per coordinate. `config`: what was asked. `settings` that warm-up found: `final.settings`.
    `warnings`: what the diagnostics said. `interrupted`: stopped by Ctrl-C before the draws asked for.
    `squares`: sum over draws and chains of the squared score per coordinate, then their number, [dim + 1].
    """

    positions: Float[Tensor, "chain draw dim"]
    stats: dict[str, Tensor]
    cost: Cost
    config: dict[str, Any]
    final: Final
    names: list[str] | None = None
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    squares: Tensor | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict[str, Tensor]:
        """Step sizes, levels, ladder and fit that warm-up found."""
        return self.final.settings

    @property
    def local_scale(self) -> Tensor:
        """Standard deviation inside a mode per coordinate, from the mean squared score over the run, [dim]."""
        if self.squares is None or not float(self.squares[-1]):
            raise InvalidInput("there are no draws yet, so no scores were seen")
        return (self.squares[-1] / self.squares[:-1].clamp(min=1e-300)).sqrt().to(self.positions)

    def flat(self) -> Float[Tensor, "row dim"]:
        """All draws of all chains, [chain x draw, dim]."""
        return self.positions.reshape(-1, self.positions.shape[-1])

    def to_arviz(self) -> Any:
        """An ArviZ InferenceData: variable `x` [chain, draw, dim] with named coordinates, `sample_stats`, attributes.

        Raises `MissingExtra` without ArviZ.
        """
        arviz = require("arviz", "sampling")
        stats = {"lp": self.stats["log_prob"].T.cpu().numpy()} if "log_prob" in self.stats else {}
        return arviz.from_dict(
            posterior={"x": self.positions.cpu().numpy()},
            sample_stats=stats,
            coords={"coordinate": self.names or [str(i) for i in range(self.positions.shape[-1])]},
            dims={"x": ["coordinate"]},
            attrs={"sampler": json.dumps(self.config), "gradients": self.cost.gradients},
        )

    def summary(self, modes: Any = None) -> Any:
        """R-hat, bulk and tail ESS, mean and sd per coordinate, and the traffic between modes; see `Summary`.

        `modes`: [mode, dim] centres, a callable [row, dim] -> integer labels [row], or None to find them in the draws.
        """
        from noisewise.sampling.diagnostics import summarise

        return summarise(self, modes)

    def save(self, folder: str | Path) -> Path:
        """Write a run folder that `load` and `resume` read; the folder must be new or empty."""
        run = RunFolder(folder)
        run.begin(KIND, self.config)
        run.put_piece(0, {"positions": self.positions.transpose(0, 1), **self.stats})
        progress = {
            "draws": self.positions.shape[1],
            "pieces": 1,
            "finished": True,
            "cost": vars(self.cost),
            "names": self.names,
            "warnings": list(self.warnings),
            "interrupted": self.interrupted,
            # the warm-up is over: `sample` with this folder as its checkpoint goes on among the draws
            "warmed": True,
            "phase": 0,
            "index": 0,
            "steps": None,
            "allowance": 0,
        }
        run.checkpoint(pack(self.final, self.squares), progress)
        return run.path

    @classmethod
    def load(cls, folder: str | Path) -> "Draws":
        """Read a run folder, finished or not (then: what its last checkpoint holds). Raises `RunFolderError`."""
        run = RunFolder(folder)
        config = run.config(KIND)
        restored = run.restore()
        if restored is None or not restored[1]["pieces"]:
            raise RunFolderError(
                f"{folder} holds a run without draws yet; call sample(...) with this checkpoint to go on"
            )
        tensors, progress = restored
        pieces = [run.piece(index) for index in range(progress["pieces"])]
        stats = {name: torch.cat([piece[name] for piece in pieces])[: progress["draws"]] for name in pieces[0]}
        final, squares = unpack(tensors)
        return cls(
            positions=stats.pop("positions").transpose(0, 1).contiguous(),
            stats=stats,
            cost=Cost(**progress["cost"]),
            config=config,
            final=final,
            names=progress["names"],
            warnings=tuple(progress["warnings"]),
            interrupted=progress["interrupted"],
            squares=squares,
        )

    def resume(self, kernel_or_target: Any, draws: int, progress: bool = True) -> "Draws":
        """Go on for `draws` more per chain; together they equal one longer run bit for bit.

        `kernel_or_target`: what the run was started with (functions are not stored). Raises `InvalidInput` when it differs.
        """
        from noisewise.sampling.loop import continue_run

        return continue_run(kernel_or_target, self, draws, progress)

    def joined(self, later: "Draws") -> "Draws":
        """These draws followed by `later`, with the final state of `later` and its bill, which includes ours."""
        return replace(
            later,
            warnings=tuple(dict.fromkeys((*self.warnings, *later.warnings))),
            positions=torch.cat([self.positions, later.positions], 1),
            stats={name: torch.cat([value, later.stats[name]]) for name, value in self.stats.items()},
        )

    def report(self, path: str | Path, modes: Any = None, log_prob: Callable[[Tensor], Tensor] | None = None) -> Path:
        """Write one offline HTML page: summary, traces, mode weights, acceptances. Raises `MissingExtra`."""
        from noisewise.sampling.page import write_page

        return write_page(self, path, modes, log_prob)


def pack(final: Final, squares: Tensor | None, memory: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """One flat dict of tensors for a checkpoint."""
    tensors = {f"state.{name}": value for name, value in final.state.items()}
    tensors |= {f"settings.{name}": value for name, value in final.settings.items()}
    tensors |= {f"memory.{name}": value for name, value in (memory or {}).items()}
    tensors["generator"] = final.generator
    if squares is not None:
        tensors["squares"] = squares
    return tensors


def unpack(tensors: dict[str, Tensor]) -> tuple[Final, Tensor | None]:
    """The inverse of `pack`, without the memory."""
    return Final(part(tensors, "state"), part(tensors, "settings"), tensors["generator"]), tensors.get("squares")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those entries whose name begins with `prefix` and a dot, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
