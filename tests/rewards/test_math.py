"""The math verifier: what it reads, what it takes for equal, and what earns nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import Sample, Score
from rewards.verifiers.math import CONVENTIONS, Math, symbolic
from rewards.verifiers.math.canonical import canonical
from rewards.verifiers.math.extract import extract
from rewards.verifiers.math.grade import grade
from rewards.verifiers.math.node import UnreadableError
from rewards.verifiers.math.read import read

needs_extra = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra math")


def boxed(answer: str, reference: str) -> tuple[str, str]:
    verdict = grade(f"So it is $\\boxed{{{answer}}}$.", reference)
    return verdict.outcome, verdict.stage


def score(completion: str, reference: Any, prompt: str = "", **options: Any) -> Score:
    return rewards.make("math", **options)([Sample(prompt=prompt, completion=completion, reference=reference)])[0]


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "stage"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", "text"),
        (r"( 1 , 2 )", r"\left(1,2\right)", "text"),
        (r"\text{Odd}", "odd", "text"),
        (r"\textbf{(B)}\ 12", "B", "text"),
        ("0.5", r"\frac12", "exact"),
        ("0.50", ".5", "exact"),
        (r"1{,}000", "1000", "exact"),
        (r"12,\!345", "12345", "exact"),
        ("1,234.50", "1234.5", "exact"),
        (r"3\frac12", "7/2", "exact"),
        ("3 1/2", "3.5", "exact"),
        (r"2^{10}", "1024", "exact"),
        (r"\sqrt{\frac{9}{4}}", "1.5", "exact"),
        (r"\binom{5}{2}", "10", "exact"),
        ("5!", "120", "exact"),
        (r"0.\overline{3}", "1/3", "exact"),
        (r"1.5 \times 10^{3}", "1500", "exact"),
        (r"\sqrt{3}/2", r"\frac{\sqrt{3}}{2}", "exact"),
        (r"x^2 + 1", r"1 + x^{2}", "exact"),
        (r"5 \text{ cm}", "5", "exact"),
        (r"\$7.50", "7.5", "exact"),
        (r"30^\circ", "30", "exact"),
        ("45", r"45^\circ", "exact"),
        ("3.50", r"\$3.50", "exact"),
        (r"\$3.50", "3.5", "exact"),
        (r"12 \text{ distinct sequences}", "12", "exact"),
        ("x = 5", "5", "exact"),
        ("5", "x = 5", "exact"),
        ("2, 1", "1, 2", "structure"),
        (r"\{2, 1\}", "1, 2", "structure"),
        (r"\pm 2", "2, -2", "structure"),
        (r"(\tfrac12, 0.25)", "(0.5, 1/4)", "structure"),
        (r"x \in [0.5, 1)", r"[\frac12, 1)", "structure"),
        (r"1 < x \le 2", "(1, 2]", "structure"),
        (r"(2, 3) \cup (0, 1)", r"(0,1) \cup (2,3)", "structure"),
        (
            r"\begin{bmatrix} 1 & 0.5 \\ 0 & 1 \end{bmatrix}",
            r"\begin{pmatrix} 1 & 1/2 \\ 0 & 1 \end{pmatrix}",
            "structure",
        ),
        ("2 : 4", "1:2", "structure"),
        ("204_{5}", "204_5", "text"),
        (r"\text{204}_5", "204_5", "structure"),
        ("1:2", r"\frac12", "exact"),
        (r"\{1\} \cup \{2\}", r"\{1, 2\}", "structure"),
        (r"\{x : x > 3\}", r"(3, \infty)", "structure"),
        (r"\{x \in \mathbb{R} \mid x \le 3\}", r"(-\infty, 3]", "structure"),
        ("|x| > 3", r"(-\infty, -3) \cup (3, \infty)", "structure"),
        (r"|x| \le 3", "[-3, 3]", "structure"),
        ("(0, -4), (0, 4)", r"(0, \pm 4)", "structure"),
        (r"\text{No solutions}", r"\emptyset", "structure"),
        (r"(-\infty, \infty)", r"\text{all real numbers}", "structure"),
        (r"k\pi + 1, k \in \mathbb{Z}", r"1 + k\pi", "exact"),
        (r"\begin{aligned} x &= 3 \\ y &= -2 \end{aligned}", "x = 3, y = -2", "text"),
        (r"\begin{aligned} x &= 3 + 4 \\ &= 7 \end{aligned}", "7", "exact"),
        (r"\mathbf{(C)}\ 7", "7", "exact"),
        (r"\text{Option B}", "B", "text"),
        (r"\text{A and C}", "C, A", "structure"),
        (r"1, 2, \dots, n", r"1,2,\ldots,n", "text"),
        (r"\frac{1}{3}", "0.3333", "rounding"),
    ],
)
def test_equal_answers_and_the_stage_that_sees_it(answer, reference, stage):
    assert boxed(answer, reference) == ("correct", stage)


@needs_extra
@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"(x+1)^2", "x^2+2x+1"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\tan^2 y + 1", r"\sec^2 y"),
        (r"\ln 8", r"3 \ln 2"),
        (r"e^{i\pi}", "-1"),
        (r"\sin \pi/2", "1"),
        (r"2x + 4y = 3", r"y = -\frac12 x + \frac34"),
        (r"6 - 2y > 2x", "x + y < 3"),
        (r"\sqrt{2}", "1.414"),
    ],
)
def test_expressions_are_compared_by_their_values(answer, reference):
    assert boxed(answer, reference) == ("correct", "symbolic")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("0.49", "1/2"),
        ("0.33", "1/3"),  # two digits
        ("0.3334", "1/3"),
        ("0.2501", "1/4"),
        ("0.1235", r"\frac{12345}{100000}"),
        (r"\tanh 90", "1"),
        ("e^{-180}", "0"),
        (r"0.5\%", "0.5"),
        ("30 = 31", "31"),
        (r"\{\{1\}, \{2\}\}", "1, 2"),
        ("h(x) = 2x", "f(x) = 2x"),
        ("1e-10", "2e-10"),
        ("100000000000000000000000001", "100000000000000000000000000"),
        (r"10^{60} + 1", "10^{60}"),
        (r"x + 10^{-60}", "x"),
        ("1 2", "12"),
        ("204", "204_5"),
        ("54", "204_5"),
        ("204_6", "204_5"),
        ("[0, 1)", "(0, 1)"),
        ("(2, 1)", "(1, 2)"),
        (r"5 \text{ m}", r"5 \text{ cm}"),
        (r"\$5", "5€"),
        ("28", "0.28"),
        ("0.28", "28"),
        (r"50\%", "50.5"),
        ("1, 2, 3", "1, 2"),
        ("1", "1, 2"),
        ("2", r"\pm 2"),
        ("9, 4", "a = 4, b = 9"),
        ("4 + 9", "a = 4, b = 9"),
        ("a = 4, a = 9", "a = 4, b = 9"),
        (r"\frac49", "a = 4, b = 9"),
        ("[4, 9)", "a = 4, b = 9"),
        ("x > 5", "x < 5"),
        ("2x = 10", "x = 5"),  # the question
        ("x + 3 = 8", "x = 5"),
        ("x = 6", "y = 6"),
        ("x^2", "y^2"),
        ("x", r"\sqrt{x^2}"),
        (r"7 \text{ million}", "7"),
        ("7 tenths", "7"),
        ("7 squared", "7"),
        ("7:1", "7"),
        ("x = 3 = 12", "12"),
        (r"\{y : x > 3\}", r"(3, \infty)"),
        (r"|x| \ge 3", r"(-\infty, -3) \cup (3, \infty)"),
        ("1 < x < 3 < 4", "(1, 3)"),
        ("|x| > -3", r"(-\infty, 3) \cup (-3, \infty)"),
        ("(0, 4)", r"(0, \pm 4)"),
        (r"k\pi, k \in \mathbb{N}", r"k\pi"),
        (r"1, 3, \ldots, n", r"1, 2, \ldots, n"),
        (r"\frac13", "0.333"),  # three digits
        (r"\frac13", "0.3334"),
        (r"0 \cdot \infty", "0"),
        (r"\frac10", "1"),
        ("AB", "A"),
        ("5 or any other number", "5"),
        ("11 6/6", "12"),
    ],
)
def test_what_is_not_the_same_is_refused(answer, reference):
    assert boxed(answer, reference)[0] == "wrong"


@pytest.mark.parametrize(
    ("convention", "completion", "reference"),
    [
        ("unit", r"\boxed{14}", r"14 \text{ cm}"),
        ("unit", r"\boxed{3, 4}", r"3 \text{ m}, 4 \text{ m}"),
        ("percent", r"\boxed{28\%}", "0.28"),
        ("percent", r"\boxed{28\%}", "28"),
        ("percent", r"\boxed{28}", r"28\%"),
        ("percent", r"\boxed{0.28}", r"28\%"),
        ("percent", r"\boxed{4 4/9 percent}", "40/900"),
        ("rounding", r"\boxed{0.3333}", r"\frac13"),
        pytest.param("rounding", r"\boxed{1.4142}", r"\sqrt{2}", marks=needs_extra),
        ("decimal comma", r"\boxed{2,75}", "2.75"),
        ("decimal comma", r"\boxed{2.75}", "2,75"),
        ("last number", "We found 5 sheep.", "5"),
        ("last number", "Anna sold 48 + 24 = 72 clips in April and May.", "72"),
    ],
)
def test_a_convention_holds_only_when_it_is_asked_for(convention, completion, reference):
    assert grade(completion, reference).outcome in ("wrong", "no answer")
    others = [other for other in CONVENTIONS if other != convention]
    assert grade(completion, reference, conventions=others).outcome in ("wrong", "no answer")
    verdict = grade(completion, reference, conventions=[convention])
    assert (verdict.outcome, verdict.convention) == ("correct", convention)


@pytest.mark.parametrize(
    ("answer", "reference", "named"),
    [
        ("14", r"14 \text{ cm}", "unit"),
        (r"28\%", "0.28", "percent"),
        ("0.3333", r"\frac13", "rounding"),
        ("2,75", "2.75", "decimal comma"),
        ("0.3333, 14", r"\frac13, 14 \text{ cm}", "rounding, unit"),
        ("14", "14", ""),
        (r"\frac13", "0.3333", ""),
        ("15", r"14 \text{ cm}", ""),
    ],
)
def test_the_verdict_names_the_conventions_that_decided(answer, reference, named):
    assert grade(f"\\boxed{{{answer}}}", reference, conventions=CONVENTIONS).convention == named


def test_the_last_number_is_named_beside_what_else_decided():
    verdict = grade("We walked 5 km.", r"5 \text{ km}", conventions=CONVENTIONS)
    assert (verdict.outcome, verdict.convention) == ("correct", "last number, unit")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"14 \text{ m}", r"14 \text{ cm}"),
        (r"28\%", "280"),
        (r"50\%", "50.5"),
        ("0.28", "28"),
        ("0.33", r"\frac13"),
        ("0.3334", r"\frac13"),
        ("0.2501", r"\frac14"),
        ("2,75", "2.5"),
        ("2, 75", "275"),
    ],
)
def test_all_conventions_together_make_no_other_value_right(answer, reference):
    assert grade(f"\\boxed{{{answer}}}", reference, conventions=CONVENTIONS).outcome == "wrong"


@pytest.mark.parametrize("conventions", [["units"], "unit", ["unit", "round"]])
def test_an_unknown_convention_is_refused_with_the_list(conventions):
    with pytest.raises(ValueError, match=r"conventions must be a list with some of .*'unit', 'percent', 'rounding'"):
        Math(conventions)


def test_a_score_names_the_convention_only_where_one_decided():
    assert score(r"\boxed{14}", r"14 \text{ cm}", conventions=["unit"]).info["convention"] == "unit"
    assert "convention" not in score(r"\boxed{14}", "14", conventions=["unit"]).info


@pytest.mark.parametrize("sign", [r"^\circ", r"\%", r"\text{ cm}", r"\text{ apples}"])
def test_another_unit_than_the_references_is_always_wrong(sign):
    for unit in {r"\text{ m}", r"\text{ pears}", r"\text{ hours}"}:
        assert grade(rf"\boxed{{5{unit}}}", f"5{sign}", conventions=CONVENTIONS).outcome == "wrong"


@settings(max_examples=100, deadline=None)
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_are_equal_exactly_when_they_are(one, other):
    latex = f"\\frac{{{one.numerator}}}{{{one.denominator}}}"
    assert boxed(latex, str(one))[0] == "correct"
    assert (boxed(latex, str(other))[0] == "correct") == (one == other)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(0, 8))
def test_a_decimal_is_the_fraction_that_it_writes(digits, places):
    value = Fraction(digits, 10**places)
    sign, rest = "-" if digits < 0 else "", str(abs(digits)).rjust(places + 1, "0")
    text = f"{sign}{rest[: len(rest) - places]}.{rest[len(rest) - places :]}0"
    assert boxed(text, str(value))[0] == "correct"
    assert boxed(text + "1", str(value))[0] == "wrong"


# --- where the answer stands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"We get $\boxed{5}$.", "5"),
        (r"\boxed{4}? No: \boxed{5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed 5", "5"),
        (r"<think>\boxed{4}</think> It is \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}} and $\boxed{3}$", r"\frac{1}{2}, 3"),
        (r"\boxed{4}. Final answer: 5", "5"),
        ("#### 5", "5"),
        ("**Answer:** 5", "5"),
        ("Answer: 4\nNo, wait.\nAnswer: 5", "5"),
        ("<answer> 5 </answer>", "5"),
        ("The final answer is $5$. I hope it is correct.", "$5$"),
        ("Hence the sum is 5.", "5"),
        ("There are 5 ways to do it.", "5 ways"),
        ("The answer is 5 sequences of length n.", "5 sequences"),
        ("The answer is not 4 but 5.", "5"),
        (r"\boxed{4}. That is wrong. Alternatively, \boxed{5}", "5"),
        (r"\boxed{4}. Alternatively, \boxed{5}", "4, 5"),
        ("First 2 + 2 = 4.\nSo we have $x = 5$.", "$x = 5$"),
        ("5", "5"),
        ("Evelyn", "Evelyn"),
    ],
)
def test_the_answer_is_found(completion, answer):
    assert extract(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   ",
        r"\boxed{}",
        r"\boxed{5",
        r"<think>\boxed{5}",
        r"<think> \boxed{5} </think>",
        r"a</think><think>\boxed{5}",
        r"\boxed{5}? Wait, that is wrong.",
        r"\boxed{5}, or any other number",
        r"\boxed{5} (or 6)",
        "\\boxed{4}\n\nAlternatively \\boxed{5}",
        "\\boxed{5}\n\nAlternatively \\boxed{6}",
        "$\\boxed{5}$.\n\nCorrection: I forgot the zero, so it is 6.",
        "The answer is 4 and the question number is 5.",
        "The expected answer is 5. I will say 4.",
        "There are 5 ways to win and more to lose.",
        "There are 5 times that number of ways.",
        "We found 5 sheep.",
        "Is it 5?",
        "It is not 5.",
        "The answer is 5?",
        "The answer is at least 5.",
        "The answer cannot be 5.",
        "It would be 5 if there were more.",
        "The answer is 5... or 6.",
        "I counted 4 apples and 5 pears.",
        "Option 1: 4. Option 2: 5.",
        "5 7 8 9 " * 200,
    ],
)
def test_what_states_no_answer_earns_nothing(completion):
    assert grade(completion, "5").outcome in ("no answer", "wrong")


@pytest.mark.parametrize(
    "completion", ["", r"\boxed{}", r"<think>\boxed{5}", "Is it 5?", "We shall see what comes of it."]
)
def test_no_answer_is_an_outcome_of_its_own(completion):
    assert grade(completion, "5").outcome == "no answer"


def test_reasoning_that_the_prompt_began_must_end():
    assert grade(r"\boxed{5}", "5", prompt="Add 2 and 3. <think>\n").outcome == "no answer"
    assert grade(r"4? </think> \boxed{5}", "5", prompt="Add 2 and 3. <think>\n").outcome == "correct"


@pytest.mark.parametrize(
    ("answer", "reference", "prompt"),
    [
        (r"12 \cdot 5", "60", r"Compute $12 \cdot 5$."),
        ("5 * 12", "60", "A crate holds 12 bottles. How many bottles are in 5 crates?"),
        ("2^{10}", "1024", "Compute $2^{10}$."),
        ("x^2 - 1", "(x-1)(x+1)", "Factor $x^2 - 1$."),
    ],
)
def test_repeating_the_question_earns_nothing(answer, reference, prompt):
    assert grade(f"\\boxed{{{answer}}}", reference, prompt).outcome == "wrong"
    assert grade(f"\\boxed{{{reference}}}", reference, prompt).outcome == "correct"


@pytest.mark.parametrize("number", range(10))
def test_listing_answers_earns_nothing(number):
    numbers = [str(n) for n in range(10)]
    walls = [
        " ".join(numbers),
        ", ".join(numbers),
        "The answer is " + ", ".join(numbers),
        r"\boxed{" + ", ".join(numbers) + "}",
        "\n".join(f"\\boxed{{{n}}}" for n in numbers),
        " or ".join(numbers),
    ]
    assert not any(grade(wall, str(number)).outcome == "correct" for wall in walls)


# --- the reward ------------------------------------------------------------------------------------------------------


def test_a_score_names_outcome_text_and_stage():
    right, wrong, none = score(r"\boxed{0.5}", "1/2"), score(r"\boxed{2}", "1/2"), score("hm", "1/2")
    assert (right.value, right.parts) == (1.0, {"correct": 1.0, "readable": 1.0})
    assert right.info == {"outcome": "correct", "extracted": "0.5", "stage": "exact"}
    assert (wrong.value, wrong.info["outcome"], wrong.parts["readable"]) == (0.0, "wrong", 1.0)
    assert none.value == 0.0


@pytest.mark.parametrize("reference", [5, 5.0, Fraction(5), "5", "$5$", r"$\boxed{5}$", "2 + 3 = 5\n#### 5"])
def test_references_are_texts_numbers_or_solutions(reference):
    assert score(r"\boxed{5}", reference).value == 1.0
    assert score(r"\boxed{6}", reference).value == 0.0


@pytest.mark.parametrize(
    "reference",
    [None, True, [5], float("nan"), "", " ", r"\boxed{}", r"\frac{1}{", r"\frac{1}{0}", "\x00", "{" * 100, "7" * 9999],
)
def test_an_unreadable_reference_is_ungraded(reference):
    assert score(r"\boxed{5}", reference).error.startswith("unreadable reference")


def test_scores_come_in_the_order_of_the_samples():
    samples = [Sample(prompt="", completion=f"\\boxed{{{n}}}", reference=None if n == 3 else n % 2) for n in range(6)]
    assert [s.value for s in Math()(samples)] == [1.0, 1.0, 0.0, None, 0.0, 0.0]


def test_a_time_out_is_ungraded_with_its_reason():
    heavy = "x" + r" \cdot x^{1.5}" * 100
    result = score(rf"\boxed{{{heavy}}}", "x + 1", seconds=0.001)
    assert result.value is None
    assert "took longer than 0.001 s" in result.error


def test_seconds_must_be_positive():
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        Math(seconds=0)


def test_any_thread_may_ask():
    results: list[float | None] = []
    threads = [threading.Thread(target=lambda: results.append(score(r"\boxed{0.5}", "1/2").value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1.0] * 4


WITHOUT_EXTRA = """
import sys
for name in ("math_verify", "latex2sympy2_extended", "sympy", "mpmath"):
    sys.modules[name] = None
from rewards.verifiers.math.grade import grade
import json
cases = [(r"\\\\boxed{0.5}", "1/2"), (r"\\\\boxed{x+1}", "1+x"), (r"\\\\boxed{(x+1)^2}", "x^2+2x+1"), (r"\\\\boxed{2}", "3")]
verdicts = [grade(*case) for case in cases]
print(json.dumps([[v.outcome, v.why] for v in verdicts]))
"""


def test_without_the_extra_all_but_the_symbolic_stage_works():
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True, check=True)
    verdicts = json.loads(run.stdout)
    assert [outcome for outcome, _ in verdicts] == ["correct", "correct", "missing extra", "wrong"]
    assert "textenv[math]" in verdicts[2][1]


def test_a_pair_that_needs_the_missing_extra_is_ungraded(monkeypatch):
    missing = {"outcome": "missing extra", "extracted": "x", "stage": "symbolic", "why": "needs textenv[math]"}
    reward = Math()
    monkeypatch.setattr(type(reward.workers), "map", lambda self, items: [missing for _ in items])
    (result,) = reward([Sample(prompt="", completion="x", reference="y")])
    assert (result.value, result.error) == (None, "needs textenv[math]")


# --- hostile input ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "\\boxed{" * 1000 + "5" + "}" * 1000,
    "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "\\boxed{" + "{" * 1000,
    "}" * 10_000 + "{" * 10_000,
    "\\boxed{9^{9^{9^{9}}}x}",
    "\\boxed{(((10^{10})!)!)!}",
    "\\boxed{\\exp(\\exp(\\exp(100))) x}",
    "\\boxed{\\sin(10^{100000})}",
    "\\boxed{" + "+1" * 900 + "}",
    "\\boxed{2 *" + "-" * 1900 + "1}",
    "2 *" + "-" * 1900 + "1",
    "\\boxed{5}. So x = " + "1+" * 900 + "1",
    "\\boxed{" + "1 \\pm " * 30 + "1}",
    "\\boxed{\\sqrt[" + "9" * 500 + "]{2}}",
    "\\boxed{1e9999999999}",
    "\\boxed{__import__('os').abort()}",
    "\\boxed{\ud800}",
    "\\boxed{\u202e\x00}",
    "٣",
    "#### " * 50_000,
    "answer to " * 50_000,
    "$" * 500_000,
    "9" * 1_000_000,
    "is " * 100_000,
    "<think>" * 50_000,
]


@pytest.mark.parametrize("completion", HOSTILE, ids=lambda text: ascii(text[:30]))
@pytest.mark.parametrize("reference", ["2", "x", r"\pi", "1, 2"])
def test_hostile_text_earns_nothing_and_breaks_nothing(completion, reference):
    assert grade(completion, reference).outcome in ("wrong", "no answer")


PIECES = [
    *"\\{}()[]|$^_+-*/=<>,.:;!%0159xyie \n\ud800\x00",
    "\\frac",
    "\\sqrt",
    "\\boxed{",
    "\\text{",
    "\\pm",
    "or",
    "is",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_no_text_raises(text):
    assert grade(text, "1").outcome in ("correct", "wrong", "no answer")
    assert grade(r"\boxed{1}", text).outcome in ("correct", "wrong", "unreadable reference")


def test_what_is_nested_too_deep_or_too_long_is_not_read():
    for text, why in (
        ("(" * 60 + "x" + ")" * 60, "nested deeper than 50"),
        ("x+" * 2000 + "x", "at most 2000 characters"),
    ):
        with pytest.raises(UnreadableError, match=why):
            read(text)


@needs_extra
def test_values_are_compared_to_the_last_digit_of_what_is_written():
    one, other = canonical(read("x + 10^{-900}")), canonical(read("x"))
    assert not symbolic.equal(one, other)
    assert symbolic.equal(one, one)
