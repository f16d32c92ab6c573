"""The layers beside MRConv are what their papers say: a recurrence, a decaying staircase, a cascade; and they are causal."""

import numpy as np
import pytest
import torch

from noisewise.sequence.experiments.mrconv.peers import (
    GRU,
    S4D,
    DilatedStack,
    FreeKernel,
    MultiresNet,
    SGConv,
    Transformer,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("state", [4, 16])
def test_s4d_is_its_recurrence(state):
    layer = S4D(3, 50, state).double()
    u = torch.randn(2, 3, 50, dtype=torch.float64)
    with torch.no_grad():
        turn, gain = layer.discrete()
        x = torch.zeros(2, 3, state // 2, dtype=torch.complex128)
        for t in range(50):
            x = turn * x + u[:, :, t, None]
            y_t = 2 * (gain * x).sum(-1).real + layer.skip * u[..., t]
            torch.testing.assert_close(layer(u)[..., t], y_t, rtol=1e-10, atol=1e-12)


def test_s4d_sampled_twice_as_fast_reads_the_same_system():
    layer = S4D(4, 400, 8).double()
    with torch.no_grad():
        layer.skip.zero_()
        layer.log_dt.fill_(np.log(0.01))
        # zero-order hold is exact for inputs that are held: each sample twice
        u = torch.randn(1, 4, 200, dtype=torch.float64)
        slow = layer(u)
        fast = layer.at_rate(2.0)(u.repeat_interleave(2, -1))[..., 1::2]
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)


def test_sgconv_halves_its_size_from_piece_to_piece_and_starts_at_unit_norm():
    layer = SGConv(2, 1000, 64)
    assert layer.pieces.shape == (5, 2, 64)
    with torch.no_grad():
        assert float(layer.kernel(1024).norm(dim=-1).max()) == pytest.approx(1, abs=1e-5)
        layer.pieces.fill_(1.0)
        whole = layer.unscaled()
    assert whole.shape == (2, 1024)
    steps = torch.cat([torch.full((n,), h) for n, h in ((64, 16.0), (64, 8.0), (128, 4.0), (256, 2.0), (512, 1.0))])
    torch.testing.assert_close(whole[0], steps)


def test_sgconv_keeps_the_norm_of_its_first_pass():
    layer = SGConv(2, 100, 16)
    u = torch.randn(1, 2, 100)
    with torch.no_grad():
        first = layer(u) - layer.skip[:, None] * u
        layer.pieces *= 3
        torch.testing.assert_close(layer(u) - layer.skip[:, None] * u, 3 * first)


@pytest.mark.parametrize("taps", [2, 4])
def test_multiresnet_is_the_sum_of_its_cascades(taps):
    layer = MultiresNet(2, 40, taps).double()
    assert (taps - 1) * (2**layer.depth - 1) + 1 >= 40
    impulse = torch.zeros(1, 2, 40, dtype=torch.float64)
    impulse[..., 0] = 1
    with torch.no_grad():
        found = layer(impulse)[0].numpy()
    low, high, weights = (p.detach().squeeze(1).numpy() for p in (layer.low, layer.high, layer.weights))
    for channel in range(2):
        rest, expected = np.ones(1), np.zeros(40)
        expected[0] = weights[channel, 0]
        for level in range(layer.depth):
            detail = np.convolve(rest, _spread(high[channel], 2**level))[:40]
            rest = np.convolve(rest, _spread(low[channel], 2**level))[:40]
            expected[: len(detail)] += weights[channel, level + 1] * detail
        expected[: len(rest)] += weights[channel, -1] * rest
        np.testing.assert_allclose(found[channel], expected, atol=1e-12)


def _spread(taps, dilation):
    made = np.zeros(dilation * (len(taps) - 1) + 1)
    made[::dilation] = taps
    return made


def test_the_free_kernel_is_convolved_as_numpy_does():
    layer = FreeKernel(2, 30).double()
    u = torch.randn(1, 2, 30, dtype=torch.float64)
    with torch.no_grad():
        y = layer(u) - layer.skip[:, None] * u
        for channel in range(2):
            expected = np.convolve(u[0, channel].numpy(), layer.taps[channel].numpy())[:30]
            np.testing.assert_allclose(y[0, channel].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    "layer", [S4D(4, 64), SGConv(4, 64, 8), FreeKernel(4, 64), MultiresNet(4, 64), DilatedStack(4, 64), GRU(4)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_peers_are_causal_and_see_the_first_input_at_the_end(layer):
    layer = layer.double()
    u = torch.randn(2, 4, 64, dtype=torch.float64, requires_grad=True)
    (early,) = torch.autograd.grad(layer(u)[..., 20].sum(), u)
    assert early[..., 21:].abs().max() < 1e-12
    (late,) = torch.autograd.grad(layer(u)[..., -1].sum(), u)
    assert late[..., 0].abs().min() > 0


def test_only_its_positions_tell_a_transformer_the_order():
    layer = Transformer(8, 20).double().eval()
    u = torch.randn(1, 8, 20, dtype=torch.float64)
    order = torch.randperm(20)
    with torch.no_grad():
        assert not torch.allclose(layer(u[..., order]), layer(u)[..., order], atol=1e-3)
        layer.positions.zero_()
        torch.testing.assert_close(layer(u[..., order]), layer(u)[..., order])
