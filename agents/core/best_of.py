"""Best-of-n sampling: what a policy earns when the best of n completions is picked by their reward. Nothing is trained.

From N completions of a problem comes an unbiased figure for every n up to N: the mean over all choices of n of them.

Shapes: N graded completions of one problem, in the order they were sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.core.config import require
from agents.core.evaluate import EVAL_BATCH, mean_interval
from agents.core.rollout import Rollout
from rewards import Score


@dataclass(frozen=True)
class BestOf:
    """What the best of n completions earns, picked by their reward.

    Attributes:
        n: completions to pick from.
        problems: with at least n graded completions; the others are left out.
        reward, reward_low, reward_high: expected reward of the one picked, and its 95 % bootstrap interval over problems.
        accuracy, accuracy_low, accuracy_high: how often it is right, likewise.
        kl_bound: most that picking may move the policy, in nats: see :func:`kl_bound`.
    """

    n: int
    problems: int
    reward: float
    reward_low: float
    reward_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    kl_bound: float

    def reward_text(self) -> str:
        """Expected reward with its interval."""
        return f"{self.reward:.3f} [{self.reward_low:.3f}, {self.reward_high:.3f}]"

    def accuracy_text(self) -> str:
        """Accuracy with its interval, in per cent."""
        return f"{100 * self.accuracy:.1f} % [{100 * self.accuracy_low:.1f}, {100 * self.accuracy_high:.1f}]"


@dataclass(frozen=True)
class BestOfEvaluation:
    """What a policy earns on held-out problems by best-of-n sampling.

    Attributes:
        problems: how many were asked.
        completions: sampled for each.
        temperature: of the sampling.
        ungraded: how many completions could not be graded; they are as if they had not been sampled.
        table: for n = 1, 2, 4, … and ``completions``.
    """

    problems: int
    completions: int
    temperature: float
    ungraded: int
    table: list[BestOf]


def check_best_of(completions: int, temperature: float) -> None:
    """Refuse what there is no best of, before a model loads.

    Raises:
        ValueError: no completion, or several of a temperature that makes them all the same.
    """
    require(completions >= 1, "best_of", "at least 1", completions)
    require(
        completions == 1 or temperature > 0,
        "temperature",
        f"above 0 for the best of {completions}, since greedily all completions of a problem are the same",
        temperature,
    )


def evaluate_best_of(
    rollout: Rollout, problems: int, completions: int, *, temperature: float = 1.0, seed: int = 0
) -> BestOfEvaluation:
    """Sample ``completions`` for each of the first ``problems`` problems of ``rollout``; a dataset is gone through once.

    Raises:
        ValueError: see :func:`check_best_of`.
    """
    check_best_of(completions, temperature)
    problems = min(problems, rollout.task.size(rollout.split) or problems)
    at_once = max(1, EVAL_BATCH // completions)
    scores: list[list[Score]] = []
    for index in range(0, problems, at_once):
        prompts = min(at_once, problems - index)
        batch = rollout.collect(index, prompts, completions, temperature=temperature, seed=(seed, index))
        scores += [batch.scores[row : row + completions] for row in range(0, len(batch), completions)]
    graded = [[score for score in group if score.value is not None] for group in scores]
    return BestOfEvaluation(
        problems=problems,
        completions=completions,
        temperature=temperature,
        ungraded=problems * completions - sum(map(len, graded)),
        table=[best_of(graded, n) for n in sizes(completions)],
    )


def sizes(completions: int) -> list[int]:
    """1, 2, 4, … and ``completions`` itself.

    Example:
        >>> sizes(8), sizes(6)
        ([1, 2, 4, 8], [1, 2, 4, 6])
    """
    return [2**i for i in range((completions - 1).bit_length())] + [completions]


def best_of(groups: Sequence[Sequence[Score]], n: int) -> BestOf:
    """The figures for the best of ``n``, from the graded scores of each problem."""
    rewards, accuracies = [], []
    for group in groups:
        if len(group) >= n:
            reward_N = np.array([score.value for score in group])
            picked_N = pick_probability(reward_N, n)
            rewards.append(float(picked_N @ reward_N))
            accuracies.append(float(picked_N @ [float(bool(score.correct)) for score in group]))
    return BestOf(n, len(rewards), *mean_interval(rewards), *mean_interval(accuracies), kl_bound(n))


def pick_probability(reward_N: np.ndarray, n: int) -> np.ndarray:
    """How likely each completion is to be the best of n, drawn from all N without replacement; ties go to the first.

    The i-th from below, counted from 1, is picked when the other n - 1 all come from the i - 1 below it: with probability
    ``C(i - 1, n - 1) / C(N, n)``. Any figure of the completions, averaged with these weights, is an unbiased estimate of
    what it is for the best of n fresh ones.

    Returns:
        ``(N,)``, summing to 1.

    Example:
        >>> (pick_probability(np.array([0.0, 1.0, 2.0, 3.0]), 2) @ [0.0, 1.0, 2.0, 3.0]).round(6)
        np.float64(2.333333)
    """
    total = len(reward_N)
    upwards = np.lexsort((-np.arange(total), reward_N))  # of equal ones the first comes last
    probability_N = np.zeros(total)
    probability_N[upwards] = [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]
    return probability_N


def kl_bound(n: int) -> float:
    """``log n - (n - 1) / n``: the KL from the policy to its best-of-n, in nats, is at most this (arXiv:2401.01879).

    Example:
        >>> round(kl_bound(4), 6)
        0.636294
    """
    return math.log(n) - (n - 1) / n
