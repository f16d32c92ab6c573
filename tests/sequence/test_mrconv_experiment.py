"""`noisewise compare mrconv` at quick scale and on small data of paper scale, and the truths that its problems rest on."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from noisewise.sequence.experiments import mrconv
from noisewise.sequence.experiments.mrconv.arena import ARENA, arena_problems
from noisewise.sequence.experiments.mrconv.identification import identification_problems, target_kernels
from noisewise.sequence.experiments.mrconv.peers import BothWays, FreeKernel
from noisewise.sequence.experiments.mrconv.problems import handwritten_rows, listops_split
from noisewise.sequence.experiments.mrconv.speech import SPEAKERS, by_index, by_speaker, spoken_digits
from noisewise.sequence.experiments.mrconv.training import (
    Shape,
    decimated,
    kept_for_backward,
    majority,
    matched,
    network,
    shaped_like,
    stretched,
)


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """As many clips as the real data have, of a tone for each digit."""
    generator = np.random.default_rng(0)
    digit, speaker, take = (part.ravel() for part in np.meshgrid(range(10), range(6), range(50), indexing="ij"))
    lengths = generator.integers(3000, 5000, 3000)
    t = np.arange(5000) / 8000
    clips = [
        (1e4 * np.sin(2 * np.pi * (100 + 50 * d) * t[:n]) + generator.normal(0, 100, n)).astype(np.int16)
        for d, n in zip(digit, lengths, strict=True)
    ]
    (tmp_path / "fsdd").mkdir()
    file = tmp_path / "fsdd" / "fsdd_8khz.npz"
    offsets = np.concatenate([[0], lengths.cumsum()])
    speakers = np.array(SPEAKERS)[speaker]
    np.savez(file, audio=np.concatenate(clips), offsets=offsets, digit=digit, speaker=speakers, index=take)
    monkeypatch.setenv("NOISEWISE_DATA", str(tmp_path))
    yield file
    spoken_digits.cache_clear()


@pytest.mark.slow
def test_mrconv_at_quick_scale(tmp_path, recordings, shapes_unchecked):
    results = mrconv.run("quick", out=tmp_path / "out", progress=False)
    assert not [note for row in results.rows for note in row.notes if note.startswith("failed")]
    assert len(results.problems) == 6
    changes = [row.measurements["changed by merging"].value for row in results.rows
               if "changed by merging" in row.measurements]  # fmt: skip
    assert changes == [0] * 5
    merged = [row.measurements["merge difference"].value for row in results.rows
              if "merge difference" in row.measurements]  # fmt: skip
    assert max(merged) < 1e-4
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("<figure>") == 8


@pytest.mark.slow
def test_few_frequencies_at_each_resolution_find_a_smooth_kernel_in_scarce_data(shapes_unchecked):
    problem = identification_problems("cpu")[0]
    systems = {system.name: system for system in problem.systems}
    errors = {}
    for name in ("MRConv fourier", "fourier, by branches", "free kernel"):
        found = systems[name].draw(150, 7, learning_rate=0.1 if "fourier" in name else 0.01)
        errors[name] = problem.measure(found)["NMSE"].value
    assert errors["MRConv fourier"] < 0.1
    assert 4 * errors["MRConv fourier"] < errors["free kernel"]
    # the same function by another computation
    assert errors["fourier, by branches"] == pytest.approx(errors["MRConv fourier"], rel=0.05)


def test_kernels_to_identify_have_unit_norm_and_say_what_they_are():
    for name in ("smooth", "echoes", "both"):
        torch.testing.assert_close(target_kernels(name, 3).norm(dim=-1), torch.ones(8, dtype=torch.float64))
    echoes, smooth = target_kernels("echoes", 3), target_kernels("smooth", 3)
    assert (echoes != 0).sum(-1).tolist() == [12] * 8
    # a smooth kernel moves by little from lag to lag
    assert (smooth.diff().square().sum(-1) < 0.5 * echoes.diff().square().sum(-1)).all()
    assert not torch.equal(smooth, target_kernels("smooth", 100))


def test_no_clip_is_trained_on_and_tested_and_tuning_never_meets_the_tested_ones(recordings):
    data = spoken_digits(recordings, 64)
    clips = data.clips.flatten(1)
    assert clips.isfinite().all()
    sets = {}
    for tuning in (False, True):
        split = by_index(data, tuning)
        assert (len(split.y), len(split.test_y)) == ((2700, 300), (2400, 300))[tuning]
        sets[tuning] = tuple({tuple(row.tolist()) for row in x.flatten(1)} for x in (split.x, split.test_x))
        assert not sets[tuning][0] & sets[tuning][1]
        assert split.test_y.bincount().tolist() == [30] * 10
    tested = sets[False][1]
    assert not tested & (sets[True][0] | sets[True][1])


def test_every_seed_holds_out_one_speaker_whom_tuning_does_not(recordings):
    data = spoken_digits(recordings, 64)
    held_out = []
    for seed, tuning in ((0, False), (1, False), (2, False), (100, True)):
        split = by_speaker(data, seed, tuning)
        assert (len(split.y), len(split.test_y)) == (2500, 500)
        rows = [data.speaker[int((data.clips == row).flatten(1).all(1).nonzero()[0])] for row in split.test_x[::100]]
        held_out.append(set(rows))
    assert all(len(names) == 1 for names in held_out)
    assert len(set.union(*held_out)) == 4


def test_decimation_keeps_what_the_lower_rate_can_hold_and_nothing_else():
    t = torch.arange(400, dtype=torch.float64)
    low, high = (torch.cos(2 * math.pi * f * t / 400 + 0.3).reshape(1, 1, -1) for f in (60, 130))
    torch.testing.assert_close(decimated(low + high), low[..., ::2], rtol=0, atol=1e-12)


def test_a_stretched_kernel_answers_a_slow_signal_as_before():
    layer = FreeKernel(2, 400).double()
    lag = torch.arange(400, dtype=torch.float64)
    u = torch.cos(2 * math.pi * lag / 100).expand(1, 2, -1)
    with torch.no_grad():
        # it begins at 0, so that the sum over lags is near its integral
        layer.taps.copy_((torch.exp(-lag / 80) * torch.sin(lag / 40)).expand(2, -1))
        layer.skip.zero_()
        for module in (layer, BothWays(layer, layer)):
            found, expected = module.at_rate(0.5)(u[..., ::2]), module(u)[..., ::2]
            assert (found - expected).std() < 0.02 * expected.std()


def test_a_stretched_model_holds_the_same_weights_elsewhere():
    model = network("S4D", Shape(64, d_model=4), 0).eval()
    made = stretched(model, 0.5)
    assert torch.equal(made.head.weight, model.head.weight)
    assert made(torch.zeros(1, 1, 32)).shape == (1, 10)
    torch.testing.assert_close(
        model(torch.zeros(1, 1, 64)), network("S4D", Shape(64, d_model=4), 0)(torch.zeros(1, 1, 64))
    )


def test_what_a_linear_layer_keeps_is_its_input():
    layer = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.BatchNorm1d(3, affine=False)).eval()
    plain = torch.nn.Sequential(torch.nn.Linear(6, 3))
    x = torch.randn(40, 6)
    assert kept_for_backward(plain, x) == 40 * 6 * 4
    kept_for_backward(layer, x)
    assert int(layer[1].num_batches_tracked) == 0
    assert not layer.training


def test_all_models_are_of_about_the_same_size():
    shape = Shape(4096, patch=16)
    sizes = {name: sum(p.numel() for p in network(name, shape, 0).parameters())
             for name in ("MRConv fourier", "MRConv fourier+sparse", "MRConv dilated", "S4D", "SGConv", "GRU")}  # fmt: skip
    assert max(sizes.values()) < 1.35 * min(sizes.values())


def test_matched_systems_have_about_the_parameters_of_the_reference_and_its_time(monkeypatch):
    shape, reference, names = (
        Shape(64),
        "MRConv fourier",
        ("MRConv fourier", "S4D", "GRU", "transformer", "dilated CNN"),
    )
    size = {
        name: sum(p.numel() for p in network(name, shaped_like(reference, name, shape), 0).parameters())
        for name in names
    }
    assert shaped_like(reference, reference, shape) == shape
    assert all(abs(count / size[reference] - 1) < 0.08 for count in size.values())
    # twice as slow, so half as long
    monkeypatch.setattr("noisewise.sequence.experiments.mrconv.training.pace", lambda *shapes: 2.0)
    split = handwritten_rows(True)
    steps = [
        system.draw(0.5, 0, 0.01).cost.gradients for system in matched(names[:2], reference, shape, lambda seed: split)
    ]
    assert steps[0] == pytest.approx(2 * steps[1], rel=0.1)


def test_the_majority_class_is_right_as_often_as_it_occurs():
    split = listops_split(60, 40, False)
    system = majority(lambda seed: split)
    most = int(split.y.bincount().argmax())
    assert int(system.draw(1, 0).right.sum()) == int((split.test_y == most).sum())
    assert not torch.equal(split.x, listops_split(60, 40, True).x)


def test_tuning_on_images_does_not_look_at_the_tested_ones():
    tuned, final = handwritten_rows(True), handwritten_rows(False)
    torch.testing.assert_close(tuned.test_x, final.x[-297:])
    assert len(final.x) + len(final.test_x) == 1797
    assert float(final.x.min()) == -1
    assert float(final.x.max()) == 1


@pytest.mark.slow
def test_tasks_of_paper_scale_on_small_data(tmp_path, shapes_unchecked):
    generator = np.random.default_rng(0)
    tasks = []
    for name in ("text", "scifar", "speech-commands"):
        task = next(task for task in ARENA if task.name == name)
        shape = dataclasses.replace(task.shape, length=64, n_layers=1, d_model=8, classes=2)
        tasks.append(dataclasses.replace(task, shape=shape, epochs=1, batch=8))
        for part in ("train", "test"):
            y = np.arange(24) % 2
            signal = generator.normal(size=(24, shape.d_input, 64)).astype(np.float32)
            rows = {"X": generator.integers(1, 200, (24, 64))} if shape.vocabulary else {"X": signal}
            if shape.vocabulary:
                rows["lengths"] = generator.integers(20, 64, 24)
            np.savez(tmp_path / f"{name}-{part}.npz", y=y, **rows)
    problems = arena_problems(tmp_path, "cpu", tasks)
    assert [problem.name for problem in problems] == [f"long range, {task.name}" for task in tasks]
    assert arena_problems(tmp_path / "nothing", "cpu") == []
    for problem in problems:
        for system in problem.systems[:1] + problem.systems[-2:]:
            measured = problem.measure(system.draw(1, 0, **system.settings[0]))
            assert measured["accuracy, %"].n == 24
            assert ("accuracy at half the rate, %" in measured) == problem.name.endswith("commands")
