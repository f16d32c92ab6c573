"""The run of every comparison: rows kept at once, tuning on a seed of its own, arguments checked before any work."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from noisewise.comparison import TUNING_SEED, Comparison, Problem, System, tune
from noisewise.errors import InvalidInput, RunFolderError
from noisewise.metrics.measurement import Measurement
from noisewise.typing import Cost


@dataclass(frozen=True)
class Drawn:
    x: torch.Tensor
    cost: Cost
    notes: tuple[str, ...] = ()


def toy(calls, fail_at=None):
    """A problem whose draws are standard normal times a setting: the mean square tells the setting."""

    def draw(budget, seed, width=1.0):
        if fail_at is not None and len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append((seed, width))
        x = width * torch.randn(4, 50, 1, generator=torch.Generator().manual_seed(seed))
        return Drawn(x, Cost(gradients=int(budget)))

    def measure(outcome):
        return {"gap": Measurement(abs(float(outcome.x.square().mean()) - 1))}

    systems = (System("plain", draw), System("tuned", draw, ({"width": 3.0}, {"width": 1.0}, {"width": 0.2})))
    return Problem("A", "toy", 1000, systems, measure, "gap")


def comparison(calls, fail_at=None):
    def illustrate(report, results, pictures):
        report.text("illustrated")

    problems = (toy(calls, fail_at),)
    return Comparison("toys", "Toys", "", lambda scale, device: problems, illustrate, protocols=("A", "B"))


def test_rows_finished_before_an_interruption_are_kept(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        comparison(calls, fail_at=2).run("quick", seeds=3, out=tmp_path, protocols=["A"], progress=False)
    assert len(list((tmp_path / "rows").iterdir())) == 2
    again = []
    results = comparison(again).run("quick", seeds=3, out=tmp_path, protocols=["A"], progress=False)
    assert [seed for seed, _ in calls + again] == [0, 1, 2, 0, 1, 2]
    assert [(row.system, row.seed) for row in results.rows] == [(s, k) for s in ("plain", "tuned") for k in range(3)]


def test_names_that_differ_in_signs_alone_have_rows_of_their_own(tmp_path):
    calls = []
    problem = toy(calls)
    draw = problem.systems[0].draw
    problem = replace(problem, systems=tuple(System(name, draw) for name in ("beta~", "beta", "beta+")))
    every = replace(comparison(calls), problems=lambda scale, device: (problem,))
    for _ in range(2):
        results = every.run("quick", out=tmp_path, protocols=["A"], progress=False)
        assert [row.system for row in results.rows] == ["beta~", "beta", "beta+"]
    assert len(calls) == 3


def test_what_a_protocol_needs_is_asked_for_before_any_row(tmp_path):
    calls, asked = [], []

    def check(scale, device, protocols):
        asked.append((scale, device, protocols))
        if "B" in protocols:
            raise InvalidInput("the data of B are not here")

    checked = replace(comparison(calls), check=check)
    with pytest.raises(InvalidInput, match="data of B"):
        checked.run("quick", out=tmp_path, protocols=["A", "B"], progress=False)
    assert not calls
    assert not list(tmp_path.iterdir())
    checked.run("quick", out=tmp_path, protocols=["A"], progress=False)
    assert asked == [("quick", "cpu", ("A", "B")), ("quick", "cpu", ("A",))]


def test_tuning_takes_the_best_setting_on_its_own_seed_and_says_what_it_tried(tmp_path):
    calls = []
    results = comparison(calls).run("cpu", seeds=1, out=tmp_path, protocols=["A"], progress=False)
    assert calls == [(0, 1.0), *[(TUNING_SEED, width) for width in (3.0, 1.0, 0.2)], (0, 1.0)]
    note = next(note for note in results.notes if note.startswith("tuned on toy"))
    assert "3 settings" in note
    assert "chosen by gap: width 1 (" in note
    assert results.command == "noisewise compare toys --scale cpu --seeds 1 --protocol A"
    page = (tmp_path / "report.html").read_text()
    assert "illustrated" in page
    assert "toy, 1 seed" in page


def test_tuning_takes_the_mean_over_as_many_seeds_as_the_problem_asks_for(tmp_path):
    calls = []
    problem = replace(toy(calls), tuning_seeds=3)
    settings = problem.systems[1].settings
    assert tune(problem, problem.systems[1], tmp_path) == {"width": 1.0}
    assert calls == [(seed, s["width"]) for s in settings for seed in range(TUNING_SEED, TUNING_SEED + 3)]
    scores = [entry["score"] for entry in json.loads(next(tmp_path.iterdir()).read_text())["tried"]]
    alone = [float(problem.measure(problem.systems[1].draw(1, seed, width=3.0))["gap"]) for seed in (100, 101, 102)]
    assert scores[0] == pytest.approx(sum(alone) / 3, rel=1e-12)


def test_torch_has_its_threads_back(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        comparison([]).run("quick", out=tmp_path, protocols=["A"], progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "huge"}, "'huge'"),
        ({"protocols": ("A", "Z")}, "A, Z"),
        ({"protocols": ()}, "none"),
        ({"seeds": (TUNING_SEED,)}, "belong to tuning"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(InvalidInput, match=message):
        comparison([]).run(out=tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_damaged_row_is_named(tmp_path):
    comparison([]).run("quick", out=tmp_path, protocols=["A"], progress=False)
    row = next((tmp_path / "rows").iterdir())
    row.write_text(json.dumps({})[:1])
    with pytest.raises(RunFolderError, match=row.name):
        comparison([]).run("quick", out=tmp_path, protocols=["A"], progress=False)
