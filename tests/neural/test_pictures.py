"""What the pictures draw: bands that perfect samples keep to, mass that is all there, and each kind of target."""

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
    figure = energy_plot(x, target, reference)
    (note,) = figure.axes[0].texts
    assert note.get_text() == "25.00 % beyond the axis\n(reference 0.10 %)"
    assert not energy_plot(x[100:], target, reference).axes[0].texts


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
    with pytest.raises(InvalidInput, match="history of 1 looks"):
        training_plot(history[:1])
