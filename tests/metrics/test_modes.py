import contextlib
import math

import jaxtyping
import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.metrics import (
    assign_modes,
    histogram_total_variation,
    label_ess,
    mode_flips,
    mode_weights,
    modes_found,
    total_variation,
)
from noisewise.typing import Cost


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def untyped():
    """As users run it: without the shape checks of the test suite, which would raise first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


MEANS = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 9.0]], dtype=torch.float64)


def test_weights_and_their_error_on_independent_draws():
    truth = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    labels = torch.multinomial(truth, 50 * 400, replacement=True, generator=generator()).reshape(50, 400)
    draws = MEANS[labels] + 0.5 * torch.randn(50, 400, 2, generator=generator(1), dtype=torch.float64)
    estimate = mode_weights(draws, MEANS)
    closed_form = (truth * (1 - truth) / labels.numel()).sqrt()
    assert ((estimate.weights - truth).abs() < 4 * closed_form).all()
    # a variance estimated from 50 means has relative error sqrt(2/49): 4 of these on the standard error
    assert ((estimate.se / closed_form - 1).abs() < 4 * math.sqrt(2 / 49) / 2).all()
    assert torch.equal(assign_modes(draws, MEANS), labels)
    pooled = mode_weights(draws.reshape(-1, 2), MEANS)
    torch.testing.assert_close(pooled.weights, estimate.weights)
    torch.testing.assert_close(pooled.se, (pooled.weights * (1 - pooled.weights) / labels.numel()).sqrt())
    assert [m.value for m in pooled.measurements()] == pooled.weights.tolist()


def test_error_sees_chains_that_never_move():
    stuck = MEANS[torch.tensor([0] * 7 + [1] * 3)][:, None].expand(10, 1000, 2)
    estimate = mode_weights(stuck, MEANS)
    assert estimate.weights.tolist() == pytest.approx([0.7, 0.3, 0.0])
    # ten independent labels, not ten thousand
    assert float(estimate.se[0]) == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    assert mode_weights(stuck[:1], MEANS).se is None


def test_a_callable_names_the_modes():
    draws = torch.randn(4, 100, 3, generator=generator())
    estimate = mode_weights(draws, lambda x: (x[:, 0] > 0).long(), modes=2)
    assert float(estimate.weights[1]) == pytest.approx(float((draws[..., 0] > 0).double().mean()))
    with pytest.raises(InvalidInput, match="modes is needed"):
        mode_weights(draws, lambda x: (x[:, 0] > 0).long())
    with pytest.raises(InvalidInput, match=r"label 2 is outside 0\.\.1"):
        mode_weights(draws, lambda x: torch.full((len(x),), 2), modes=2)
    with pytest.raises(InvalidInput, match="whole numbers"):
        mode_weights(draws, lambda x: x[:, 0], modes=2)


def test_mode_weights_names_what_does_not_fit():
    with untyped(), pytest.raises(InvalidInput, match=r"\[mode, 3\]"):
        mode_weights(torch.zeros(4, 3), MEANS)
    with untyped(), pytest.raises(InvalidInput, match="2 entries and q has 3"):
        total_variation(torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.3, 0.5]))
    with pytest.raises(InvalidInput, match="NaN"):
        mode_weights(torch.full((4, 2), math.nan), MEANS)


@pytest.mark.parametrize(
    ("p", "q", "value"),
    [
        ([0.3, 0.7], [0.3, 0.7], 0.0),
        ([1.0, 0.0], [0.0, 1.0], 1.0),
        ([0.5, 0.5, 0.0], [0.25, 0.25, 0.5], 0.5),
        ([0.2, 0.8], [0.5, 0.5], 0.3),
    ],
)
def test_total_variation_in_closed_form(p, q, value):
    assert total_variation(torch.tensor(p), torch.tensor(q)).value == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("bad", [[3.0, 7.0], [1.2, -0.2], [math.nan, 1.0]])
def test_total_variation_refuses_what_is_no_distribution(bad):
    with pytest.raises(InvalidInput, match="probabilities"):
        total_variation(torch.tensor(bad), torch.tensor([0.5, 0.5]))


def test_histograms_count_the_mass_outside():
    inside = torch.tensor([0.1, 0.2, 0.6, 0.7])
    # all of y lies outside: nothing in common, though no inner bin of y is filled
    assert histogram_total_variation(inside, inside + 5, 2, (0.0, 1.0)).value == 1.0
    assert histogram_total_variation(inside - 5, inside + 5, 2, (0.0, 1.0)).value == 1.0
    assert histogram_total_variation(inside + 7, inside + 5, 2, (0.0, 1.0)).value == 0.0
    half_outside = torch.tensor([0.1, 0.6, math.inf, 9.0])
    assert histogram_total_variation(inside, half_outside, 2, (0.0, 1.0)).value == 0.5


def test_histogram_edges_are_numpys():
    # the upper edge of the range belongs to the last bin, inner edges to the bin above
    x = torch.tensor([0.0, 0.5, 1.0])
    y = torch.tensor([0.25, 0.75, 0.9])
    assert histogram_total_variation(x, y, 2, (0.0, 1.0)).value == pytest.approx(0.0, abs=1e-15)


def test_histogram_in_two_dimensions_of_uniforms_is_the_area_not_shared():
    x = torch.rand(40_000, 2, generator=generator())
    y = torch.rand(40_000, 2, generator=generator(1))
    y[:, 0] = y[:, 0] * 0.5
    measured = histogram_total_variation(x, y, (4, 3), [(0.0, 1.0), (0.0, 1.0)])
    assert measured.value == pytest.approx(0.5, abs=4 * 12 * 0.5 * math.sqrt(1 / 12 / 40_000))
    with pytest.raises(InvalidInput, match="2 coordinates"):
        histogram_total_variation(x, y, (4, 3, 2), (0.0, 1.0))
    with pytest.raises(InvalidInput, match="low < high"):
        histogram_total_variation(x, y, 4, (1.0, 0.0))


def test_label_ess_of_independent_labels_is_their_number():
    labels = (torch.rand(400, 100, generator=generator()) < 0.3).long()
    ess = label_ess(labels)
    assert ess.value == pytest.approx(labels.numel(), abs=4 * ess.se)
    assert ess.se / ess.value == pytest.approx(math.sqrt(2 / 399))


def test_label_ess_of_a_sticky_two_state_chain():
    # stays with probability 1 - f: autocorrelation (1 - 2 f)^k, so ESS = n f / (1 - f) for long chains
    flip, chains, draws = 0.1, 400, 1000
    flips = torch.rand(chains, draws, generator=generator()) < flip
    start = torch.rand(chains, 1, generator=generator(1)) < 0.5
    labels = ((flips.cumsum(1) + start) % 2).long()
    ess = label_ess(labels)
    assert ess.value == pytest.approx(chains * draws * flip / (1 - flip), abs=4 * ess.se)
    flipped = mode_flips(labels)
    assert flipped.value == pytest.approx(flip * chains * (draws - 1), abs=4 * flipped.se)


def test_label_ess_of_stuck_chains():
    assert label_ess(torch.zeros(5, 100, dtype=torch.long)).value == 0
    assert label_ess(torch.tensor([[0] * 50] * 5 + [[1] * 50] * 5)).value == pytest.approx(9)


def test_rates_are_per_million_calls():
    labels = (torch.rand(20, 50, generator=generator()) < 0.5).long()
    for rate in (label_ess, mode_flips):
        assert rate(labels, cost=250_000).value == pytest.approx(4 * rate(labels).value)
        assert rate(labels, cost=Cost(gradients=200_000, energies=50_000)) == rate(labels, cost=250_000)
    with pytest.raises(InvalidInput, match="at least 2 chains"):
        label_ess(labels[:1])


def test_flips_and_modes_are_counted():
    labels = torch.tensor([[0, 0, 3, 3, 0], [1, 1, 1, 1, 1]])
    assert mode_flips(labels).value == 2
    found = modes_found(labels, 5)
    assert (found.value, found.floor, found.better) == (3, 5, "higher")
