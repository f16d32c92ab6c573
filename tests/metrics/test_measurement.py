import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisewise.errors import InvalidInput
from noisewise.metrics import Measurement, format_value


def test_reads_as_value_error_floor():
    assert str(Measurement(0.01234, 0.00041, floor=0.011)) == "0.0123 ± 0.0004 (floor 0.011)"
    assert str(Measurement(1234.5, 14.2, unit="kJ")) == "1234 ± 14 kJ"
    assert float(Measurement(0.25)) == 0.25


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (0.5, None, "0.5"),
        (1.23456, None, "1.235"),
        (21169.4, 428.0, "21169 ± 428"),
        (0.0217, 0.00013, "0.02170 ± 0.00013"),
        (1.2e-7, 3e-9, "(1.20 ± 0.03)e-07"),
        (40.0, 0.0, "40 ± 0"),
        (0.0, 0.02, "0.00 ± 0.02"),
        (0.7, 0.0098, "0.700 ± 0.010"),
        (math.nan, 0.1, "n/a"),
        (math.inf, None, "inf"),
    ],
)
def test_digits_follow_the_error(value, se, text):
    assert format_value(value, se) == text


numbers = st.none() | st.floats(min_value=0, allow_nan=False, allow_infinity=False)


@given(st.floats(allow_nan=False, allow_infinity=False), numbers, numbers, st.none() | st.integers(0, 10**9))
def test_survives_json(value, se, floor, n):
    measured = Measurement(value, se, floor, n, unit="nm", better="higher")
    text = json.dumps(measured.to_dict(), allow_nan=False)
    assert Measurement.from_dict(json.loads(text)) == measured


def test_what_is_not_finite_becomes_null_and_returns_as_nan_while_unknown_stays_unknown():
    entries = Measurement(math.inf, se=math.nan).to_dict()
    assert entries["value"] is None
    assert entries["se"] is None
    back = Measurement.from_dict(entries)
    assert math.isnan(back.value)
    assert math.isnan(back.se)
    assert back.floor is None


def test_refuses_what_no_measurement_can_be():
    with pytest.raises(InvalidInput, match=r"-0\.1"):
        Measurement(1.0, se=-0.1)
    with pytest.raises(InvalidInput, match="bigger"):
        Measurement(1.0, better="bigger")
    with pytest.raises(InvalidInput, match="-3"):
        Measurement(1.0, n=-3)
    with pytest.raises(InvalidInput, match="colour"):
        Measurement.from_dict({"value": 1.0, "colour": "red"})


def test_floor_is_filled_in():
    assert Measurement(2.0, 0.1).with_floor(1.5) == Measurement(2.0, 0.1, 1.5)
