"""Trajectories: what a rollout hands to a learner.

Shapes: B episodes, T tokens. Rows are right-padded contexts: prompt, completion, and for several turns replies and further
completions. Every mask is derived from ``source_BT``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rewards import Sample, Score, ungraded
from textenv.episodes import Episodes, Source
from textenv.task import Finish


@dataclass(frozen=True)
class Trajectories:
    """A batch of finished episodes.

    Attributes:
        tokens_BT: int64.
        source_BT: uint8, the :class:`textenv.Source` of each token.
        logp_BT: float32, log-probability of each sampled token in the distribution it was drawn from; 0 elsewhere.
        reward_BT: float64, the reward of each sampled token; a row sums to its return. 0 elsewhere.
        penalty_B: float64, what penalties added to each return, 0 without any.
        group_B: int64; the completions of one problem share a number.
        scores: a :class:`rewards.Score` an episode.
        finish_B: uint8 array of :class:`textenv.Finish`, of the last completion.
        prompts, completions, references: for people; ``completions[i]`` has one text a turn.
        samples: the episodes as their reward saw them; may be left out.
        reference_BT: log-probability of each sampled token under a reference policy, where one is wanted.
        kl_B: float64, with a reference the k1 estimate of each episode's KL to it, in nats: its log ratio, summed over tokens.
        noted: what learning saw of the tokens, for people, see :meth:`note`. Nothing is computed from it.
    """

    tokens_BT: Tensor
    source_BT: Tensor
    logp_BT: Tensor
    reward_BT: Tensor
    penalty_B: Tensor
    group_B: Tensor
    scores: list[Score]
    finish_B: np.ndarray
    prompts: list[str]
    completions: list[list[str]]
    references: list[object]
    samples: Sequence[Sample] = ()
    reference_BT: Tensor | None = None
    kl_B: Tensor | None = None
    noted: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.tokens_BT)

    @property
    def rows(self) -> Tensor:
        """int64: the number of every row."""
        return torch.arange(len(self), device=self.tokens_BT.device)

    @property
    def sampled_BT(self) -> Tensor:
        """Bool: the tokens that the policy chose, end tokens included."""
        return self.source_BT == Source.SAMPLED

    @property
    def length_B(self) -> Tensor:
        """int64: tokens of each row, padding left out."""
        return (self.source_BT != Source.PAD).sum(dim=1)

    @property
    def return_B(self) -> Tensor:
        """float64: each episode's score and penalty; NaN for an ungraded one.

        Not summed from tokens: equal scores must stay equal however their credit is spread.
        """
        return self._per_score(lambda score: score.value) + self.penalty_B

    @property
    def graded_B(self) -> Tensor:
        """Bool: the episodes whose reward could be told."""
        return ~self.return_B.isnan()

    @property
    def outcome_B(self) -> Tensor:
        """float64: ``parts["correct"]`` of each score where the reward names it, else its value; NaN for an ungraded one.

        It tells right from wrong answers whatever else a reward pays for. From 1 on an answer is right.
        """
        return self._per_score(lambda score: score.parts.get("correct", score.value))

    def part_B(self, name: str) -> Tensor:
        """float64: one part of each score; NaN where it is ungraded or lacks the part."""
        return self._per_score(lambda score: score.parts.get(name, torch.nan))

    @property
    def cut_B(self) -> Tensor:
        """Bool: the episodes that spent their budget without an end."""
        return torch.from_numpy(np.isin(self.finish_B, (Finish.LENGTH, Finish.CONTEXT))).to(self.tokens_BT.device)

    def note(self, name: str, x: Tensor, rows: Tensor | None = None) -> None:
        """Keep a number of each token ``(R, T)``, or of each episode ``(R,)``, of ``rows``, default all, with the episodes.

        What was noted before under this name is written over; rows of which nothing was noted are NaN.
        """
        rows = self.rows if rows is None else rows
        kept_BT = self.noted.setdefault(name, torch.full_like(self.logp_BT, torch.nan))
        width = kept_BT.shape[1] if x.dim() == 1 else x.shape[1]
        kept_BT[rows, :width] = (x.unsqueeze(1) if x.dim() == 1 else x).detach().to(kept_BT.dtype)

    def penalised(self, penalty_BT: Tensor) -> Trajectories:
        """The same episodes with ``penalty_BT`` added to the rewards of their sampled tokens."""
        penalty_BT = torch.where(self.sampled_BT, penalty_BT.double(), 0.0)
        return replace(self, reward_BT=self.reward_BT + penalty_BT, penalty_B=self.penalty_B + penalty_BT.sum(dim=1))

    def _per_score(self, number: Callable[[Score], float | None]) -> Tensor:
        values = [torch.nan if score.value is None else number(score) for score in self.scores]
        return torch.tensor(values, dtype=torch.float64, device=self.penalty_B.device)

    def to(self, device: torch.device) -> Trajectories:
        return replace(
            self,
            tokens_BT=self.tokens_BT.to(device),
            source_BT=self.source_BT.to(device),
            logp_BT=self.logp_BT.to(device),
            reward_BT=self.reward_BT.to(device),
            penalty_B=self.penalty_B.to(device),
            group_B=self.group_B.to(device),
            reference_BT=None if self.reference_BT is None else self.reference_BT.to(device),
            kl_B=None if self.kl_B is None else self.kl_B.to(device),
            noted={name: x_BT.to(device) for name, x_BT in self.noted.items()},
        )


def from_episodes(
    episodes: Episodes, logp_NT: np.ndarray, group_N: np.ndarray, samples: Sequence[Sample] | None = None
) -> Trajectories:
    """Finished episodes as trajectories, cut to the longest row.

    Args:
        episodes: all done.
        logp_NT: behaviour log-probabilities at the sampled tokens.
        group_N: the group of each episode.
        samples: of the episodes, if they have been made already.
    """
    width = int(episodes.length_N.max())
    source_BT = episodes.source_NT[:, :width]
    reward_BT = np.zeros(source_BT.shape)
    reward_BT[source_BT == Source.SAMPLED] = np.concatenate([episodes.credit(n) for n in range(episodes.num)])
    return Trajectories(
        tokens_BT=torch.from_numpy(episodes.tokens_NT[:, :width].copy()),
        source_BT=torch.from_numpy(source_BT.copy()),
        logp_BT=torch.from_numpy(logp_NT[:, :width].astype(np.float32)),
        reward_BT=torch.from_numpy(reward_BT),
        penalty_B=torch.zeros(episodes.num, dtype=torch.float64),
        group_B=torch.from_numpy(group_N.astype(np.int64)),
        scores=[ungraded("not scored") if score is None else score for score in episodes.scores],
        finish_B=episodes.finish_N.copy(),
        prompts=[problem.prompt for problem in episodes.problems],
        completions=[list(texts) for texts in episodes.completions],
        references=[problem.reference for problem in episodes.problems],
        samples=[episodes.sample(n) for n in range(episodes.num)] if samples is None else samples,
    )


def concatenate(batches: Sequence[Trajectories]) -> Trajectories:
    """Batches without references as one, right-padded to the widest; groups are numbered on."""
    width = max(batch.tokens_BT.shape[1] for batch in batches)
    first = np.cumsum([0, *(int(batch.group_B.max()) + 1 for batch in batches[:-1])]).tolist()

    def joined(name: str) -> Tensor:
        arrays = [getattr(batch, name) for batch in batches]
        return torch.cat([functional.pad(array, (0, width - array.shape[1])) for array in arrays])

    def chained(name: str) -> list:
        return [item for batch in batches for item in getattr(batch, name)]

    return Trajectories(
        tokens_BT=joined("tokens_BT"),
        source_BT=joined("source_BT"),
        logp_BT=joined("logp_BT"),
        reward_BT=joined("reward_BT"),
        penalty_B=torch.cat([batch.penalty_B for batch in batches]),
        group_B=torch.cat([batch.group_B + start for batch, start in zip(batches, first, strict=True)]),
        scores=chained("scores"),
        finish_B=np.concatenate([batch.finish_B for batch in batches]),
        prompts=chained("prompts"),
        completions=chained("completions"),
        references=chained("references"),
        samples=chained("samples"),
    )


def summary(trajectories: Trajectories) -> dict[str, float]:
    """What a step logs about its rollout: rewards, accuracy, lengths, endings, groups. Ungraded episodes are left out of
    rewards and accuracy and counted in ``ungraded_share``; a mean over none is NaN, as is the accuracy where no score tells
    right from wrong.
    """
    graded = [score for score in trajectories.scores if score.value is not None]
    values = [score.value for score in graded if score.value is not None]
    new_tokens_B = trajectories.sampled_BT.sum(dim=1).double()
    # Alone in its group an answer is compared with nothing.
    spread = group_spread(trajectories) if len(trajectories.group_B.unique()) < len(trajectories) else {}
    parts = sorted({name for score in graded for name in score.parts})
    return {
        "reward": _mean(values),
        "reward_std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "accuracy": _mean([float(bool(score.correct)) for score in graded if score.tells]),
        **{f"reward/{name}": _mean([s.parts[name] for s in graded if name in s.parts]) for name in parts},
        "return": float(trajectories.return_B.nanmean()),
        "ungraded_share": 1 - len(graded) / len(trajectories),
        "new_tokens_mean": float(new_tokens_B.mean()),
        "new_tokens_p95": float(new_tokens_B.quantile(0.95)),
        "cut_share": float(trajectories.cut_B.double().mean()),
        **spread,
        **({} if trajectories.kl_B is None else {"kl": float(trajectories.kl_B.mean())}),
    }


def group_spread(trajectories: Trajectories) -> dict[str, float]:
    """Shares of the groups whose returns are all equal, and of those that are all correct or all wrong."""
    rows_by_group: dict[int, list[int]] = {}
    for row, group in enumerate(trajectories.group_B.tolist()):
        rows_by_group.setdefault(group, []).append(row)
    flat = right = wrong = 0
    for rows in rows_by_group.values():
        scores = [trajectories.scores[row] for row in rows if trajectories.scores[row].value is not None]
        flat += len({score.value for score in scores}) <= 1
        told = [score for score in scores if score.tells]
        right += bool(told) and all(score.correct for score in told)
        wrong += bool(told) and not any(score.correct for score in told)
    groups = len(rows_by_group)
    return {
        "groups_without_spread": flat / groups,
        "groups_all_right": right / groups,
        "groups_all_wrong": wrong / groups,
    }


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
