import base64
import math
import re

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.metrics import Measurement, Results, Row
from noisewise.report import (
    Report,
    acceptance_plot,
    measurement_plot,
    mode_weight_plot,
    scatter_plot,
    trace_plot,
)

HOSTILE = '<script>alert("x")</script>'


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def comparison(name="DiGS"):
    rows = [
        Row(system, "GMM-40", seed, {"TV": Measurement(value + 0.01 * seed**2, floor=0.08)}, notes=(HOSTILE,))
        for system, value in ((name, 0.1), ("MALA", 0.9))
        for seed in range(3)
    ]
    return Results("digs", "quick", f"noisewise {HOSTILE}", rows, notes=(HOSTILE,))


def test_everything_foreign_is_escaped():
    page = (
        Report(HOSTILE, HOSTILE)
        .section(HOSTILE, HOSTILE)
        .section("second")
        .code(HOSTILE)
        .warning(HOSTILE)
        .table([HOSTILE], [[HOSTILE]], caption=HOSTILE)
        .figure(mode_weight_plot(torch.tensor([0.5, 0.5])), caption=HOSTILE, alt=HOSTILE)
        .results(comparison(HOSTILE))
        .html()
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 15


def test_page_needs_nothing_from_outside():
    page = Report("a").figure(mode_weight_plot(torch.tensor([1.0]))).results(comparison()).html()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|\#)""", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_results_show_value_difference_floor_and_bold_lead():
    page = Report("a").results(comparison()).html()
    assert re.search(r"<strong>0\.117 ± 0\.012</strong>", page)
    assert "<small>+0.8 [0.8, 0.8]</small>" in page
    assert '<tr class="floor"><td>floor</td><td class="number">0.08</td>' in page


def test_numbers_stand_right_and_words_left():
    page = Report("a").table(["name", "score"], [["x", 1.23456], ["y", Measurement(0.5, 0.1)], ["z", None]]).html()
    assert '<td class="number">1.235</td>' in page
    assert '<td class="number">0.5 ± 0.1</td>' in page.replace("0.50 ± 0.10", "0.5 ± 0.1")
    assert "<td>x</td>" in page
    with pytest.raises(InvalidInput, match="1 cells for 2"):
        Report("a").table(["a", "b"], [["x"]])


def pictures(figure):
    page = Report("a").figure(figure, caption="c").html()
    kind, data = re.search(r'src="data:image/([a-z+]+);base64,([^"]+)"', page).groups()
    return kind, base64.b64decode(data)


def test_few_points_are_vectors_and_many_are_a_bitmap():
    kind, data = pictures(scatter_plot(torch.randn(100, 2, generator=generator())))
    assert kind == "svg+xml"
    assert b"<svg" in data
    kind, data = pictures(scatter_plot(torch.randn(9000, 2, generator=generator())))
    assert kind == "png"
    assert data.startswith(b"\x89PNG")


def test_same_figure_gives_the_same_bytes():
    first, second = (pictures(mode_weight_plot(torch.tensor([0.3, 0.7]))) for _ in range(2))
    assert first == second


def test_save_replaces_whole(tmp_path):
    path = Report("one").save(tmp_path / "new" / "report.html")
    assert Report("two").save(path).read_text().count("<h1>two</h1>") == 1


def test_mode_weight_plot_draws_the_weights():
    weights, se, truth = torch.tensor([0.2, 0.8]), torch.tensor([0.05, 0.1]), torch.tensor([0.3, 0.7])
    (axes,) = mode_weight_plot(weights, se, truth).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.2, 0.8])
    segments = [segment for collection in axes.collections for segment in collection.get_segments()]
    spans = sorted((float(s[0][1]), float(s[1][1])) for s in segments)
    expected = [(0.15, 0.25), (0.3, 0.3), (0.7, 0.7), (0.7, 0.9)]
    for span, other in zip(spans, expected, strict=True):
        assert span == pytest.approx(other, abs=1e-6)


def test_trace_plot_colours_each_draw_by_its_mode():
    labels = torch.tensor([[0, 0, 1, 2], [1, 1, 1, 1]])
    draws = torch.randn(2, 4, 3, generator=generator())
    figure = trace_plot(draws, labels, coordinate=1)
    coloured = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    values = {tuple(line.get_xdata()): list(line.get_ydata()) for line in coloured}
    assert values[(0, 1)] == pytest.approx(draws[0, :2, 1].tolist())
    assert values[(3,)] == pytest.approx([float(draws[0, 3, 1])])
    assert len({line.get_color() for axes in figure.axes for line in axes.lines if line.get_marker() == "."}) == 3


def test_scatter_plot_contours_lie_at_the_density():
    def log_prob(x):
        return -0.5 * x.square().sum(-1)

    draws = torch.randn(4, 500, 2, generator=generator())
    axes = scatter_plot(draws, log_prob=log_prob).axes[0]
    radii = sorted(
        float(torch.tensor(path.vertices).norm(dim=-1).mean())
        for path in axes.collections[0].get_paths()
        if len(path.vertices)
    )
    # log p falls by .5 and 2 at radius 1 and 2; the outer two may leave the picture
    assert radii[:2] == pytest.approx([1, 2], rel=0.02)
    with pytest.raises(InvalidInput, match="dim 3"):
        scatter_plot(torch.zeros(5, 3), log_prob=log_prob)


def test_acceptance_plot_keeps_levels_that_never_accept():
    (axes,) = acceptance_plot([0.5, 1.0, 4.0, 10.0], [0.7, 0.2, 0.0, 0.0]).axes
    drawn = {tuple(line.get_xdata()): list(line.get_ydata()) for line in axes.lines[:2]}
    assert drawn[(0.5, 1.0)] == [0.7, 0.2]
    assert drawn[(4.0, 10.0)] == [axes.get_ylim()[0]] * 2


def test_measurement_plot_shows_means_seeds_and_floor():
    (axes,) = measurement_plot(comparison(), "TV").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["DiGS", "MALA"]
    drawn = [list(map(float, line.get_xdata())) for line in axes.lines]
    assert pytest.approx([0.10, 0.11, 0.14]) in drawn
    assert pytest.approx([0.35 / 3]) in drawn
    assert pytest.approx([0.08, 0.08]) in drawn
    with pytest.raises(InvalidInput, match="W2"):
        measurement_plot(comparison(), "W2")


def test_a_failed_system_is_written_not_dropped():
    rows = [Row("A", "P", 0, {"TV": Measurement(0.5)}), Row("B", "P", 0, {"TV": Measurement(math.nan)})]
    (axes,) = measurement_plot(Results("digs", "quick", "c", rows), "TV").axes
    assert [text.get_text() for text in axes.texts] == ["failed"]


def test_plots_leave_pyplot_and_its_state_alone():
    import sys

    before = set(sys.modules)
    trace_plot(torch.zeros(2, 5, 1))
    assert "matplotlib.pyplot" not in set(sys.modules) - before
