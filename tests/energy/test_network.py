"""EnergyNet: its score is minus its gradient, its start is its seed's, it refuses kinks, and it comes back from a folder."""

import json

import pytest
import torch
from torch import nn

from noisewise.energy import EnergyNet
from noisewise.energy.network import check_curvature
from noisewise.errors import InvalidInput, RunFolderError
from noisewise.noise import Corruption


def points(n=6, dim=3):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make(**options):
    return EnergyNet(3, hidden=16, depth=2, **options).double()


@pytest.mark.parametrize("options", [{}, {"head": "autoencoder"}, {"base_scale": 1.5}, {"activation": "tanh"}])
def test_score_is_minus_the_finite_difference_of_the_energy(options):
    net, x = make(**options), points()
    step = 1e-6
    for i in range(3):
        move = torch.zeros(3, dtype=torch.float64)
        move[i] = step
        slope = (net(x + move) - net(x - move)) / (2 * step)
        assert torch.allclose(net.score(x)[:, i], -slope, atol=1e-8)


def test_the_base_term_is_a_gaussian_of_that_scale():
    x = points()
    plain, with_base = make(seed=3), make(seed=3, base_scale=2.0)
    assert torch.allclose(with_base(x) - plain(x), x.square().sum(1) / 8)


def test_the_autoencoder_energy_is_the_squared_residual():
    net, x = make(head="autoencoder"), points()
    assert torch.allclose(net(x), (x - net.net(x)).square().sum(1))


def test_score_is_recorded_in_grad_mode_and_plain_without():
    net, x = make(), points()
    (gradient,) = torch.autograd.grad(net.score(x).square().sum(), net.net.layers[0].weight)
    assert gradient.abs().sum() > 0
    leaf = x.clone().requires_grad_(True)
    (hessian_row,) = torch.autograd.grad(net.score(leaf)[:, 0].sum(), leaf)
    other = torch.autograd.functional.hessian(lambda row: net(row[None])[0], x[0])
    assert torch.allclose(hessian_row[0], -other[0])
    with torch.no_grad():
        score = net.score(leaf)
    assert not score.requires_grad
    assert torch.allclose(score, net.score(x).detach(), rtol=1e-12)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    assert torch.equal(make(seed=1)(points()), make(seed=1)(points()))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_work_with_a_module_of_your_own():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
    net = EnergyNet(16, net=conv)
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert net.score(x).shape == x.shape
    assert torch.allclose(net(x), conv(x).sum((1, 2, 3)))


def test_relu_is_refused_by_name_and_by_its_flat_second_derivative():
    with pytest.raises(InvalidInput, match="'relu'"):
        EnergyNet(2, activation="relu")
    with pytest.raises(InvalidInput, match="'1' is ReLU"):
        EnergyNet(2, net=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)))
    weight = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with pytest.raises(InvalidInput, match="exactly zero"):
        check_curvature(lambda x: torch.relu(x @ weight).sum(1), points())
    check_curvature(lambda x: torch.tanh(x @ weight).sum(1), points())


@pytest.mark.parametrize(("options", "quoted"), [({"head": "mean"}, "'mean'"), ({"base_scale": 0.0}, "0.0")])
def test_settings_that_cannot_work_are_named(options, quoted):
    with pytest.raises(InvalidInput, match=quoted):
        EnergyNet(2, **options)


def test_an_energy_of_the_wrong_shape_is_named():
    with pytest.raises(InvalidInput, match=r"\(6, 2\)"):
        EnergyNet(3, head="autoencoder", net=nn.Linear(3, 2)).double()(points())


def test_saved_and_loaded_is_the_same_energy(tmp_path):
    net = make(head="autoencoder", base_scale=2.0, activation="softplus", seed=7)
    net.corruption = Corruption(0.8, 0.6)
    net.save_pretrained(tmp_path)
    again = EnergyNet.from_pretrained(tmp_path)
    assert torch.equal(again(points()), net(points()))
    assert again.corruption == net.corruption
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_module_of_your_own_is_given_again(tmp_path):
    make_own = lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    net = EnergyNet(3, net=make_own()).double()
    net.save_pretrained(tmp_path)
    with pytest.raises(RunFolderError, match="Sequential of your own"):
        EnergyNet.from_pretrained(tmp_path)
    assert torch.equal(EnergyNet.from_pretrained(tmp_path, net=make_own())(points()), net(points()))


@pytest.mark.parametrize(
    ("key", "value", "quoted"),
    [("schema", 9, "schema 9"), ("class", "MLP", "'MLP'"), ("model_sha256", "0", "not the file")],
)
def test_another_class_schema_or_file_is_refused_by_name(tmp_path, key, value, quoted):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(RunFolderError, match=quoted):
        EnergyNet.from_pretrained(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"config\.json is missing"):
        EnergyNet.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        EnergyNet.from_pretrained(tmp_path)
