"""The same number."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.verifiers.numeric import Numeric


@pytest.mark.parametrize(
    ("reference", "completion", "value"),
    [
        ("42", "42", 1.0),
        (42, "42.0", 1.0),
        ("1234", "$1,234.00", 1.0),
        ("3/4", "0.75", 1.0),
        (Fraction(3, 4), "75%", 1.0),
        (0.1, "1/10", 1.0),
        ("50%", "0.5", 1.0),
        ("-5", "−5", 1.0),
        ("50%", "50", 0.0),
        ("50", "50%", 0.0),
        ("5", "-5", 0.0),
        ("1/3", "0.3333333333333333", 0.0),
        ("0.3", "0.30000000000000004", 0.0),
        ("9007199254740993", "9007199254740992", 0.0),  # equal as floats
        ("1e-300", "0", 0.0),
    ],
)
def test_numbers_are_compared_exactly(reference, completion, value, grade):
    score = grade(Numeric(), completion, reference)
    assert (score.value, score.parts) == (value, {"correct": value, "readable": 1.0})


@pytest.mark.parametrize(
    "completion", ["", "3 4", "2, 3, 4", "3 or 4", "3 apples", "x = 3", "12/4", "6/2", "12/4=3", "three"]
)
def test_listings_echoes_and_words_earn_nothing_and_are_told_from_wrong_numbers(completion, grade):
    score = grade(Numeric(), completion, "3")
    assert (score.value, score.parts) == (0.0, {"correct": 0.0, "readable": 0.0})


def test_tolerance_is_exact_and_includes_its_bound(grade):
    tenth = Numeric(tolerance=0.1)
    assert [grade(tenth, answer, "3").value for answer in ("3.1", "2.9", "3.1000000000000000001")] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf"), "wide"])
def test_a_tolerance_that_makes_no_sense_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a number of at least 0"):
        Numeric(tolerance)


@pytest.mark.parametrize("reference", ["many", "12/4", True, float("nan"), 10**200])
def test_an_unreadable_reference_is_ungraded(reference, grade):
    assert grade(Numeric(), "3", reference).error.startswith("unreadable reference: wanted a number")


def test_a_reference_too_long_for_python_to_write_is_ungraded(grade):
    assert "ValueError" in grade(Numeric(), "3", 10**5000).error


@settings(max_examples=50)
@given(st.one_of(st.integers(-(10**20), 10**20), st.fractions(max_denominator=1000)))
def test_every_gold_answer_is_accepted(gold):
    assert Numeric().grade(str(gold), str(gold)).value == 1.0
    assert Numeric().grade(str(gold), gold).value == 1.0
    assert Numeric().grade(str(gold + 1), gold).value == 0.0
