"""DAPO (arXiv:2503.14476): GRPO with four changes, and no KL.

- Clip-higher (section 3.1): the ratio may rise further above 1 than it may fall below, so that unlikely tokens can grow.
- Dynamic sampling (section 3.2): groups whose answers are all right or all wrong have no gradient; they are thrown away,
  and more problems are sampled until the batch is full of groups with both.
- Token-level loss (section 3.3): every token of the batch weighs the same, those of long answers too.
- Overlong answers (section 3.4): an answer that nears its budget is punished softly, one that was cut can be left out.

Shapes: P problems, G completions a problem, B episodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from agents.core.advantages import group_range
from agents.core.config import require
from agents.core.policy_gradient import AdvantageConfig, PolicyGradient, compare_in_groups, policy_loss
from agents.core.rollout import Rollout, check_graded
from agents.core.training import Callback
from agents.core.trajectories import Trajectories, concatenate, summary
from rewards.verifiers.soft_overlong import punish_length


@dataclass(frozen=True, kw_only=True)
class DAPOConfig(AdvantageConfig):
    """Settings of DAPO. A clip above acts from the second update on a batch on, hence two of them."""

    clip_high: float = 0.28
    """How far a token's ratio may rise above 1."""
    updates_per_batch: int = 2
    """Optimiser steps a batch, each on its own share of the episodes; the paper has 16, of 512 problems."""
    max_sampling: int = 10
    """Most problems sampled for a step, in multiples of prompts_per_step. With fewer mixed groups than wanted by then,
    the step makes do with them; with none, training stops."""
    overlong_buffer: float = 0.2
    """Share of an answer's budget, at its end, in which a growing punishment sets in, -1 at the limit; 0 for none, as where
    right answers need the whole budget."""
    overlong_filter: bool = False
    """Leave answers that were cut at their budget out of the loss; their rewards still count for their group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_sampling >= 1, "max_sampling", "at least 1", self.max_sampling)
        require(0 <= self.overlong_buffer < 1, "overlong_buffer", "from 0 to below 1", self.overlong_buffer)
        require(
            not self.part_weights or self.overlong_buffer == 0,
            "overlong_buffer",
            '0 with part_weights; to weigh long answers make the reward "soft_overlong" one of the parts',
            self.overlong_buffer,
        )


class DAPO(PolicyGradient):
    """Decoupled clip and dynamic sampling policy optimisation: GRPO on groups that have something to teach.

    Example::

        agent = DAPO("textenv/Arithmetic-v0", DAPOConfig(group_size=8))
        agent.learn(total_episodes=20_000)
    """

    name = "dapo"
    config_class = DAPOConfig
    config: DAPOConfig

    def learn(self, total_episodes: int | None = None, callback: Callback | None = None) -> Self:
        config = self.config
        # A refill may be of so few problems that none can be graded: what counts is the step so far.
        rollout, reference = self.rollout(max_ungraded=1.0), self.reference()
        sample = self.sampler(rollout, lambda step, index: self.sample_mixed_groups(rollout, index, step))
        budget = self.task.max_new_tokens * self.task.turns
        with self.training(total_episodes, config.prompts_per_step * config.group_size, callback) as training:
            for step in training:
                batch, kept_B = sample(step, training.episodes // config.group_size)
                batch = self.penalise(batch, reference).penalised(
                    soft_overlong_penalty(batch.sampled_BT, budget, config.overlong_buffer)
                )
                advantage_B = compare_in_groups(batch, config, kept_B)  # what is thrown away has no say in any mean
                batch.note("advantage", advantage_B)
                counted_B = kept_B & ~batch.cut_B if config.overlong_filter else kept_B
                loss = partial(
                    policy_loss,
                    config=config,
                    advantage=advantage_B,
                    reference_BT=batch.reference_BT,
                    kl_loss_coef=config.kl_loss_coef * self.kl_factor,
                )
                trained_B = counted_B & (batch.graded_B if config.kl_loss_coef else advantage_B != 0)
                metrics = self.update(batch, loss, step, trained_B=trained_B, counted_B=counted_B) | self.adapt_kl(
                    batch
                )
                shares = sampling_shares(batch, kept_B)
                if not kept_B.any():
                    training.stop(nothing_kept(len(batch) // config.group_size, shares))
                training.log(batch, summary(batch) | metrics | shares)
        return self

    def sample_mixed_groups(self, rollout: Rollout, index: int, step: int) -> tuple[Trajectories, Tensor]:
        """Sample from problem ``index`` on until ``prompts_per_step`` groups are mixed, or ``max_sampling`` is reached.

        Returns:
            all that was sampled, and which of it is kept, bool ``(B,)``: the first ``prompts_per_step`` mixed groups.
        """
        config = self.config
        wanted, most = config.prompts_per_step, config.prompts_per_step * config.max_sampling
        batches: list[Trajectories] = []
        asked = mixed = 0
        while mixed < wanted and asked < most:
            # As many more as should be needed, by the share that was mixed so far.
            share = max(mixed, 1) / asked if asked else 1.0
            prompts = min(math.ceil((wanted - mixed) / share), wanted, most - asked)
            batches.append(self.sample(rollout, index + asked, (step, len(batches)), prompts))
            check_graded(
                [score for batch in batches for score in batch.scores], rollout.reward.name, config.max_ungraded
            )
            asked += prompts
            mixed += int(mixed_groups(batches[-1]).sum()) // config.group_size
        batch = concatenate(batches)
        mixed_B = mixed_groups(batch)
        # The rows of a group are neighbours.
        return batch, mixed_B & (mixed_B.cumsum(dim=0) <= wanted * config.group_size)


def mixed_groups(batch: Trajectories) -> Tensor:
    """Bool ``(B,)``: the episodes whose group has both right and wrong answers (arXiv:2503.14476, eq. 11).

    It goes by the outcome alone: penalties differ within every group. Ungraded episodes have no say.
    """
    least_B, most_B = group_range(batch.outcome_B, batch.group_B)
    return least_B < most_B


def sampling_shares(batch: Trajectories, kept_B: Tensor) -> dict[str, float]:
    """What became of the groups that were sampled, as shares of them. What is missing to 1 could not be graded at all.

    Args:
        batch: all that was sampled, in groups of one size.
        kept_B: bool, the episodes of the groups that are trained on.

    Returns:
        ``kept_share``; ``dropped_all_right`` and ``dropped_all_wrong``, the groups without a spread; ``surplus``, mixed groups
        beyond those that were wanted.
    """
    least_B, most_B = group_range(batch.outcome_B, batch.group_B)
    became = {
        "kept_share": kept_B,
        "dropped_all_right": (least_B == most_B) & (most_B >= 1),
        "dropped_all_wrong": (least_B == most_B) & (most_B < 1),
        "surplus": (least_B < most_B) & ~kept_B,
    }
    return {name: float(share_B.double().mean()) for name, share_B in became.items()}


def nothing_kept(groups: int, shares: Mapping[str, float]) -> str:
    """Why training stops, with what was seen."""
    right, wrong = shares["dropped_all_right"], shares["dropped_all_wrong"]
    advice = (
        "the task is solved"
        if right > wrong
        else "begin from a model that is right now and then (textenv train sft), or with easier problems"
    )
    return (
        f"none of {groups} groups had both right and wrong answers, {right:.0%} were all right and {wrong:.0%} all "
        f"wrong; {advice}"
    )


def soft_overlong_penalty(sampled_BT: Tensor, budget: int, buffer: float) -> Tensor:
    """The punishment of long answers ``(B, T)``, at the last sampled token of each row (arXiv:2503.14476, eq. 13).

    Of the episode's sampled tokens, end token included, by :func:`rewards.verifiers.soft_overlong.punish_length`.

    Args:
        sampled_BT: bool, True where the policy chose the token.
        budget: most tokens that an episode may have.
        buffer: share of the budget.

    Example:
        >>> soft_overlong_penalty(torch.ones(1, 9, dtype=torch.bool), budget=10, buffer=0.2).sum()
        tensor(-0.5000, dtype=torch.float64)
    """
    penalty_BT = torch.zeros(sampled_BT.shape, dtype=torch.float64, device=sampled_BT.device)
    if buffer == 0:
        return penalty_BT
    count_BT = sampled_BT.cumsum(dim=1)
    length_B1 = count_BT[:, -1:]
    punishment_B1 = penalty_BT.new_tensor([[punish_length(n, budget, buffer * budget)] for [n] in length_B1.tolist()])
    return torch.where(sampled_BT & (count_BT == length_B1), punishment_B1, penalty_BT)
