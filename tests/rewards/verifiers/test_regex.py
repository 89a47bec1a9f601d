"""Regular expressions."""

from __future__ import annotations

import threading

import pytest

from rewards import Sample
from rewards.verifiers import regex
from rewards.verifiers.regex import Regex

SLOW, ATTACK = r"(a|aa)+$", "a" * 300 + "!"


@pytest.mark.parametrize(
    ("pattern", "completion", "value"),
    [
        (r"[0-9]+", "42", 1.0),
        (r"[0-9]+", "42 ", 0.0),
        (r"[0-9]+", "x42", 0.0),
        (r"[0-9]+", "", 0.0),
        (r"a|ab", "ab", 1.0),
        (r"", "", 1.0),
        (r"\p{Greek}+", "λόγος", 1.0),
    ],
)
def test_the_whole_completion_must_match(pattern, completion, value, grade):
    score = grade(Regex(pattern), completion, "ignored")
    assert (score.value, score.parts) == (value, {"correct": value})


def test_a_match_anywhere_counts_on_request(grade):
    assert grade(Regex("[0-9]+", fullmatch=False), "it is 42.").value == 1.0


def test_without_a_pattern_the_reference_is_the_pattern(grade):
    assert grade(Regex(), "colour", "colou?r").value == 1.0
    assert grade(Regex(), "collar", "colou?r").value == 0.0


@pytest.mark.parametrize("reference", ["(", None, 42])
def test_a_reference_that_is_no_pattern_is_ungraded(reference, grade):
    assert grade(Regex(), "42", reference).error.startswith("unreadable reference: wanted a regular expression")


def test_a_pattern_that_does_not_compile_is_refused():
    with pytest.raises(ValueError, match="does not compile: missing"):
        Regex("(")


def test_a_match_that_takes_too_long_is_ungraded_on_any_thread_and_the_others_are_scored(monkeypatch):
    monkeypatch.setattr(regex, "SECONDS", 0.1)
    samples = [Sample(prompt="", completion=text) for text in ("aaa", ATTACK, "b")]
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(Regex(SLOW)(samples)))
    thread.start()
    thread.join(timeout=30)
    assert [score.value for score in scores] == [1.0, None, 0.0]
    assert "took longer than 0.1 s" in scores[1].error
