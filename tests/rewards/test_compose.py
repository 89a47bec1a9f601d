"""Sums and gates, with numbers worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Gate, Reward, RewardError, Sample, Score, WeightedSum, score_samples, ungraded

SOLVED = "<think>6 times 7</think><answer>42</answer>"


def test_a_sum_weighs_values_and_reports_them_unweighted(fixed, sample):
    # 2 * 1.0 + 0.5 * 0.5 - 1 * 0.25 = 2.0
    mixed = WeightedSum({"a": (2, fixed(Score(1.0))), "b": (0.5, fixed(Score(0.5))), "c": (-1, fixed(Score(0.25)))})
    (score,) = mixed([sample()])
    assert score == Score(2.0, {"a": 1.0, "b": 0.5, "c": 0.25})


def test_a_sum_takes_registered_names(sample):
    wrong, right = WeightedSum({"exact": 1.0, "format_tags": 0.2})([sample(SOLVED, "42"), sample("42", "42")])
    assert wrong == Score(0.2, {"exact": 0.0, "format_tags": 1.0, "correct": 0.0})
    assert right == Score(1.0, {"exact": 1.0, "format_tags": 0.0, "correct": 1.0})


def test_form_never_counts_as_accuracy_beside_a_verifier(sample):
    (score,) = WeightedSum({"format_tags": 5.0, "exact": 1.0})([sample(SOLVED, "42")])
    assert score.value == 5.0
    assert score.correct is False


def test_correct_is_that_of_the_first_component_that_names_it(fixed, sample):
    first, second = fixed(Score(0.3, {"correct": 1.0})), fixed(Score(0.9, {"correct": 0.0}))
    (score,) = WeightedSum({"form": (1, fixed(Score(1.0))), "first": (1, first), "second": (1, second)})([sample()])
    assert score.parts["correct"] == 1.0


def test_an_ungraded_component_leaves_its_sample_ungraded_and_no_other(fixed, sample):
    flaky = fixed(Score(1.0), ungraded("time-out"))
    good, bad = WeightedSum({"exact": 1.0, "judge": (1.0, flaky)})([sample("a", "a"), sample("a", "a")])
    assert good.value == 2.0
    assert (bad.value, bad.error) == (None, "judge: time-out")


def test_a_component_that_raises_leaves_its_samples_ungraded(sample):
    class Broken(Reward):
        def __call__(self, samples):
            raise OSError("gone")

    (score,) = WeightedSum({"exact": 1.0, "broken": (1.0, Broken())})([sample("a", "a")])
    assert score.value is None
    assert score.error.startswith("broken: ")
    assert "OSError: gone" in score.error


@pytest.mark.parametrize("values", [(1e308, 1e308), (1e308, -1e308)])
def test_a_sum_too_large_to_add_up_is_ungraded(values, fixed, sample):
    huge = WeightedSum({"a": (10.0, fixed(Score(values[0]))), "b": (10.0, fixed(Score(values[1])))})
    (score,) = huge([sample()])
    assert score.value is None
    assert score.error.startswith("weighted_sum: ")


def test_token_credit_is_weighed_and_a_bare_value_goes_to_the_last_token(fixed, sample):
    # 2 * (0.25, 0.5, 0.25) + 0.5 * (0, 0, 3) = (0.5, 1.0, 2.0)
    dense, bare = fixed(Score(1.0, tokens=(0.25, 0.5, 0.25))), fixed(Score(3.0))
    (score,) = WeightedSum({"dense": (2, dense), "bare": (0.5, bare)})([sample(tokens=(7, 8, 9))])
    assert score.tokens == (0.5, 1.0, 2.0)
    assert score.value == 3.5


def test_without_token_credit_a_sum_gives_none(fixed, sample):
    (score,) = WeightedSum({"a": (1, fixed(Score(1.0)))})([sample(tokens=(7, 8))])
    assert score.tokens is None


def test_token_credit_that_does_not_fit_the_tokens_is_a_broken_contract(fixed, sample):
    with pytest.raises(RewardError, match="credit to 1 tokens of a sample with 2"):
        WeightedSum({"a": (1, fixed(Score(1.0, tokens=(1.0,))))})([sample(tokens=(7, 8))])


CREDIT = st.lists(st.floats(-10, 10), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(credit=CREDIT, value=st.floats(-10, 10), weights=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_the_tokens_of_a_sum_sum_to_its_value(credit, value, weights):
    class Dense(Reward):
        def __call__(self, samples):
            return [Score(sum(credit), tokens=tuple(credit)) for _ in samples]

    mixed = WeightedSum({"dense": (weights[0], Dense()), "bare": (weights[1], lambda p, c, r: value)})
    (score,) = mixed([Sample(prompt="", completion="", tokens=(1, 2, 3))])
    assert score.value == pytest.approx(weights[0] * sum(credit) + weights[1] * value)
    assert sum(score.tokens) == pytest.approx(score.value, abs=1e-9)


@pytest.mark.parametrize(
    "components", [{}, {"correct": (1.0, "exact")}, {"exact": float("nan")}, {"exact": "exact"}, {"exat": 1.0}]
)
def test_a_sum_that_makes_no_sense_is_refused(components):
    with pytest.raises(ValueError, match=r"components|finite weight|no reward is named"):
        WeightedSum(components)


def test_an_empty_batch_has_no_scores():
    assert WeightedSum({"exact": 1.0})([]) == []
    assert Gate("exact", "exact")([]) == []


def test_a_reward_counts_only_behind_an_open_gate(fixed, sample):
    gate, reward = fixed(Score(1.0), Score(0.99), Score(2.0)), fixed(Score(0.5), Score(0.25))
    first, second, third = Gate(gate, reward)([sample("a"), sample("b"), sample("c")])
    assert first == Score(0.5, {"gate": 1.0, "reward": 0.5, "correct": 0.0})
    assert second == Score(0.0, {"gate": 0.99, "reward": 0.0, "correct": 0.0})
    assert third == Score(0.25, {"gate": 2.0, "reward": 0.25, "correct": 0.0})


def test_behind_a_closed_gate_the_reward_is_not_called(fixed, sample):
    gate, reward = fixed(Score(0.0), Score(1.0)), fixed(Score(1.0))
    Gate(gate, reward)([sample("shut"), sample("open")])
    assert gate.seen == ["shut", "open"]
    assert reward.seen == ["open"]


def test_an_ungraded_gate_or_reward_leaves_the_sample_ungraded(fixed, sample):
    gate, reward = fixed(ungraded("unclear"), Score(1.0), Score(0.0)), fixed(ungraded("time-out"))
    first, second, third = Gate(gate, reward)([sample(), sample(), sample()])
    assert (first.value, first.error) == (None, "gate: unclear")
    assert (second.value, second.error) == (None, "reward: time-out")
    assert third.value == 0.0


@pytest.mark.parametrize(
    ("completion", "reference", "value", "correct"),
    [(SOLVED, SOLVED, 1.0, 1.0), (SOLVED, "42", 0.0, 0.0), ("42", "42", 0.0, 0.0)],
)
def test_behind_a_format_gate_correct_is_that_of_the_verifier(completion, reference, value, correct, sample):
    (score,) = Gate("format_tags", "exact")([sample(completion, reference)])
    assert (score.value, score.parts["correct"]) == (value, correct)


@pytest.mark.parametrize(("completion", "correct"), [("42", 1.0), ("41", 0.0)])
def test_behind_a_verifier_as_gate_correct_is_that_of_the_gate(completion, correct, sample):
    (score,) = Gate("exact", lambda prompt, completion, reference: 0.1)([sample(completion, "42")])
    assert score.parts["correct"] == correct


def test_token_credit_passes_an_open_gate(fixed, sample):
    gate, reward = fixed(Score(1.0), Score(0.0)), fixed(Score(1.0, tokens=(0.25, 0.75)))
    passed, stopped = Gate(gate, reward)([sample(tokens=(1, 2)), sample(tokens=(1, 2))])
    assert passed.tokens == (0.25, 0.75)
    assert stopped.tokens is None


def test_compositions_nest(sample):
    nested = WeightedSum({"gated": (1.0, Gate("format_tags", "exact")), "format_tags": 0.5})
    solved, bare = score_samples(nested, [sample(SOLVED, SOLVED), sample("42", "42")])
    assert (solved.value, solved.parts["correct"]) == (1.5, 1.0)
    assert (bare.value, bare.parts["correct"]) == (0.0, 0.0)
