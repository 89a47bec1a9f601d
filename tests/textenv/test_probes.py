"""Probes: their optimum and the sign of their gradient are what their docstrings say, by exact sums."""

import numpy as np
import pytest

import rewards
from rewards import Sample
from textenv.tasks.probes import Constant, DelayedCopy, Length, OneHot, Substring
from textenv.tasks.tabular import expected_return, list_choices, list_completions, list_states, policy_gradient

VOCAB, EOS = 6, 0
A, B, C = 1, 2, 3


class Exact:
    """All completions of a probe with a short budget, and what they return."""

    def __init__(self, task, index=0, budget=None):
        budget = budget or task.max_new_tokens
        task.max_new_tokens = budget
        self.problem = task.problem(0, "train", index)
        self.states = list_states(VOCAB, budget)
        self.completions = list_completions(VOCAB, budget)
        self.choice_CSV = list_choices(VOCAB, budget)
        self.scores = rewards.as_reward(task.reward)([self.sample(task, tokens) for tokens in self.completions])
        self.return_C = np.array([score.value for score in self.scores])

    def sample(self, task, tokens):
        text = task.tokenizer().decode([token for token in tokens if token != EOS])
        return Sample(prompt=self.problem.prompt, completion=text, reference=self.problem.reference)

    def gradient(self, state, logits_SV=None):
        logits_SV = np.zeros((len(self.states), VOCAB)) if logits_SV is None else logits_SV
        return policy_gradient(logits_SV, self.choice_CSV, self.return_C)[self.states.index(state)]

    def returned(self, *tokens):
        return self.return_C[self.completions.index(tokens)]


def only_rises(gradient_V, token):
    return gradient_V[token] > 1e-9 and all(np.delete(gradient_V, token) < -1e-9)


def only_falls(gradient_V, token):
    return only_rises(-gradient_V, token) and np.ptp(np.delete(gradient_V, token)) < 1e-12


@pytest.mark.parametrize("task", [Constant(), OneHot(), DelayedCopy(delay=1), Length(), Substring()], ids=str)
def test_the_vocabulary_is_small_and_the_optimum_one(task):
    exact = Exact(task, budget=3)
    assert task.tokenizer().vocab_size == VOCAB
    assert exact.return_C.min() >= 0
    assert exact.return_C.max() == 1
    assert task.problem(0, "eval", 0).prompt in "abcd"


def test_constant_has_no_gradient_at_any_policy():
    exact = Exact(Constant(), budget=3)
    logits_SV = np.random.default_rng(0).normal(size=(len(exact.states), VOCAB))
    assert expected_return(logits_SV, exact.choice_CSV, exact.return_C) == pytest.approx(1.0)
    np.testing.assert_allclose(policy_gradient(logits_SV, exact.choice_CSV, exact.return_C), 0.0, atol=1e-15)


@pytest.mark.parametrize(("target", "token"), [("a", A), ("b", B)])
def test_one_hot_raises_the_target_at_the_first_token_and_moves_nothing_at_the_second(target, token):
    exact = Exact(OneHot(target))
    assert only_rises(exact.gradient(()), token)
    for first in range(1, VOCAB):
        np.testing.assert_allclose(exact.gradient((first,)), 0.0, atol=1e-15)
    assert exact.returned(token, EOS) == exact.returned(token, token) == 1


def test_one_hot_lowers_the_others_in_proportion_to_their_probability():
    exact = Exact(OneHot("b"))
    logits_SV = np.random.default_rng(0).normal(size=(len(exact.states), VOCAB))
    probability_V = np.exp(logits_SV[0]) / np.exp(logits_SV[0]).sum()
    share_V = exact.gradient((), logits_SV) / probability_V
    np.testing.assert_allclose(np.delete(share_V, B), -probability_V[B])


def test_delayed_copy_raises_the_prompts_character_after_the_delay_and_only_lowers_the_end_before():
    exact = Exact(DelayedCopy(delay=1))
    copied = exact.problem.prompt
    token = 1 + "abcd".index(copied)
    assert only_falls(exact.gradient(()), EOS)
    for first in range(1, VOCAB):
        assert only_rises(exact.gradient((first,)), token)
        np.testing.assert_allclose(exact.gradient((first, token)), 0.0, atol=1e-15)


def test_delayed_copy_asks_for_every_character():
    assert {DelayedCopy().problem(0, "train", index).prompt for index in range(30)} == set("abcd")


def test_length_lowers_the_end_at_every_token():
    exact = Exact(Length(), budget=3)
    assert all(only_falls(exact.gradient(state), EOS) for state in exact.states)
    assert exact.returned(EOS) == 0
    assert exact.returned(A, B, C) == 1


def test_length_pays_by_the_share_of_the_budget_that_is_set():
    task = Length()
    task.max_new_tokens = 12
    assert task.reward("a", "abc", None) == 0.25


def test_substring_raises_the_answer_and_then_the_end():
    exact = Exact(Substring(), budget=3)
    token = 1 + "abcd".index(exact.problem.prompt)
    assert only_rises(exact.gradient(()), token)
    assert only_rises(exact.gradient((token,)), EOS)


def test_substring_never_pays_for_writing_everything():
    task = Substring()
    samples = [Sample(prompt="c", completion=text, reference="c") for text in ("c", "abcd", "cccccc", "ab", "", "c.")]
    scores = rewards.as_reward(task.reward)(samples)
    assert [score.value for score in scores] == [1, 0, 0, 0, 0, 0]
    assert [score.correct for score in scores] == [True, False, False, False, False, False]
    assert [score.parts["contains"] for score in scores] == [1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("target", ["", "ab", "x"])
def test_one_hot_refuses_another_target(target):
    with pytest.raises(ValueError, match=f"target must be one of the characters abcd, got '{target}'"):
        OneHot(target)


def test_delayed_copy_refuses_another_delay():
    with pytest.raises(ValueError, match="delay must be a whole number from 0 to 8, got 9"):
        DelayedCopy(delay=9)
