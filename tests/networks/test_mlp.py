"""The MLP: seeded without the global generator, smooth, and as expressive as its layers say."""

import pytest
import torch
from torch import nn

from noisewise.errors import InvalidInput
from noisewise.networks import MLP, check_smooth


def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first = MLP(3, 2, hidden=8, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = MLP(3, 2, hidden=8, seed=4), MLP(3, 2, hidden=8, seed=5)
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    assert torch.equal(first(x), again(x))
    assert not torch.allclose(first(x), other(x))
    other.reset(4)
    assert torch.equal(first(x), other(x))


def test_weights_have_the_variance_of_their_uniform_law():
    layer = MLP(400, 1, hidden=400, depth=1, seed=0).layers[0]
    # U(-b, b) with b = 1/20 has variance b^2 / 3; 160,000 weights estimate it to 0.3 %
    assert layer.weight.var().item() == pytest.approx(1 / 400 / 3, rel=0.015)
    assert layer.weight.abs().max() <= 1 / 20


@pytest.mark.parametrize("activation", ["silu", "softplus", "tanh", "gelu"])
def test_second_derivatives_agree_with_finite_differences(activation):
    net = MLP(2, 1, hidden=16, depth=2, activation=activation, seed=1).double()
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: net(x).sum(), point)
    step = 1e-5
    for i in range(2):
        move = torch.zeros(2, dtype=torch.float64)
        move[i] = step
        plus, minus = (torch.autograd.functional.jacobian(lambda x: net(x).sum(), point + s * move) for s in (1, -1))
        assert torch.allclose(hessian[i], (plus - minus) / (2 * step), atol=1e-8)
    assert hessian.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"activation": "relu"}, "'relu'"),
        ({"depth": 0}, "depth"),
        ({"hidden": 0}, "hidden"),
        ({"dim_in": 0}, "dim_in"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_cannot_work_are_named(options, quoted):
    with pytest.raises(InvalidInput, match=quoted):
        MLP(**{"dim_in": 2, "dim_out": 2, **options})


@pytest.mark.parametrize("kinked", [nn.ReLU(), nn.LeakyReLU(), nn.Hardtanh(), nn.ELU(), nn.ReLU6()])
def test_a_kinked_layer_is_found_however_deep_it_lies(kinked):
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.SiLU(), kinked))
    with pytest.raises(InvalidInput, match=f"'1.1' is {type(kinked).__name__}"):
        check_smooth(module)
    check_smooth(module[:1])
