"""Convolution by FFT is convolution: that of numpy, that of scipy's filters, that of torch."""

import numpy as np
import pytest
import scipy.signal
import torch
from branches_by_torch import convolve, signal

from noisewise.errors import InvalidInput
from noisewise.sequence import long_conv
from noisewise.sequence.convolution import fast_length

SIZES = pytest.mark.parametrize(("length", "lags"), [(1, 1), (2, 5), (17, 1), (97, 97), (100, 31), (40, 200)])


def kernels(lags, d_model=3, seed=7, dtype=torch.float64):
    return signal(1, lags, d_model, seed, dtype)[0]


@SIZES
def test_it_is_the_convolution_of_numpy_and_the_filter_of_scipy(length, lags):
    u, kernel = signal(2, length), kernels(lags)
    y = long_conv(u, kernel).numpy()
    for row in range(2):
        for channel in range(3):
            one, k = u[row, channel].numpy(), kernel[channel].numpy()
            assert np.abs(y[row, channel] - np.convolve(one, k)[:length]).max() < 1e-12
            assert np.abs(y[row, channel] - scipy.signal.lfilter(k, [1.0], one)).max() < 1e-12


@SIZES
def test_with_a_kernel_for_each_direction_it_is_the_sum_of_both(length, lags):
    u, forward, backward = signal(2, length), kernels(lags), kernels(lags, seed=8)
    both = convolve(u, forward) + convolve(u, backward, ahead=True)
    assert (long_conv(u, forward, backward) - both).abs().max() < 1e-12
    reversed_ = long_conv(u.flip(-1), backward).flip(-1)
    assert (long_conv(u, forward, backward) - long_conv(u, forward) - reversed_).abs().max() < 1e-12


def test_lag_zero_belongs_to_both_kernels():
    u, one = signal(2, 9), torch.ones(3, 1, dtype=torch.float64)
    assert (long_conv(u, one, 10 * one) - 11 * u).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_formats_are_computed_in_single_precision(dtype):
    u, kernel = signal(2, 300, dtype=torch.float32).to(dtype), kernels(300, dtype=torch.float32)
    true = convolve(u.double(), kernel.double())
    y = long_conv(u, kernel)
    assert y.dtype == dtype
    # the rounding of the result alone, and some of the transform in float32
    allowed = max(torch.finfo(dtype).eps, 1e-6)
    assert (y.double() - true).abs().max() < allowed * true.abs().max()


def test_its_gradients_are_those_of_finite_differences():
    u, forward, backward = signal(2, 7), kernels(5), kernels(5, seed=8)
    inputs = [value.requires_grad_() for value in (u, forward, backward)]
    assert torch.autograd.gradcheck(long_conv, inputs)


def test_the_fast_length_is_the_next_even_one_without_large_factors():
    def is_fast(n):
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1

    fast = [n for n in range(2, 4000, 2) if is_fast(n)]
    for n in range(1, 3000):
        assert fast_length(n) == next(one for one in fast if one >= n)
    assert fast_length(2 * 10**6 - 1) == 2 * 10**6


def test_a_kernel_of_other_channels_is_refused_with_both_numbers(shapes_unchecked):
    with pytest.raises(InvalidInput, match=r"2 channels, the input 3"):
        long_conv(signal(2, 9), kernels(4, d_model=2))
