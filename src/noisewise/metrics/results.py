"""results.json: what every `noisewise compare METHOD` writes, one row per system, problem and seed, and its summary."""

import datetime
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.files import write_atomically
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.paired import PairedDifference, paired_difference
from noisewise.typing import Cost

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["SCHEMA", "Results", "Row", "SystemSummary", "describe_environment"]

SCHEMA = 1
_LIBRARIES = ("torch", "numpy", "scipy", "POT", "arviz", "scikit-learn", "jax", "blackjax")


@dataclass(frozen=True)
class Row:
    """What one system scored on one problem with one seed, and what it used. `notes`: failures, warnings, settings."""

    system: str
    problem: str
    seed: int
    measurements: dict[str, Measurement]
    cost: Cost = field(default_factory=Cost)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "system": self.system,
            "problem": self.problem,
            "seed": self.seed,
            "measurements": {name: m.to_dict() for name, m in self.measurements.items()},
            "cost": asdict(self.cost),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "Row":
        """Inverse of `to_dict`."""
        measurements = {name: Measurement.from_dict(m) for name, m in entries["measurements"].items()}
        return cls(
            entries["system"],
            entries["problem"],
            entries["seed"],
            measurements,
            Cost(**entries["cost"]),
            tuple(entries["notes"]),
        )


@dataclass(frozen=True)
class SystemSummary:
    """One system on one problem, over its seeds.

    `measurements`: mean over seeds, with the standard error of that mean (that of the measurement itself for one seed),
    the mean floor, and `n`, the number of seeds whose value is finite. `differences`: this system minus `against` on
    their common seeds; empty for `against` itself. `decided`: names of the measurements in which this system has the
    best mean, no failed seed, and a paired interval against the second best that excludes 0. `cost`: mean over seeds.
    """

    system: str
    problem: str
    seeds: tuple[int, ...]
    measurements: dict[str, Measurement]
    against: str
    differences: dict[str, PairedDifference]
    decided: frozenset[str]
    cost: dict[str, float]


@dataclass(frozen=True)
class Results:
    """A finished comparison.

    `method`: what was compared, such as "digs"; `scale`: "quick", "cpu" or "paper"; `command`: the shell line that
    makes it again; `wall_seconds`: of the whole comparison. The first system of each problem is the one that the
    others are compared with, unless told otherwise. Raises `InvalidInput` when one system has two rows for one problem
    and seed.
    """

    method: str
    scale: str
    command: str
    rows: Sequence[Row]
    environment: dict[str, Any] = field(default_factory=lambda: describe_environment())
    wall_seconds: float | int = 0.0
    notes: Sequence[str] = ()
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    noisewise: str = field(default_factory=lambda: _version("noisewise") or "unknown")

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "notes", tuple(self.notes))
        seen: set[tuple[str, str, int]] = set()
        for row in self.rows:
            key = (row.system, row.problem, row.seed)
            if key in seen:
                raise InvalidInput(f"two rows for system {key[0]!r} on problem {key[1]!r} with seed {key[2]}")
            seen.add(key)

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems, in the order of their first row."""
        return tuple(dict.fromkeys(row.problem for row in self.rows))

    def systems(self, problem: str) -> tuple[str, ...]:
        """Systems that have rows for `problem`, in the order of their first row."""
        return tuple(dict.fromkeys(row.system for row in self.rows if row.problem == problem))

    def measurement_names(self, problem: str) -> tuple[str, ...]:
        """Measurements made on `problem`, in the order of their first appearance."""
        return tuple(dict.fromkeys(name for row in self.rows if row.problem == problem for name in row.measurements))

    def summary(self, against: str | None = None, confidence: float = 0.95) -> tuple[SystemSummary, ...]:
        """Means over seeds and paired differences to `against`, for each problem and system in order.

        `against` defaults to the first system of each problem; problems that lack it have no differences. Raises
        `InvalidInput` for a system that no problem has.
        """
        if against is not None and all(row.system != against for row in self.rows):
            known = sorted({row.system for row in self.rows})
            raise InvalidInput(f"no system is called {against!r}; there are {known}")
        return tuple(
            self._summarise(system, problem, against or self.systems(problem)[0], confidence)
            for problem in self.problems
            for system in self.systems(problem)
        )

    def to_dict(self) -> dict[str, Any]:
        """The layout of results.json: strict JSON, in which a number that is not finite is null."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "scale": self.scale,
            "command": self.command,
            "noisewise": self.noisewise,
            "environment": self.environment,
            "date": self.date,
            "wall_seconds": self.wall_seconds,
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write results.json so that a crash leaves the old file whole."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        return write_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Results":
        """Read what `save` wrote. Raises `RunFolderError` for a missing or damaged file or one of another schema."""
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error}") from error
        except ValueError as error:
            raise RunFolderError(f"{path} is not JSON ({error}); it is damaged or no results file") from error
        schema = entries.get("schema") if isinstance(entries, dict) else None
        if schema != SCHEMA:
            raise RunFolderError(
                f"{path} has results schema {schema!r}, and this version of noisewise reads schema {SCHEMA}; "
                "run the comparison again, or read it with the noisewise that wrote it"
            )
        try:
            fields = {name: value for name, value in entries.items() if name != "schema"}
            return cls(**(fields | {"rows": [Row.from_dict(row) for row in entries["rows"]]}))
        except (KeyError, TypeError, AttributeError, InvalidInput) as error:
            raise RunFolderError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def markdown(self, against: str | None = None) -> str:
        """Tables for docs/results.md: one section per problem, with scale, seeds, command and environment."""
        from noisewise.metrics.tables import markdown

        return markdown(self, against)

    def table(self, against: str | None = None) -> "Group":
        """The same tables for a terminal: a rich renderable."""
        from noisewise.metrics.tables import terminal

        return terminal(self, against)

    def values(self, system: str, problem: str, name: str) -> dict[int, float]:
        """Finite values of one measurement, by seed."""
        rows = (row for row in self.rows if row.system == system and row.problem == problem)
        found = {row.seed: float(row.measurements[name]) for row in rows if name in row.measurements}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def row_notes(self) -> tuple[str, ...]:
        """The notes of single rows, each with the system, problem and seed it speaks of."""
        return tuple(
            f"{row.system} on {row.problem}, seed {row.seed}: {note}" for row in self.rows for note in row.notes
        )

    def _summarise(self, system: str, problem: str, against: str, confidence: float) -> SystemSummary:
        rows = [row for row in self.rows if row.system == system and row.problem == problem]
        names = [name for name in self.measurement_names(problem) if any(name in row.measurements for row in rows)]
        measurements = {
            name: _mean_measurement([r.measurements[name] for r in rows if name in r.measurements]) for name in names
        }
        differences = {}
        for name in names if against != system else ():
            better = measurements[name].better
            pair = self._pair(system, against, problem, name, confidence, better)
            if pair is not None:
                differences[name] = pair
        decided = frozenset(name for name in names if self._is_decided_best(system, problem, name, confidence))
        totals = [asdict(row.cost) for row in rows]
        cost = {name: math.fsum(total[name] for total in totals) / len(totals) for name in totals[0]}
        seeds = tuple(row.seed for row in rows)
        return SystemSummary(system, problem, seeds, measurements, against, differences, decided, cost)

    def _pair(self, a: str, b: str, problem: str, name: str, confidence: float, better: str) -> PairedDifference | None:
        first, second = self.values(a, problem, name), self.values(b, problem, name)
        common = [seed for seed in first if seed in second]
        if not common:
            return None
        return paired_difference(
            [first[s] for s in common], [second[s] for s in common], confidence=confidence, better=better
        )

    def _is_decided_best(self, system: str, problem: str, name: str, confidence: float) -> bool:
        """Whether `system` leads in `name` with no failed seed, ahead of the second best beyond its paired interval."""
        rows = [row for row in self.rows if row.problem == problem and name in row.measurements]
        better = rows[0].measurements[name].better
        if better == "neither":
            return False
        sign = 1 if better == "lower" else -1
        means = {}
        for rival in dict.fromkeys(row.system for row in rows):
            values = self.values(rival, problem, name)
            if values:
                means[rival] = sign * math.fsum(values.values()) / len(values)
        order = sorted(means, key=means.__getitem__)
        seeds = [row.seed for row in self.rows if row.problem == problem and row.system == system]
        if len(order) < 2 or order[0] != system or len(self.values(system, problem, name)) < len(seeds):
            return False
        pair = self._pair(system, order[1], problem, name, confidence, better)
        return pair is not None and pair.better == "a"


def describe_environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, threads and device, for the record; `device` as torch names it."""
    import torch

    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    )
    versions = {library: version for library in _LIBRARIES if (version := _version(library))}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": device,
        "device_name": name,
    }


def _mean_measurement(measured: list[Measurement]) -> Measurement:
    finite = [m for m in measured if math.isfinite(m.value)]
    floors = [m.floor for m in measured if m.floor is not None and math.isfinite(m.floor)]
    mean = math.fsum(m.value for m in finite) / len(finite) if finite else math.nan
    se = finite[0].se if len(finite) == 1 else None
    if len(finite) > 1:
        se = math.sqrt(math.fsum((m.value - mean) ** 2 for m in finite) / (len(finite) - 1) / len(finite))
    floor = math.fsum(floors) / len(floors) if floors else None
    return Measurement(mean, se, floor, len(finite), measured[0].unit, measured[0].better)


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
