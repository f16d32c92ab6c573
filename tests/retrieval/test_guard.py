"""The guard: what it leaves the black box for, what it does not, and how often it errs."""

import numpy as np
import pytest

from noisewise.errors import InvalidInput
from noisewise.retrieval.guard import Candidate, GuardReport, choose


def candidates(*shifts, n=100, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.3, 0.7, n)
    drawn = [base, *(base + shift + rng.normal(0, noise, n) for shift in shifts)]
    return [Candidate(f"c{index}", values) for index, values in enumerate(drawn)]


def test_a_clear_gain_leaves_the_black_box():
    report = choose(candidates(0.1))
    assert report.choice == "c1"
    assert report.rows[1].passed
    # mean - 1.645 se, by hand
    gain = candidates(0.1)[1].values - candidates(0.1)[0].values
    assert report.rows[1].lower == pytest.approx(gain.mean() - 1.645 * gain.std(ddof=1) / 10, abs=1e-4)


def test_the_simplest_within_one_error_of_the_best_is_taken():
    rng = np.random.default_rng(0)
    base, noise = rng.uniform(0.3, 0.6, 200), rng.normal(0, 0.02, (3, 200))
    noise -= noise.mean(1, keepdims=True)
    near = [
        Candidate("box", base), Candidate("simple", base + 0.1 + noise[0]), Candidate("complex", base + 0.1005 + noise[1])
    ]  # fmt: skip
    assert choose(near).choice == "simple"
    far = [*near[:2], Candidate("complex", base + 0.12 + noise[2])]
    assert choose(far).choice == "complex"


def test_no_candidate_that_is_no_better_passes_more_often_than_the_level_says():
    left = sum(choose(candidates(0.0, seed=seed)).choice != "c0" for seed in range(400))
    # 5 % of 400, and four standard errors
    assert left <= 20 + 4 * (400 * 0.05 * 0.95) ** 0.5
    assert left > 2
    worse = sum(choose(candidates(*[-0.03] * 6, seed=seed)).choice != "c0" for seed in range(200))
    assert worse <= 4


def test_the_false_alarm_it_states_is_the_one_it_has():
    stated = np.mean([choose(candidates(0.0, 0.0, 0.0, seed=seed)).false_alarm for seed in range(20)])
    seen = np.mean([choose(candidates(0.0, 0.0, 0.0, seed=seed)).choice != "c0" for seed in range(300)])
    assert stated == pytest.approx(seen, abs=0.045)


def test_few_queries_share_out_the_level():
    few = choose(candidates(0.1, n=12))
    assert few.corrected
    assert "shared out" in few.rule
    # however many were labelled, few were judged on
    assert choose(candidates(0.1, n=12), labelled=200).corrected
    assert choose(candidates(0.1, n=40), labelled=12).corrected
    assert not choose(candidates(0.1, n=40), labelled=200).corrected
    false = sum(choose(candidates(*[0.0] * 6, n=12, seed=seed)).choice != "c0" for seed in range(400))
    # a familywise 5 %
    assert false <= 20 + 4 * (400 * 0.05 * 0.95) ** 0.5


def test_a_reference_is_shown_and_not_chosen():
    box, best = candidates(0.2)
    report = choose([box, Candidate("two indexes", best.values, reference=True)])
    assert report.choice == "c0"
    assert report.rows[1].lower > 0


def test_equal_scores_keep_the_black_box():
    box, _ = candidates(0.1)
    report = choose([box, Candidate("the same", box.values)])
    assert report.choice == "c0"
    assert report.false_alarm == 0


def test_a_report_survives_json_and_prints_every_row():
    report = choose(candidates(0.1, 0.05), notes=("one note",))
    again = GuardReport.from_dict(report.to_dict())
    assert again == report
    for row in report.rows:
        assert row.name in str(report)
    assert "c1 *" in str(report)
    assert "one note" in str(report)


def test_values_of_different_queries_are_refused():
    with pytest.raises(InvalidInput, match=r"\(3,\), \(2,\)"):
        choose([Candidate("a", np.zeros(3)), Candidate("b", np.zeros(2))])
    with pytest.raises(InvalidInput, match="2 queries"):
        choose([Candidate("a", np.zeros(1))])
