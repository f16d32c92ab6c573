"""Readers of sequences: what is written in a form that other libraries know comes back as it was."""

import importlib.util
import io
import struct
import wave

import numpy as np
import pytest
from scipy.io import wavfile

from noisewise.errors import InvalidInput, MissingExtra, NoisewiseWarning
from noisewise.sequence import listops
from noisewise.sequence.readers import read_sequences

needs_aeon = pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="needs noisewise[timeseries]")


def signals(n=6, *shape):
    return np.random.default_rng(0).normal(size=(n, *shape)).astype(np.float32)


def saved(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


# --- .npz


@pytest.mark.parametrize("shape", [(9,), (1, 9), (3, 9)])
def test_signals_come_back_with_their_labels(tmp_path, shape):
    X, y = signals(6, *shape), np.array(["yes", "no", "yes", "no", "yes", "maybe"])
    found = read_sequences(saved(tmp_path, X=X, y=y))
    assert np.array_equal(found.X, X.reshape(6, -1, 9))
    assert found.classes == ("maybe", "no", "yes")
    assert [found.classes[place] for place in found.y] == y.tolist()
    assert (found.lengths == 9).all()
    assert (found.groups, found.rate, found.cut.any(), found.tokens) == (None, None, False, False)


def test_rows_are_cut_and_filled_to_one_length(tmp_path):
    X, lengths = signals(6, 2, 9), np.array([9, 5, 7, 1, 9, 3])
    path = saved(tmp_path, X=X, y=np.arange(6) % 2, lengths=lengths)
    found = read_sequences(path)
    for row, end in enumerate(lengths):
        assert np.array_equal(found.X[row, :, :end], X[row, :, :end])
        assert not found.X[row, :, end:].any()
    short = read_sequences(path, length=6)
    assert short.X.shape == (6, 2, 6)
    assert np.array_equal(short.X, found.X[..., :6])
    assert short.lengths.tolist() == [6, 5, 6, 1, 6, 3]
    assert short.cut.tolist() == (lengths > 6).tolist()
    assert short.rows(np.array([1, 2])).cut.tolist() == [False, True]
    long = read_sequences(path, length=20)
    assert np.array_equal(long.X[..., :9], found.X)
    assert (long.X.shape, long.cut.any(), long.lengths.tolist()) == ((6, 2, 20), False, lengths.tolist())


def test_classes_are_in_the_order_of_numbers_and_known_ones_keep_theirs(tmp_path):
    X = signals(4, 5)
    path = saved(tmp_path, X=X, y=np.array([10.0, 9.0, 2.0, 10.0]))
    found = read_sequences(path)
    assert found.classes == ("2", "9", "10")
    assert found.y.tolist() == [2, 1, 0, 2]
    known = read_sequences(path, classes=("10", "1", "9", "2"))
    assert (known.classes, known.y.tolist()) == (("10", "1", "9", "2"), [0, 2, 3, 0])
    with pytest.raises(InvalidInput, match="labels that the model does not know: 9; it knows 10, 2"):
        read_sequences(path, classes=("10", "2"))
    # a model is measured on rows of a single class, it is not fitted on them
    one = saved(tmp_path, X=X, y=np.full(4, 2))
    assert read_sequences(one, classes=("1", "2")).y.tolist() == [1, 1, 1, 1]
    with pytest.raises(InvalidInput, match=r"all 4 rows of .* have the label '2': at least two classes"):
        read_sequences(one)


def test_values_are_read_for_regression(tmp_path):
    path = saved(tmp_path, X=signals(3, 5), y=np.array([0.5, -2.0, 3.25]))
    found = read_sequences(path, task="regression")
    assert (found.y.tolist(), found.classes, found.y.dtype) == ([0.5, -2.0, 3.25], (), np.float32)
    with pytest.raises(InvalidInput, match=r"the label of row 0 .* is 0.5: .*task='regression' \(--task regression\)"):
        read_sequences(path)
    with pytest.raises(InvalidInput, match=r"the label of row 1 .* is nan"):
        read_sequences(saved(tmp_path, X=signals(3, 5), y=np.array([0.5, np.nan, 3.25])), task="regression")
    with pytest.raises(InvalidInput, match=r"labels of .* are no numbers"):
        read_sequences(saved(tmp_path, X=signals(2, 5), y=np.array(["a", "b"])), task="regression")
    for y in (np.array([1j, 2]), np.array(["2020-01-01", "2020-01-02"], "datetime64[D]")):
        with pytest.raises(InvalidInput, match=rf"are no numbers, as regression needs: they are {y.dtype.name[:8]}"):
            read_sequences(saved(tmp_path, X=signals(2, 5), y=y), task="regression")


def test_sequences_end_to_end_are_taken_apart_at_their_offsets(tmp_path):
    audio = np.arange(-10, 20, dtype=np.int16) * 1000
    digit, speaker = np.array([1, 0, 1], np.int8), np.array(["ann", "bob", "ann"])
    path = saved(tmp_path, audio=audio, offsets=np.array([0, 7, 8, 30]), digit=digit, speaker=speaker, rate=8000)
    found = read_sequences(path, label="digit", group="speaker")
    assert found.X.shape == (3, 1, 22)
    assert found.lengths.tolist() == [7, 1, 22]
    for row, (begin, end) in enumerate([(0, 7), (7, 8), (8, 30)]):
        assert np.array_equal(found.X[row, 0, : end - begin], audio[begin:end].astype(np.float32) / 32768)
        assert not found.X[row, 0, end - begin :].any()
    assert (found.y.tolist(), found.groups.tolist(), found.rate) == ([1, 0, 1], ["ann", "bob", "ann"], 8000)
    kept = found.rows(found.groups == "ann")
    assert (len(kept), kept.lengths.tolist(), kept.groups.tolist()) == (2, [7, 22], ["ann", "ann"])
    with pytest.raises(InvalidInput, match=r"has no column 'word' with a label for .*value for each: digit, speaker"):
        read_sequences(path, label="word")
    with pytest.raises(InvalidInput, match=r"has no column 'y' .*: digit, speaker"):
        read_sequences(path)


def test_whole_numbers_are_symbols_unless_they_are_said_to_be_samples(tmp_path):
    codes, values, lengths = listops.arrays(20, 10, 30, 4, 4, seed=1)
    path = saved(tmp_path, X=codes, y=values, lengths=lengths)
    found = read_sequences(path)
    assert found.tokens
    assert np.array_equal(found.X[:, : found.X.shape[1]], codes[:, : lengths.max()])
    assert np.array_equal(found.lengths, lengths)
    flat = np.concatenate([row[:end] for row, end in zip(codes, lengths, strict=True)])
    ragged = read_sequences(
        saved(tmp_path, symbols=flat, offsets=np.concatenate([[0], lengths.cumsum()]), label=values)
    )
    assert np.array_equal(ragged.X, found.X)
    path = saved(tmp_path, X=codes, y=values, lengths=lengths)
    assert read_sequences(path, tokens=False).X.shape == (20, 1, lengths.max())
    with pytest.raises(InvalidInput, match="neither a rate nor channels: leave out rate and mono"):
        read_sequences(path, rate=100)
    with pytest.raises(InvalidInput, match=r"X of .* is no array .* of symbols: float32"):
        read_sequences(saved(tmp_path, X=signals(4, 5), y=np.arange(4)), tokens=True)


def test_a_sine_stays_a_sine_at_another_rate(tmp_path):
    t = np.arange(800) / 8000
    X = np.stack([np.sin(2 * np.pi * f * t) for f in (200, 310)]).astype(np.float32)
    found = read_sequences(saved(tmp_path, X=X, y=np.arange(2), rate=8000), rate=4000)
    assert (found.X.shape, found.rate) == ((2, 1, 400), 4000)
    # its ends see the zeros outside
    np.testing.assert_allclose(found.X[:, 0, 40:-40], X[:, ::2][:, 40:-40], atol=5e-3)
    with pytest.raises(InvalidInput, match="does not say its samples a second"):
        read_sequences(saved(tmp_path, X=X, y=np.arange(2)), rate=4000)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"Z": np.zeros(3)}, "holds Z; needed are X and y"),
        ({"X": np.zeros((3, 2, 2, 2)), "y": np.arange(3)}, r"X of .* is float64 of shape \(3, 2, 2, 2\)"),
        ({"X": np.zeros((3, 0)), "y": np.arange(3)}, r"shape \(3, 0\)"),
        ({"X": np.array([["a"], ["b"]]), "y": np.arange(2)}, r"X of .* is <U1"),
        ({"X": np.zeros((3, 5)), "y": np.arange(2)}, "has no column 'y' with a label for each row; .*: none"),
        ({"X": np.zeros((3, 5)), "y": np.arange(3), "lengths": np.array([1, 2, 6])}, "whole numbers in 1 to 5, .*1 to 6"),
        ({"X": np.zeros((3, 5)), "y": np.arange(3), "lengths": np.array([1, 2])}, r"3 whole numbers .* shape \(2,\)"),
        ({"a": np.zeros(9), "offsets": np.array([0, 4, 8]), "y": np.arange(2)}, "offsets up to 8, and no one-dim.*: a, offsets"),
        ({"a": np.zeros(9), "b": np.zeros(9), "offsets": np.array([0, 4, 9]), "y": np.arange(2)}, "and 2 one-dim.*: a, b"),
        ({"a": np.zeros(9), "offsets": np.array([0, 4, 4, 9]), "y": np.arange(3)}, "row 1 runs from 4 to 4"),
        ({"a": np.zeros(9), "offsets": np.array([1, 4, 9]), "y": np.arange(2)}, "must begin with 0"),
        ({"a": np.zeros(9), "offsets": np.array([0.0, 9.0]), "y": np.arange(1)}, r"n \+ 1 whole numbers, got float64"),
    ],
)  # fmt: skip
def test_arrays_of_another_form_are_refused_by_what_they_are(tmp_path, arrays, said):
    with pytest.raises(InvalidInput, match=said):
        read_sequences(saved(tmp_path, **arrays))


def test_nan_is_refused_by_its_row_and_column(tmp_path):
    X = signals(6, 2, 9)
    X[4, 1, 7] = np.nan
    X[5, 0, 0] = np.inf
    with pytest.raises(InvalidInput, match=r"2 of 6 rows .* the first in row 4, column 7 \(channel 1\)"):
        read_sequences(saved(tmp_path, X=X, y=np.arange(6)))
    # behind the end of a row nothing is read
    lengths = np.array([9, 9, 9, 9, 7, 9])
    X[5] = 0
    assert np.isfinite(read_sequences(saved(tmp_path, X=X, y=np.arange(6), lengths=lengths)).X).all()


def test_files_that_are_none_are_refused_and_no_pickle_is_read(tmp_path):
    with pytest.raises(InvalidInput, match="there is no file or folder"):
        read_sequences(tmp_path / "absent.npz")
    (tmp_path / "table.csv").write_text("1,2\n")
    with pytest.raises(InvalidInput, match="is not known by its ending"):
        read_sequences(tmp_path / "table.csv")
    whole = saved(tmp_path, X=signals(6, 50), y=np.arange(6)).read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2], whole[:40]):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(InvalidInput, match=r"cannot be read as an .npz file"):
            read_sequences(tmp_path / "cut.npz")
    np.savez(tmp_path / "objects.npz", X=np.array([[1], [1, 2]], object), y=np.arange(2))
    np.savez(tmp_path / "mixed.npz", X=signals(2, 5), y=np.array(["yes", 1], object))
    for name, column in (("objects", "X"), ("mixed", "y")):
        with pytest.raises(InvalidInput, match=rf"column '{column}' of .* holds Python objects") as refused:
            read_sequences(tmp_path / f"{name}.npz")
        assert "pickle" not in str(refused.value)
    with pytest.raises(InvalidInput, match="task must be one of classification, regression, got 'forecast'"):
        read_sequences(tmp_path / "cut.npz", task="forecast")


# --- WAV


def recorded(folder, name, rate, samples):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples)


def test_a_folder_of_recordings_has_a_class_for_each_folder(tmp_path):
    rng = np.random.default_rng(0)
    made = {
        f"{word}/{i}.wav": rng.integers(-999, 999, 20 + i).astype(np.int16) for word in ("no", "yes") for i in range(3)
    }
    for name, samples in made.items():
        recorded(tmp_path, name, 8000, samples)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "no" / "notes.txt").write_text("")
    found = read_sequences(tmp_path)
    assert (found.classes, found.y.tolist(), found.rate) == (("no", "yes"), [0, 0, 0, 1, 1, 1], 8000)
    for row, samples in enumerate(made.values()):
        assert np.array_equal(found.X[row, 0, : len(samples)], samples.astype(np.float32) / 32768)
    assert found.lengths.tolist() == [20, 21, 22] * 2


def test_a_class_is_the_first_folder_however_deep_its_files_and_hidden_ones_are_none(tmp_path):
    for value, name in enumerate(("no/a/b/1.wav", "no/2.wav", "yes/ann/1.wav", "yes/bob/1.wav"), 1):
        recorded(tmp_path, name, 8000, np.full(9, value, np.int16))
    for hidden in ("no/._2.wav", "yes/.trash/1.wav", ".git/no/1.wav"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(b"Mac OS X")
    found = read_sequences(tmp_path)
    assert [found.classes[place] for place in found.y] == ["no", "no", "yes", "yes"]
    assert (32768 * found.X[:, 0, 0]).tolist() == [2, 1, 3, 4]
    assert found.names.tolist() == [
        str(tmp_path / f"{name}.wav") for name in ("no/2", "no/a/b/1", "yes/ann/1", "yes/bob/1")
    ]


def test_rows_without_labels_are_the_same_rows(tmp_path):
    X, lengths = signals(4, 9), np.array([9, 3, 5, 7])
    with_labels = read_sequences(saved(tmp_path, X=X, lengths=lengths, y=np.arange(4) % 2))
    found = read_sequences(saved(tmp_path, X=X, lengths=lengths), labelled=False)
    assert np.array_equal(found.X, with_labels.X)
    assert (found.y.tolist(), found.names.tolist()) == ([-1] * 4, ["0", "1", "2", "3"])
    assert np.isnan(read_sequences(tmp_path / "data.npz", labelled=False, task="regression").y).all()
    for name in ("1.wav", "b/c/2.wav", "._1.wav"):
        recorded(tmp_path / "clips", name, 8000, np.ones(9, np.int16))
    found = read_sequences(tmp_path / "clips", labelled=False)
    assert found.names.tolist() == [str(tmp_path / "clips" / name) for name in ("1.wav", "b/c/2.wav")]
    assert (found.full_scale, with_labels.full_scale) == (True, False)
    one = read_sequences(tmp_path / "clips" / "1.wav", labelled=False)
    assert (len(one), one.X[0, 0, 0]) == (1, np.float32(1 / 32768))
    with pytest.raises(InvalidInput, match="is not known by its ending"):
        read_sequences(tmp_path / "clips" / "1.wav")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no WAV files$"):
        read_sequences(tmp_path / "empty", labelled=False)


def in_24_bits(samples):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 3, 8000, 0, "NONE", ""))
        writer.writeframes(b"".join(struct.pack("<i", int(s))[:3] for s in samples))
    return file.getvalue()


def test_every_width_of_samples_gives_the_same_signal(tmp_path):
    signal = np.round(128 * np.sin(np.arange(50) / 3) * 0.9) / 128
    recorded(tmp_path, "a/8.wav", 8000, (signal * 128 + 128).astype(np.uint8))
    recorded(tmp_path, "a/16.wav", 8000, (signal * 2**15).astype(np.int16))
    (tmp_path / "a" / "24.wav").write_bytes(in_24_bits(signal * 2**23))
    recorded(tmp_path, "b/32.wav", 8000, (signal * 2**31).astype(np.int32))
    recorded(tmp_path, "b/float.WAV", 8000, signal.astype(np.float32))
    recorded(tmp_path, "b/double.wav", 8000, signal)
    found = read_sequences(tmp_path)
    assert len(found) == 6
    np.testing.assert_allclose(found.X[:, 0], np.tile(signal, (6, 1)), atol=1e-7)


def test_stereo_is_two_channels_or_their_mean(tmp_path):
    both = signals(2, 30, 2)
    for word, samples in zip(("a", "b"), both, strict=True):
        recorded(tmp_path, f"{word}/x.wav", 8000, samples)
    assert np.array_equal(read_sequences(tmp_path).X, both.swapaxes(1, 2))
    np.testing.assert_allclose(read_sequences(tmp_path, mono=True).X[:, 0], both.mean(-1), rtol=1e-6)
    recorded(tmp_path, "b/y.wav", 8000, both[0, :, 0])
    with pytest.raises(
        InvalidInput, match=r"b/y.wav has 1 channels, .*a/x.wav has 2: take their mean with mono=True \(--mono\)"
    ):
        read_sequences(tmp_path)
    assert read_sequences(tmp_path, mono=True).X.shape == (3, 1, 30)


def test_rates_must_agree_or_are_made_to(tmp_path):
    for rate in (8000, 16000, 11025):
        recorded(
            tmp_path, f"{rate}/x.wav", rate, np.sin(2 * np.pi * 300 * np.arange(rate // 10) / rate).astype(np.float32)
        )
    with pytest.raises(
        InvalidInput,
        match=r"16000/x.wav has 16000 samples a second, .*11025/x.wav has 11025: .*rate=8000 \(--rate 8000\)",
    ):
        read_sequences(tmp_path)
    found = read_sequences(tmp_path, rate=8000)
    assert found.rate == 8000
    assert found.resampled == (11025, 16000)
    assert found.lengths.tolist() == [800, 800, 800]
    sine = np.sin(2 * np.pi * 300 * np.arange(800) / 8000)
    np.testing.assert_allclose(found.X[:, 0, 100:700], np.tile(sine[100:700], (3, 1)), atol=0.01)
    assert found.classes == ("8000", "11025", "16000")


def test_recordings_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(InvalidInput, match="holds no WAV files in folders named by their class"):
        read_sequences(tmp_path)
    recorded(tmp_path, "x.wav", 8000, np.zeros(9, np.int16))
    with pytest.raises(InvalidInput, match=r"those in .* itself have no class"):
        read_sequences(tmp_path)
    recorded(tmp_path, "a/x.wav", 8000, np.ones(90, np.int16))
    with (
        pytest.warns(
            NoisewiseWarning, match=r"1 WAV files in .* itself, such as x.wav, have no class and are left out"
        ),
        pytest.raises(InvalidInput, match=r"all 1 rows of .* have the label 'a'"),
    ):
        read_sequences(tmp_path)
    (tmp_path / "x.wav").unlink()
    recorded(tmp_path, "b/x.wav", 8000, np.array([0, 1, np.nan, 2], np.float32))
    with pytest.raises(InvalidInput, match=r"1 of 2 rows .*b/x.wav, column 2 \(channel 0\)"):
        read_sequences(tmp_path)
    whole = (tmp_path / "a" / "x.wav").read_bytes()
    for end in (0, 10, 30, 44, 100):
        (tmp_path / "b" / "x.wav").write_bytes(whole[:end])
        with pytest.raises(InvalidInput, match=r"b/x.wav' cannot be read as a WAV file"):
            read_sequences(tmp_path)
    recorded(tmp_path, "b/x.wav", 8000, np.zeros(0, np.int16))
    with pytest.raises(InvalidInput, match=r"b/x.wav' (holds no samples|cannot be read)"):
        read_sequences(tmp_path)
    with pytest.raises(InvalidInput, match=r"group 'speaker' names a column of an .npz file"):
        recorded(tmp_path, "b/x.wav", 8000, np.ones(9, np.int16))
        read_sequences(tmp_path, group="speaker")


# --- .ts

EQUAL = """@problemName Two
@timeStamps false
@missing false
@univariate true
@equalLength true
@seriesLength 4
@classLabel true up down
@data
1.0,2.0,3.0,4.5:up
4.0,3.0,2.0,1.0:down
"""
UNEQUAL = (
    EQUAL.replace("univariate true", "univariate false\n@dimensions 2")
    .replace("equalLength true", "equalLength false")
    .replace("@seriesLength 4\n", "")
    .partition("@data")[0]
    + "@data\n1,2,3:4,5,6:up\n9,8:7,6:down\n"
)


@needs_aeon
def test_archives_of_series_are_read_whole_and_ragged(tmp_path):
    path = tmp_path / "Two_TRAIN.ts"
    path.write_text(EQUAL)
    found = read_sequences(path)
    assert found.X[:, 0].tolist() == [[1, 2, 3, 4.5], [4, 3, 2, 1]]
    assert [found.classes[place] for place in found.y] == ["up", "down"]
    path.write_text(UNEQUAL)
    found = read_sequences(path)
    assert found.X.tolist() == [[[1, 2, 3], [4, 5, 6]], [[9, 8, 0], [7, 6, 0]]]
    assert found.lengths.tolist() == [3, 2]
    path.write_text(EQUAL.replace("4.5", "four"))
    with pytest.raises(InvalidInput, match=r"cannot be read as a .ts file: .*'four'"):
        read_sequences(path)
    path.write_text("nonsense")
    with pytest.raises(InvalidInput, match="holds no rows"):
        read_sequences(path)


@pytest.mark.skipif(importlib.util.find_spec("aeon") is not None, reason="aeon is installed")
def test_without_aeon_the_pip_line_is_given(tmp_path):
    (tmp_path / "x.ts").write_text(EQUAL)
    with pytest.raises(MissingExtra, match=r"pip install 'noisewise\[timeseries\]'"):
        read_sequences(tmp_path / "x.ts")
