"""Tasks: what is asked, how an answer is scored, how a turn goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

import rewards
from textenv.tokenizer import CharTokenizer, Tokenizer

SPLITS = ("train", "eval")
MAX_DRAWS = 10_000


class Finish(IntEnum):
    """Why a completion ended. ``NONE`` while it goes on."""

    NONE = 0
    EOS = 1
    """the policy chose an end-of-sequence token"""
    STOP = 2
    """the policy chose one of the task's stop tokens"""
    LENGTH = 3
    """the completion's token budget is spent"""
    CONTEXT = 4
    """the context is full"""
    ERROR = 5
    """the episode broke"""

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with its reference answer. ``info`` travels to the reward and into ``info`` of the environment."""

    prompt: str
    reference: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Transcript:
    """An episode as text, so far: ``completions[i]`` was answered by ``replies[i]``."""

    problem: Problem
    completions: tuple[str, ...]
    replies: tuple[str, ...]
    finish: Finish
    episode_seed: tuple[int, ...] = ()

    @property
    def rng(self) -> np.random.Generator:
        """Randomness for this turn's reply: a function of the episode's seed and the turn, so that it can be replayed."""
        return np.random.default_rng([*self.episode_seed, len(self.replies)])


class Task:
    """Draws problems and, for several turns, replies. Subclass it, or register a function or a dataset instead.

    A subclass writes :meth:`draw`; everything else has a default. Options of the task are parameters of its constructor.

    Attributes:
        reward: what scores an episode: a name, a :class:`rewards.Reward` or ``(prompt, completion, reference) -> float``.
        max_new_tokens: budget of one completion, in tokens, its end token included.
        max_tokens: size of the context: prompt, completions and replies together.
        holdout: share of the problems kept for the ``eval`` split. Which split a problem belongs to is decided by the hash
            of :meth:`key`, so the two are disjoint whatever the seeds; 0 means that both splits draw from all problems.
        stop: texts of one token each that end a completion, beside the end-of-sequence token.
        system: a system message, for tokenizers with a chat template; else put on a line before the prompt.
        turns: how many completions an episode has at most.
        licence: the licence of the problems, or "generated".

    Example:
        >>> class Double(Task):
        ...     def draw(self, rng):
        ...         n = int(rng.integers(100))
        ...         return Problem(f"2*{n}=", str(2 * n))
        >>> problem = Double().problem(seed=0, split="train", index=3)
        >>> int(problem.reference) % 2
        0
    """

    reward: str | rewards.Reward | Callable[..., Any] = "exact"
    max_new_tokens: int = 32
    max_tokens: int = 256
    holdout: float = 0.2
    stop: tuple[str, ...] = ()
    system: str | None = None
    turns: int = 1
    licence: str = "generated"

    def draw(self, rng: np.random.Generator) -> Problem | tuple[str, Any]:
        """Draw a problem, all randomness from ``rng``: a :class:`Problem` or ``(prompt, reference)``."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(rng) -> Problem")

    def reply(self, transcript: Transcript) -> str | None:
        """What the environment says to the last completion; None ends the episode."""
        return None

    def demonstrate(self, transcript: Transcript) -> str | None:
        """A good next completion, to learn from before reinforcement; None if the task has none to show.

        ``transcript`` ends with the environment's last reply, or is empty at the start.
        """
        reference = transcript.problem.reference
        return reference if isinstance(reference, str) else None

    def key(self, problem: Problem) -> str:
        """What makes two problems the same one. It decides the split; the default is the prompt."""
        return problem.prompt

    def tokenizer(self) -> Tokenizer:
        """The tokenizer used when none is asked for."""
        return CharTokenizer()

    def problem(self, seed: int, split: str, index: int) -> Problem:
        """The problem at address ``(seed, split, index)``: the same in every view and on every platform.

        Raises:
            ValueError: the split does not exist, or no problem of it turns up.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        for _ in range(MAX_DRAWS):
            problem = as_problem(self.draw(rng), self)
            if self.holdout == 0 or self.split_of(problem) == split:
                return problem
        raise ValueError(
            f"{self} drew no problem of the {split!r} split in {MAX_DRAWS:,} tries: it has too few different problems to "
            f"hold out {self.holdout:.0%} of them; give it more, or set holdout=0 to train and evaluate on the same ones"
        )

    def size(self, split: str) -> int | None:
        """How many problems a split has; None when they are drawn and there is no end to them."""
        return None

    def preview(self, split: str) -> Sequence[Problem]:
        """Problems to look at before a run starts: the first few, or all where the task knows them."""
        return [self.problem(0, split, index) for index in range(16)]

    def split_of(self, problem: Problem) -> str:
        """The split a problem belongs to, by the hash of its key."""
        digest = hashlib.blake2b(self.key(problem).encode(), digest_size=8).digest()
        return "eval" if int.from_bytes(digest, "big") < self.holdout * 2**64 else "train"

    def __str__(self) -> str:
        return type(self).__name__


class FunctionTask(Task):
    """A task from a function ``rng -> (prompt, reference)``."""

    def __init__(self, function: Callable[[np.random.Generator], Problem | tuple[str, Any]]) -> None:
        self.draw = function  # type: ignore[method-assign, assignment]
        self.function = function
        self.__doc__ = function.__doc__

    def __str__(self) -> str:
        return self.function.__name__


def as_problem(drawn: Any, task: Task) -> Problem:
    """``drawn`` as a :class:`Problem`, refused with a clear error when it is neither that nor a (prompt, reference) pair."""
    problem = Problem(*drawn) if isinstance(drawn, tuple) and len(drawn) == 2 else drawn
    if not isinstance(problem, Problem) or not isinstance(problem.prompt, str) or not problem.prompt:
        raise ValueError(f"{task} must draw (prompt, reference) with a prompt that is not empty, got {drawn!r}")
    return problem
