"""Reading numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.verifiers.number import read_number

NO_NUMBERS = """
- . $ % five 1,23 12,34,567 0,123 ,123 1,,234 1,234, 1.2.3 5.. --5 5- 50%% 3/4% $3/4 3/0 0/0 /4 3/ 1/2/3 12/4 6/8 4/1
03/4 0x10 1_000 ٤٢ ½ nan inf -infinity 1e e5 1e99999 1e999999999 2**3 4j"""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("42", 42),
        ("007", 7),
        (" 42\n", 42),
        ("42.", 42),
        ("-2", -2),
        ("−2", -2),
        ("+7", 7),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("1,234", 1234),
        ("1,234,567.89", Fraction(123456789, 100)),
        ("$5.00", 5),
        ("-$5", -5),
        ("€1,000", 1000),
        ("50%", Fraction(1, 2)),
        ("12.5 %", Fraction(1, 8)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("+3/4.", Fraction(3, 4)),
        ("1e3", 1000),
        ("1.5E-3", Fraction(3, 2000)),
        ("1e+22", 10**22),
        ("9" * 99, 10**99 - 1),
    ],
)
def test_what_is_a_number(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text", [*NO_NUMBERS.split(), "", " ", "4 apples", "4 2", "41, 42", "3 / 4", "5 $", "1\n2", "9" * 101, "0" * 10_000]
)
def test_what_is_none(text):
    assert read_number(text) is None


@settings(max_examples=100)
@given(st.integers(-(10**30), 10**30))
def test_integers_survive_being_written(number):
    for text in (
        str(number),
        f"{number:,}",
        f"{number:+}",
        f"{number}.",
        f"{number}.00",
        f"{number}e0",
        f"{number}00%",
    ):
        assert read_number(text) == number


@settings(max_examples=100)
@given(st.fractions(max_denominator=10**9))
def test_fractions_survive_being_written(number):
    assert read_number(str(number)) == number


@settings(max_examples=100)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_the_decimal_that_it_shows(number):
    assert read_number(str(number)) == Fraction(str(number))
