"""Whether single-turn training makes retries repeat themselves, and unary feedback undoes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import textenv
from agents.core.agent import Agent
from agents.core.rollout import Rollout
from agents.grpo import GRPO
from benchmarks.claims.base import Claim, Measured, Verdict, conclude, differences, mean, told
from benchmarks.claims.training import QUICK, SORT, Arm, Scale, make, train
from textenv import make_task
from textenv.task import Transcript
from textenv.tasks.try_again import TryAgain

FULL = Scale(steps=50, problems=256)
RETRIES = "claims/Retries-v0"
TURNS = 5


@textenv.register(RETRIES)
class Retries(TryAgain):
    """Words to sort, with retries. What is shown, and so the start, is the right answer or a guess, each as often."""

    def __init__(self) -> None:
        super().__init__(SORT, turns=TURNS)

    def demonstrate(self, transcript: Transcript) -> str:
        right, rng = transcript.problem.reference, transcript.rng
        return "".join(rng.permutation(list(right))) if rng.random() < 0.5 else right


SHARED = {"aggregation": "token_mean"}


def experiment(seed: int, folder: Path, quick: bool = False) -> Measured:
    scale = QUICK if quick else FULL
    multi = make(Arm(GRPO, SHARED), folder / "multi", seed, RETRIES)
    multi.policy.save(folder / "start")
    found = looked_at("start", multi, scale.problems)
    train(multi, scale.steps)
    single = make(Arm(GRPO, SHARED), folder / "single", seed, SORT, model=str(folder / "start"))
    train(single, scale.steps)
    return found | looked_at("single", single, scale.problems) | looked_at("multi", multi, scale.problems)


def looked_at(name: str, agent: Agent, problems: int) -> dict[str, float | list[float]]:
    """What a policy does with several attempts at held-out problems, sampled at temperature 1."""
    rollout = Rollout(make_task(RETRIES), agent.engine, agent.policy, seed=agent.config.seed, split="eval")
    batch = rollout.collect(0, problems, 1, temperature=1.0, seed=(agent.config.seed,))
    right_B = (batch.outcome_B >= 1).tolist()
    at_once_B = [right and len(turns) == 1 for right, turns in zip(right_B, batch.completions, strict=True)]
    return {
        f"{name} repeats": repeated(batch.completions),
        f"{name} solved at once": sum(at_once_B) / problems,
        f"{name} solved": sum(right_B) / problems,
    }


def repeated(turns_B: Sequence[Sequence[str]]) -> float:
    """Share of retries that give an answer which the same episode has given before; 0 of none.

    Example:
        >>> repeated([["ab", "ab", "ba"], ["ab"], ["b"]])
        0.5
    """
    retries = sum(len(turns) - 1 for turns in turns_B)
    fresh = sum(len({" ".join(turn.casefold().split()) for turn in turns}) - 1 for turns in turns_B)
    return 1 - fresh / retries if retries else 0.0


def judge(measured: Sequence[Measured]) -> Verdict:
    more = differences(measured, "single repeats", "start repeats")
    undone = differences(measured, "single repeats", "multi repeats")
    shares = ", ".join(f"{name} {mean(measured, f'{name} repeats'):.1%}" for name in ("start", "single", "multi"))
    solved = ", ".join(
        f"{name} {mean(measured, f'{name} solved at once'):.1%} and {mean(measured, f'{name} solved'):.1%}"
        for name in ("start", "single", "multi")
    )
    sentence = (
        f"Retries that repeat an answer: {shares}; single-turn training adds {told(more, '+.1f', 100)} points, and is "
        f"{told(undone, '+.1f', 100)} above multi-turn training. Solved at once and in {TURNS} turns: {solved}."
    )
    return conclude([more, undone], sentence)


CLAIM = Claim(
    name="retries_repeat",
    statement="Training on single turns makes a policy repeat its answer when told that it is wrong; training with that unary "
    "feedback over several turns undoes it.",
    source="Liu et al. 2025 (UFO), arXiv:2507.14295, sections 2 and 5",
    protocol="A start that imitates right answers and guesses, each as often, over up to five turns of textenv/TryAgain-v0 on "
    f"words to sort; GRPO from it for {FULL.steps} steps of 128 episodes on single turns (textenv/Sort-v0) and on all five "
    f"(decay 0.5, repetition 0.5; the paper has PPO). Then {FULL.problems} held-out problems with up to five turns at "
    "temperature 1: the share of retries that repeat an answer of the same episode. Decides: single-turn training less "
    "start, and less multi-turn training.",
    refuted_by="Single-turn training repeats less than the start, or multi-turn training more than single-turn training.",
    experiment=experiment,
    judge=judge,
)
