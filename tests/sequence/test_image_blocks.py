"""Images as signals: the layer reads pixels row by row, and takes the place of two-dimensional convolutions anywhere."""

import functools

import pytest
import torch
from torch import nn

from noisewise.errors import InvalidInput
from noisewise.sequence import ImageMRConv, LongConv, MRConv, merge_layers, swap_layers

LONG = functools.partial(ImageMRConv, kernel_size=8)


def images(batch=2, channels=3, size=32, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """The residual block of ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.wide, self.narrow = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x):
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(self.dwconv(x)))))


def convnext():
    stages = [nn.Conv2d(3, 8, 4, 4), Block(8), nn.Conv2d(8, 12, 2, 2), Block(12), Block(12)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


def test_image_layer_is_the_layer_of_the_flattened_image():
    layer = ImageMRConv(3, 5, 7, kernel_size=8)
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    layer(x)
    layer.eval()
    rows = torch.cat([x[:, :, row] for row in range(5)], -1)
    assert torch.allclose(layer(x).reshape(2, 3, 35), layer.conv(rows), atol=1e-6)
    assert layer.conv.bidirectional
    assert not ImageMRConv(3, 5, 7, causal=True).conv.bidirectional
    with pytest.raises(InvalidInput, match="5 x 7"):
        layer(x.mT)


def check_swapped(net, names, logits, examples):
    """Forward, backward, state dict and merging of a network with swapped layers."""
    assert all(isinstance(net.get_submodule(name), ImageMRConv) for name in names)
    net.train()
    for seed in range(2):
        logits(net, images(size=examples.shape[-1], seed=seed)).square().sum().backward()
    for name in names:
        for parameter in net.get_submodule(name).parameters():
            assert parameter.grad is not None
            assert bool(torch.isfinite(parameter.grad).all())
    net.eval()
    merged = merge_layers(net)
    assert all(isinstance(merged.get_submodule(name).conv, LongConv) for name in names)
    before = logits(net, examples).detach()
    assert torch.allclose(logits(merged, examples), before, atol=1e-5 * float(before.abs().max()))
    return before


def test_convnext_with_long_convolutions(tmp_path):
    net = convnext().train()
    names = swap_layers(net, LONG, sizes=images())
    assert names == ["1.dwconv", "3.dwconv", "4.dwconv"]
    assert [(net.get_submodule(n).height, net.get_submodule(n).conv.d_model) for n in names] == [
        (8, 8),
        (4, 12),
        (4, 12),
    ]
    # equal layers start from different weights
    for name in ("skip", "kernels.fourier_0"):
        assert not torch.equal(*(net[index].dwconv.conv.get_parameter(name) for index in (3, 4)))
    before = check_swapped(net, names, lambda model, x: model(x), images(seed=5))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fresh = convnext()
    swap_layers(fresh, LONG, sizes=torch.zeros(1, 3, 32, 32), seed=1)
    fresh.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(fresh.eval()(images(seed=5)), before)


def test_convnext_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 16], depths=[1, 1, 2, 1], num_labels=4, image_size=64)
    net = transformers.ConvNextForImageClassification(config)
    examples = images(size=64, seed=7)
    names = swap_layers(net, LONG, sizes={"pixel_values": examples})
    assert len(names) == 5
    assert all(name.endswith("dwconv") for name in names)
    before = check_swapped(net, names, lambda model, x: model(pixel_values=x).logits, examples)
    fresh = transformers.ConvNextForImageClassification(config)
    swap_layers(fresh, LONG, sizes={"pixel_values": examples})
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(pixel_values=examples).logits, before)


def test_looking_for_sizes_changes_nothing():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 7, padding=3, groups=3)).train()
    net[1].eval()
    mean = net[0].running_mean.clone()
    swap_layers(net, LONG, sizes=images())
    assert torch.equal(net[0].running_mean, mean)
    assert net.training
    assert not net[1].training


def test_layers_are_chosen_by_kind_size_and_name():
    net = convnext()
    assert swap_layers(net, LONG, sizes=images(), names="4.*") == ["4.dwconv"]
    assert swap_layers(net, LONG, sizes={"1.dwconv": (8, 8)}, names="1.*") == ["1.dwconv"]
    plain = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)).double()
    assert swap_layers(plain, LONG, sizes=images().double(), kernel_size=3, depthwise=False) == ["0"]
    assert plain[0].conv.alpha.dtype == torch.float64
    shared = nn.Conv2d(3, 3, 7, padding=3, groups=3)
    twice = nn.Sequential(shared, shared)
    assert swap_layers(twice, LONG, sizes=images()) == ["0", "1"]
    assert twice[0] is twice[1]


def test_what_cannot_be_swapped_is_named():
    shifted = nn.Sequential(nn.Conv1d(3, 3, 7, padding=3, groups=3))
    with pytest.raises(InvalidInput, match="layer '0' reads inputs of 1 axes"):
        swap_layers(shifted, LONG, sizes=torch.zeros(1, 3, 32), kind=nn.Conv1d)
    with pytest.raises(InvalidInput, match=r"no depthwise Conv2d of kernel size 5.*1\.dwconv: Conv2d.* and 6 more"):
        swap_layers(convnext(), LONG, sizes=images(), kernel_size=5)
    with pytest.raises(InvalidInput, match="no Conv2d at all"):
        swap_layers(nn.Sequential(nn.Linear(2, 2)), LONG, sizes=images())
    with pytest.raises(InvalidInput, match=r"maps \(32, 32\) to \(16, 16\)"):
        swap_layers(nn.Sequential(nn.Conv2d(3, 3, 7, stride=2, padding=3, groups=3)), LONG, sizes=images())
    net = convnext()
    net.spare = nn.ModuleList([nn.Conv2d(3, 3, 7, groups=3)])
    net.forward = lambda x: nn.Sequential(*list(net)[:8])(x)
    with pytest.raises(InvalidInput, match=r"'spare.0' is never reached"):
        swap_layers(net, LONG, sizes=images())
    with pytest.raises(InvalidInput, match=r"no \(height, width\) for 3\.dwconv"):
        swap_layers(convnext(), LONG, sizes={"1.dwconv": (8, 8), "4.dwconv": (4, 4)})


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (8, 8)}, r"example input.*got \(8, 8\)"),
        ({"sizes": {"1.dwconv": 8, "3.dwconv": (4, 4), "4.dwconv": (4, 4)}}, r"sizes\['1.dwconv'\] must be .*, got 8"),
        ({"kind": "wavelet"}, "class of layers such as torch.nn.Conv2d, got 'wavelet'"),
        ({"build": MRConv}, "use ImageMRConv"),
        ({"build": functools.partial(MRConv, norm="kernel")}, "use ImageMRConv"),
        (
            {"build": functools.partial(ImageMRConv, kernal_size=8)},
            "kernal_size= is no option.*did you mean kernel_size",
        ),
        ({"build": functools.partial(ImageMRConv, kind="wavelet")}, "kind must be one of .* got 'wavelet'"),
    ],
)
def test_a_call_that_cannot_be_leaves_the_network_as_it_was(options, message):
    net = convnext()
    with pytest.raises(InvalidInput, match=message):
        swap_layers(net, **{"build": LONG, "sizes": images()} | options)
    assert not any(isinstance(part, ImageMRConv) for part in net.modules())
