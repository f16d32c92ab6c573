"""What `noisewise compare` runs for every method: systems on problems, tuned on a seed of its own, kept row by row."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.files import write_atomically
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.results import Results, Row, describe_environment
from noisewise.report import Report
from noisewise.typing import Cost, check_count

__all__ = ["TUNING_SEED", "Comparison", "Outcome", "Pictures", "Problem", "System", "tune"]

# settings are chosen on this seed (and as many after it as a problem asks for), never reported, at this share of the budget
TUNING_SEED = 100
_LAST_TUNING_SEED = 109
_TUNING_SHARE = 0.5

Pictures = Mapping[tuple[str, str], dict[str, Any]]


class Outcome(Protocol):
    """What a system made of its budget; what else it holds is between the problem's systems and its measurements."""

    @property
    def cost(self) -> Cost:
        """The bill."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What to remark in the table."""
        ...


@dataclass(frozen=True)
class System:
    """One contestant. `draw(budget, seed, **setting)`: spend `budget`, warm-up or training included.

    `settings`: those that tuning tries; the first one holds where nothing is tuned. `extra`: the optional libraries
    it needs, as (module, extra), or None.
    """

    name: str
    draw: Callable[..., Any]
    settings: tuple[dict[str, Any], ...] = ({},)
    extra: tuple[str, str] | None = None


@dataclass(frozen=True)
class Problem:
    """One problem. `measure(outcome)` gives the measurements; `criterion` names the one that tuning looks at.

    `picture(outcome)`: JSON values that the report draws. `notes`: what to say of the problem. `better`: which way the
    criterion is better. `tuning_seeds`: how many seeds tuning takes the mean over, at most 10.
    """

    protocol: str
    name: str
    budget: float | int
    systems: tuple[System, ...]
    measure: Callable[[Any], dict[str, Measurement]]
    criterion: str
    picture: Callable[[Any], dict[str, Any]] = lambda outcome: {}
    notes: tuple[str, ...] = ()
    better: str = "lower"
    tuning_seeds: int = 1

    @property
    def seeds_of_tuning(self) -> tuple[int, ...]:
        """The seeds that its settings are chosen on."""
        return tuple(range(TUNING_SEED, TUNING_SEED + self.tuning_seeds))


@dataclass(frozen=True)
class Comparison:
    """What a method's experiment declares, and the run of it.

    `method`: its key on the command line. `title`, `subtitle`: of the report. `problems(scale, device)`.
    `illustrate(report, results, pictures)`: adds sections of figures to a report, where rows kept any `pictures`.
    `protocols`: names of all problems' protocols; `optional`: those that run only when asked for; `absent`: those that a
    scale lacks. `seeds`: by scale. `check(scale, device, protocols)`: raises where the data or the libraries of a protocol that
    was asked for are not at hand, before any row.
    """

    method: str
    title: str
    subtitle: str
    problems: Callable[[str, str], Sequence[Problem]]
    illustrate: Callable[[Report, Results, Pictures], None]
    protocols: tuple[str, ...]
    optional: tuple[str, ...] = ()
    absent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"quick": (0,), "cpu": (0, 1, 2), "paper": tuple(range(10))}
    )
    check: Callable[[str, str, tuple[str, ...]], None] = lambda scale, device, protocols: None

    def run(
        self,
        scale: str = "quick",
        seeds: int | Sequence[int] | None = None,
        out: Path | str | None = None,
        protocols: Sequence[str] | None = None,
        progress: bool = True,
    ) -> Results:
        """Run the rows that `out` does not hold yet, then write results and report; returns all rows of this scale there.

        `scale`: "quick" (seconds, nothing tuned), "cpu" (minutes) or "paper". `seeds`: how many (0, 1, ...) or which; by
        default the method's own. `out`: folder of rows/, tuning/, results.json and report.html, by default
        runs/compare-METHOD-SCALE; several processes may share it on different protocols. `protocols`: names, all but the
        optional ones by default. Torch runs on one thread meanwhile. Raises `InvalidInput` for an unknown scale or protocol
        and for seeds 100 to 109, which belong to tuning, and what `check` raises; `RunFolderError` for a damaged row.
        """
        if scale not in self.seeds:
            raise InvalidInput(f"scale must be one of {', '.join(self.seeds)}, got {scale!r}")
        usual = tuple(protocol for protocol in self.protocols if protocol not in self.optional)
        wanted = usual if protocols is None else tuple(protocols)
        if not wanted or set(wanted) - set(self.protocols):
            raise InvalidInput(
                f"protocols are {', '.join(self.protocols)}, got {', '.join(map(str, wanted)) or 'none'}"
            )
        chosen = self.seeds[scale] if seeds is None else _checked_seeds(seeds)
        device = "cuda" if scale == "paper" and torch.cuda.is_available() else "cpu"
        self.check(scale, device, wanted)
        folder = Path(out or Path("runs") / f"compare-{self.method}-{scale}")
        every = self.problems(scale, device)
        absent: list[str] = []
        with _one_thread():
            for problem in every:
                if problem.protocol in wanted:
                    absent += _run_problem(problem, chosen, scale, folder, progress)
            results = self._collect(every, scale, folder, device, tuple(dict.fromkeys(absent)))
            results.save(folder / "results.json")
            report = Report(self.title, self.subtitle)
            self.add_to(report.section("Results"), results, folder)
            report.save(folder / "report.html")
        return results

    def add_to(self, report: Report, results: Results, folder: Path) -> None:
        """The tables of `results` and the figures of the rows in `folder`, into a report that may hold other methods too."""
        report.results(results)
        self.illustrate(report, results, _pictures(folder, results.scale))

    def _collect(
        self, every: Sequence[Problem], scale: str, folder: Path, device: str, missing: tuple[str, ...]
    ) -> Results:
        """All rows of this scale in the folder, in the order of problems and systems."""
        order = {(p.name, s.name): index for index, (p, s) in enumerate((p, s) for p in every for s in p.systems)}
        records = [r for r in _records(folder, scale) if (r["row"]["problem"], r["row"]["system"]) in order]
        records.sort(key=lambda r: (order[r["row"]["problem"], r["row"]["system"]], r["row"]["seed"]))
        rows = [Row.from_dict(record["row"]) for record in records]
        present = {row.problem for row in rows}
        protocols = sorted({record["protocol"] for record in records})
        notes = [note for problem in every if problem.name in present for note in problem.notes]
        notes += [*_tuning_notes(folder, scale), *missing]
        if scale == "quick":
            notes.append("Quick scale tunes nothing: each system has the first setting of its grid; cpu scale chooses.")
        notes.append("Wall time adds up the rows, measuring included; processes may have run them side by side.")
        number = len({row.seed for row in rows})
        command = ["noisewise", "compare", self.method, "--scale", scale, "--seeds", str(number)]
        if set(self.protocols) - set(self.optional) - set(self.absent.get(scale, ())) != set(protocols):
            command += ["--protocol", ",".join(protocols)]
        return Results(
            method=self.method,
            scale=scale,
            command=shlex.join(command),
            rows=rows,
            environment=describe_environment(device),
            wall_seconds=math.fsum(record["seconds"] for record in records),
            notes=notes,
        )


def _checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, int | float):
        return tuple(range(check_count("seeds", seeds)))
    chosen = tuple(check_count("seeds", seed, 0) for seed in seeds)
    if not chosen or any(TUNING_SEED <= seed <= _LAST_TUNING_SEED for seed in chosen):
        raise InvalidInput(
            f"seeds must be some whole numbers outside {TUNING_SEED} to {_LAST_TUNING_SEED}, which belong to tuning, "
            f"got {seeds!r}"
        )
    return chosen


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: the batches are small, and two processes then share a machine fairly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_problem(problem: Problem, seeds: tuple[int, ...], scale: str, folder: Path, progress: bool) -> list[str]:
    """Run the rows that are missing; return a note for each system whose library is not installed."""
    absent = []
    for system in problem.systems:
        if system.extra is not None and importlib.util.find_spec(system.extra[0]) is None:
            absent.append(f"{system.name} was left out: pip install 'noisewise[{system.extra[1]}]'")
            continue
        missing = [seed for seed in seeds if not _row_path(folder, scale, problem, system, seed).exists()]
        if not missing:
            continue
        setting = system.settings[0] if scale == "quick" else tune(problem, system, folder / "tuning", scale)
        for seed in missing:
            record = _run_row(problem, system, setting, seed)
            _write(_row_path(folder, scale, problem, system, seed), {"scale": scale, **record})
            if progress:
                print(
                    f"noisewise: {problem.name}, {system.name}, seed {seed}: {record['seconds']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return absent


def tune(problem: Problem, system: System, folder: Path, scale: str = "cpu") -> dict[str, Any]:
    """The best of the system's settings by the problem's criterion, on the tuning seeds and half the budget.

    The scores stay in `folder`, and a repeated call reads them. A system with one setting gets it untried.
    """
    if len(system.settings) == 1:
        return system.settings[0]
    path = folder / f"{_file_name(scale, problem, system)}.json"
    if path.exists():
        return _read(path)["chosen"]
    scores = [_tuning_score(problem, system, setting) for setting in system.settings]
    sign = -1 if problem.better == "higher" else 1
    ranks = [math.inf if score is None else sign * score for score in scores]
    best = system.settings[ranks.index(min(ranks))]
    tried = [{"setting": setting, "score": score} for setting, score in zip(system.settings, scores, strict=True)]
    names = {"scale": scale, "problem": problem.name, "system": system.name, "criterion": problem.criterion}
    _write(path, {**names, "seeds": problem.seeds_of_tuning, "tried": tried, "chosen": best})
    return best


def _tuning_score(problem: Problem, system: System, setting: dict[str, Any]) -> float | None:
    """The criterion's mean, or None for a setting that on some seed cannot run within the budget or is not finite."""
    values = []
    try:
        for seed in problem.seeds_of_tuning:
            outcome = system.draw(_TUNING_SHARE * problem.budget, seed, **setting)
            values.append(float(problem.measure(outcome)[problem.criterion]))
    except NoisewiseError:
        return None
    value = math.fsum(values) / len(values)
    return value if math.isfinite(value) else None


def _run_row(problem: Problem, system: System, setting: dict[str, Any], seed: int) -> dict[str, Any]:
    """One row with its picture and the wall time of running and measuring it."""
    begin = time.monotonic()
    picture: dict[str, Any] = {}
    try:
        outcome = system.draw(problem.budget, seed, **setting)
        measurements = problem.measure(outcome)
        picture = problem.picture(outcome)
        row = Row(system.name, problem.name, seed, measurements, outcome.cost, outcome.notes)
    except NoisewiseError as error:
        # a contestant that fails stays in the table, as a failure
        failed = {problem.criterion: Measurement(math.nan, better=problem.better)}
        cost = Cost(seconds=time.monotonic() - begin)
        row = Row(system.name, problem.name, seed, failed, cost, (f"failed: {error}",))
    seconds = time.monotonic() - begin
    return {"protocol": problem.protocol, "seconds": seconds, "row": row.to_dict(), "picture": picture}


def _tuning_notes(folder: Path, scale: str) -> list[str]:
    notes = []
    for path in sorted((folder / "tuning").glob(f"{scale}-*.json")):
        found = _read(path)
        scores = "; ".join(
            f"{_shown(entry['setting'])}: {'failed' if entry['score'] is None else format(entry['score'], '.4g')}"
            for entry in found["tried"]
        )
        seeds = found.get("seeds", [TUNING_SEED])
        on = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        notes.append(
            f"{found['system']} on {found['problem']}: {len(found['tried'])} settings tried on {on} "
            f"with {_TUNING_SHARE:.0%} of the budget, chosen by {found['criterion']}: {_shown(found['chosen'])} ({scores})."
        )
    return notes


def _shown(setting: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}" for name, value in setting.items()
    )


def _records(folder: Path, scale: str) -> list[dict[str, Any]]:
    found = [_read(path) for path in sorted((folder / "rows").glob(f"{scale}-*.json"))]
    return [record for record in found if record["scale"] == scale]


def _pictures(folder: Path, scale: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By problem and system, from the lowest seed."""
    records = sorted(_records(folder, scale), key=lambda r: -r["row"]["seed"])
    return {(r["row"]["problem"], r["row"]["system"]): r["picture"] for r in records if r["picture"]}


def _row_path(folder: Path, scale: str, problem: Problem, system: System, seed: int) -> Path:
    return folder / "rows" / f"{_file_name(scale, problem, system)}-seed{seed}.json"


def _file_name(scale: str, problem: Problem, system: System) -> str:
    """Of names that differ in signs alone, as beta~ and beta do, the later ones get a number."""
    name = _slug(scale, problem.name, system.name)
    alike = [other.name for other in problem.systems if _slug(other.name) == _slug(system.name)]
    place = alike.index(system.name) if system.name in alike else 0
    return f"{name}-{place + 1}" if place else name


def _slug(*parts: str) -> str:
    return "-".join(re.sub(r"[^a-z0-9.]+", "_", part.lower()).strip("_") for part in parts)


def _write(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(record, ensure_ascii=False) + os.linesep)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}); delete it, and the same call makes it again") from error
    if not isinstance(record, dict) or "scale" not in record:
        raise RunFolderError(f"{path} is no row of a comparison; delete it, and the same call makes it again")
    return record
