"""Rejection sampling: learn from the samples that are good enough, and leave the others out.

- RAFT (arXiv:2304.06767, algorithm 1): supervised fine-tuning on the best completion of each problem.
- RAFT++ (arXiv:2504.11343, section 2): the right completions have advantage 1, with PPO's ratio and clip, so that a batch
  bears several updates.
- Reinforce-Rej (arXiv:2504.11343, section 3.3): groups that are all right or all wrong are dropped; of the others the right
  completions have advantage 1, the wrong ones 0 (or ``wrong_advantage``).

A group that is all wrong is never trained on, be its answers ever so different in other ways. An answer is right from an
outcome of 1 on. Where the reward names no ``correct`` part and nothing in a group reaches 1, outcomes that differ are taken
for grades, and RAFT learns from the better ones; all equal, they are all wrong.

Shapes: P problems, G completions a problem, B = P·G episodes, R rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from agents.core.advantages import group_advantages, group_range
from agents.core.config import require
from agents.core.learner import Scored
from agents.core.losses import Denominators, aggregate
from agents.core.policy_gradient import GroupConfig, PolicyGradient, Weigh, kl_term, policy_loss
from agents.core.training import Callback
from agents.core.trajectories import Trajectories, summary

Variant = Literal["raft", "raft++", "reinforce-rej"]


@dataclass(frozen=True, kw_only=True)
class RAFTConfig(GroupConfig):
    """Settings of RAFT and its relatives. ``clip_high`` acts in the variants with a ratio, raft++ and reinforce-rej;
    ``clip_low`` and ``clip_ratio_max`` only where wrong answers are pushed down."""

    variant: Variant = "raft"
    """"raft": supervised on the accepted; "raft++": with ratio and clip; "reinforce-rej": on mixed groups only."""
    accept: Literal["best", "correct", "above"] | None = None
    """Which completions are learned from: the best of each group, all right ones, or those that earn more than
    accept_above. Default best for raft, correct for raft++; reinforce-rej has a rule of its own."""
    accept_k: int | None = None
    """With accept "best": keep the best 1/k of each group, rounded down; default the group size, the best one."""
    accept_above: float | None = None
    """With accept "above": the return that a completion must exceed."""
    denominator: Literal["accepted", "all"] | None = None
    """Average the loss over the completions that are learned from, or over all that were sampled; default accepted for raft,
    all for the others, whose steps then shrink with the share that is accepted."""
    wrong_advantage: float = 0.0
    """Advantage of a wrong completion in reinforce-rej; -1 pushes it down."""
    max_barren_steps: int = 20
    """Training stops after this many steps in a row without an accepted completion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        group, k = self.group_size, self.accept_k
        if self.variant == "reinforce-rej":
            require(self.accept is None, "accept", "left out: reinforce-rej keeps the mixed groups whole", self.accept)
        else:
            require(
                self.wrong_advantage == 0, "wrong_advantage", f"0 in {self.variant}, which has no wrong samples",
                self.wrong_advantage,
            )  # fmt: skip
        require(self.wrong_advantage <= 0, "wrong_advantage", "0 or less", self.wrong_advantage)
        require(
            k is None or (self.acceptance == "best" and 1 < k <= group),
            "accept_k", f'from 2 to group_size={group}, with accept "best"', k,
        )  # fmt: skip
        require(
            (self.accept_above is not None) == (self.acceptance == "above"),
            "accept_above", 'given with accept "above", and only then', self.accept_above,
        )  # fmt: skip
        require(self.max_barren_steps >= 1, "max_barren_steps", "at least 1", self.max_barren_steps)

    @property
    def acceptance(self) -> str:
        """Which completions are learned from, the default filled in."""
        return self.accept or {"raft": "best", "raft++": "correct", "reinforce-rej": "mixed"}[self.variant]

    @property
    def counts_all(self) -> bool:
        """Whether rejected completions count in the loss's denominators."""
        return (self.denominator or ("accepted" if self.variant == "raft" else "all")) == "all"


class RAFT(PolicyGradient):
    """Reward-ranked fine-tuning: rejection sampling as an agent.

    Example::

        agent = RAFT("textenv/Arithmetic-v0", RAFTConfig(variant="raft++"))
        agent.learn(total_episodes=20_000)
    """

    name = "raft"
    config_class = RAFTConfig
    config: RAFTConfig

    def learn(self, total_episodes: int | None = None, callback: Callback | None = None) -> Self:
        config = self.config
        rollout, reference = self.rollout(), self.reference()
        sample = self.sampler(rollout, lambda step, index: self.sample(rollout, index, (step,)))
        with self.training(total_episodes, config.prompts_per_step * config.group_size, callback) as training:
            for step in training:
                batch = sample(step, training.episodes // config.group_size)
                batch = self.penalise(batch, reference)
                advantage_B = rejection_advantages(batch, config)
                batch.note("advantage", advantage_B)
                learned_B, accepted = advantage_B != 0, int((advantage_B > 0).sum())
                loss = partial(
                    supervised_loss if config.variant == "raft" else policy_loss,
                    config=config,
                    advantage=advantage_B,
                    reference_BT=batch.reference_BT,
                    kl_loss_coef=config.kl_loss_coef * self.kl_factor,
                )
                counted_B = learned_B | config.counts_all
                trained_B = counted_B & (batch.graded_B if config.kl_loss_coef else learned_B)
                metrics = self.update(batch, loss, step, trained_B=trained_B, counted_B=counted_B) | self.adapt_kl(
                    batch
                )
                self.state["barren_steps"] = 0 if accepted else self.state.get("barren_steps", 0) + 1
                metrics |= summary(batch) | {"accepted_share": accepted / len(batch)}
                if self.state["barren_steps"] >= config.max_barren_steps:
                    training.stop(nothing_accepted(metrics, config))
                training.log(batch, metrics)
        return self


def rejection_advantages(batch: Trajectories, config: RAFTConfig) -> Tensor:
    """The advantage of each episode ``(B,)``, float32: 1 if it is accepted, else 0; in Reinforce-Rej wrong answers of mixed
    groups have ``wrong_advantage``.

    Ungraded episodes have 0, and so has every episode of a group that is all wrong.
    """
    return_B, outcome_B, group_B = batch.return_B, batch.outcome_B, batch.group_B
    least_B, most_B = group_range(outcome_B, group_B)
    eligible_B = batch.graded_B
    if config.min_group_std:
        apart_B = group_advantages(return_B, group_B, min_std=config.min_group_std).abs()
        eligible_B = eligible_B & (group_range(apart_B, group_B)[1] > 0)
    if config.acceptance == "mixed":
        advantage_B = torch.where(outcome_B >= 1, 1.0, config.wrong_advantage)
        return torch.where(eligible_B & (least_B < 1) & (most_B >= 1), advantage_B, 0.0).float()
    if config.acceptance == "correct":
        accepted_B = outcome_B >= 1
    elif config.accept_above is not None:
        accepted_B = return_B > config.accept_above
    else:
        best = config.group_size // (config.accept_k or config.group_size)
        accepted_B = rank_in_group(return_B, group_B) < best
    # Nothing right, but a spread: outcomes are grades, of which the better ones can be learned from.
    all_wrong_B = (most_B < 1) & (least_B == most_B)
    return (eligible_B & ~all_wrong_B & accepted_B).float()


def rank_in_group(return_B: Tensor, group_B: Tensor) -> Tensor:
    """How many of its group come before each episode, int64 ``(B,)``: the best has 0. Equal ones go by their order; ungraded
    ones (NaN) come last.
    """
    order_B = return_B.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    order_B = order_B[group_B[order_B].argsort(stable=True)]
    sorted_group_B = group_B[order_B]
    first_B = torch.searchsorted(sorted_group_B, sorted_group_B)
    rank_B = torch.empty_like(group_B)
    rank_B[order_B] = torch.arange(len(group_B), device=group_B.device) - first_B
    return rank_B


def supervised_loss(
    scored: Scored,
    *,
    config: RAFTConfig,
    advantage: Tensor,
    old_BT: Tensor | None,
    denominators: Denominators,
    weigh: Weigh | None = None,
    reference_BT: Tensor | None = None,
    kl_loss_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of RAFT's loss, the negative log-likelihood of the accepted episodes, and of its metrics.

    Args:
        scored: the micro-batch under the current weights.
        config: the aggregation.
        advantage: 1 for an accepted episode of the batch, 0 for another, ``(B,)``.
        old_BT, weigh: not used: there is no ratio.
        denominators: of the whole update batch.
        reference_BT, kl_loss_coef: a KL term, see :func:`agents.core.policy_gradient.policy_loss`.
    """
    loss_RT = -scored.logp_RT * scored.of(advantage).unsqueeze(1)
    metrics = {"nll": aggregate(loss_RT.detach(), scored.sampled_RT, config.aggregation, denominators)}
    if kl_loss_coef and reference_BT is not None:
        kl_RT, kl_metrics = kl_term(scored, reference_BT, kl_loss_coef, denominators)
        loss_RT, metrics = loss_RT + kl_RT, metrics | kl_metrics
    return aggregate(loss_RT, scored.sampled_RT, config.aggregation, denominators), metrics


def nothing_accepted(metrics: Mapping[str, float], config: RAFTConfig) -> str:
    """Why training stops, with what was seen."""
    advice = (
        "the task is solved"
        if metrics["groups_all_right"] > metrics["groups_all_wrong"]
        else "begin from a model that is right now and then (textenv train sft), or accept more"
    )
    return (
        f"no completion was accepted in {config.max_barren_steps} steps; in the last one {metrics['accuracy']:.0%} of the "
        f"answers were right, the mean reward was {metrics['reward']:.3g} and {metrics['cut_share']:.0%} of the answers were "
        f"cut; {advice}"
    )
