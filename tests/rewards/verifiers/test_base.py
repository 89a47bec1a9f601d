"""What all verifiers promise."""

from __future__ import annotations

import random

import pytest

from rewards import Sample, make, score_samples
from rewards.verifiers.base import Verifier, verdict

SCHEMA = {"required": ["a"]}
KEYWORD = {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["tea"]}]}
ANSWERS = {
    "choice": [("B", "B"), ("A", "B"), ("", "B"), ("B", "none"), ("A or B", "B")],
    "exact": [("42", "42"), ("41", "42"), ("", "42"), ("42", None), ("41 42", "42")],
    "format_tags": [("<think></think><answer></answer>", None), ("<think>", None), ("", None)],
    "ifeval": [("tea", KEYWORD), ("milk", KEYWORD), ("", KEYWORD), ("tea", None)],
    "json": [('{"a": 1}', SCHEMA), ("{}", SCHEMA), ("", SCHEMA), ("{}", 5), ("{", SCHEMA)],
    "last_number": [("so 42", "42"), ("so 41", "42"), ("", "42"), ("42", "many"), ("1,23", "42")],
    "numeric": [("42", "42"), ("41", "42"), ("", "42"), ("42", "many"), ("41 42", "42")],
    "regex": [("42", "[0-9]+"), ("x", "[0-9]+"), ("", "[0-9]+"), ("42", "("), ("42", None)],
}
HOSTILE = ["", "\0", "\ud800", "٤٢", "−", "(" * 100_000, "#### " * 20_000, "1," * 50_000, " " * 100_000]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_score_does_not_depend_on_order_or_company(name):
    verifier = make(name)
    samples = [Sample(prompt="", completion=answer, reference=reference) for answer, reference in ANSWERS[name]]
    alone = [score_samples(verifier, [sample])[0] for sample in samples]
    order = list(range(len(samples))) * 3
    random.Random(0).shuffle(order)
    together = score_samples(verifier, [samples[i] for i in order])
    assert together == [alone[i] for i in order]


@pytest.mark.parametrize("name", ANSWERS)
def test_hostile_text_scores_zero(name, grade):
    reference = ANSWERS[name][0][1]
    assert [grade(make(name), text, reference).value for text in HOSTILE] == [0.0] * len(HOSTILE)


@pytest.mark.parametrize("name", ["choice", "exact", "last_number", "numeric"])
@pytest.mark.parametrize("reference", [None, "", " ", [], {}], ids=repr)
def test_an_unreadable_reference_is_ungraded_whatever_the_answer(name, reference, grade):
    for completion in ("", "42", "B", str(reference)):
        score = grade(make(name), completion, reference)
        assert score.value is None
        assert score.error.startswith("unreadable reference: wanted ")


def test_a_sample_that_breaks_the_rule_is_ungraded_and_the_others_are_scored():
    class Fragile(Verifier):
        def grade(self, completion, reference):
            return verdict(completion[0] == reference)

    samples = [Sample(prompt="", completion=text, reference="a") for text in ("a", "", "b")]
    first, broken, last = score_samples(Fragile(), samples)
    assert (first.value, broken.value, last.value) == (1.0, None, 0.0)
    assert "IndexError" in broken.error
