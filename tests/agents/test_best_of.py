"""Best-of-n sampling: figures by hand, and against every choice of n completions there is."""

import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import textenv
from agents.core import best_of as module
from agents.core.best_of import best_of, evaluate_best_of, kl_bound, pick_probability, sizes
from agents.core.engines.native import NativeEngine
from agents.core.policy import Policy
from agents.core.rollout import Rollout
from rewards import Score
from tests.agents.conftest import make_model
from textenv import Problem, Task


def test_the_examples_in_its_docstrings_hold():
    assert doctest.testmod(module).failed == 0


def test_the_best_of_two_of_four_by_hand():
    # of the six pairs of 0, 1, 2, 3 one has 1 as its best, two have 2, three have 3
    reward_N = np.array([0.0, 1.0, 2.0, 3.0])
    assert pick_probability(reward_N, 2) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert pick_probability(reward_N, 2) @ reward_N == pytest.approx(14 / 6)
    assert pick_probability(reward_N[[2, 0, 3, 1]], 2) == pytest.approx([2 / 6, 0, 3 / 6, 1 / 6])


def test_the_first_of_equal_ones_is_picked():
    # of the three pairs the first is in two, the second is the better of the third
    assert pick_probability(np.ones(3), 2) == pytest.approx([2 / 3, 1 / 3, 0])
    assert pick_probability(np.ones(3), 3) == pytest.approx([1, 0, 0])


@pytest.mark.parametrize("n", range(1, 6))
def test_the_best_of_one_is_the_mean_and_of_all_the_best(n):
    reward_N = np.array([0.3, -1.0, 2.5, 0.3, 1.0])[:n]
    assert pick_probability(reward_N, 1) == pytest.approx([1 / n] * n)
    assert pick_probability(reward_N, n) @ reward_N == pytest.approx(reward_N.max())


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=7), st.data())
@settings(max_examples=150, deadline=None)
def test_it_agrees_with_going_through_all_choices(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    picked = [max(choice, key=lambda i: (rewards[i], -i)) for choice in itertools.combinations(range(len(rewards)), n)]
    expected = np.bincount(picked, minlength=len(rewards)) / len(picked)
    assert pick_probability(np.array(rewards, dtype=float), n) == pytest.approx(expected)


def test_many_completions_do_not_overflow():
    probability_N = pick_probability(np.arange(2000.0), 1000)
    assert probability_N.sum() == pytest.approx(1)
    assert probability_N[-1] == pytest.approx(0.5)


def test_the_estimate_from_more_completions_is_unbiased():
    # a reward is 1 with probability .3: the best of 3 earns 1 - .7³ on average, estimated from 5 each
    rng = np.random.default_rng(0)
    groups = [[Score(float(x)) for x in rng.random(5) < 0.3] for _ in range(4000)]
    row = best_of(groups, 3)
    assert row.reward == pytest.approx(1 - 0.7**3, abs=0.02)
    assert row.reward_low < 1 - 0.7**3 < row.reward_high


def test_the_kl_bound_by_hand():
    # log 4 - 3/4
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(0.636294, abs=1e-6)


def test_the_sizes_double_and_end_with_all():
    assert [sizes(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_accuracy_is_that_of_the_one_picked_by_reward():
    # The best paid of the second problem is wrong: the best of two earns more and is right less often.
    groups = [
        [Score(0.0, {"correct": 0.0}), Score(1.0, {"correct": 1.0})],
        [Score(0.5, {"correct": 1.0}), Score(0.9, {"correct": 0.0})],
        [Score(0.2, {"correct": 1.0}), Score(0.4, {"correct": 0.0})],
    ]
    one, two = best_of(groups, 1), best_of(groups, 2)
    assert (one.reward, one.accuracy) == pytest.approx((0.5, 0.5))
    assert (two.reward, two.accuracy) == pytest.approx((2.3 / 3, 1 / 3))
    assert (two.n, two.problems, two.kl_bound) == (2, 3, pytest.approx(math.log(2) - 0.5))


def test_a_problem_counts_as_far_as_its_graded_completions_go():
    groups = [[Score(1.0), Score(0.0), Score(0.0)], [Score(0.0)], []]
    assert [best_of(groups, n).problems for n in (1, 2, 3)] == [2, 1, 1]
    assert best_of(groups, 1).reward == pytest.approx((1 / 3 + 0) / 2)
    assert best_of(groups, 2).reward == pytest.approx(2 / 3)


def test_intervals_are_over_problems_and_not_over_completions():
    few = best_of([[Score(1.0)] * 64, [Score(0.0)] * 64], 1)
    assert (few.reward, few.reward_low, few.reward_high) == (0.5, 0, 1)


class Letter(Task):
    """Asks for a letter; of every fourth problem the reward cannot be told."""

    holdout = 0
    max_new_tokens, max_tokens = 2, 8

    def draw(self, rng):
        return Problem("a", "abcd"[rng.integers(4)])

    def reward(self, prompt, completion, reference):
        if reference == "d":
            raise ZeroDivisionError("this reference cannot be read")
        return float(completion[:1] == reference)

    def tokenizer(self):
        return textenv.make_task("textenv/ProbeOneHot-v0").tokenizer()


def rollout_of(task):
    tokenizer = task.tokenizer()
    policy = Policy(make_model("llama", vocab_size=tokenizer.vocab_size), tokenizer)
    return Rollout(task, NativeEngine(policy), policy, split="eval")


def test_a_policy_is_measured_by_its_samples(monkeypatch):
    monkeypatch.setattr(module, "EVAL_BATCH", 32)  # so that several batches are sampled
    rollout = rollout_of(Letter())
    evaluation = evaluate_best_of(rollout, 21, 6)
    unreadable = sum(rollout.task.problem(0, "eval", index).reference == "d" for index in range(21))
    assert unreadable > 0
    assert (evaluation.problems, evaluation.completions, evaluation.ungraded) == (21, 6, 6 * unreadable)
    assert [row.n for row in evaluation.table] == [1, 2, 4, 6]
    assert {row.problems for row in evaluation.table} == {21 - unreadable}
    batches = [rollout.collect(i, min(5, 21 - i), 6, temperature=1.0, seed=(0, i)) for i in range(0, 21, 5)]
    values = [score.value for batch in batches for score in batch.scores if score.value is not None]
    assert evaluation.table[0].reward == pytest.approx(np.mean(values))
    assert evaluation.table[-1].reward == pytest.approx(np.reshape(values, (-1, 6)).max(axis=1).mean())
    rewards = [row.reward for row in evaluation.table]
    assert rewards == sorted(rewards)
    assert rewards[0] < rewards[-1]


def test_a_dataset_is_gone_through_once():
    class Three(Letter):
        def size(self, split):
            return 3

        def reward(self, prompt, completion, reference):
            return 0.0

    assert evaluate_best_of(rollout_of(Three()), 500, 2).problems == 3


@pytest.mark.parametrize(
    ("completions", "temperature", "message"),
    [
        (
            8,
            0.0,
            "temperature must be above 0 for the best of 8, since greedily all completions .* are the same, got 0",
        ),
        (8, -1.0, "temperature must be above 0"),
        (0, 1.0, "best_of must be at least 1, got 0"),
    ],
)
def test_what_has_no_best_is_refused(completions, temperature, message):
    with pytest.raises(ValueError, match=message):
        evaluate_best_of(rollout_of(Letter()), 4, completions, temperature=temperature)
