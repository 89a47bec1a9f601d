"""Contenders that are only evaluated: their results have one point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import rewards
from agents.core.agent import load_policy
from agents.core.best_of import check_best_of, kl_bound
from agents.core.config import AgentConfig
from benchmarks.harness.arena import Arena
from benchmarks.harness.contenders import check_settings
from benchmarks.harness.measuring import (
    HELD_OUT_SEED,
    Answer,
    Played,
    PolicyPlayer,
    answers_of,
    held_out,
    problems_of,
)
from benchmarks.harness.suite import EvaluationPlan
from rewards.judge.chat import BaseChat, Reply, Request
from rewards.judge.client import Chat
from textenv.problems import ProblemStream
from textenv.task import Finish, Problem, Task, Transcript


class Start:
    """What all contenders of the environment start from."""

    def train(self, arena: Arena) -> None:
        """Not at all: the arena measures the start."""


class Model:
    """A model in this process, untrained.

    Args:
        model: a transformers folder, a run's folder or a hub name.
    """

    def __init__(self, model: str) -> None:
        self.model = model

    def train(self, arena: Arena) -> None:
        config = AgentConfig(model=self.model, env_options=arena.options)
        policy = load_policy(arena.env_id, arena.task, config)
        arena.evaluate(PolicyPlayer(arena.task, policy, arena.seed))


class BestOfN:
    """The start, and of n answers the one with the highest reward. Of equal ones it is the first.

    Of how far this moves the start the harness knows a bound alone, the metric ``sampled/kl_bound``; see
    :func:`agents.core.best_of.kl_bound`.

    Args:
        n: answers to pick from.
        reward: what picks, a registered name; default the environment's own, which then also measures.
        temperature: of the answers.

    Raises:
        ValueError: n or the temperature are out of their range; no reward has this name.
    """

    def __init__(self, n: int = 8, reward: str | None = None, temperature: float = 1.0) -> None:
        check_best_of(n, temperature)
        self.n, self.temperature = n, temperature
        self.reward = None if reward is None else rewards.as_reward(reward)

    def train(self, arena: Arena) -> None:
        arena.evaluate(BestOfPlayer(PolicyPlayer(arena.task, arena.policy(), arena.seed), self))


class BestOfPlayer:
    """Plays as :class:`BestOfN` says; its greedy answer is one such pick."""

    def __init__(self, player: PolicyPlayer, best_of: BestOfN) -> None:
        self.player, self.best_of = player, best_of

    def play(self, plan: EvaluationPlan, samples: int, temperature: float) -> Played:
        n = self.best_of.n
        problems: list[Problem] = []
        picked: list[Answer] = []
        for batch in self.player.batches(plan, samples * n, self.best_of.temperature):
            problems += problems_of(batch, samples * n)
            judge = self.best_of.reward
            scores = batch.scores if judge is None else rewards.score_samples(judge, batch.samples)
            answers = answers_of(batch)
            picked += [
                answers[first + best([score.value for score in scores[first : first + n]])]
                for first in range(0, len(answers), n)
            ]
        groups = [picked[first : first + samples] for first in range(0, len(picked), samples)]
        return Played(problems, groups, {"kl_bound": kl_bound(n)})


def best(values: Sequence[float | None]) -> int:
    """The number of the highest value, of equal ones the first; what is ungraded comes last.

    Example:
        >>> best([None, 0.0, 1.0, 1.0])
        2
    """
    return max(range(len(values)), key=lambda i: (-math.inf if (value := values[i]) is None else value, -i))


class API:
    """A model behind an OpenAI-compatible server.

    It gets the task's system message, prompts and replies as a chat, and its budget and stop texts. Lengths are in its own
    tokens. What the server does not answer is ungraded.

    Args:
        model: the name that the server knows it by.
        base_url: such as ``http://127.0.0.1:8000/v1``.
        sampling: further fields of the requests.
        chat: further arguments of :class:`rewards.judge.client.Chat`: ``concurrency``, ``timeout``, ``cache_dir``, …

    Raises:
        ValueError, ImportError: see there.
    """

    def __init__(self, model: str, base_url: str, sampling: Mapping[str, Any] | None = None, **chat: Any) -> None:
        known = ("concurrency", "timeout", "retries", "max_calls", "max_tokens", "cache_dir", "key_env")
        check_settings("api", chat, ["model", "base_url", "sampling", *known])
        self.chat = Chat(model, base_url, **chat)
        self.sampling = dict(sampling or {})

    def train(self, arena: Arena) -> None:
        arena.evaluate(ChatPlayer(arena.task, self.chat, self.sampling, arena.seed))


class ChatPlayer:
    """Plays a task by chat.

    Args:
        task: with the reward that is measured.
        chat: what answers.
        sampling: further fields of the requests.
        seed: of the sampling, where the server takes one.
    """

    def __init__(self, task: Task, chat: BaseChat, sampling: Mapping[str, Any], seed: int) -> None:
        self.task, self.chat, self.sampling, self.seed = task, chat, sampling, seed

    def play(self, plan: EvaluationPlan, samples: int, temperature: float) -> Played:
        """See :class:`benchmarks.harness.measuring.Player`.

        Raises:
            RuntimeError: the server answered nothing at all.
        """
        stream = ProblemStream(self.task, "eval")
        stream.start(HELD_OUT_SEED)
        drawn = stream.take(held_out(self.task, plan) * samples, {"repeat": samples})
        dialogues = [Dialogue(problem, address) for problem, address in drawn]
        while running := [dialogue for dialogue in dialogues if not dialogue.over]:
            requests = [
                Request(
                    dialogue.messages(self.task),
                    {
                        "temperature": temperature,
                        "max_tokens": self.task.max_new_tokens,
                        # Equal requests are sent once: the samples of a problem are to differ.
                        "seed": self.seed * samples + dialogue.address[-1],
                        **({"stop": list(self.task.stop)} if self.task.stop else {}),
                        **self.sampling,
                    },
                )
                for dialogue in running
            ]
            for dialogue, reply in zip(running, self.chat.ask(requests), strict=True):
                dialogue.extend(reply, self.task)
        errors = [dialogue.error for dialogue in dialogues if dialogue.error is not None]
        if len(errors) == len(dialogues):
            raise RuntimeError(f"none of {len(errors)} problems was answered; the first error was: {errors[0]}")
        answers = self.graded(dialogues)
        return Played(
            [problem for problem, _ in drawn[::samples]],
            [answers[first : first + samples] for first in range(0, len(answers), samples)],
        )

    def graded(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Dialogues that are over, with their scores; those that broke are ungraded."""
        whole = [dialogue for dialogue in dialogues if dialogue.error is None]
        scored = iter(rewards.score_samples(rewards.as_reward(self.task.reward), [one.sample() for one in whole]))
        return [
            Answer(
                turns=tuple(dialogue.turns) or ("",),
                score=next(scored) if dialogue.error is None else rewards.ungraded(dialogue.error),
                finish=dialogue.finish,
                tokens=dialogue.tokens,
            )
            for dialogue in dialogues
        ]


@dataclass
class Dialogue:
    """An episode by chat.

    Attributes:
        address: of the problem, and the number of the sample; the seed of the task's replies.
        turns, replies: what was written, and what the task said to it.
        error: why it broke, if it did.
        over: whether nothing is to follow.
    """

    problem: Problem
    address: tuple[int, ...]
    turns: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    finish: Finish = Finish.NONE
    tokens: int = 0
    error: str | None = None
    over: bool = False

    def messages(self, task: Task) -> list[dict[str, str]]:
        """All so far, as a server takes it."""
        system = [{"role": "system", "content": task.system}] if task.system else []
        exchanged = [
            message
            for turn, reply in zip(self.turns, self.replies, strict=True)
            for message in ({"role": "assistant", "content": turn}, {"role": "user", "content": reply})
        ]
        return [*system, {"role": "user", "content": self.problem.prompt}, *exchanged]

    def extend(self, reply: Reply, task: Task) -> None:
        """Go on with what the model wrote, and with what the task says to that."""
        if reply.error is not None:
            self.error, self.finish, self.over = reply.error, Finish.ERROR, True
            return
        self.turns.append(reply.text)
        self.tokens += reply.completion_tokens
        self.finish = Finish.LENGTH if reply.finish == "length" else Finish.EOS
        transcript = Transcript(self.problem, tuple(self.turns), tuple(self.replies), self.finish, self.address)
        said = task.reply(transcript) if len(self.turns) < task.turns else None
        if said is None:
            self.over = True
        else:
            self.replies.append(said)

    def sample(self) -> rewards.Sample:
        """As a reward sees it, without tokens."""
        return rewards.Sample(
            prompt=self.problem.prompt,
            completion=self.turns[-1],
            reference=self.problem.reference,
            turns=tuple(self.turns),
            finish=self.finish.label,
            split="eval",
            info=self.problem.info,
        )
