"""Reasoning is no answer."""

from __future__ import annotations

import pytest

from rewards import make
from rewards.verifiers.reasoning import without_reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5", "5"),
        ("<think>4</think>5", "5"),
        ("<think>4</think>5<think>6</think>7", "7"),
        ("4</think>5", "5"),  # the template opened it
        ("<THINKING>4</ thinking >5", "5"),
        ("<think>5", None),
        ("<think>4</think>5<think>6", None),
        ("<thin>5", "<thin>5"),
        ("", ""),
    ],
)
def test_what_counts_is_behind_the_reasoning(text, answer):
    assert without_reasoning(text) == answer


def test_reasoning_that_the_prompt_began_has_to_end():
    assert without_reasoning("5", prompt="2+3=?\n<think>\n") is None
    assert without_reasoning("4</think>5", prompt="2+3=?\n<think>\n") == "5"
    assert without_reasoning("5", prompt="<think></think>") == "5"


@pytest.mark.parametrize(
    ("name", "reference", "right", "wrong"),
    [
        ("last_number", "18", "It is 18.", "It is 17."),
        ("choice", "B", "Answer: B", "Answer: C"),
        ("math", "18", r"\boxed{18}", r"\boxed{17}"),
    ],
)
def test_verifiers_of_free_text_read_the_answer_alone(name, reference, right, wrong, grade):
    verifier = make(name)
    assert grade(verifier, f"<think>{wrong}</think>{right}", reference).value == 1.0
    assert grade(verifier, f"<think>{right}</think>{wrong}", reference).value == 0.0
    assert grade(verifier, f"<think>{right}", reference).value == 0.0
    assert grade(verifier, f"<think>{right}</think>", reference).value == 0.0


def test_a_wall_of_tags_takes_linear_time(grade):
    for unit in ("<", "< ", "<think>", "</think", "<think>" + " " * 1000):
        assert grade(make("last_number"), unit * (2_000_000 // len(unit)), "7").value == 0.0
