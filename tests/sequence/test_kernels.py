"""Sub-kernels are what their names say: dilated taps, low frequencies, few lags, and sums of them."""

import math

import pytest
import torch
from branches_by_torch import dense_kernels, layer, signal
from torch.nn import functional

from noisewise.sequence import long_conv
from noisewise.sequence.kernels import KINDS, SubKernels, resolutions


def set_to(made, value):
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)


def made(kind, length=50, kernel_size=8, **options):
    return SubKernels(3, length, kind, kernel_size, **options).double()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 50, 64, 65, 1000])
def test_lengths_double_until_they_cover_the_signal(length):
    found = resolutions(length, 8)
    assert [r.period for r in found] == [8 * 2**i for i in range(len(found))]
    assert [r.support for r in found] == [min(8 * 2**i, length) for i in range(len(found))]
    assert found[-1].support == length
    assert all(r.support < length for r in found[:-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("length", [5, 50, 64])
def test_every_kind_is_its_definition(kind, directions, length):
    module = layer(kind, length, 8, bidirectional=directions == 2)
    if kind == "fourier+sparse":
        with torch.no_grad():
            module.kernels.mix.copy_(
                signal(1, 2 * module.kernels.mix.numel(), 1)[0, 0, 1::2].view_as(module.kernels.mix)
            )
    for ours, true in zip(module.kernels(), dense_kernels(module), strict=True):
        assert ours.shape == true.shape
        assert (ours - true).abs().max() < 1e-13


def test_dilated_taps_are_the_dilation_of_torch():
    own, u = made("dilated"), signal(2, 50)
    for r, kernel in zip(own.resolutions, own(), strict=True):
        taps, step = own.dilated_at(r)[0], 2**r.index
        padded = functional.pad(u, ((taps.shape[-1] - 1) * step, 0))
        theirs = functional.conv1d(padded, taps.flip(-1).unsqueeze(1), groups=3, dilation=step)
        assert (long_conv(u, kernel[0]) - theirs).abs().max() < 1e-12


def test_sparse_taps_are_a_sum_of_shifts():
    own, u = made("sparse", taps=5), signal(2, 50)
    for r, kernel in zip(own.resolutions, own(), strict=True):
        shifted = torch.zeros_like(u)
        for channel in range(3):
            for lag, weight in zip(own.lags(r)[0, channel].tolist(), own.sparse_at(r)[0, channel], strict=True):
                shifted[:, channel, lag:] += weight * u[:, channel, : 50 - lag]
        assert (long_conv(u, kernel[0]) - shifted).abs().max() < 1e-12


def test_one_tap_of_one_at_lag_zero_is_the_identity():
    own, u = made("sparse", taps=1), signal(2, 50)
    set_to(own, 1.0)
    own.lags_0.zero_()
    assert (long_conv(u, own()[0][0]) - u).abs().max() < 1e-13


@pytest.mark.parametrize("taps", [1, 5, 8])
def test_lags_are_drawn_without_repetition_inside_their_resolution(taps):
    own = SubKernels(40, 50, "sparse", 8, 2, taps=taps)
    for r in own.resolutions:
        lags = own.lags(r)
        assert lags.shape == (2, 40, taps)
        assert (lags.diff(dim=-1) > 0).all()
        assert lags.min() >= 0
        assert lags.max() < r.support
    # each channel and direction has its own
    assert len({tuple(row) for row in own.lags_3.reshape(-1, taps).tolist()}) > 1


@pytest.mark.parametrize("modes", [1, 3, 5])
def test_a_fourier_kernel_has_its_lowest_frequencies_and_no_others(modes):
    own = made("fourier", 64, modes=modes)
    for kernel in own():
        spectrum = torch.fft.rfft(kernel).abs()
        assert spectrum[..., modes:].numel() == 0 or spectrum[..., modes:].max() < 1e-12 * spectrum.max()
        assert spectrum[..., :modes].min() > 1e-3 * spectrum.max()


def test_the_zero_frequency_alone_is_a_moving_average():
    own, u = made("fourier", 64, modes=1), signal(2, 64)
    for r, kernel in zip(own.resolutions, own(), strict=True):
        y = long_conv(u, kernel[0] / kernel[0, :, :1])
        means = functional.avg_pool1d(functional.pad(u, (r.period - 1, 0)), r.period, 1)
        assert (y / r.period - means).abs().max() < 1e-13


def test_a_fourier_kernel_is_the_sum_of_waves_that_its_stream_uses():
    for kind in ("fourier", "fourier+sparse"):
        # as many modes as there can be: the last stands at half the period, where a wave has no sine
        own = made(kind, 50, modes=5)
        for r in own.resolutions:
            angle = (
                2 * math.pi * torch.arange(5.0, dtype=torch.float64).unsqueeze(-1) * torch.arange(r.support) / r.period
            )
            summed = (own.coefficients(r) @ (1j * angle).exp()).real
            expected = own._fourier(r) * (own.mix[0, r.index] if kind != "fourier" else 1)
            assert (summed - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["dilated", "fourier", "sparse", "dense"])
def test_kernels_are_linear_in_their_parameters(kind):
    one, two = made(kind, seed=1), made(kind, seed=2)
    for name, lags in one.named_buffers():
        two.get_buffer(name).copy_(lags)
    both = made(kind, seed=1)
    both.load_state_dict(one.state_dict())
    with torch.no_grad():
        for name, value in both.named_parameters():
            value.mul_(2.0).sub_(3 * two.get_parameter(name))
    for a, b, c in zip(one(), two(), both(), strict=True):
        assert (c - (2 * a - 3 * b)).abs().max() < 1e-13


def test_only_the_sines_of_frequencies_that_have_none_are_idle():
    own = made("fourier", 64, modes=5)
    gradients = torch.autograd.grad(sum(k.pow(3).sum() for k in own()), list(own.parameters()))
    for r, gradient in zip(own.resolutions, gradients, strict=True):
        sine = gradient[..., 1].abs().amax((0, 1))
        idle = torch.tensor([n == 0 or 2 * n == r.period for n in range(5)])
        assert (sine[idle] == 0).all()
        assert (sine[~idle] > 0).all()
        assert (gradient[..., 0].abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_start_with_the_same_energy_at_every_length(kind):
    channels = 600
    own = SubKernels(channels, 64, kind, 8)
    energies = torch.stack([k[0].square().sum(-1) for k in own()]).detach()
    mean, se = energies.mean(-1), energies.std(-1) / channels**0.5
    for one, other in zip(range(1, len(mean)), range(len(mean) - 1), strict=True):
        assert (mean[one] - mean[other]).abs() < 4 * (se[one].square() + se[other].square()).sqrt()
    assert 0.5 < mean.mean() < 2.0
