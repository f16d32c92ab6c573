import math

import pytest
import scipy.stats
import torch

from noisewise.errors import InvalidInput
from noisewise.metrics import paired_difference


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_agrees_with_scipy(confidence):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(7, generator=generator, dtype=torch.float64)
    b = a + 0.1 * torch.randn(7, generator=generator, dtype=torch.float64)
    expected = scipy.stats.ttest_rel(a.numpy(), b.numpy())
    low, high = expected.confidence_interval(confidence)
    pair = paired_difference(a, b, confidence=confidence)
    assert (pair.low, pair.high) == pytest.approx((low, high), rel=1e-10)
    assert pair.mean / pair.se == pytest.approx(expected.statistic, rel=1e-10)
    assert (pair.better is None) == (expected.pvalue > 1 - confidence)


def test_verdict_only_where_the_interval_excludes_zero():
    small, large = [1.0, 1.1, 0.9], [2.0, 2.2, 1.9]
    assert paired_difference(small, large).better == "a"
    assert paired_difference(large, small).better == "b"
    assert paired_difference(small, large, better="higher").better == "b"
    assert paired_difference([1.0, 3.0], [2.0, 2.1]).better is None
    assert paired_difference([1.0], [9.0]).better is None


def test_pairing_removes_what_seeds_share():
    seeds = [0.0, 100.0, 200.0, 300.0]
    pair = paired_difference([s + 1 + 0.01 * i for i, s in enumerate(seeds)], seeds)
    assert pair.se < 0.01
    assert pair.better == "b"


def test_one_pair_has_no_interval():
    pair = paired_difference([1.0], [0.5])
    assert math.isnan(pair.se)
    assert (pair.low, pair.high) == (-math.inf, math.inf)
    assert str(pair) == "+0.5 (one pair)"


def test_reads_with_the_digits_of_its_interval():
    pair = paired_difference([0.06, 0.0612, 0.0587], [0.0, 0.0, 0.0])
    assert str(pair) == "+0.0600 [0.0569, 0.0631]"


def test_refuses_what_cannot_be_paired():
    with pytest.raises(InvalidInput, match="2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(InvalidInput, match="0 and 0"):
        paired_difference([], [])
    with pytest.raises(InvalidInput, match="nan"):
        paired_difference([math.nan], [1.0])
    with pytest.raises(InvalidInput, match=r"1\.0"):
        paired_difference([1.0], [1.0], confidence=1.0)
