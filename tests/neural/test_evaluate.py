"""`evaluate`: exact samples stand at the floor, and each known defect shows in the number that is made for it."""

import math

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.neural import evaluate
from noisewise.targets import GaussianMixture, as_target, double_well_4, gmm40, lennard_jones, many_well


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# far apart
THREE = GaussianMixture([[-10.0, 0.0], [10.0, 0.0], [0.0, 15.0]], 1.0, [0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    "target",
    [THREE, gmm40(), many_well(8), double_well_4(), lennard_jones()],
    ids=["three", "40", "wells", "dw4", "lj13"],
)
def test_exact_samples_are_at_the_floor(target):
    """Within a factor of two of the mean floor, or four standard errors where there are any."""
    if hasattr(target, "sample"):
        results = evaluate(target.sample(500, seeded(7)), target)
    else:
        # the two halves of the shipped rows share none
        every = target.reference(10_000)
        results = evaluate(every[:500], target, reference=every[5000:])
    for name, measured in results.items():
        assert measured.floor is not None
        assert measured.n == 500
        if name == "MMD2" or name.startswith("W2") or name.endswith(("TVD", "weights")):
            assert measured.floor / 2 < measured.value < 2 * measured.floor, name
        elif name.startswith("energy") and measured.se is not None:
            assert measured.value < 4 * measured.se, name


def test_a_missing_mode_shows():
    x = THREE.sample(4000, seeded(1))
    lost = x[THREE.component(x) != 2]
    results = evaluate(lost, THREE, metrics=["modes covered", "TV of mode weights", "share within 3 sd", "W2"])
    assert results["modes covered"].value == 2
    assert results["modes covered"].floor == 3
    assert results["TV of mode weights"].value == pytest.approx(0.2, abs=0.02)
    assert results["TV of mode weights"].floor < 0.02
    # 0.2 of the mass travels from where the others are, at least 18 away
    assert results["W2"].value > math.sqrt(0.2) * 15 * 0.9
    assert results["share within 3 sd"].value == pytest.approx(1 - math.exp(-4.5), abs=4 * 0.0018)


def test_coverage_counts_sharp_draws_of_a_fair_share():
    means = THREE.means
    # all at the means: mode 2 holds 3 % where 4 % (a fifth of its weight) are wanted
    share = [0.6, 0.37, 0.03]
    x = torch.cat([mean.expand(int(1000 * s), 2) for mean, s in zip(means, share, strict=True)])
    names = ["modes covered", "share within 3 sd"]
    assert evaluate(x, THREE, metrics=names)["modes covered"].value == 2
    share = [0.6, 0.35, 0.05]
    x = torch.cat([mean.expand(int(1000 * s), 2) for mean, s in zip(means, share, strict=True)])
    assert evaluate(x, THREE, metrics=names)["modes covered"].value == 3
    far = x + torch.tensor([3.1, 0.0])  # outside three standard deviations, nearest to the same means
    results = evaluate(far, THREE, metrics=names)
    assert results["modes covered"].value == 0
    assert results["share within 3 sd"].value == 0


@pytest.mark.parametrize("dim", [1, 2, 20])
def test_the_radius_holds_as_much_of_a_gaussian_in_every_dimension(dim):
    covariance = torch.diag(torch.linspace(0.2, 5, dim)) + 0.1
    target = GaussianMixture(torch.zeros(1, dim), covariance[None])
    measured = evaluate(target.sample(20_000, seeded(2)), target, metrics=["share within 3 sd"])["share within 3 sd"]
    assert abs(measured.value - 0.98889) < 4 * measured.se


def test_a_wrong_well_probability_shows():
    target = many_well(32)
    x = target.sample(4000, seeded(3))
    # every well as often left as right, by symmetry of its two sides
    flat = x.clone()
    flip = (torch.rand(4000, 16, generator=seeded(4)) < 0.5).float() * 2 - 1
    flat[:, 0::2] = flat[:, 0::2].abs() * flip
    one = x.clone()
    one[:, 4] = one[:, 4].abs()
    names = ["worst well gap", "mean well gap", "well patterns"]
    exact, even, stuck = (evaluate(v, target, metrics=names) for v in (x, flat, one))
    assert exact["worst well gap"].value < 2 * exact["worst well gap"].floor
    assert even["mean well gap"].value == pytest.approx(target.right_probability - 0.5, abs=4 * 0.5 / math.sqrt(64_000))
    assert even["well patterns"].value > 1.5
    assert stuck["worst well gap"].value == pytest.approx(1 - target.right_probability, abs=1e-6)
    assert stuck["mean well gap"].value < 3 * exact["mean well gap"].floor + 0.16 / 16


def test_expected_patterns_are_those_of_exact_draws():
    target = many_well(20)
    ratios = torch.tensor(
        [
            evaluate(target.sample(300, seeded(s)), target, metrics=["well patterns"])["well patterns"].value
            for s in range(30)
        ]
    )
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(30)
    collapsed = target.sample(1, seeded()).expand(300, 20)
    assert evaluate(collapsed, target, metrics=["well patterns"])["well patterns"].value < 0.01


def test_a_shift_of_a_gaussian_in_closed_form():
    target = GaussianMixture(torch.zeros(1, 3), 1.0)
    x = target.sample(2000, seeded(5)) + torch.tensor([2.0, 0.0, 0.0])
    results = evaluate(x, target, metrics=["energy gap", "energy W1", "W2"])
    # E |x|^2 / 2 grows by 2^2 / 2, and every quantile with it
    assert abs(results["energy gap"].value - 2.0) < 4 * results["energy gap"].se
    assert results["energy W1"].value == pytest.approx(results["energy gap"].value, rel=0.01)
    assert results["W2"].value == pytest.approx(2.0, abs=results["W2"].floor)


def test_clusters_are_compared_without_labels_and_places():
    target = double_well_4()
    every = target.reference(2000)
    # one copy of each cluster: the first particle at a place of its own, the second on a ray from it
    position = every[:500].double().reshape(500, 4, 2) - every[:500, None, :2]
    unit = position[:, 1] / position[:, 1].norm(dim=-1, keepdim=True)
    turn = torch.stack([torch.stack([unit[:, 0], -unit[:, 1]], -1), torch.stack([unit[:, 1], unit[:, 0]], -1)], 1)
    placed = (position @ turn + 40.0).flatten(1)
    assert (placed[:, :2] - 40).abs().max() < 1e-9
    assert (placed[:, 3] - 40).abs().max() < 1e-9
    results = evaluate(placed, target, reference=every[1000:], metrics=["W2", "W2 modulo symmetry", "distance TVD"])
    for measured in results.values():
        assert measured.value < 1.3 * measured.floor
    squeezed = evaluate(0.9 * every[:500], target, reference=every[1000:])
    for name in ("W2 modulo symmetry", "distance TVD", "energy TVD", "energy 99 % gap"):
        assert squeezed[name].value > 1.5 * squeezed[name].floor, name


def test_the_same_seed_gives_the_same_numbers():
    x = gmm40().sample(300, seeded())
    assert evaluate(x, gmm40(), seed=3) == evaluate(x, gmm40(), seed=3)
    assert evaluate(x, gmm40(), seed=3)["W2"] != evaluate(x, gmm40(), seed=4)["W2"]


def test_a_bare_density_needs_a_reference():
    target = as_target(lambda x: -x.square().sum(-1) / 2, dim=2)
    x = torch.randn(100, 2, generator=seeded())
    with pytest.raises(InvalidInput, match=r"TorchTarget has neither exact draws .*reference=\[m, dim\]"):
        evaluate(x, target)
    results = evaluate(x, target, reference=torch.randn(120, 2, generator=seeded(1)))
    # half of the reference against the other half
    assert {measured.n for measured in results.values()} == {60}
    assert results["energy gap"].value < 4 * results["energy gap"].se


def test_arrays_and_plain_functions_are_taken_as_they_are(shapes_unchecked):
    target, x = gmm40(), gmm40().sample(200, seeded())
    exact = target.sample(200, seeded(1))
    wanted = evaluate(x, target, reference=exact, metrics=["MMD2"])["MMD2"]
    found = evaluate(x.numpy(), target.log_prob, reference=exact.numpy(), metrics=["MMD2"])["MMD2"]
    assert found == wanted
    with pytest.raises(InvalidInput, match=r"the string 'MMD2': give \['MMD2'\]"):
        evaluate(x, target, metrics="MMD2")


def test_bad_input_is_quoted():
    target, x = gmm40(), gmm40().sample(20, seeded())
    with pytest.raises(
        InvalidInput, match=r"no metric 'KL' for GaussianMixture; there are: energy gap, .*modes covered"
    ):
        evaluate(x, target, metrics=["W2", "KL"])
    with pytest.raises(InvalidInput, match=r"samples must have shape \[n, 2\].*got \(20, 1\)"):
        evaluate(x[:, :1], target)
    with pytest.raises(InvalidInput, match="samples has 1 rows"):
        evaluate(x[:1], target)
    with pytest.raises(InvalidInput, match=r"reference has 3 rows"):
        evaluate(x, target, reference=x[:3])
    x[3, 1] = math.nan
    with pytest.raises(InvalidInput, match=r"row 3 of samples is not finite \(1 of 20 rows\)"):
        evaluate(x, target)
    with pytest.raises(InvalidInput, match="row 3 of reference"):
        evaluate(x[4:], target, reference=x)
    holed = as_target(lambda x: torch.where(x[:, 0] > 2, math.nan, -x.square().sum(-1)), dim=2)
    x = torch.zeros(40, 2)
    x[7] = torch.tensor([3.0, 0.5])
    with pytest.raises(InvalidInput, match=r"log_prob is NaN for 1 of 20 draws, one of which begins \[3, 0\.5\]"):
        evaluate(x[:20], holed, reference=torch.randn(40, 2, generator=seeded()).clamp(max=2), metrics=["energy gap"])
