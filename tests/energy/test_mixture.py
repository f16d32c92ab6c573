"""MixtureScoreMatching: a normalised density with the right mode weights, on the scale of the data, kept and checked."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from noisewise.energy import EnergyNet, MixtureScoreMatching, fit_energy, student_t_reference
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.networks import MLP
from noisewise.sampling import MALA, ParallelTempering, sample
from noisewise.targets import GaussianMixture, as_target

F64 = torch.float64
TRUTH = GaussianMixture(torch.tensor([[-4.0], [4.0]], dtype=F64), 1.0, torch.tensor([0.2, 0.8], dtype=F64))
QUICK = {"hidden": 16, "depth": 2, "steps": 400, "learning_rate": 1e-2, "floor": 1e-3}
# fits of a second to few rows are coarse and say so; what is said is tested below
pytestmark = pytest.mark.filterwarnings("ignore::noisewise.errors.NoisewiseWarning")


def rows(n=3000, seed=0):
    return TRUTH.sample(n, torch.Generator().manual_seed(seed))


def grid(reach=20.0, nodes=4001):
    return torch.linspace(-reach, reach, nodes, dtype=F64)[:, None], 2 * reach / (nodes - 1)


@pytest.fixture(scope="module")
def fitted():
    # a fixture does not see the marks of the tests
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoisewiseWarning)
        return MixtureScoreMatching(**QUICK).fit(rows())


# --- what is fitted


def test_the_density_integrates_to_one_and_its_halves_are_the_mode_weights(fitted):
    x, dx = grid()
    density = fitted.score_samples(x).exp() * dx
    # the normaliser's error, 1/beta of it in the density
    assert float(density.sum()) == pytest.approx(1, abs=5 * fitted.log_normalizer_se_ / fitted.beta + 1e-3)
    left = float(density[x[:, 0] < 0].sum() / density.sum())
    weights = fitted.mode_weights(torch.tensor([[-4.0], [4.0]]))
    assert abs(weights.weights[0].item() - left) < 4 * weights.se[0].item() + 1e-3
    by_label = fitted.mode_weights(lambda y: (y[:, 0] > 0).long())
    assert torch.equal(by_label.weights, weights.weights)


def test_the_mode_weights_are_near_those_of_the_data(fitted):
    share = float((rows() < 0).double().mean())
    assert fitted.mode_weights(TRUTH.means).weights[0].item() == pytest.approx(share, abs=0.06)
    # the clusters that fit finds are the same partition, the larger one first
    assert fitted.mode_weights().weights[1].item() == pytest.approx(share, abs=0.06)


def test_the_divergence_to_the_truth_is_small(fitted):
    x, dx = grid()
    p = TRUTH.log_prob(x)
    assert float((p.exp() * (p - fitted.score_samples(x))).sum() * dx) < 0.06


def test_units_change_the_density_by_their_jacobian_alone():
    # oracle 8: standardised data are the same whatever their units
    x = rows(800)
    options = {**QUICK, "steps": 40}
    plain, scaled = MixtureScoreMatching(**options), MixtureScoreMatching(**options)
    plain.fit(x)
    scaled.fit(8.0 * x - 32.0)
    assert torch.allclose(
        scaled.score_samples(8.0 * x[:50] - 32.0), plain.score_samples(x[:50]) - math.log(8), atol=1e-3
    )


@pytest.mark.slow
def test_without_standardising_the_scale_is_left_alone():
    x = (rows(2000) - 2.4) / 3.3
    on = MixtureScoreMatching(**QUICK).fit(x)
    off = MixtureScoreMatching(**QUICK, standardize=False).fit(x)
    assert torch.equal(off.scale_, torch.ones(1, dtype=F64))
    held = TRUTH.sample(2000, torch.Generator().manual_seed(9))
    assert on.score((held - 2.4) / 3.3) == pytest.approx(off.score((held - 2.4) / 3.3), abs=0.05)


def test_arrays_lists_and_frames_give_what_tensors_give(fitted):
    x = rows(5)
    assert torch.equal(fitted.score_samples(x.numpy()), fitted.score_samples(x))
    assert torch.equal(fitted.score_samples(x.tolist()), fitted.score_samples(x))
    frame = pytest.importorskip("pandas").DataFrame(x.numpy(), columns=["a"])
    assert torch.equal(fitted.score_samples(frame), fitted.score_samples(x))
    by_tensor = fitted.mode_weights(TRUTH.means).weights
    for centres in (TRUTH.means.numpy(), TRUTH.means.tolist(), frame.iloc[:0].reindex([0, 1]).assign(a=[-4.0, 4.0])):
        assert torch.equal(fitted.mode_weights(centres).weights, by_tensor)
    with pytest.raises(InvalidInput, match="partition has 2 columns"):
        fitted.mode_weights([[0.0, 1.0]])
    assert fitted.score_samples(x.float()).dtype == F64
    assert fitted.score(x) == pytest.approx(float(fitted.score_samples(x).mean()))


def test_log_prob_is_score_samples_with_a_gradient(fitted):
    x = rows(20).requires_grad_(True)
    value = fitted.log_prob(x)
    assert torch.equal(value.detach(), fitted.score_samples(x.detach()))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    step = 1e-5
    slope = (fitted.score_samples(x.detach() + step) - fitted.score_samples(x.detach() - step)) / (2 * step)
    assert torch.allclose(gradient[:, 0], slope, atol=1e-4, rtol=1e-4)
    assert fitted.log_prob(x.detach().float()).dtype == torch.float32


def test_one_seed_one_result_and_the_global_generator_is_left_alone():
    options = {**QUICK, "steps": 20}
    before = torch.get_rng_state()
    first, again = (MixtureScoreMatching(**options).fit(rows(300)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.score_samples(rows(50)), again.score_samples(rows(50)))
    assert first.log_normalizer_ == again.log_normalizer_


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["importance", "reverse"])
def test_the_other_normalisers_agree_with_the_bridge(fitted, normalizer):
    other = MixtureScoreMatching(**QUICK, normalizer=normalizer).fit(rows())
    spread = math.hypot(other.log_normalizer_se_, fitted.log_normalizer_se_)
    # rows of the data are draws of the fitted bridge only as far as the fit is good
    assert abs(other.log_normalizer_ - fitted.log_normalizer_) < 4 * spread + 0.02


@pytest.mark.slow
def test_a_student_reference_an_own_one_and_an_own_network_fit_too(shapes_unchecked):
    x = rows(2000)
    share = float((x < 0).double().mean())
    flat = nn.Sequential(MLP(1, 1, hidden=16, depth=2, seed=1), nn.Flatten(0))
    start = [p.clone() for p in flat.parameters()]
    distribution = torch.distributions.MultivariateNormal(torch.tensor([2.4], dtype=F64), 12 * torch.eye(1, dtype=F64))
    for options in (
        {"reference": "student-t"},
        {"reference": student_t_reference(x, 7)},
        {"reference": distribution},
        {"energy": EnergyNet(1, hidden=16, depth=2, base_scale=1.2)},
        {"energy": flat},
        {"trace": "sliced"},
    ):
        found = MixtureScoreMatching(**{**QUICK, **options}).fit(x)
        assert found.mode_weights(TRUTH.means).weights[0].item() == pytest.approx(share, abs=0.12), options
    # a copy is trained
    assert all(torch.equal(a, b) for a, b in zip(start, flat.parameters(), strict=True))


# --- draws


@pytest.mark.slow
def test_draws_have_the_weights_of_the_model(fitted, shapes_unchecked):
    draws = fitted.sample(2000, seed=1)
    assert draws.shape == (2000, 1)
    share = float((draws < 0).double().mean())
    # at the very least 100 independent chains
    assert abs(share - fitted.mode_weights(TRUTH.means).weights[0].item()) < 4 * math.sqrt(0.2 * 0.8 / 100)
    within = draws[draws > 0]
    assert within.mean().item() == pytest.approx(4, abs=0.3)
    assert within.std().item() == pytest.approx(1, abs=0.3)
    assert torch.equal(draws[:150], fitted.sample(2000, seed=1)[:150])


@pytest.mark.slow
def test_another_kernel_draws_too(fitted):
    assert torch.isfinite(fitted.sample(300, kernel=lambda target: ParallelTempering(target))).all()


# --- checks


@pytest.mark.slow
def test_the_blindness_check_compares_seeds(shapes_unchecked, fitted):
    seen = fitted.blindness_check(2)
    assert seen.weights.shape == (2, 2)
    assert torch.allclose(seen.weights.sum(1), torch.ones(2, dtype=F64))
    assert torch.allclose(seen.spread, seen.weights.std(0))
    # two refits see the weights, whatever their start
    assert seen.spread.max() < 0.06


def test_the_report_says_what_was_found(fitted):
    text = fitted.report()
    # the larger cluster is the first; each line allows to tell it, and to see a misfit
    first = next(line for line in text.splitlines() if line.startswith("cluster 1:"))
    assert f"weight {fitted.mode_weights().measurements()[0]}," in first
    assert f"share of the rows {fitted.cluster_shares_.measurements()[0]}, centre (" in first
    assert fitted.cluster_shares_.weights[0].item() == pytest.approx(float((rows() > 0).double().mean()), abs=2e-3)
    assert fitted.cluster_centres_.flatten().tolist() == pytest.approx([4, -4], abs=0.2)
    assert "gap 1-2:" in text
    assert f"{fitted.negative_mass_:.3%} ± {fitted.negative_mass_se_:.3%}" in text
    assert "interrupted" not in text
    assert "clusters of the data: 2" in text
    assert f"{fitted.log_normalizer_:.4f}" in text
    assert "negative mass" in text
    assert fitted.history_[0]["step"] > 0


def test_a_narrow_reference_warns_of_the_gap():
    far = torch.cat([rows(800) * 0.02 - 5, rows(800) * 0.02 + 5])
    with pytest.warns(NoisewiseWarning, match="reference points lie in the gap"):
        found = MixtureScoreMatching(**{**QUICK, "steps": 5, "beta": 0.99}).fit(far)
    assert found.gaps_[0].points < 50
    assert any("gap" in text for text in found.warnings_)
    assert "warning: only" in found.report()


def test_little_beta_amplifies_the_faults_of_the_bridge_and_is_warned_of():
    with pytest.warns(NoisewiseWarning, match="mass is negative"):
        found = MixtureScoreMatching(**{**QUICK, "steps": 200, "beta": 0.1}).fit(rows(1000))
    assert found.negative_mass_ > 0.01
    assert found.negative_mass_ > 10 * found.negative_mass_se_


def test_weights_that_miss_the_shares_of_the_rows_are_warned_of(fitted):
    # after five steps the fit is its reference, which has half of its mass above 0
    m = torch.distributions.MultivariateNormal(torch.zeros(1, dtype=F64), 25 * torch.eye(1, dtype=F64))
    with pytest.warns(
        NoisewiseWarning, match="fitted weight of cluster 2 is .*its share of the 3000 rows .*1 more cluster"
    ):
        coarse = MixtureScoreMatching(reference=m, **{**QUICK, "steps": 5}).fit(rows())
    assert any("the fit is wrong there" in text for text in coarse.warnings_)
    weight, share = coarse.cluster_weights_, coarse.cluster_shares_
    assert share.se[0].item() == pytest.approx(math.sqrt(0.8 * 0.2 / 3000), rel=0.1)
    assert (weight.weights - share.weights).abs()[0] > 4 * share.se[0]
    # a weight within the errors is not
    assert (fitted.cluster_weights_.weights - fitted.cluster_shares_.weights).abs().max() < 0.03
    assert not any("the fit is wrong" in text for text in fitted.warnings_)


def test_few_rows_for_their_columns_are_warned_of():
    with pytest.warns(NoisewiseWarning, match="40 rows in 1 column are few: with less than 50 a column"):
        MixtureScoreMatching(**{**QUICK, "steps": 2}).fit(rows(40))
    assert not any("few" in text for text in MixtureScoreMatching(**{**QUICK, "steps": 2}).fit(rows(50)).warnings_)


def test_a_fit_that_was_cut_says_where(tmp_path):
    model = MixtureScoreMatching(**{**QUICK, "steps": 100_000}, max_seconds=0.2).fit(rows(100))
    assert 0 < model.n_iter_ < 100_000
    assert f"stopped by max_seconds at step {model.n_iter_}" in model.report()
    model.save_pretrained(tmp_path)
    assert MixtureScoreMatching.from_pretrained(tmp_path).report() == model.report()


def test_a_fitted_model_is_a_target_that_sample_takes(fitted, shapes_unchecked):
    target = as_target(fitted)
    x = rows(6).reshape(2, 3, 1)
    value, score = target.log_prob_and_score(x)
    assert value.shape == (2, 3)
    assert torch.equal(value.flatten(), fitted.score_samples(x.reshape(6, 1)))
    step = 1e-5
    slope = (fitted.log_prob(x + step) - fitted.log_prob(x - step)) / (2 * step)
    assert torch.allclose(score[..., 0], slope, atol=1e-4, rtol=1e-4)
    run = sample(MALA(target), init=rows(200), draws=20, warmup=20, progress=False)
    # the starts have the weights, short runs of MALA keep them; on the scale of the data
    assert float((run.positions > 0).double().mean()) == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 200))
    assert run.positions[run.positions > 0].mean().item() == pytest.approx(4, abs=0.3)
    assert as_target(fitted, dim=1) is fitted


# --- keeping


def test_saved_and_loaded_is_the_same_density(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    again = MixtureScoreMatching.from_pretrained(tmp_path)
    x = rows(100)
    assert torch.equal(again.score_samples(x), fitted.score_samples(x))
    for name in ("log_normalizer_", "log_normalizer_se_", "negative_mass_", "history_", "gaps_", "warnings_"):
        assert getattr(again, name) == getattr(fitted, name), name
    assert again.report() == fitted.report()
    assert torch.equal(again.mode_weights().weights, fitted.mode_weights().weights)
    with pytest.raises(InvalidInput, match="X=data"):
        again.blindness_check(2)


def test_what_is_yours_is_given_again(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))  # noqa: E731
    m = torch.distributions.MultivariateNormal(torch.tensor([2.0], dtype=F64), 12 * torch.eye(1, dtype=F64))
    found = MixtureScoreMatching(make(), m, **{**QUICK, "steps": 20}).fit(rows(300))
    found.save_pretrained(tmp_path)
    with pytest.raises(RunFolderError, match="Sequential of your own"):
        MixtureScoreMatching.from_pretrained(tmp_path, reference=m)
    with pytest.raises(RunFolderError, match="of your own: give it as reference="):
        MixtureScoreMatching.from_pretrained(tmp_path, energy=make())
    again = MixtureScoreMatching.from_pretrained(tmp_path, make(), m)
    assert torch.equal(again.score_samples(rows(20)), found.score_samples(rows(20)))


def test_another_class_is_refused_by_name(fitted, tmp_path):
    EnergyNet(1).save_pretrained(tmp_path / "net")
    with pytest.raises(RunFolderError, match="'EnergyNet'"):
        MixtureScoreMatching.from_pretrained(tmp_path / "net")
    fitted.save_pretrained(tmp_path / "fit")
    path = tmp_path / "fit" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 0}))
    with pytest.raises(RunFolderError, match="schema 0"):
        MixtureScoreMatching.from_pretrained(tmp_path / "fit")


def test_scikit_learn_can_clone_and_set_it():
    sklearn = pytest.importorskip("sklearn.base")
    model = MixtureScoreMatching(EnergyNet(1, hidden=4), beta=0.9, seed=3)
    copy = sklearn.clone(model)
    assert copy.get_params()["beta"] == 0.9
    assert copy.set_params(beta=0.7).beta == 0.7
    with pytest.raises(InvalidInput, match="'betta'"):
        copy.set_params(betta=0.7)


def test_scikit_learn_can_cross_validate_it():
    selection = pytest.importorskip("sklearn.model_selection")
    model = MixtureScoreMatching(**{**QUICK, "steps": 20})
    scores = selection.cross_val_score(model, rows(300).numpy(), cv=2)
    halves = rows(300)[150:], rows(300)[:150]
    by_hand = [
        MixtureScoreMatching(**{**QUICK, "steps": 20}).fit(train).score(test) for train, test in [halves, halves[::-1]]
    ]
    assert scores.tolist() == pytest.approx(by_hand)
    search = selection.GridSearchCV(model, {"beta": [0.5, 0.9]}, cv=2).fit(rows(200).numpy())
    assert search.best_estimator_.beta in (0.5, 0.9)


def test_a_text_column_of_a_frame_is_named():
    frame = pytest.importorskip("pandas").DataFrame({"x": range(20), "city": ["Oslo"] * 20})
    with pytest.raises(InvalidInput, match=r"column 2 \('city'\)"):
        MixtureScoreMatching().fit(frame)


# --- bad input


def with_nan():
    x = rows(50)
    x[7] = np.nan
    return x


UNIT = torch.distributions.Independent(torch.distributions.Uniform(torch.zeros(1), torch.ones(1)), 1)


@pytest.mark.parametrize(
    ("options", "x", "quoted"),
    [
        ({"beta": 0.0}, rows(50), "0.0"),
        ({"beta": 1.0}, rows(50), "1.0"),
        ({"reference": "uniform"}, rows(50), "'uniform'"),
        ({"reference": object()}, rows(50), "lacks log_prob and sample"),
        ({"reference": UNIT}, rows(50) / 100 + 0.5, None),
        ({"reference": UNIT}, rows(50), "no density at 50 of 50 rows"),
        ({}, with_nan(), r"index 7, from 0\)"),
        ({}, torch.cat([rows(50), torch.ones(50, 1, dtype=F64)], 1), "column 2 is constant at 1"),
        ({}, torch.zeros(5, dtype=F64), r"X\[:, None\]"),
        ({}, rows(1), "at least 10 rows"),
        ({}, [["a"]], "rows of numbers"),
        ({}, rows(9), "at least 10 rows"),
        ({}, torch.randn(200, 65, generator=torch.Generator().manual_seed(0)), "sliced"),
        ({"normalizer": "annealed"}, rows(50), "'annealed'"),
        ({"floor": 1.0}, rows(50), "floor"),
        ({"inflate": 0.0}, rows(50), "inflate"),
        ({"energy": 3}, rows(50), "int"),
        ({"energy": EnergyNet(2)}, rows(50), "dim 2"),
        ({"energy": nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))}, rows(50), "ReLU"),
        ({"steps": 0}, rows(50), "steps"),
        ({"seed": -1}, rows(50), "seed"),
    ],
)
def test_what_cannot_work_is_named(options, x, quoted):
    model = MixtureScoreMatching(**{**QUICK, "steps": 2, **options})
    if quoted is None:
        model.fit(x)
        return
    with pytest.raises(InvalidInput, match=quoted):
        model.fit(x)


def test_nothing_works_before_fit_and_other_columns_are_named(fitted):
    for call in ("score_samples", "log_prob", "score"):
        with pytest.raises(InvalidInput, match="not fitted"):
            getattr(MixtureScoreMatching(), call)(rows(5))
    for call in ("sample", "mode_weights", "report", "blindness_check"):
        with pytest.raises(InvalidInput, match="not fitted"):
            getattr(MixtureScoreMatching(), call)()
    with pytest.raises(InvalidInput, match="3 columns"):
        fitted.score_samples(torch.zeros(4, 3))
    with pytest.raises(InvalidInput, match="index 7"):
        fitted.score_samples(with_nan())


# --- oracle 9


@pytest.mark.slow
def test_the_mixture_sees_the_weights_that_score_matching_misses(shapes_unchecked):
    seen, blind = [], []
    for seed in range(5):
        x = rows(10_000, seed)
        found = MixtureScoreMatching(hidden=32, seed=seed).fit(x)
        seen.append(found.mode_weights(TRUTH.means).weights[0].item())
        z = (x - x.mean(0)) / x.std(0)
        net = EnergyNet(1, hidden=32, base_scale=1.0, seed=seed)
        fit_energy(net, z, "sm", steps=1200, seed=seed)
        points, _ = grid()
        mass = net.double().log_prob((points - x.mean(0)) / x.std(0)).detach().softmax(0)
        blind.append(float(mass[points[:, 0] < 0].sum()))
    assert max(abs(w - 0.2) for w in seen) < 0.05, seen
    assert sum(abs(w - 0.2) > 0.05 for w in blind) >= 3, blind
