"""The same text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.verifiers.exact import Exact


@pytest.mark.parametrize(
    ("reference", "completion", "value"),
    [
        ("Paris", "Paris", 1.0),
        ("Paris", "  Paris\n", 1.0),
        (" Paris ", "Paris", 1.0),
        (42, "42", 1.0),
        ("Paris", "paris", 0.0),
        ("Paris", "Paris.", 0.0),
        ("a b", "a  b", 0.0),
        ("Paris", "", 0.0),
        ("é", "e\u0301", 0.0),  # code points, not looks
    ],
)
def test_table(reference, completion, value, grade):
    score = grade(Exact(), completion, reference)
    assert (score.value, score.parts) == (value, {"correct": value})


@pytest.mark.parametrize(
    "completion", ["Paris London Rome", "ParisParis", "Pari", "The answer is Paris", "Paris" * 1000]
)
def test_holding_the_answer_or_a_part_of_it_earns_nothing(completion, grade):
    assert grade(Exact(), completion, "Paris").value == 0.0


def test_case_is_ignored_on_request(grade):
    assert grade(Exact(ignore_case=True), "STRASSE", "straße").value == 1.0
    assert grade(Exact(ignore_case=True), "Rome", "Paris").value == 0.0


@settings(max_examples=50)
@given(st.text(min_size=1).filter(str.strip))
def test_every_gold_answer_is_accepted(gold):
    assert Exact().grade(gold, gold).value == 1.0
