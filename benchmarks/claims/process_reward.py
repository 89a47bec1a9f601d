"""Whether a process reward helps when the outcome is rare."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

import rewards
import textenv
from agents.ppo import PPO
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean, told
from benchmarks.claims.training import QUICK, Arm, Scale, accuracy, make, train
from textenv.task import Problem, Task
from textenv.tokenizer import CharTokenizer

FULL = Scale(steps=32, problems=512)
LETTERS = "abcd"
LENGTHS = {"rare": 4, "common": 1}
"""Of the combination. A policy without knowledge writes it, and ends, with probability 5^-5 and 5^-2."""
SHARED = {"prompts_per_step": 128, "group_size": 1}


class StepsReward(rewards.Reward):
    """A step is a letter, and the end. Each right one earns its share of 1 where it is written, up to the first wrong one.

    So it is 1 for the right answer alone, as the outcome reward is.

    Example:
        >>> [score] = StepsReward()([rewards.Sample(prompt="", completion="abd", reference="abc", tokens=(1, 2, 4, 0))])
        >>> score.value, score.tokens
        (0.5, (0.25, 0.25, 0.0, 0.0))
    """

    name = "steps"

    def __call__(self, samples: Sequence[rewards.Sample]) -> list[rewards.Score]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: rewards.Sample) -> rewards.Score:
        wanted = [*sample.reference, "end"]
        written = [*sample.completion, "end"][: len(sample.tokens)]  # an answer that was cut has no end
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(written, wanted, strict=False)))
        credit = [1 / len(wanted)] * right + [0.0] * (len(sample.tokens) - right)
        correct = float(right == len(wanted))
        return rewards.Score(sum(credit), {"correct": correct}, tuple(credit))


class Lock(Task):
    """Write the combination, always the same, that nobody tells.

    Args:
        length: how many letters it has.
        combination: which one it is.
    """

    holdout = 0.0
    max_tokens = 16

    def __init__(self, length: int, combination: int = 0) -> None:
        self.max_new_tokens = length + 2
        self.combination = "".join(np.random.default_rng([combination, length]).choice(list(LETTERS), size=length))

    def draw(self, rng: np.random.Generator) -> Problem:
        return Problem(LETTERS[0], self.combination)

    def demonstrate(self, transcript: object) -> None:
        return None

    def tokenizer(self) -> CharTokenizer:
        return CharTokenizer(LETTERS)


textenv.register("claims/Lock-outcome-v0", Lock, length=4)
textenv.register("claims/Lock-process-v0", Lock, length=4, reward=StepsReward())


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    scale = QUICK if quick else FULL
    found: dict[str, float | list[float]] = {}
    for often, length in LENGTHS.items():
        options = {"length": str(length), "combination": str(seed)}
        for kind in ("outcome", "process"):
            arm = Arm(PPO, {**SHARED, "env_options": options})
            agent = make(arm, folder / f"{often}-{kind}", seed, f"claims/Lock-{kind}-v0")
            logged = train(agent, scale.steps)
            found[f"{often} {kind}"] = accuracy(agent, scale.problems)
            found[f"{often} {kind} seen"] = sum(metrics["accuracy"] for metrics in logged) * 128
    return found


def judge(measured: Sequence[Measured]) -> Verdict:
    rare, common = (differences(measured, f"{often} process", f"{often} outcome") for often in LENGTHS)
    ends = "; ".join(
        f"{often} {mean(measured, f'{often} outcome'):.1%} by the outcome, which came "
        f"{mean(measured, f'{often} outcome seen'):.1f} times in training, and "
        f"{mean(measured, f'{often} process'):.1%} by steps"
        for often in LENGTHS
    )
    sentence = (
        f"Accuracy at the end: {ends}. Steps are worth {told(rare, '+.1f', 100)} points where a right answer is rare and "
        f"{told(common, '+.1f', 100)} where it is common."
    )
    return conclude([rare], sentence)


CLAIM = Claim(
    name="process_reward",
    statement="A reward for right steps helps where right outcomes are too rare to learn from.",
    source="Setlur et al. 2024, arXiv:2410.08146, section 5",
    protocol=f"A combination of {LENGTHS['rare']} letters out of four, or of {LENGTHS['common']}, that an untrained tiny model "
    f"has to find: PPO for {FULL.steps} steps of 128 episodes, paid for the whole combination at its end, or for each right "
    "letter up to the first wrong one, where it is written. A rule judges the steps, not a learned model. Accuracy of "
    f"{FULL.problems} samples at the end, on the problem that was trained on. Decides: with steps less with the outcome, on "
    "the long combination.",
    refuted_by="Where the outcome is rare, accuracy is lower with the reward for steps.",
    experiment=experiment,
    judge=judge,
)
