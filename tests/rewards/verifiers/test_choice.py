"""The letter of a choice."""

from __future__ import annotations

import pytest

from rewards.verifiers.choice import Choice

CHOOSE_B = """
B
(B)
[B]
B.
B)
B:
B) Paris
B, since it rains.
**B**
**(B)** Paris
Answer: B
ANSWER: (B)
**Answer:** B
**Answer**: B
answer = B
The answer is B
the answer is: B
The answer is **B**.
The answer is "B".
The correct choice is option B because it is.
A is wrong and C too. The answer is B.
The wrong answer is A. The answer is B.
I don't think the answer is A. The answer is B.
It can't be A so the answer is B.
B) False
B. Not many know.
(B) is right
The answer is B, which is not what I thought.
It is not easy but my answer is B.
The answer is B. A dog barks.
The answer is B. C-sections are rare.
B. I think so."""

CHOOSE_NOTHING = """
F
b
Be
BB
B's
B-side
Β
Paris
not B
I like B
Answer: none
The answer is not B
The wrong answer is B
The only incorrect option: B
It's a false choice = B
I don't think the answer is B.
I never said that my final answer is B
It isn't true that the answer is B
This is not the right answer: B
B is not the answer
(B) is not the answer
(B) isn't right.
**(B)** is *not* it
B) is wrong
(B) is the wrong choice
B, is clearly incorrect
(B) cannot be right
(B) can’t be it
The answer is B is not true
Answer: B is wrong.
The answer is B-side"""

NAME_SEVERAL = """
A B C D E
ABCDE
A, B
A/B
A or B
A and B
(A)(B)
(A) (B)
A) x  B) y  C) z
B, not A
The answer is A or B
The answer is B and A
Answer: A. Answer: B
Answer: A, B, C
The answer is B. A is too.
The answer is B or rather C because it rains."""


@pytest.mark.parametrize("completion", [*CHOOSE_B.strip().split("\n"), " B\n", "Answer:\n\nB"])
def test_ways_to_choose(completion, grade):
    right, wrong = grade(Choice(), completion, "B"), grade(Choice(), completion, "C")
    assert (right.value, right.parts) == (1.0, {"correct": 1.0, "readable": 1.0})
    assert (wrong.value, wrong.parts) == (0.0, {"correct": 0.0, "readable": 1.0})


@pytest.mark.parametrize("completion", [*NAME_SEVERAL.strip().split("\n"), "Answer: A\nAnswer: B", "A) x\nB) y"])
def test_naming_several_choices_earns_nothing(completion, grade):
    for reference in "ABCDE":
        score = grade(Choice(), completion, reference)
        assert (score.value, score.parts) == (0.0, {"correct": 0.0, "readable": 0.0})


@pytest.mark.parametrize("completion", ["", *CHOOSE_NOTHING.strip().split("\n")])
def test_choosing_nothing_is_wrong_and_told_from_a_wrong_choice(completion, grade):
    score = grade(Choice(), completion, "B")
    assert (score.value, score.parts) == (0.0, {"correct": 0.0, "readable": 0.0})


@pytest.mark.parametrize(
    "unit", ["the wrong answer is ", "I don't think the ", "B is ", "not ", "(", "B) ", "answer is"]
)
def test_long_texts_choose_nothing(unit, grade):
    assert grade(Choice(), unit * 20_000, "C").value == 0.0


@pytest.mark.parametrize("letter", "ABCDE")
@pytest.mark.parametrize("form", ["{}", "({})", "{}.", "Answer: {}", "the answer is {} because I say so"])
def test_every_gold_answer_is_accepted_and_no_letter_is_special(letter, form, grade):
    gold = form.format(letter)
    assert [grade(Choice(), gold, other).value for other in "ABCDE"] == [float(other == letter) for other in "ABCDE"]
    assert grade(Choice(), gold, gold).value == 1.0


@pytest.mark.parametrize("reference", ["F", "b", "A or B", 1, "Paris"])
def test_a_reference_that_is_no_choice_is_ungraded(reference, grade):
    assert grade(Choice(), "B", reference).error.startswith(
        "unreadable reference: wanted one of the choices A, B, C, D, E"
    )


def test_the_choices_can_be_others(grade):
    assert grade(Choice("1234"), "(3)", "3").value == 1.0
    assert grade(Choice("AB"), "C", "B").parts["readable"] == 0.0


@pytest.mark.parametrize("choices", ["", "A", "ABA", "A-C", "A B"])
def test_choices_that_make_no_sense_are_refused(choices):
    with pytest.raises(ValueError, match="at least two different letters"):
        Choice(choices)
