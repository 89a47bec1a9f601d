"""Judges that compare two answers at a time."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from rewards.contract import Sample, Score, ungraded
from rewards.judge.chat import BaseChat, ChatReward, Request
from rewards.judge.local import as_chat
from rewards.judge.pointwise import fill_in, verdict_schema
from rewards.judge.reading import Outcome, Verdict, ask, read_choice, tally
from rewards.judge.template import PROMPTS, Prompt, addresses_judge, as_text

Aggregation = Literal["win_share", "bradley_terry"]

_SCHEMA = verdict_schema({"winner": {"type": "string", "enum": ["A", "B", "tie"]}})
_ITERATIONS, _PRECISION = 10_000, 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to a question."""

    question: str
    first: str
    second: str
    reference: Any = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of a pair.

    Args:
        win: 1.0 if the first answer is better, 0.0 if the second is, 0.5 for a tie; None if an order has no verdict.
        flipped: the two orders disagree, so it is a tie.
        error: why there is no verdict.
        verdicts: what was read from the order as given and from the other, in each of which "A" is the answer shown first;
            none for equal answers.
    """

    win: float | None
    flipped: bool = False
    error: str | None = None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """``"graded"``, or how the first order ended that has no verdict."""
        return next((verdict.outcome for verdict in self.verdicts if verdict.outcome != "graded"), "graded")


class PairwiseJudge:
    """Which of two answers a model finds better, asked in both orders.

    Where the orders agree, that counts; where they do not, it is a tie, which takes the bias for a position out of the
    verdict (arXiv:2306.05685, section 3.4). Two calls a pair; equal answers are a tie and cost none.

    Args:
        chat: the judge's model, or the arguments of a :class:`~rewards.judge.Chat`, or without ``base_url`` of a
            :class:`~rewards.judge.LocalChat`.
        prompt: a file in the place of ``prompts/pairwise.txt``; it names ``$question``, ``$first``, ``$second`` and
            ``$mark``, and may name ``$reference``.
        sampling: fields of the request in the place of :data:`~rewards.judge.pointwise.SAMPLING`, one by one; None for a
            value leaves a field out.

    Attributes:
        counts: how many replies ended in which way (:data:`~rewards.judge.reading.Outcome`), ``asked_again``, ``cached``;
            and pairs: ``compared`` (a verdict in both orders), ``flipped``, ``equal``.

    Raises:
        ValueError: an unusable prompt.
        ImportError: a server without the extra ``textenv[judge]``.
    """

    def __init__(
        self,
        chat: BaseChat | Mapping[str, Any],
        *,
        prompt: str | Path = PROMPTS / "pairwise.txt",
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.prompt = Prompt(prompt, ["question", "first", "second"], ["reference"])
        self.sampling = fill_in(sampling, {})
        self.chat = as_chat(chat)
        self.counts: Counter[str] = Counter()

    @property
    def flip_rate(self) -> float | None:
        """The share of compared pairs whose orders disagreed: 0 for a judge without a bias for a position."""
        compared = self.counts["compared"]
        return self.counts["flipped"] / compared if compared else None

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """One comparison a pair, in order."""
        asked = [pair for pair in pairs if pair.first != pair.second]
        requests = [self._request(pair, swap) for pair in asked for swap in (False, True)]
        verdicts = [verdict for _, verdict in ask(self.chat, requests, read_choice, self.counts)]
        results = [_combine(*verdicts[i : i + 2]) for i in range(0, len(verdicts), 2)]
        tally(
            self.counts,
            compared=sum(result.win is not None for result in results),
            flipped=sum(result.flipped for result in results),
            equal=len(pairs) - len(asked),
        )
        compared = iter(results)
        return [Comparison(0.5) if pair.first == pair.second else next(compared) for pair in pairs]

    def _request(self, pair: Pair, swap: bool) -> Request:
        first, second = (pair.second, pair.first) if swap else (pair.first, pair.second)
        texts = {"question": pair.question, "first": first, "second": second, "reference": as_text(pair.reference)}
        return Request([{"role": "user", "content": self.prompt.fill(texts)}], self.sampling, _SCHEMA)


def _combine(given: Verdict, swapped: Verdict) -> Comparison:
    verdicts = (given, swapped)
    for verdict in verdicts:
        if verdict.outcome != "graded":
            return Comparison(None, error=verdict.why, verdicts=verdicts)
    win = {"A": 1.0, "B": 0.0, "tie": 0.5}[given.value]
    if win == {"A": 0.0, "B": 1.0, "tie": 0.5}[swapped.value]:
        return Comparison(win, verdicts=verdicts)
    return Comparison(0.5, flipped=True, verdicts=verdicts)


class GroupJudge(ChatReward):
    """Each answer against all others to the same prompt in the batch.

    ``value`` is by ``how``: ``"win_share"``, the share of comparisons won, a tie being half a win, 0 to 1;
    ``"bradley_terry"``, the log-strength of :func:`bradley_terry`, whose mean over a group is 0. Values rank the answers of
    one group; those of different groups say nothing about each other, and an evaluation of one answer a problem is ungraded:
    watch another reward beside it.

    ``parts`` are ``win_share``, ``compared`` (with how many of the group's others) and ``addresses_judge`` (1.0 if the
    answer seems to speak to its judge). Comparisons without a verdict are left out. An answer without any, or alone with
    its prompt, is ungraded.

    A group of G different answers costs G(G-1) calls, each pair in both orders: 56 for G = 8, 240 for 16.

    Args:
        chat: the judge's model as for :class:`PairwiseJudge`, or such a judge itself.
        how: what becomes of the comparisons.

    Attributes:
        counts: those of the judge, and samples that seem to address it.

    Raises:
        ValueError: an unknown ``how``; what :class:`PairwiseJudge` refuses.
    """

    name = "group_judge"
    whole_groups = True

    def __init__(self, chat: PairwiseJudge | BaseChat | Mapping[str, Any], *, how: Aggregation = "win_share") -> None:
        if how not in get_args(Aggregation):
            raise ValueError(f"a group judge's how is one of {', '.join(get_args(Aggregation))}, got {how!r}")
        self.judge = chat if isinstance(chat, PairwiseJudge) else PairwiseJudge(chat)
        self.chat = self.judge.chat
        self.waits = self.chat.waits
        self.how = how

    @property
    def counts(self) -> Counter[str]:
        return self.judge.counts

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        groups: dict[tuple[str, str], list[int]] = {}
        for number, sample in enumerate(samples):
            groups.setdefault((sample.prompt, as_text(sample.reference)), []).append(number)
        games = [game for group in groups.values() for game in combinations(group, 2)]
        comparisons = self.judge.compare([_pair(samples[i], samples[j]) for i, j in games])
        played = dict(zip(games, comparisons, strict=True))
        scores: dict[int, Score] = {}
        for group in groups.values():
            scores.update(zip(group, self._score_group([samples[i] for i in group], group, played), strict=True))
        return [scores[number] for number in range(len(samples))]

    def _score_group(
        self, samples: Sequence[Sample], group: Sequence[int], played: Mapping[tuple[int, int], Comparison]
    ) -> list[Score]:
        wins_GG: list[list[float | None]] = [[None] * len(group) for _ in group]
        errors: list[str] = ["there is no other answer to this prompt in the batch"] * len(group)
        for (a, i), (b, j) in combinations(enumerate(group), 2):
            game = played[i, j]
            if game.win is None:
                errors[a] = errors[b] = str(game.error)
            else:
                wins_GG[a][b], wins_GG[b][a] = game.win, 1.0 - game.win
        rows = [[win for win in row if win is not None] for row in wins_GG]
        strengths = bradley_terry([[win or 0.0 for win in row] for row in wins_GG])
        scores = []
        for sample, row, strength, error in zip(samples, rows, strengths, errors, strict=True):
            addressed = addresses_judge(sample.completion)
            tally(self.counts, addresses_judge=addressed)
            if not row:
                scores.append(ungraded(error))
                continue
            share = statistics.fmean(row)
            parts = {"win_share": share, "compared": len(row), "addresses_judge": float(addressed)}
            scores.append(Score(share if self.how == "win_share" else strength, parts))
        return scores


def _pair(first: Sample, second: Sample) -> Pair:
    return Pair(question=first.prompt, first=first.completion, second=second.completion, reference=first.reference)


def bradley_terry(wins_PP: Sequence[Sequence[float]], pseudo_ties: float = 1.0) -> list[float]:
    """Log-strengths of players, of which i beats j with probability sigmoid(s_i - s_j); their mean is 0.

    The maximum of the likelihood, by the MM iteration (Hunter 2004, The Annals of Statistics 32(1), eq. 3).

    Args:
        wins_PP: [player, player], how often the row's player beat the column's. A tie is half a win for each.
        pseudo_ties: made-up ties added to each pair, so that who never loses has a finite strength too. With 0 each
            player must have lost to, and have won against, the others in a chain.

    Example:
        >>> strong, weak = bradley_terry([[0, 3], [1, 0]], pseudo_ties=0)
        >>> round(strong - weak, 4)  # log 3
        1.0986
    """
    import numpy as np

    players = len(wins_PP)
    wins = np.array(wins_PP, dtype=float).reshape(players, players)
    wins = wins + (pseudo_ties / 2) * (1 - np.eye(players))
    games, won = wins + wins.T, wins.sum(axis=1)
    strength = np.ones(players)
    for _ in range(_ITERATIONS if players > 1 else 0):
        before = strength
        strength = won / (games / (strength[:, None] + strength)).sum(axis=1)
        strength = strength / np.exp(np.log(strength).mean())
        if np.abs(np.log(strength / before)).max() < _PRECISION:
            break
    return [float(value) for value in np.log(strength)]
