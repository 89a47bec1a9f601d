"""The last number of a text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.verifiers.last_number import LastNumber

OPERANDS = r"""
10*18
10 * 18
10**18
x*18
2x * 18
10×18
10·18
10 \times 18
10\cdot18
2 * (18)
3(4)*18
2^18
2^{18}
2^-18
18 m^18
0 + 18
0+18
$0 + $18
5 apples + 18
50% * 18
−1 * −18
36 / 18
36 ÷ 18
\frac{36}{18}
18*x
18 * x
18 + x
18^x
18 \div x
#### 10*18
#### 2^18"""


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("18", "18"),
        ("She makes 9 * 2 = 18.", "18"),
        ("18, as I said", "18"),
        ("It costs $18", "18"),
        ("a loss of -$18", "-18"),
        ("18%", "18"),
        ("18 km", "18"),
        ("18km", "18"),
        ("**18**", "18"),
        ("_18_", "18"),
        ("\\boxed{18}", "18"),
        ("(-5)", "-5"),
        ("= -5", "-5"),
        ("=−5", "-5"),
        ("x-5", "5"),
        ("f(x)-5", "5"),
        ("9-5", "5"),
        ("5-3=2", "2"),
        ("1,234.", "1234"),
        ("1,234.50!", "1234.5"),
        ("about 3/4.", "3/4"),
        ("wait...5", "5"),
        (".5", "0.5"),
        ("1.5e3 m", "1500"),
        ("on 2024-11-20", "20"),
        ("18 kg of CO2", "18"),
        ("9 + 9 = 18", "18"),
        ("so it is 3*6=18", "18"),
        ("3 * 6 = **18** apples", "18"),
        ("is *18*", "18"),
        ("Answer:**18**km", "18"),
        ("答案是**18**", "18"),
        ("Done:\n\n* 18\n", "18"),
        ("Day 2\n* 18", "18"),
        ("so the answer**18**", "18"),
        ("and/18", "18"),
        ("C++ 18", "18"),
        ("= +18", "18"),
        ("18+ years", "18"),
        ("w/ 18", "18"),
        ("$18/day", "18"),
        ("18 / person", "18"),
        ("18^\\circ", "18"),
        ("Total - 18", "18"),
        ("#### 18", "18"),
        ("9 + 9 = <<9+9=18>>18\n#### 18", "18"),
        ("#### $1,234\nLet me check: 5 steps.", "1234"),
        ("#### **18**\n7", "18"),
        ("#### -5\n7", "-5"),
        ("#### 4\nNo, wait.\n#### 18\n7", "18"),
        ("#### 2. Add them up\nThat is 18", "18"),
        ("#### Step 2\nThat is 18", "18"),
    ],
)
def test_what_the_last_number_is(completion, number, grade):
    score = grade(LastNumber(), completion, number)
    assert (score.value, score.parts) == (1.0, {"correct": 1.0, "readable": 1.0})


@pytest.mark.parametrize(
    "completion",
    ["", "none", "eighteen", "CO2", "####", "1,23", "12/4", "1,2,3", "12/3/2024", "1.2.3", "5 1e99999", "٣", "9" * 101],
)
def test_text_without_a_number_at_its_end_is_wrong_and_told_from_a_wrong_number(completion, grade):
    score = grade(LastNumber(), completion, "3")
    assert (score.value, score.parts) == (0.0, {"correct": 0.0, "readable": 0.0})


@pytest.mark.parametrize("completion", OPERANDS.strip().split("\n"))
def test_an_operand_of_what_was_not_worked_out_is_no_answer(completion, grade):
    for number in ("18", "-18", "10"):
        score = grade(LastNumber(), completion, number)
        assert (score.value, score.parts) == (0.0, {"correct": 0.0, "readable": 0.0})


@pytest.mark.parametrize(
    "completion",
    ["17 18 19", "18 or 19", "18\n19", "#### 18\n#### 19", "118", "181", "-18", "1.8", "18.5", "18/5", "0.18", "18e2"],
)
def test_near_misses_and_listings_earn_nothing_unless_their_last_number_is_right(completion, grade):
    score = grade(LastNumber(), completion, "18")
    assert (score.value, score.parts) == (0.0, {"correct": 0.0, "readable": 1.0})


def test_a_wall_of_numbers_is_one_guess(grade):
    wall = " ".join(map(str, range(100)))
    assert [number for number in range(100) if grade(LastNumber(), wall, number).value == 1.0] == [99]


def test_repeating_the_question_earns_nothing(grade):
    assert grade(LastNumber(), "What is 12/4?", "3").value == 0.0
    assert grade(LastNumber(), "Anna has 5 apples and eats 3. How many are left?", "2").value == 0.0


@pytest.mark.parametrize("reference", ["18", 18, 18.0, "$18", "18 dollars", "Nine and 9 is 18.\n#### 18", "#### 18\n"])
def test_a_reference_is_a_number_or_a_solution(reference, grade):
    assert grade(LastNumber(), "18", reference).value == 1.0
    assert grade(LastNumber(), "19", reference).value == 0.0


@pytest.mark.parametrize("reference", ["9 and 9 is 18", "many", "1,23", "12/4", "#### many", "x*18"])
def test_any_other_reference_is_ungraded(reference, grade):
    assert grade(LastNumber(), "18", reference).error.startswith("unreadable reference: wanted one number")


@pytest.mark.parametrize(
    "unit", ["#", "####", "#### 1x", "1,", "1e", "-", "####\n", "9", ".", "$", "9*", "9 * ", "9+", "}{"]
)
def test_long_texts_are_read_in_linear_time(unit, grade):
    start = time.perf_counter()
    grade(LastNumber(), unit * 5_000, "18")
    assert time.perf_counter() - start < 1


@settings(max_examples=50)
@given(st.one_of(st.integers(-(10**20), 10**20), st.fractions(max_denominator=1000)))
def test_every_gold_answer_is_accepted_bare_marked_and_in_a_sentence(gold):
    for completion in (str(gold), f"3 steps.\n#### {gold}\n", f"After 3 steps it is {gold}."):
        assert LastNumber().grade(completion, gold).value == 1.0
        assert LastNumber().grade(completion, gold + 1).value == 0.0
