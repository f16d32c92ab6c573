"""What the pictures of long convolutions draw is what the layers hold."""

import math

import matplotlib.colors
import pytest
import torch
from branches_by_torch import layer, signal

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.report import Report
from noisewise.sequence import LongConv, MRConv
from noisewise.sequence.pictures import branch_plot, kernel_plot, kernel_report, reach, reach_plot, scale_plot


def conv(*directions):
    kernel = torch.stack([torch.as_tensor(one, dtype=torch.float64).expand(2, -1) for one in directions])
    return LongConv(kernel, torch.zeros(2, dtype=torch.float64))


def net(*layers):
    return torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 3), "blocks": torch.nn.ModuleList(layers)})


# ---- reach


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_reach_of_a_geometric_kernel_is_known(ratio, share):
    kernel = ratio ** torch.arange(1200.0, dtype=torch.float64)
    # lags 0 to n hold 1 - ratio^(2 n + 2) of the energy
    n = math.ceil(math.log(1 - share) / (2 * math.log(ratio)) - 1)
    assert reach(conv(kernel), share).tolist() == [n, n]


def test_the_reach_of_one_tap_is_its_lag_in_either_direction():
    late = torch.nn.functional.one_hot(torch.tensor(7), 20).double()
    assert reach(conv(late)).tolist() == [7, 7]
    assert reach(conv(torch.zeros(20), late)).tolist() == [7, 7]
    # at lag 0 the two directions meet, and here they cancel
    now = torch.nn.functional.one_hot(torch.tensor(0), 20).double()
    assert reach(conv(now + 0.1 * late, -now)).tolist() == [7, 7]


def test_the_direct_path_is_no_memory():
    module = layer("dense", 40)
    before = reach(module)
    with torch.no_grad():
        module.skip.fill_(1e3)
    assert torch.equal(reach(module), before)
    # a merged layer does not know what of lag 0 it was
    assert (reach(module.merge()) == 0).all()


def test_the_reach_stands_on_the_axis():
    layers = [layer("fourier", 40, seed=1), layer("dense", 90, seed=2).merge()]
    figure = reach_plot(net(*layers))
    (axes,) = figure.axes
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "."]
    assert [found.tolist() for found in dots] == [reach(one).tolist() for one in layers]
    dashed = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [39, 89]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 90.0])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        reach(conv(torch.ones(3)), share)


# ---- kernels


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_kernel_is_drawn_at_its_lags_without_the_direct_path(bidirectional):
    module = layer("fourier", 30, bidirectional=bidirectional)
    kernel = module.merge().kernel
    figure = kernel_plot(module)
    assert len(figure.axes) == 3
    for channel, axes in enumerate(figure.axes):
        lag, value = axes.lines[1].get_data()
        drawn = dict(zip(lag.tolist(), value.tolist(), strict=True))
        assert len(drawn) == (59 if bidirectional else 30)
        expected = {j: float(kernel[0, channel, j]) for j in range(1, 30)}
        expected |= {-j: float(kernel[1, channel, j]) for j in range(1, 30)} if bidirectional else {}
        expected[0] = float(kernel[:, channel, 0].sum() - module.skip[channel].detach())
        assert drawn == pytest.approx(expected, abs=1e-12)
        low, high = axes.get_xlim()
        assert low < min(lag)
        assert high > max(lag)


def test_a_kernel_of_few_taps_is_drawn_as_taps():
    figure = kernel_plot(layer("dilated", 200, skip=False))
    (stems,) = figure.axes[0].collections
    taps = {2**i * j for i in range(7) for j in range(4) if 2**i * j < 200}
    assert {round(float(path.vertices[0, 0])) for path in stems.get_paths()} == taps


def test_six_channels_are_enough_to_look_at():
    module = layer("fourier", 30, d_model=9)
    assert len(kernel_plot(module).axes) == 6
    assert "the first 6 of 9 channels" in kernel_report(module).html()


# ---- branches


def test_the_map_holds_shares_of_squared_norms_and_leaves_out_what_is_not_there():
    layers = [layer("fourier", 16, seed=1), layer("fourier", 60, seed=2, bidirectional=True)]
    axes = scale_plot(net(*layers)).axes[0]
    norms = axes.images[0].get_array()
    assert norms.shape == (2, 5)
    for row, one in enumerate(layers):
        own = one.alpha.detach().square().sum((1, 2))
        own = 100 * own / own.sum()
        assert norms[row, : len(own)].tolist() == pytest.approx(own.tolist())
    assert norms.mask[0].tolist() == [False, False, False, True, True]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "8", "16", "32", "60"]
    # every number is written on its square, and dark on pale
    assert len(axes.texts) == 8
    for text in axes.texts:
        column, row = text.get_position()
        shade = axes.images[0].cmap(axes.images[0].norm(norms[row, column]))
        light, ink = (matplotlib.colors.rgb_to_hsv(matplotlib.colors.to_rgb(c)) for c in (shade, text.get_color()))
        assert (
            abs(_luminance(matplotlib.colors.hsv_to_rgb(light)) - _luminance(matplotlib.colors.hsv_to_rgb(ink))) > 0.3
        )


def test_a_layer_that_has_learned_nothing_yet_is_of_middling_shade():
    axes = scale_plot(net(MRConv(2, 24, kernel_size=4), MRConv(3, 24, kernel_size=4))).axes[0]
    (image,) = axes.images
    assert image.norm(image.get_array()).ravel().tolist() == pytest.approx([0.5] * 8)


def test_a_column_names_the_lags_that_there_are():
    def names(*lengths):
        axes = scale_plot(net(*(MRConv(2, length, kernel_size=32) for length in lengths))).axes[0]
        return [text.get_text() for text in axes.get_xticklabels()]

    assert names(4) == ["4"]
    assert names(4, 100, 90) == ["4–32", "64", "90–100"]
    mixed = net(MRConv(2, 8, kernel_size=4), MRConv(2, 24, kernel_size=8))
    assert [text.get_text() for text in scale_plot(mixed).axes[0].get_xticklabels()] == ["1 l₀", "2 l₀", "4 l₀"]


def deep(path, count):
    """A module whose layers lie behind so many names."""
    head, _, rest = path.partition(".")
    if head == "*":
        return torch.nn.ModuleList(deep(rest, 1) for _ in range(count))
    return torch.nn.ModuleDict({head: deep(rest, count)}) if head else layer()


@pytest.mark.parametrize("draw", [reach_plot, scale_plot])
def test_long_names_are_cut_to_what_differs_and_written_once(draw):
    (axes, *_) = draw(deep("encoder.stages.*.depthwise_convolution.conv", 3)).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2"]
    assert axes.get_title(loc="left") == "encoder.stages.[…].depthwise_convolution.conv"
    # one name alone, too long by itself
    (axes, *_) = draw(deep("encoder_of_the_signal.depthwise_convolution.conv", 1)).axes
    (name,) = [text.get_text() for text in axes.get_yticklabels()]
    assert len(name) == 24
    assert name.startswith("encoder_of_")
    assert name.endswith("olution.conv")
    inner = torch.nn.ModuleDict({"a_name_that_is_long_enough": layer()})
    inner["a_name_that_is_long_enough"].inside = layer()
    (axes, *_) = draw(inner).axes
    assert all(text.get_text() for text in axes.get_yticklabels())


@pytest.mark.parametrize("length", [2, 4, 30, 1000, 16384, 10**6])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_axis_of_lags_has_names_enough_and_not_too_many(length, bidirectional):
    kernel = torch.zeros(1 + bidirectional, 1, length, dtype=torch.float64)
    kernel[..., 0] = kernel[..., -1] = 1.0
    axes = kernel_plot(LongConv(kernel, torch.zeros(1, dtype=torch.float64))).axes[-1]
    ticks = axes.get_xticks().tolist()
    assert ticks == sorted(ticks)
    assert min(length, 4) <= len(ticks) <= 15
    assert [-one for one in ticks if one < 0][::-1] == ([one for one in ticks if one > 0] if bidirectional else [])
    assert max(ticks) <= length - 1 < 10 * max(ticks)


def test_pictures_of_a_page_are_of_one_width():
    model = net(layer("fourier", 30, seed=1), layer("sparse", 4, seed=2))
    figures = [reach_plot(model), scale_plot(model), kernel_plot(model["blocks"][0]), branch_plot(model["blocks"][1])]
    assert {figure.get_size_inches()[0] for figure in figures} == {7.5}


def test_a_share_is_written_as_the_text_writes_it():
    assert reach_plot(layer()).axes[0].get_xlabel() == "lag with 90 % of the energy"
    assert reach_plot(layer(), 0.995).axes[0].get_xlabel() == "lag with 99.5 % of the energy"
    assert "90%" not in kernel_report(layer()).html()


def _luminance(rgb):
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("norm", ["batch", "kernel"])
def test_the_bars_are_the_median_channel(bidirectional, norm):
    module = layer("fourier", 30, bidirectional=bidirectional, norm=norm)
    own = module.alpha.detach().abs() * (1 if norm == "kernel" else module.weight.detach().abs())
    figure = branch_plot(module)
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]
    # the first direction's, then the second's
    assert heights == pytest.approx(own.quantile(0.5, -1).T.flatten().tolist())
    assert axes.get_ylabel() == ("|α|" if norm == "kernel" else "|α γ|")
    assert len(figure.legends) == bidirectional


# ---- the page


def test_a_page_shows_every_layer_of_a_model(tmp_path):
    model = net(layer("fourier", 30, seed=1), layer("sparse", 60, seed=2).merge())
    page = kernel_report(model).save(tmp_path / "kernels.html").read_text(encoding="utf-8")
    assert "2 in ModuleDict" in page
    for heading in ("How far back", "What each resolution carries", "Layer blocks.0", "Layer blocks.1"):
        assert heading in page
    # reach and scales; kernel and branches of the first, the kernel of the second, which has no branches left
    assert page.count("<figure>") == 5
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_it_goes_into_a_report_that_is_there():
    report = Report("A model").section("Accuracy", "0.9")
    assert kernel_report(layer(), report) is report
    assert report.html().index("Accuracy") < report.html().index("How far back")


def test_merged_layers_alone_have_no_branches_to_show():
    merged = layer().merge()
    page = kernel_report(merged).html()
    assert page.count("<figure>") == 2
    assert "What each resolution carries" not in page
    with pytest.raises(InvalidInput, match="the module that they were merged from"):
        scale_plot(merged)


def test_a_warning_of_merging_stands_on_top_of_the_page():
    module = layer(momentum=1.0)
    u = signal(3, 24)
    u[:, 1] = 0.0
    module(u)
    page = kernel_report(net(module)).html()
    assert 0 < page.index("blocks.0: 4 of 12 branches hardly vary") < page.index("How far back each layer hears</h2>")


def test_drawing_changes_nothing():
    module = layer().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kernel_report(module)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("draw", [kernel_report, reach_plot, scale_plot])
def test_where_there_is_no_long_convolution_it_says_so(draw):
    with pytest.raises(InvalidInput, match="Linear has no MRConv or LongConv layer inside"):
        draw(torch.nn.Linear(3, 3))


def test_a_layer_that_was_never_trained_has_no_kernel_to_draw():
    with pytest.raises(NoisewiseError, match="train it first"):
        kernel_report(MRConv(3, 24))
