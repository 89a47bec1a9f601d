"""What an agent can do on held-out problems, at one point of its training.

The problems are the same at every point, for every agent and for every seed. Metrics, means over problems:

- ``greedy/…`` of one greedy answer to each, ``sampled/…`` of several: ``reward``, ``reward/PART``, ``accuracy``, ``length``
  (tokens), ``cut_share`` (answers that their budget cut) and ``ungraded_share``. Ungraded answers count in no other reward
  and accuracy.
- ``sampled/pass@K``: the chance that one of K samples is right, without bias; see :func:`benchmarks.statistics.pass_at_k`.
- ``sampled/unique_share``: different answers among the samples, over the samples.
- ``greedy/unique_turn_share`` and ``sampled/unique_turn_share``, where there are several turns: different answers among the
  turns of an episode, over its turns (arXiv:2507.14295, E/T).
- ``sampled/entropy``, in nats a token, and ``sampled/kl``, in nats an answer, to the start: see :func:`divergence`.

A mean over nothing, such as the accuracy where no reward tells right from wrong, is None. What a player has none of, such as
the entropy of a model behind a server, is left out.

Shapes: P problems, G samples of each, B episodes, T tokens, N sampled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.core.engines.native import NativeEngine
from agents.core.evaluate import CUT, EVAL_BATCH
from agents.core.head import AT_ONCE
from agents.core.policy import Policy, States
from agents.core.rollout import Rollout
from agents.core.trajectories import Trajectories
from benchmarks.harness.records import problem_row
from benchmarks.harness.suite import EvaluationPlan
from benchmarks.statistics import pass_at_k
from rewards import Score
from textenv.task import Finish, Problem, Task

HELD_OUT_SEED = 0
"""Of the held-out problems."""
SAMPLING = 0x4D45
"""First word of every seed that answers are sampled with, which sets them apart from those of training."""
TOKENS_AT_ONCE, LOGITS_AT_ONCE = 16_384, 2**28
"""Most tokens, padding included, that go through the models at once, and most logits that one may hold of them."""
EXTRACTED = "extracted"
"""What verifiers call, in a score's ``info``, the answer that they read out of a text."""


@dataclass(frozen=True)
class Answer:
    """An episode: what was written, turn by turn, and what it is worth.

    Attributes:
        finish: how the last turn ended.
        tokens: how many were written, end tokens included.
    """

    turns: tuple[str, ...]
    score: Score
    finish: Finish
    tokens: int

    @property
    def correct(self) -> float | None:
        """1 if it is right, 0 if it is wrong, None where the score does not tell."""
        return float(bool(self.score.correct)) if self.score.tells else None


@dataclass(frozen=True)
class Played:
    """What a player wrote: to each problem as many answers as were wanted.

    Attributes:
        metrics: of the player's own, for ``sampled/…``.
    """

    problems: list[Problem]
    answers_PG: list[list[Answer]]
    metrics: dict[str, float] = field(default_factory=dict)


class Player(Protocol):
    """What can be measured: a policy, or anything else that answers a task's problems."""

    def play(self, plan: EvaluationPlan, samples: int, temperature: float) -> Played:
        """Answer the first ``plan.problems`` held-out problems.

        Args:
            plan: what is measured.
            samples: answers to each problem.
            temperature: of the sampling; 0 is greedy.
        """


@dataclass(frozen=True)
class Measured:
    """What was measured: the metrics, and by problem what they are made of; see :class:`benchmarks.harness.records.Point`.

    Attributes:
        rows: the problems and all that was written, see :func:`benchmarks.harness.records.problem_row`.
    """

    metrics: dict[str, float | None]
    greedy: dict[str, list[float | None]]
    sampled: dict[str, list[list[float | None]]]
    rows: list[dict[str, Any]]


def measure(player: Player, plan: EvaluationPlan) -> Measured:
    """Have a player answer the held-out problems, greedily and sampled."""
    greedy, sampled = player.play(plan, 1, 0.0), player.play(plan, plan.samples, plan.temperature)
    metrics = {
        **{f"greedy/{name}": value for name, value in summary(greedy.answers_PG).items()},
        **{f"sampled/{name}": value for name, value in summary(sampled.answers_PG).items()},
        **{f"sampled/{name}": value for name, value in diversity(sampled.answers_PG).items()},
        **{f"sampled/{name}": value for name, value in sampled.metrics.items()},
    }
    return Measured(
        metrics=metrics,
        greedy={
            "reward": [answer.score.value for (answer,) in greedy.answers_PG],
            "correct": [answer.correct for (answer,) in greedy.answers_PG],
        },
        sampled={
            "reward": [[answer.score.value for answer in group] for group in sampled.answers_PG],
            "correct": [[answer.correct for answer in group] for group in sampled.answers_PG],
        },
        rows=[
            problem_row(problem.prompt, problem.reference, _completion(one), [_completion(each) for each in several])
            for problem, (one,), several in zip(greedy.problems, greedy.answers_PG, sampled.answers_PG, strict=True)
        ],
    )


def _completion(answer: Answer) -> dict[str, Any]:
    return {
        "text": "\n".join(answer.turns),
        "reward": answer.score.value,
        "correct": answer.correct,
        "parts": dict(answer.score.parts),
        "error": answer.score.error,
        "finish": answer.finish.label,
        "tokens": answer.tokens,
    }


def summary(answers_PG: Sequence[Sequence[Answer]]) -> dict[str, float | None]:
    """Means over answers: rewards, accuracy, length, endings."""
    answers = [answer for group in answers_PG for answer in group]
    graded = [answer for answer in answers if answer.score.value is not None]
    parts = sorted({name for answer in graded for name in answer.score.parts})
    turns = {}
    if any(len(answer.turns) > 1 for answer in answers):
        turns["unique_turn_share"] = _mean([_unique(answer.turns) for answer in answers])
    return {
        "reward": _mean([answer.score.value for answer in graded]),
        "accuracy": _mean([answer.correct for answer in answers]),
        "length": _mean([answer.tokens for answer in answers]),
        "cut_share": _mean([answer.finish in CUT for answer in answers]),
        "ungraded_share": 1 - len(graded) / len(answers),
        **turns,
        **{f"reward/{name}": _mean([answer.score.parts.get(name) for answer in graded]) for name in parts},
    }


def diversity(answers_PG: Sequence[Sequence[Answer]]) -> dict[str, float | None]:
    """``pass@K`` for K = 1, 2, 4, … up to the number of samples, and ``unique_share``.

    For a K count the problems with at least K samples that are known to be right or wrong.
    """
    told_PG = [[answer.correct for answer in group if answer.correct is not None] for group in answers_PG]
    metrics: dict[str, float | None] = {}
    samples = max(map(len, answers_PG))
    for k in (2**i for i in range(samples.bit_length())):
        enough = [told for told in told_PG if len(told) >= k]
        right = [sum(told) for told in enough]
        metrics[f"pass@{k}"] = _mean(list(pass_at_k([len(told) for told in enough], right, k))) if enough else None
    metrics["unique_share"] = _mean([_unique([_said(answer) for answer in group]) for group in answers_PG])
    return metrics


def _said(answer: Answer) -> str:
    """The answer that its verdict was about, or the whole text of the last turn."""
    return answer.score.info.get(EXTRACTED, answer.turns[-1])


def _unique(texts: Sequence[str]) -> float:
    """Different texts over texts, case and spaces aside.

    Example:
        >>> _unique(["4", " 4", "5", "7"])
        0.75
    """
    return len({" ".join(text.casefold().split()) for text in texts}) / len(texts)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


class PolicyPlayer:
    """A policy in this process.

    Args:
        task: with the reward that is measured.
        policy: what plays.
        seed: of the sampling.
        start: what the KL is to; None for none.
    """

    def __init__(self, task: Task, policy: Policy, seed: int, start: Policy | None = None) -> None:
        self.task, self.policy, self.seed, self.start = task, policy, seed, start

    def play(self, plan: EvaluationPlan, samples: int, temperature: float) -> Played:
        problems: list[Problem] = []
        answers_PG: list[list[Answer]] = []
        kl = entropy = 0.0
        tokens = 0
        for batch in self.batches(plan, samples, temperature):
            problems += problems_of(batch, samples)
            answers = answers_of(batch)
            answers_PG += [answers[row : row + samples] for row in range(0, len(answers), samples)]
            if temperature > 0:
                kl_N, entropy_N = divergence(self.policy, self.start, batch.tokens_BT, batch.sampled_BT, temperature)
                kl, entropy, tokens = kl + float(kl_N.sum()), entropy + float(entropy_N.sum()), tokens + len(entropy_N)
        metrics = {} if temperature == 0 else {"entropy": entropy / tokens}
        if temperature > 0 and self.start is not None:
            metrics["kl"] = kl / (len(answers_PG) * samples)
        return Played(problems, answers_PG, metrics)

    def batches(self, plan: EvaluationPlan, samples: int, temperature: float) -> Iterator[Trajectories]:
        """The episodes in batches that fit, the answers to a problem beside each other."""
        # With an engine of its own, which has the weights as they are now and leaves that of training as it was.
        engine = NativeEngine(self.policy)
        rollout = Rollout(self.task, engine, self.policy, seed=HELD_OUT_SEED, split="eval", max_ungraded=1.0)
        at_once = max(1, EVAL_BATCH // samples)
        problems = held_out(self.task, plan)
        for index in range(0, problems, at_once):
            prompts = min(at_once, problems - index)
            seed = (SAMPLING, self.seed, index)
            batch = rollout.collect(index, prompts, samples, temperature=temperature, seed=seed)
            yield batch.to(self.policy.device)


def held_out(task: Task, plan: EvaluationPlan) -> int:
    """How many problems are measured on: of a dataset each at most once."""
    return min(plan.problems, task.size("eval") or plan.problems)


def problems_of(batch: Trajectories, samples: int) -> list[Problem]:
    """The problems of a batch, each of which was answered ``samples`` times."""
    return list(map(Problem, batch.prompts[::samples], batch.references[::samples]))


def answers_of(batch: Trajectories) -> list[Answer]:
    """The episodes of a batch, in its order."""
    tokens_B = batch.sampled_BT.sum(dim=1).tolist()
    return [
        Answer(tuple(turns), score, Finish(finish), tokens)
        for turns, score, finish, tokens in zip(batch.completions, batch.scores, batch.finish_B, tokens_B, strict=True)
    ]


@torch.no_grad()
def divergence(
    policy: Policy, start: Policy | None, tokens_BT: Tensor, sampled_BT: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """How far the policy is from the start, and how undecided it is, at every token that it sampled.

    The sum of the first over an episode is an unbiased estimate of the KL divergence of the policy's answers to the start's,
    with less variance than the log ratio of what was sampled, as each token's share is the expectation over the vocabulary.

    Args:
        policy: what sampled the tokens.
        start: the other one; None leaves the divergence 0.
        tokens_BT: int64 ids, right-padded.
        sampled_BT: bool, the tokens that the policy chose.
        temperature: that they were sampled at; above 0.

    Returns:
        ``kl_N``, ``sum_v p(v) (log p(v) - log q(v))`` with p of the policy and q of the start, and ``entropy_N``,
        ``-sum_v p(v) log p(v)``, in nats, of the sampled tokens, row after row.
    """
    rows = max(1, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // policy.vocab_size) // tokens_BT.shape[1])
    kl, entropy = [], []
    for tokens_RT, sampled_RT in zip(tokens_BT.split(rows), sampled_BT.split(rows), strict=True):
        ours = policy.states(tokens_RT, sampled_RT)
        theirs = None if start is None else start.states(tokens_RT, sampled_RT)
        size = max(1, AT_ONCE // policy.vocab_size)
        for first in range(0, len(ours.hidden_NH), size):
            piece = slice(first, first + size)
            p_NV = _distribution(policy, ours, piece, temperature)
            q_NV = p_NV if start is None or theirs is None else _distribution(start, theirs, piece, temperature)
            kl_N, entropy_N = kl_and_entropy(p_NV, q_NV)
            kl.append(kl_N)
            entropy.append(entropy_N)
    return torch.cat(kl), torch.cat(entropy)


def _distribution(policy: Policy, states: States, piece: slice, temperature: float) -> Tensor:
    """Log-probabilities ``(n, V)`` in some of the states."""
    if states.logits_NV is not None:
        return policy.distribution(states.logits_NV[piece], temperature)
    return policy.distribution(policy.model.get_output_embeddings()(states.hidden_NH[piece]), temperature)


def kl_and_entropy(p_NV: Tensor, q_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL of each row of log-probabilities to the other's, and its entropy, in nats and in float64.

    What has no probability under either adds nothing to both.
    """
    p_NV, q_NV = p_NV.double(), q_NV.double()
    prob_NV = p_NV.exp()
    difference_NV = torch.where(prob_NV > 0, p_NV - q_NV, 0.0)
    return (prob_NV * difference_NV).sum(dim=1), torch.special.entr(prob_NV).sum(dim=1)
