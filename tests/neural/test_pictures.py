"""What the pictures draw: bands that perfect samples keep to, mass that is all there, and each kind of target."""

from types import SimpleNamespace

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.neural import distance_plot, energy_plot, sample_plot, training_plot
from noisewise.targets import GaussianMixture, double_well_4, gmm40, lennard_jones, many_well


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def steps(figure):
    """Edges, band from below and above, density of the samples."""
    band, _, own = figure.axes[0].patches
    return band.get_data(), own.get_data()


@pytest.mark.parametrize("target", [double_well_4(), lennard_jones()], ids=["dw4", "lj13"])
@pytest.mark.parametrize("plot", [energy_plot, distance_plot])
def test_perfect_samples_keep_to_the_band(target, plot):
    rows = target.reference(10_000)
    (above, edges, below), (density, _, _) = steps(plot(rows[:2000], target, rows[2000:]))
    inside = (density >= below) & (density <= above)
    # two standard errors hold 95 % of the bins that have any; neighbours of a pooled histogram vary together
    assert inside[above > 0].mean() > 0.85
    assert (density * (edges[1:] - edges[:-1])).sum() == pytest.approx(1, abs=0.005)
    (_, _, below), (density, _, _) = steps(plot(1.1 * rows[:2000], target, rows[2000:]))
    assert (density < below).any()


def test_samples_beyond_the_axis_are_counted():
    target = GaussianMixture(torch.zeros(1, 2), 1.0)
    x = torch.zeros(400, 2)
    x[:100] = 100.0
    reference = target.sample(1000, seeded(1))
    reference[0] = 50.0
    # a few far ones do not stretch the axis
    figure = energy_plot(x[90:], target, reference)
    (note,) = figure.axes[0].texts
    assert note.get_text() == "3.23 % beyond the axis\n(reference 0.10 %)"
    assert figure.axes[0].get_xscale() == "linear"
    assert not energy_plot(x[100:], target, reference).axes[0].texts


def test_the_axis_holds_the_middle_of_draws_that_all_lie_far_away():
    target = GaussianMixture(torch.zeros(1, 2), 1.0)
    reference, far = target.sample(1000, seeded(1)), 1e3 * target.sample(1000, seeded(2))
    axes = energy_plot(far, target, reference).axes[0]
    energy = -target.log_prob(far)
    low, high = axes.get_xlim()
    assert low < energy.quantile(0.05)
    assert high > energy.quantile(0.95)
    ticks = axes.get_xticks()
    # most of the axis is not one of the two, and what is written is where it stands
    assert sum(tick < 1e2 for tick in ticks) >= 1
    assert sum(tick > 1e4 for tick in ticks) >= 2
    assert [float(t.get_text().replace("\N{MINUS SIGN}", "-")) for t in axes.get_xticklabels()] == list(ticks)
    # equal areas on the axis as it is drawn, for as much mass
    band, _, own = (patch.get_data() for patch in axes.patches)
    width = axes.transScale.transform([(edge, 0) for edge in own.edges])[:, 0]
    assert ((width[1:] - width[:-1]) * own.values).sum() == pytest.approx(0.95, abs=0.05)
    assert ((width[1:] - width[:-1]) * (band.values + band.baseline) / 2).sum() == pytest.approx(1, abs=0.05)


def test_pictures_name_what_they_compare_with():
    target = many_well(4)
    x, chains = target.sample(50, seeded()), target.sample(60, seeded(1))
    planar = GaussianMixture(torch.zeros(1, 2), 1.0)
    for figure in (
        sample_plot(x, target, chains, "chains"),
        sample_plot(x[:, :2], planar, chains[:, :2], "chains"),
    ):
        titles = {axes.get_title(loc=loc) for axes in figure.axes for loc in ("left", "center")} - {""}
        assert titles == {"draws (n = 50)", "chains (n = 60)"}
    legend = energy_plot(x, target, chains, "chains").legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["chains, ± 2 s.e. (n = 60)", "draws (n = 50)"]


@pytest.mark.parametrize(("dim", "panels"), [(4, 2), (32, 4)])
def test_pairs_of_coordinates_above_those_of_the_reference(dim, panels):
    target = many_well(dim)
    x, reference = target.sample(50, seeded()), target.sample(60, seeded(1))
    axes = sample_plot(x, target, reference).axes
    assert len(axes) == 2 * panels
    for row, drawn in enumerate((x, reference)):
        for pair in range(panels):
            shown = torch.as_tensor(axes[row * panels + pair].lines[0].get_xydata())
            torch.testing.assert_close(shown, drawn[:, 2 * pair : 2 * pair + 2].double())


def test_what_is_not_shown_is_said_and_an_odd_coordinate_has_a_partner():
    few, many = GaussianMixture(torch.zeros(1, 3), 1.0), many_well(32)
    axes = sample_plot(few.sample(50, seeded()), few).axes
    assert [(panel.get_xlabel(), panel.get_ylabel()) for panel in axes] == [("x[0]", "x[1]"), ("x[1]", "x[2]")]
    assert not any(panel.get_title(loc="right") for panel in axes)
    axes = sample_plot(many.sample(50, seeded()), many).axes
    assert axes[-1].get_title(loc="right") == "the first 8 of 32 coordinates"


def test_planar_samples_lie_over_the_contours():
    axes = sample_plot(gmm40().sample(100, seeded()), gmm40()).axes
    assert len(axes) == 1
    assert axes[0].collections


def test_bad_input_is_quoted():
    target, x = many_well(4), torch.zeros(5, 3)
    with pytest.raises(InvalidInput, match=r"samples must have shape \[n, 4\].*got \(5, 3\)"):
        sample_plot(x, target)
    with pytest.raises(InvalidInput, match="ManyWell has no pair_distances"):
        distance_plot(torch.zeros(5, 4), target, torch.zeros(5, 4))
    with pytest.raises(InvalidInput, match="needs 2 coordinates"):
        sample_plot(torch.zeros(5, 1), GaussianMixture(torch.zeros(1, 1), 1.0))


def test_curves_of_a_fit_follow_what_changes_and_nothing_else():
    history = [{"step": i, "done": i / 3, "seconds": 2.0 * i, "score": 5.0 - i, "target_score": 0.7} for i in range(4)]
    (axes,) = training_plot(history).axes
    assert axes.get_title(loc="left") == "score"
    assert axes.lines[0].get_xydata().tolist() == [[0, 5], [1, 4], [2, 3], [3, 2]]
    # a number that appears late has the steps at which it was seen
    history[3]["ess"], history[2]["ess"] = 2.0, 3.0
    drawn = training_plot(history).axes
    assert [panel.get_title(loc="left") for panel in drawn] == ["score", "ess"]
    assert drawn[1].lines[0].get_xydata().tolist() == [[2, 3], [3, 2]]
    with pytest.raises(InvalidInput, match=r"a fitted sampler or its history_, got float"):
        training_plot(0.5)
    with pytest.raises(InvalidInput, match="history of 1 looks"):
        training_plot(history[:1])


def test_each_stage_of_a_fit_has_steps_of_its_own():
    first = [{"stage": "score of the target", "step": i, "target_score": 9.0 - i} for i in (1, 2, 4)]
    # the last number of the first stage is repeated, and steps are counted on
    second = [{"stage": "generator", "step": 5 + i, "target_score": 5.0, "score": 3.0 - i} for i in range(3)]
    figure = training_plot(SimpleNamespace(history_=first + second))
    drawn = [(a.get_title(loc="left"), a.get_xlabel(), a.lines[0].get_xydata().tolist()) for a in figure.axes]
    assert drawn == [
        ("target score", "step (score of the target)", [[1, 8], [2, 7], [4, 5]]),
        ("score", "step (generator)", [[1, 3], [2, 2], [3, 1]]),
    ]
