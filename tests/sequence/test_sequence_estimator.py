"""The estimators follow scikit-learn, and predict by the merged model what the trained one says."""

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.model_selection import cross_val_score

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.sequence import SequenceClassifier, SequenceRegressor

SMALL = {"d_model": 8, "n_layers": 1, "kernel_size": 8, "epochs": 12, "batch_size": 16, "kernel_lr": 1e-2, "lr": 2e-2}


def waves(n=96, length=40, seed=0):
    generator = np.random.default_rng(seed)
    y = generator.integers(2, size=n)
    phase = 2 * math.pi * generator.random((n, 1))
    x = np.sin(np.arange(length) * (0.3 + 0.5 * y[:, None]) + phase)
    return 50 + 7 * (x + 0.3 * generator.normal(size=(n, length))), np.where(y == 1, "fast", "slow")


def ragged(x, seed=0):
    ends = np.random.default_rng(seed).integers(15, x.shape[1] + 1, size=len(x))
    return [row[:end] for row, end in zip(x, ends, strict=True)]


def test_classes_of_signals_and_what_is_kept(tmp_path):
    x, y = waves()
    found = SequenceClassifier(**SMALL).fit(x, y)
    other, truth = waves(seed=1)
    assert found.score(other, truth) > 0.95
    probability = found.predict_proba(other)
    assert np.allclose(probability.sum(1), 1, atol=1e-6)
    assert (found.classes_[probability.argmax(1)] == found.predict(other)).all()
    with torch.no_grad():
        plain = found.model_((torch.tensor(other).float().unsqueeze(1) - found.mean_) / found.scale_).softmax(-1)
    assert np.allclose(probability, plain.numpy(), atol=1e-5)
    again = SequenceClassifier.load(found.save(tmp_path))
    assert np.array_equal(again.predict_proba(other), probability)
    assert again.get_params() == found.get_params()
    assert list(again.classes_) == ["fast", "slow"]
    with pytest.raises(RunFolderError, match="SequenceClassifier"):
        SequenceRegressor.load(tmp_path)


def test_signals_of_unequal_length_are_predicted_as_alone():
    x, y = waves()
    found = SequenceClassifier(**SMALL).fit(ragged(x), y)
    rows = ragged(waves(20, seed=1)[0])
    together = found.predict_proba(rows)
    alone = np.concatenate([found.predict_proba([row]) for row in rows])
    assert np.allclose(together, alone, atol=1e-5)
    assert found.score(rows, waves(20, seed=1)[1]) > 0.8


def test_channels_are_standardised_by_the_rows_that_train():
    x, y = waves()
    stacked = np.stack([x, np.full_like(x, 3.0), -x], 1)
    rows = [row[:, :30] if index % 2 else row for index, row in enumerate(stacked)]
    found = SequenceClassifier(**SMALL | {"epochs": 1, "validation": 0.25}).fit(rows, y)
    kept = torch.randperm(96, generator=torch.Generator().manual_seed(0))[24:].tolist()
    joined = np.concatenate([rows[index] for index in kept], 1)
    assert np.allclose(found.mean_[:, 0], joined.mean(1), rtol=1e-5)
    assert np.allclose(found.scale_[[0, 2], 0], joined.std(1)[[0, 2]], rtol=1e-5)
    assert float(found.scale_[1]) == 1.0


def test_numbers_of_signals_on_any_scale(tmp_path):
    x, y = waves()
    numbers = np.stack([1e3 + 20.0 * (y == "fast"), x.mean(1)], 1)
    found = SequenceRegressor(**SMALL).fit(x, numbers)
    other, truth = waves(seed=1)
    wanted = 1e3 + 20.0 * (truth == "fast")
    predicted = found.predict(other)
    assert predicted.shape == (96, 2)
    assert 1 - ((predicted[:, 0] - wanted) ** 2).mean() / wanted.var() > 0.8
    assert np.array_equal(SequenceRegressor.load(found.save(tmp_path)).predict(other), predicted)
    single = SequenceRegressor(**SMALL).fit(x, numbers[:, 0])
    assert single.predict(other).shape == (96,)
    assert single.score(other, wanted) > 0.8


def test_they_are_estimators_of_scikit_learn():
    x, y = waves(48)
    estimator = SequenceClassifier(**SMALL | {"epochs": 6})
    copied = clone(estimator.set_params(d_model=6))
    assert copied.get_params() == estimator.get_params()
    assert is_classifier(copied)
    assert is_regressor(SequenceRegressor())
    assert cross_val_score(copied, x, y, cv=2).shape == (2,)
    first, second = (clone(copied).fit(x, y).predict_proba(x) for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("form", [list, lambda rows: np.array(rows, dtype=object)])
def test_unequal_rows_are_cross_validated_at_one_length(form):
    x, y = waves(48)
    rows = [row[:15] for row in x]
    # the only long row is in one fold, so that the other one's model never saw its length
    rows[0] = x[0]
    quick = {**SMALL, "epochs": 6}
    assert np.isfinite(cross_val_score(SequenceClassifier(**quick, length=40), form(rows), y, cv=2)).all()
    with pytest.raises(InvalidInput, match=r"row 0 of X has 40 steps.* fit had 15.*length=40"):
        cross_val_score(SequenceClassifier(**quick), form(rows), y, cv=2, error_score="raise")


@pytest.mark.parametrize("estimator", [SequenceClassifier, SequenceRegressor])
def test_longer_rows_are_cut_to_the_length_that_was_asked_for(estimator, tmp_path):
    x, y = waves(32)
    y = (y == "fast").astype(int)
    rows, cut = ragged(x), [row[:20] for row in ragged(x)]
    quick = {**SMALL, "epochs": 1}
    found, same = estimator(**quick, length=20).fit(rows, y), estimator(**quick).fit(cut, y)
    assert found.model_.length == same.model_.length == 20
    assert np.array_equal(found.predict(rows), same.predict(cut))
    assert np.array_equal(found.predict(x), same.predict(x[:, :20]))
    again = estimator.load(found.save(tmp_path))
    assert np.array_equal(again.predict(rows), found.predict(rows))
    # and more room than any row needs
    assert estimator(**quick, length=60).fit(rows, y).model_.length == 60


def test_whole_numbers_are_classes_of_any_type():
    x, y = waves(32)
    quick = SequenceClassifier(**SMALL | {"epochs": 1})
    whole = 1 + (y == "fast").astype(int)
    by_float = quick.fit(x, whole.astype(float)).predict(x)
    assert by_float.dtype == float
    assert np.array_equal(by_float, clone(quick).fit(x, whole).predict(x))


def test_bad_input_is_named(shapes_unchecked):
    x, y = waves(20)
    bad = x.copy()
    bad[4, 3] = math.inf
    quick = SequenceClassifier(**SMALL | {"epochs": 1})
    cases = [
        (lambda: quick.predict(x), "not fitted yet"),
        (lambda: quick.save("nowhere"), "nothing to save"),
        (lambda: quick.fit(bad, y), "first is row 4"),
        (lambda: quick.fit(x, np.full(20, "slow")), "one class only"),
        (lambda: quick.fit(x, np.zeros(20)), r"one class only \(\[0\.0\]\)"),
        (lambda: quick.fit(x, np.arange(20) / 2), "y holds 0.5, .*SequenceRegressor"),
        (lambda: quick.fit(x, np.where(y == "fast", np.nan, 1.0)), "y holds nan"),
        (lambda: quick.fit(x, np.array([None, "slow"] * 10, dtype=object)), "cannot be sorted"),
        (lambda: quick.fit([*x[:19], ["a", "b"]], y), "row 19 of X must hold numbers: .*'a'"),
        (lambda: quick.fit([*x[:19], 3.0], y), "row 19 of X has shape"),
        (lambda: SequenceClassifier(length=2.5).fit(x, y), "length must be a whole number, got 2.5"),
        (lambda: SequenceRegressor(**SMALL).fit(x, y), "y must hold numbers: .*'(slow|fast)'"),
        (lambda: SequenceRegressor(**SMALL).fit(x, np.array([{}] * 20)), "y must hold numbers: "),
        (lambda: quick.fit(x, y[:9]), "20 rows, y has 9"),
        (lambda: quick.fit([row[:0] for row in x], y), "row 0 of X"),
        (lambda: quick.fit(x[0], y), r"shape \(40,\)"),
        (lambda: SequenceRegressor(**SMALL).fit(x, np.full(20, np.nan)), "row 0"),
        (lambda: SequenceRegressor(**SMALL, label_smoothing=0.1).fit(x, np.arange(20.0)), "label_smoothing"),
        (lambda: quick.fit(x, y).predict(np.stack([x, x], 1)), "2 channels, the model was fitted on 1"),
        (lambda: quick.predict(np.concatenate([x, x], 1)), "80 steps"),
    ]
    for call, message in cases:
        with pytest.raises(InvalidInput, match=message):
            call()
