import itertools
import math

import jaxtyping
import pytest
import torch

from noisewise.diffusion.steps import step_schedule
from noisewise.errors import InvalidInput

SIZES = [
    (10, 2),
    (10, 3),
    (10, 10),
    (37, 5),
    (64, 64),
    (100, 7),
    (1000, 5),
    (1000, 10),
    (1000, 50),
    (1000, 333),
    (4000, 25),
]
VARIANCES = torch.tensor([4.0, 0.5, 0.01], dtype=torch.float64)


# from this many steps on, the default power and DDIM's squares repeat an index
REPEATS = {("power", 9): 7, ("power", 50): 30, ("quad_ddim", 9): 4, ("quad_ddim", 50): 8}


def levels(total, last=0.3):
    return torch.cumprod(1 - torch.linspace(0.01, last, total, dtype=torch.float64), 0)


def gaussian_gamma(abar):
    """E|eps_hat|^2/dim of data N(0, diag VARIANCES): eps_hat = sqrt(bbar) x_t / (abar var + bbar)."""
    bbar = 1 - abar[:, None]
    return (bbar / (abar[:, None] * VARIANCES + bbar)).mean(1)


def gaussian_bound(path, abar):
    """Nats of the KL terms of N(0, diag VARIANCES), kernels with exact mean and the best isotropic variance, from scratch."""
    bound = 0.0
    for s, t in itertools.pairwise(path):
        a_s, a_t = float(abar[s - 1]), float(abar[t - 1])
        jump = 1 - a_t / a_s
        posterior = jump * (1 - a_s) / (1 - a_t)
        spread = VARIANCES * (1 - a_t) / (a_t * VARIANCES + 1 - a_t)  # Var[x0 | x_t]
        miss = a_s * (jump / (1 - a_t)) ** 2 * spread  # mean squared error of the mean, per coordinate
        variance = posterior + miss.mean()
        bound += float(((posterior + miss) / variance - 1 + torch.log(variance / posterior)).sum()) / 2
    return bound


def paths(start, end, edges):
    return ([start, *inner, end] for inner in itertools.combinations(range(start + 1, end), edges - 1))


def total_cost(path, costs):
    return sum(float(costs[s, t]) for s, t in itertools.pairwise(path))


def random_costs(total, seed):
    return torch.randn(total + 1, total + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("total", "count", "kind", "expected"),
    [
        (1000, 5, "linear", [1, 251, 500, 750, 1000]),  # 250.75, 500.5 to the even 500, 750.25
        (1000, 5, "linspace", [1, 251, 501, 750, 1000]),  # 249.75, 499.5 to the even 500, 749.25, each plus 1
        (1000, 5, "leading", [1, 201, 401, 601, 801]),
        (1000, 5, "trailing", [200, 400, 600, 800, 1000]),
        (1000, 3, "trailing", [333, 667, 1000]),
        (1000, 5, "linear_ddim", [1, 201, 401, 601, 801]),
        (1000, 5, "quad_ddim", [1, 51, 201, 451, 801]),  # 0, 50, 200, 450, 800
        (1000, 16, "quad_ddim", [1, 4, 15, 33, 57, 89, 129, 175, 228, 289, 356, 431, 513, 601, 697, 801]),
        (101, 5, "power", [1, 14, 30, 51, 101]),  # 100 (1 - sqrt y): 13.4, 29.3, 50
        (7, 7, "linear", [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_values_worked_by_hand(total, count, kind, expected):
    assert step_schedule(total, count, kind) == expected


def test_power_one_is_linear_and_a_higher_power_is_denser_near_the_data():
    even = step_schedule(1000, 11)
    assert step_schedule(1000, 11, "power", power=1) == even
    for power, denser in ((3, True), (0.5, False)):
        uneven = step_schedule(1000, 11, "power", power=power)
        assert all((t < u) is denser for t, u in zip(uneven[1:-1], even[1:-1], strict=True))


@pytest.mark.parametrize("kind", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(("total", "count"), SIZES)
def test_spacings_of_diffusers(kind, total, count):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=total, timestep_spacing=kind)
    scheduler.set_timesteps(count)
    assert step_schedule(total, count, kind) == [t + 1 for t in reversed(scheduler.timesteps.tolist())]


def test_trailing_has_as_many_steps_as_asked_where_the_float_range_is_one_longer():
    schedule = step_schedule(1000, 61, "trailing")
    assert len(schedule) == 61
    assert schedule[:2] == [16, 33]  # 1000 / 61 = 16.4


@pytest.mark.parametrize("kind", ["linear", "power", "linspace", "leading", "trailing", "linear_ddim", "quad_ddim"])
@pytest.mark.parametrize("total", [2, 9, 50])
def test_every_spacing_is_strictly_increasing_or_says_that_it_repeats(kind, total):
    for count in range(2, total + 1):
        if (kind, total) in REPEATS and count >= REPEATS[kind, total]:
            with pytest.raises(InvalidInput, match="rounds two of its"):
                step_schedule(total, count, kind)
            continue
        schedule = step_schedule(total, count, kind)
        assert len(schedule) == count
        assert schedule == sorted(set(schedule))
        assert schedule[0] >= 1
        assert schedule[-1] == total or (kind in ("leading", "linear_ddim", "quad_ddim") and schedule[-1] < total)


@pytest.mark.parametrize("count", range(2, 10))
@pytest.mark.parametrize("seed", range(3))
def test_dp_equals_the_search_over_all_paths(count, seed):
    costs = random_costs(9, seed)
    best = min(paths(0, 9, count), key=lambda path: total_cost(path, costs))
    assert step_schedule(9, count, "dp", costs=costs) == best[1:]


def test_dp_reads_only_what_lies_above_the_diagonal_and_goes_round_forbidden_edges():
    costs = random_costs(9, 0)
    expected = step_schedule(9, 4, "dp", costs=costs)
    assert step_schedule(9, 4, "dp", costs=costs.masked_fill(torch.ones(10, 10).tril().bool(), math.nan)) == expected
    forbidden = costs.clone()
    forbidden[0, expected[0]] = math.inf
    best = min(paths(0, 9, 4), key=lambda path: total_cost(path, forbidden))
    assert step_schedule(9, 4, "dp", costs=forbidden) == best[1:]
    with pytest.raises(InvalidInput, match="no path of 4 edges"):
        step_schedule(9, 4, "dp", costs=torch.full_like(costs, math.inf))


def test_dp_never_costs_more_than_linear():
    costs = random_costs(200, 1)
    for count in (2, 5, 20, 117, 200):
        chosen, even = ([0, *step_schedule(200, count, kind, costs=costs)] for kind in ("dp", "linear"))
        assert total_cost(chosen, costs) <= total_cost(even, costs) + 1e-12


def test_one_more_step_never_costs_more_where_a_stop_on_the_way_never_does():
    # a sum of weights >= 0 over all pairs inside the edge: cost[s, u] + cost[u, t] <= cost[s, t]
    weights = random_costs(12, 2).abs()
    costs = torch.zeros(13, 13, dtype=torch.float64)
    for s, t in itertools.combinations(range(13), 2):
        costs[s, t] = weights[s + 1 : t + 1, s + 1 : t + 1].sum()
    bounds = [total_cost([0, *step_schedule(12, count, "dp", costs=costs)], costs) for count in range(2, 13)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 9, 10])
def test_ot_of_gaussian_data_is_the_least_bound_over_all_paths(count):
    abar = levels(10)
    best = min(paths(1, 10, count - 1), key=lambda path: gaussian_bound(path, abar))
    assert step_schedule(10, count, "ot", gamma=gaussian_gamma(abar), alphas_cumprod=abar) == best


def test_ot_beats_linear_on_gaussian_data():
    abar = levels(400, 0.03)
    chosen = step_schedule(400, 10, "ot", gamma=gaussian_gamma(abar), alphas_cumprod=abar)
    assert gaussian_bound(chosen, abar) < gaussian_bound(step_schedule(400, 10), abar) - 0.01


def test_ot_goes_on_evenly_where_gamma_exceeds_one():
    # 2 of 20 levels fail, so 4 are doubtful, with 10 - ceil(0.84 * 10) = 1 step; 8 of 20: 16 doubtful, 10 - ceil(3.6) = 6
    abar = levels(20)
    gamma = gaussian_gamma(abar)
    failed = torch.cat([gamma[:18], torch.tensor([1.01, 0.9], dtype=torch.float64)])
    inner = step_schedule(16, 9, "ot", gamma=gamma[:16], alphas_cumprod=abar[:16])
    assert step_schedule(20, 10, "ot", gamma=failed, alphas_cumprod=abar) == [*inner, 20]
    failed[12:] = 1.5
    assert step_schedule(20, 10, "ot", gamma=failed, alphas_cumprod=abar) == [1, 2, 3, 4, 7, 9, 12, 15, 17, 20]
    assert step_schedule(20, 2, "ot", gamma=failed, alphas_cumprod=abar) == [1, 20]
    for count in range(2, 21):
        schedule = step_schedule(20, count, "ot", gamma=failed, alphas_cumprod=abar)
        assert len(schedule) == count
        assert schedule == sorted(set(schedule))
        assert (schedule[0], schedule[-1]) == (1, 20)


def test_ot_where_almost_nothing_is_left_of_the_signal():
    abar = levels(10)
    abar[-1] = 1e-10
    best = min(paths(1, 10, 4), key=lambda path: gaussian_bound(path, abar))
    assert step_schedule(10, 5, "ot", gamma=gaussian_gamma(abar), alphas_cumprod=abar) == best
    abar[-1] = 1e-18  # lost beside 1, so gamma is 1 and 1 - b gamma / (1 - abar) would be 0 on every edge
    schedule = step_schedule(10, 5, "ot", gamma=gaussian_gamma(abar), alphas_cumprod=abar)
    assert len(schedule) == 5
    assert (schedule[0], schedule[-1]) == (1, 10)


def test_bad_counts_and_kinds_are_named():
    with pytest.raises(InvalidInput, match="num_steps must be at least 2, got 1"):
        step_schedule(10, 1)
    with pytest.raises(InvalidInput, match="at most num_train_timesteps = 10, got 11"):
        step_schedule(10, 11)
    with pytest.raises(InvalidInput, match=r'unknown kind .cubic..*"linear".*"trailing".*"power", "ot", "dp"'):
        step_schedule(10, 5, "cubic")
    with pytest.raises(InvalidInput, match="power must be a finite number above 0, got 0"):
        step_schedule(10, 5, "power", power=0)


def test_rounding_that_repeats_an_index_is_named():
    with pytest.raises(InvalidInput, match='"quad_ddim" rounds two of its 50 steps to t = 1 of 1000; take fewer'):
        step_schedule(1000, 50, "quad_ddim")
    assert len(step_schedule(1000, 29, "quad_ddim")) == 29
    with pytest.raises(InvalidInput, match="a power nearer 1"):
        step_schedule(20, 15, "power", power=4)


def test_bad_tables_are_named(monkeypatch):
    abar, costs = levels(10), random_costs(10, 0)
    gamma = gaussian_gamma(abar)

    def changed(table, index, value):
        table = table.clone()
        table[index] = value
        return table

    with pytest.raises(InvalidInput, match=r"costs\[2, 7\] is nan"):
        step_schedule(10, 5, "dp", costs=changed(costs, (2, 7), math.nan))
    with pytest.raises(InvalidInput, match=r"costs\[2, 7\] is -inf"):
        step_schedule(10, 5, "dp", costs=changed(costs, (2, 7), -math.inf))
    with pytest.raises(InvalidInput, match=r'kind="dp" needs costs, a tensor of shape \[11, 11\]'):
        step_schedule(10, 5, "dp")
    with pytest.raises(InvalidInput, match=r"costs must have shape \[11, 11\], got \[10, 10\]"):
        step_schedule(10, 5, "dp", costs=costs[1:, 1:])
    with pytest.raises(InvalidInput, match='kind="ot" needs alphas_cumprod'):
        step_schedule(10, 5, "ot", gamma=gamma)
    with pytest.raises(InvalidInput, match="got nan at t = 4"):
        step_schedule(10, 5, "ot", gamma=changed(gamma, 3, math.nan), alphas_cumprod=abar)
    with pytest.raises(InvalidInput, match=r"gamma is 1.2 at t = 5 of 10.*more data"):
        step_schedule(10, 5, "ot", gamma=changed(gamma, 4, 1.2), alphas_cumprod=abar)
    with pytest.raises(InvalidInput, match=r"fall strictly from below 1.*at t = 1 after 1.0"):
        step_schedule(10, 5, "ot", gamma=gamma, alphas_cumprod=changed(abar, 0, 1.0))
    with pytest.raises(InvalidInput, match=r"stay above 0, got 0.0 at t = 10 .*pure noise"):
        step_schedule(10, 5, "ot", gamma=gamma, alphas_cumprod=changed(abar, -1, 0.0))
    with pytest.raises(InvalidInput, match=r"fall strictly.*at t = 2"):
        step_schedule(10, 5, "ot", gamma=gamma, alphas_cumprod=abar.flip(0))
    # as users run it: the shape checks of the test suite would raise first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidInput, match=r"gamma must have shape \[10\], got \[9\]"):
        step_schedule(10, 5, "ot", gamma=gamma[1:], alphas_cumprod=abar)
