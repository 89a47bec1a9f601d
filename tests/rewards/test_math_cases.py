"""The math verifier judged by a table of our own, and by inputs that are meant to break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rewards
from rewards import Sample, Score

pytest.importorskip("sympy")

CASES = [json.loads(line) for line in (Path(__file__).parent / "math_cases.jsonl").read_text("utf-8").splitlines()]
READABLE = [case for case in CASES if not case.get("ungraded")]

NESTED = 1_000
LONG = 2_000_000
HOSTILE_ANSWERS = {
    "boxes that never close": r"\boxed{" * NESTED,
    "nothing but closing braces": r"\boxed{8" + "}" * NESTED + r"\frac{",
    "braces a thousand deep": r"\boxed{" + "{" * NESTED + "8" + "}" * NESTED + "}",
    "parentheses a thousand deep": r"\boxed{" + "(" * NESTED + "8" + ")" * NESTED + "}",
    "fractions a thousand deep": r"\boxed{" + r"\frac{1}{1+" * NESTED + "1" + "}" * NESTED + "}",
    "boxes a thousand deep": r"\boxed{" * NESTED + "8" + "}" * NESTED,
    "half a fraction": r"\boxed{\frac{7}{}}",
    "half a matrix": r"\boxed{\begin{pmatrix} 7 & }",
    "megabytes of digits": r"\boxed{" + "7" * LONG + "}",
    "megabytes of digits after a marker": "Answer: " + "7" * LONG,
    "megabytes of text": "seven " * (LONG // 6),
    "megabytes of opening braces": "{" * LONG,
    "megabytes of dollars": "$" * LONG,
    "megabytes of blanks": "Answer:" + " " * LONG + "8",
    "a hundred thousand boxes": r"\boxed{7}" * 100_000 + r"\boxed{8}",
    "a hundred thousand thoughts": "<think>" * 100_000 + r"\boxed{7}",
    "a hundred thousand terms": r"\boxed{" + "7+" * 100_000 + "7}",
    "a hundred thousand elements": r"\boxed{" + "7," * 100_000 + "7}",
    "rules": r"\boxed{" + "_" * 19_000 + "7}",
    "stars": r"\boxed{" + "*" * 19_000 + "7}",
    "formulas that never end": "The answer is " + r"\( " * 6_000,
    "NUL": "\\boxed{7\x00" + "8}",
    "lone surrogates": "\\boxed{\ud800\udfff}",
    "a lone surrogate in the text": "\udc80 \\boxed{8}",
    "right-to-left override": "\\boxed{\u202e7\u202c8}",
    "a tower": r"\boxed{9^9^9^9}",
    "a tower in LaTeX": r"\boxed{9^{9^{9^{9}}}}",
    "a tower of sevens below one": r"\boxed{7^{-7^{7^{7}}}}",
    "a factorial": r"\boxed{1000000000!}",
    "a factorial of factorials": r"\boxed{((9!)!)!}",
    "a binomial": r"\boxed{\binom{10^{12}}{10^{11}}}",
    "a sum": r"\boxed{\sum_{k=1}^{10^{15}} \frac{1}{k}}",
    "a product": r"\boxed{\prod_{k=1}^{10^{9}} k}",
    "a power of a polynomial": r"\boxed{(x+y+z)^{100000}}",
    "a root of a huge power": r"\boxed{\sqrt[1000000007]{10^{1000000009}}}",
    "nested functions": r"\boxed{" + r"\sin(" * 200 + "7" + ")" * 200 + "}",
    "Python": "\\boxed{__import__('os').abort()}",
}
UNREADABLE_REFERENCES: dict[str, Any] = {
    "None": None,
    "empty": "",
    "blank": " \n\t",
    "an empty box": r"\boxed{}",
    "a list": ["7"],
    "a dictionary": {"answer": "7"},
    "an object": object(),
    "bytes": b"7",
    "unbalanced": r"\frac{7}{",
    "NUL": "\x00",
    "a lone surrogate": "\ud800",
}


def grade(completions: list[str], references: list[Any]) -> list[Score]:
    samples = [Sample(prompt="", completion=c, reference=r) for c, r in zip(completions, references, strict=True)]
    return rewards.make("math")(samples)


@pytest.fixture(scope="module")
def scores() -> dict[str, Score]:
    """The score of each case, all from one batch."""
    graded = grade([case["completion"] for case in CASES], [case["reference"] for case in CASES])
    return {case["id"]: score for case, score in zip(CASES, graded, strict=True)}


def test_the_table_is_large_balanced_and_has_an_id_a_case() -> None:
    assert len(CASES) >= 200
    assert len({case["id"] for case in CASES}) == len(CASES)
    assert 0.4 < sum(case["correct"] for case in READABLE) / len(READABLE) < 0.6
    assert not any(case["correct"] for case in CASES if case.get("ungraded"))


def wrong_but_accepted(scores: dict[str, Score], disputed: bool) -> str:
    cases = [case for case in CASES if (case["kind"] == "convention") == disputed]
    return ", ".join(case["id"] for case in cases if not case["correct"] and scores[case["id"]].correct)


def test_no_wrong_answer_is_accepted(scores: dict[str, Score]) -> None:
    accepted = wrong_but_accepted(scores, disputed=False)
    assert not accepted, f"accepted: {accepted}"


def test_where_people_dispute_what_is_right_the_strict_reading_is_the_default(scores: dict[str, Score]) -> None:
    accepted = wrong_but_accepted(scores, disputed=True)
    assert not accepted, f"accepted: {accepted}"


def test_at_most_two_right_answers_in_a_hundred_are_refused(scores: dict[str, Score]) -> None:
    right = [case["id"] for case in CASES if case["correct"]]
    refused = [name for name in right if not scores[name].correct]
    assert len(refused) <= 0.02 * len(right), f"refused: {', '.join(refused)}"


def test_an_unreadable_reference_is_ungraded_and_no_other_is(scores: dict[str, Score]) -> None:
    ungraded = {name for name, score in scores.items() if score.value is None}
    assert ungraded == {case["id"] for case in CASES if case.get("ungraded")}


@pytest.mark.parametrize("completion", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS.keys())
def test_a_hostile_answer_is_wrong_and_does_not_get_away_ungraded(completion: str) -> None:
    assert [score.value for score in grade([completion] * 2, ["7", "x+7"])] == [0.0, 0.0]


@pytest.mark.parametrize("reference", UNREADABLE_REFERENCES.values(), ids=UNREADABLE_REFERENCES.keys())
def test_a_reference_that_cannot_be_read_leaves_the_sample_ungraded_with_the_reason(reference: Any) -> None:
    for score in grade([r"\boxed{7}", r"\boxed{}", ""], [reference] * 3):
        assert score.value is None
        assert score.error
        assert "Traceback" not in score.error


def test_the_same_hostile_text_on_both_sides_is_not_an_exception() -> None:
    boxed = [text for text in HOSTILE_ANSWERS.values() if len(text) < 10_000]
    assert all("Traceback" not in (score.error or "") for score in grade(boxed, boxed))
