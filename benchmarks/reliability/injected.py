"""Faults to inject into a training: rewards and engines that break, files that are damaged, a clock that goes back."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from agents.core.agent import Agent
from agents.core.engines.base import Completions, Engine, OnEnd, Sampling
from agents.core.policy import Policy
from rewards import Reward, Sample, Score

# --- Rewards ---

BadScores = Callable[[list[Score]], Any]
"""Takes the right scores of a batch, and gives what a broken reward returns."""


class BreakingReward(Reward):
    """Another reward, until in training it has scored so many batches; then ``fault`` has its way.

    Args:
        reward: the other one.
        fault: what is returned in the place of its scores.
        after: batches.
    """

    def __init__(self, reward: Reward, fault: BadScores, after: int) -> None:
        self.reward, self.fault, self.left = reward, fault, after
        self.name = reward.name

    def components(self) -> Mapping[str, Reward]:
        return {"reward": self.reward}

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        scores = self.reward(samples)
        if samples[0].split == "train":
            self.left -= 1
        return self.fault(scores) if self.left < 0 else scores


def raises(scores: list[Score]) -> Any:
    raise ConnectionError("the grader does not answer")


def scores_nan(scores: list[Score]) -> Any:
    return [Score(float("nan")) for _ in scores]


def scores_too_few(scores: list[Score]) -> Any:
    return scores[:-1]


def grades_three_of_four(scores: list[Score]) -> Any:
    return [Score(None, error="the grader does not answer") if at % 4 == 0 else x for at, x in enumerate(scores)]


def hangs(scores: list[Score]) -> Any:
    time.sleep(3600)


# --- Engines ---

BadCompletions = Callable[[Completions, Policy], Completions]
"""Takes what an engine wrote, and gives what a broken one returns."""


class BreakingEngine(Engine):
    """Another engine, until it has sampled so many times; then ``fault`` has its way, but not with greedy evaluations.

    Args:
        engine: the other one.
        fault: makes something else of its completions.
        after: calls.
    """

    def __init__(self, engine: Engine, fault: BadCompletions, after: int) -> None:
        self.engine, self.fault, self.left = engine, fault, after

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        budgets: Sequence[int] | None = None,
        on_end: OnEnd | None = None,
    ) -> Completions:
        completions = self.engine.generate(prompts, sampling, n, budgets, on_end)
        if sampling.temperature == 0:
            return completions
        self.left -= 1
        return self.fault(completions, self.engine.policy) if self.left < 0 else completions

    def sync(self, policy: Policy) -> None:
        self.engine.sync(policy)

    @property
    def policy(self) -> Policy:  # type: ignore[override]
        return self.engine.policy

    @property
    def version(self) -> int:  # type: ignore[override]
        return self.engine.version


def _with_first(completions: Completions, tokens: Any, logprobs: Any = None) -> Completions:
    """With another first completion; where its log-probabilities are not given either, each is -1."""
    logprobs = np.full(len(tokens), -1, dtype=np.float32) if logprobs is None else logprobs
    return replace(
        completions, tokens=[tokens, *completions.tokens[1:]], logprobs=[logprobs, *completions.logprobs[1:]]
    )


def outside_the_vocabulary(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, np.append(completions.tokens[0][:-1], policy.vocab_size))


def negative_ids(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, np.append(completions.tokens[0][:-1], -1))


def no_ids(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, completions.tokens[0] + 0.5)


def nothing(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, completions.tokens[0][:0])


def without_an_end(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, np.ones(1, dtype=np.int64))


def beyond_the_end(completions: Completions, policy: Policy) -> Completions:
    end = policy.tokenizer.eos_ids[0]
    return _with_first(completions, np.array([1, end, 1, end]))


def over_the_budget(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, np.ones(1000, dtype=np.int64))


def nan_logprobs(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, completions.tokens[0], completions.logprobs[0] * np.float32("nan"))


def probabilities_above_one(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, completions.tokens[0], np.full(len(completions.tokens[0]), 0.5, dtype=np.float32))


def a_logprob_too_few(completions: Completions, policy: Policy) -> Completions:
    return _with_first(completions, completions.tokens[0], completions.logprobs[0][:-1])


def too_few(completions: Completions, policy: Policy) -> Completions:
    return Completions(completions.tokens[:-1], completions.logprobs[:-1], completions.finish[:-1])


def wrong_logprobs(completions: Completions, policy: Policy) -> Completions:
    """Those of weights that are not the learner's any more, say."""
    return replace(completions, logprobs=[row - np.float32(0.3) for row in completions.logprobs])


GARBAGE: dict[BadCompletions, str] = {
    outside_the_vocabulary: "which stands for no text",
    negative_ids: "the id -1 in completion 0",
    no_ids: "tokens of type float64, where ids belong",
    nothing: "0 tokens as completion 0, which may have from 1 to",
    without_an_end: "1 tokens as completion 0, which neither end nor fill their budget of",
    beyond_the_end: "tokens after the end of completion 0",
    over_the_budget: "1000 tokens as completion 0, which may have from 1 to",
    nan_logprobs: "the log-probability nan in completion 0",
    probabilities_above_one: "the log-probability 0.5 in completion 0",
    a_logprob_too_few: "log-probabilities for",
    too_few: "of each were asked for",
}
"""What an engine never may give, and what is said of it."""


def break_reward(agent: Agent, fault: BadScores, after: int) -> None:
    """Let the reward of an agent's training break after so many steps."""
    agent.reward = BreakingReward(agent.reward, fault, after)


def break_engine(agent: Agent, fault: BadCompletions, after: int) -> None:
    """Let the engine of an agent break after so many steps."""
    agent.engine = BreakingEngine(agent.engine, fault, after)


# --- Disks and clocks ---


def truncate(path: Path) -> None:
    """Leave half of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    """Change the lowest bit of a file's middle byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fill_disk(folder: Path) -> Path:
    """Write a file into ``folder`` until nothing more fits on its disk."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return path


@contextmanager
def clock_going_back() -> Iterator[None]:
    """Within, the time of day goes back by an hour each time that somebody asks for it."""
    now = time.time()
    with mock.patch("time.time", side_effect=(now - 3600 * hours for hours in count(1))):
        yield
