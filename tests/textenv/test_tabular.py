"""Tabular tasks: exact sums against finite differences, hand-made numbers and the environment."""

import gymnasium as gym
import numpy as np
import pytest

import textenv
from textenv.tasks import Tabular
from textenv.tasks.tabular import expected_return, list_choices, log_probability, policy_gradient

SIZES = [(2, 1), (2, 4), (3, 3), (5, 2)]


def random_logits(task, seed=0):
    return np.random.default_rng(seed).normal(size=(len(task.states), task.vocab))


@pytest.mark.parametrize(("vocab", "horizon"), SIZES)
def test_completions_are_all_there_are(vocab, horizon):
    task = Tabular(vocab, horizon)
    letters = vocab - 1
    assert len(task.states) == sum(letters**t for t in range(horizon))
    assert len(set(task.completions)) == len(task.completions) == len(task.states) + letters**horizon
    for completion in task.completions:
        assert 0 not in completion[:-1]
        assert completion[-1] == 0 or len(completion) == horizon
    np.testing.assert_array_equal(
        task.choice_CSV.sum(axis=(1, 2)), [len(completion) for completion in task.completions]
    )


@pytest.mark.parametrize(("vocab", "horizon"), SIZES)
def test_probabilities_sum_to_one(vocab, horizon):
    task = Tabular(vocab, horizon)
    logp_C = log_probability(10 * random_logits(task), task.choice_CSV)
    assert np.exp(logp_C).sum() == pytest.approx(1.0, abs=1e-12)


def test_a_completion_is_as_likely_as_its_tokens_one_after_the_other():
    task = Tabular(vocab=3, horizon=3)
    logits_SV = random_logits(task)
    probability_SV = np.exp(logits_SV) / np.exp(logits_SV).sum(axis=1, keepdims=True)
    at = {state: probability_SV[s] for s, state in enumerate(task.states)}
    logp_C = log_probability(logits_SV, task.choice_CSV)
    assert np.exp(logp_C[task.completions.index((2, 1, 0))]) == pytest.approx(at[()][2] * at[2,][1] * at[2, 1][0])
    assert np.exp(logp_C[task.completions.index((2, 1, 2))]) == pytest.approx(at[()][2] * at[2,][1] * at[2, 1][2])


def test_logits_of_any_size_stay_finite():
    logits_SV = np.array([[1000.0, 0.0], [0.0, -1000.0]])
    choice_CSV = list_choices(vocab=2, horizon=2)
    np.testing.assert_allclose(log_probability(logits_SV, choice_CSV), [0.0, -1000.0, -2000.0])


def test_gradient_by_hand():
    # One choice between the end (returns 0.2) and a token (returns 1), with probabilities 1/4 and 3/4:
    # E[R] = 0.8; dE/dlogit = p (R - E) = 0.25 * -0.6 = -0.15 and 0.75 * 0.2 = 0.15.
    arguments = np.log([[1.0, 3.0]]), list_choices(vocab=2, horizon=1), np.array([0.2, 1.0])
    assert expected_return(*arguments) == pytest.approx(0.8)
    np.testing.assert_allclose(policy_gradient(*arguments), [[-0.15, 0.15]])


@pytest.mark.parametrize(("vocab", "horizon"), SIZES)
def test_gradient_agrees_with_finite_differences(vocab, horizon):
    task = Tabular(vocab, horizon, table_seed=1)
    logits_SV, step = random_logits(task), 1e-5
    slope_SV = np.zeros_like(logits_SV)
    for index in np.ndindex(logits_SV.shape):
        bump_SV = np.zeros_like(logits_SV)
        bump_SV[index] = step
        above, below = (expected_return(logits_SV + sign * bump_SV, task.choice_CSV, task.return_C) for sign in (1, -1))
        slope_SV[index] = (above - below) / (2 * step)
    np.testing.assert_allclose(
        policy_gradient(logits_SV, task.choice_CSV, task.return_C), slope_SV, rtol=1e-6, atol=1e-10
    )


def test_following_the_gradient_reaches_the_optimum():
    task = Tabular(vocab=3, horizon=2, table_seed=3)
    logits_SV = np.zeros((len(task.states), task.vocab))
    for _ in range(2000):
        logits_SV += 5 * policy_gradient(logits_SV, task.choice_CSV, task.return_C)
    assert expected_return(logits_SV, task.choice_CSV, task.return_C) == pytest.approx(1.0, abs=0.01)


def test_returns_are_a_fixed_table_whose_best_is_one():
    task = Tabular()
    assert task.return_C.dtype == np.float64
    assert task.return_C.min() >= 0
    assert task.return_C.max() == 1
    np.testing.assert_array_equal(task.return_C, Tabular().return_C)
    assert not np.array_equal(task.return_C, Tabular(table_seed=1).return_C)
    pinned = [0.03456552629287323, 0.30979322522192243, 0.14614777737826143]
    np.testing.assert_allclose(task.return_C[:3], pinned, rtol=1e-12)


@pytest.mark.parametrize(("vocab", "horizon"), SIZES)
def test_the_environment_ends_and_pays_every_completion_as_listed(vocab, horizon):
    task = Tabular(vocab, horizon)
    env = gym.make("textenv/Tabular-v0", level="token", vocab=vocab, horizon=horizon)
    assert env.action_space == gym.spaces.Discrete(vocab)
    for completion, value in zip(task.completions, task.return_C, strict=True):
        env.reset(seed=0)
        steps = [env.step(token) for token in completion]
        assert [terminated for _, _, terminated, _, _ in steps] == [False] * (len(completion) - 1) + [True]
        assert [reward for _, reward, *_ in steps] == [0.0] * (len(completion) - 1) + [value]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 1}, "vocab must be a whole number from 2 to 27, got 1"),
        ({"horizon": 0}, "horizon must be a whole number from 1 to 1024, got 0"),
        ({"vocab": 5, "horizon": 5}, r"vocab\*\*horizon must be at most 1024, got 5\*\*5"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        textenv.make_task("textenv/Tabular-v0", **options)
