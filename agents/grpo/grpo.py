"""GRPO with outcome supervision, as in DeepSeekMath (arXiv:2402.03300, section 4.1).

A step: sample G completions for each of P problems; an episode's advantage is its return, less the mean of its group,
over the group's standard deviation; minimise the clipped surrogate, averaged within each sequence first and then over
sequences. Unlike the paper, no KL term by default (``kl_loss_coef=0``), and groups of 8.

Shapes: P problems, G completions a problem, B = P·G episodes, T tokens, R rows of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor

from agents.core.advantages import group_advantages
from agents.core.agent import Agent
from agents.core.config import AgentConfig, require
from agents.core.kl import kl_estimate
from agents.core.learner import Scored, check_logp_gap, mean_metrics, shuffled_parts
from agents.core.losses import (
    Aggregation,
    Denominators,
    aggregate,
    clip_fractions,
    clipped_surrogate,
    count_denominators,
)
from agents.core.policy import Policy
from agents.core.trajectories import Trajectories, summary

SHUFFLING = 0x5A4C
"""First word of every shuffle's seed, which sets its stream apart from those of problems, replies and sampling."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(AgentConfig):
    """Settings of GRPO; the defaults are the paper's loss without its KL term."""

    group_size: int = 8
    """Completions a problem, 2 or more: a lone one has no group to be compared with."""
    temperature: float = 1.0
    """Of the sampling; the learner scores tokens in the same distribution."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not at all."""
    clip_low: float = 0.2
    """How far a token's ratio may fall below 1 before its gradient is cut. Acts from the second update on a batch on."""
    clip_high: float = 0.2
    """How far it may rise above 1."""
    updates_per_batch: int = 1
    """Optimiser steps a batch, each on its own share of the episodes."""
    epochs_per_batch: int = 1
    """Times that a batch is gone through."""
    aggregation: Aggregation = "sequence_mean"
    """How the loss is averaged over tokens; "sequence_mean" is GRPO's, "token_mean" DAPO's, "constant" Dr. GRPO's."""
    kl_loss_coef: float = 0.0
    """Weight of the k3 estimate of the KL to the start, added to the loss; the paper has 0.04."""
    kl_reward_coef: float = 0.0
    """Weight of the k1 estimate of that KL, taken off each token's reward."""
    max_logp_gap: float = 0.1
    """Largest mean difference, in nats, between a token's log-probability when sampled and when scored; more stops the
    run, since the learner would train on another distribution than was sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.group_size
        require(group >= 2, "group_size", "2 or more, since a lone completion has no group to be compared with", group)
        require(self.temperature > 0, "temperature", "more than 0 to explore", self.temperature)
        require(
            0 < self.clip_low < 1 and self.clip_high > 0,
            "clip_low and clip_high",
            "above 0 (clip_low below 1)",
            (self.clip_low, self.clip_high),
        )
        require(
            min(self.updates_per_batch, self.epochs_per_batch) >= 1,
            "updates_per_batch and epochs_per_batch",
            "at least 1",
            (self.updates_per_batch, self.epochs_per_batch),
        )
        require(
            min(self.kl_loss_coef, self.kl_reward_coef) >= 0,
            "kl_loss_coef and kl_reward_coef",
            "0 or more",
            (self.kl_loss_coef, self.kl_reward_coef),
        )


class GRPO(Agent):
    """Group Relative Policy Optimisation.

    Example::

        agent = GRPO("textenv/Arithmetic-v0", GRPOConfig(group_size=8))
        agent.learn(total_episodes=20_000)
        print(agent.evaluate().accuracy_text())
    """

    name = "grpo"
    config_class = GRPOConfig
    config: GRPOConfig

    @property
    def temperature(self) -> float:
        return self.config.temperature

    def learn(self, total_episodes: int | None = None) -> Self:
        config = self.config
        prompts, group = config.prompts_per_step, config.group_size
        reference = self.frozen_reference() if config.kl_loss_coef or config.kl_reward_coef else None
        rollout = self.rollout(reference=reference, kl_beta=config.kl_reward_coef)
        with self.training(total_episodes, prompts * group) as training:
            for step in training:
                batch = rollout.collect(
                    step * prompts, prompts, group, temperature=self.temperature, seed=(config.seed, step)
                ).to(self.policy.device)
                advantage_B = group_advantages(batch.return_B, batch.group_B, config.scale_rewards).float()
                training.log(batch, summary(batch) | self._update(batch, advantage_B, reference, step))
        return self

    def _update(
        self, batch: Trajectories, advantage_B: Tensor, reference: Policy | None, step: int
    ) -> dict[str, float]:
        """Go through a batch ``epochs_per_batch`` times, in ``updates_per_batch`` optimiser steps each."""
        config, learner = self.config, self.learner
        # Without a KL term an episode with advantage 0 has no gradient, so it need not be scored at all. It still counts
        # in the denominators: the gradient is that of the whole batch.
        graded_B = ~batch.return_B.isnan()
        trained_B = graded_B if config.kl_loss_coef else advantage_B != 0
        every_row = torch.arange(len(batch), device=advantage_B.device)
        reference_BT = None
        if reference is not None and config.kl_loss_coef:
            reference_BT = learner.logprobs(batch, every_row, policy=reference)
        # Used once, a batch is compared with the very weights that score it: the ratio is 1 and needs no pass of its own.
        used_once = config.updates_per_batch * config.epochs_per_batch == 1
        old_BT = None if used_once else learner.logprobs(batch, every_row[trained_B])

        updates = []
        for epoch in range(config.epochs_per_batch):
            for rows in shuffled_parts(every_row, config.updates_per_batch, (SHUFFLING, config.seed, step, epoch)):
                denominators = count_denominators(batch.sampled_BT[rows], self.task.max_new_tokens * self.task.turns)
                loss = partial(
                    grpo_loss,
                    config=config,
                    advantage_B=advantage_B,
                    old_BT=old_BT,
                    reference_BT=reference_BT,
                    denominators=denominators,
                )
                trained = rows[trained_B[rows]]
                if len(trained):
                    updates.append(learner.step(batch, trained, loss))
        metrics = mean_metrics(updates) if updates else learner.measure_gap(batch, every_row[: config.group_size])
        check_logp_gap(metrics, config.max_logp_gap)
        return {"trained_share": float(trained_B.float().mean()), **metrics}


def grpo_loss(
    scored: Scored,
    *,
    config: GRPOConfig,
    advantage_B: Tensor,
    old_BT: Tensor | None,
    reference_BT: Tensor | None,
    denominators: Denominators,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of GRPO's loss (arXiv:2402.03300, eq. 3), and of its metrics.

    Args:
        scored: the micro-batch under the current weights.
        config: clip range, aggregation and KL coefficient.
        advantage_B: of every episode of the batch.
        old_BT: log-probabilities before the first update on the batch; None if this is the first.
        reference_BT: those of the reference, for the KL term.
        denominators: of the whole update batch.
    """
    logp_RT, width = scored.logp_RT, scored.logp_RT.shape[1]
    old_RT = logp_RT.detach() if old_BT is None else old_BT[scored.rows, :width]
    surrogate = logp_RT, old_RT, advantage_B[scored.rows]
    loss_RT = clipped_surrogate(*surrogate, config.clip_low, config.clip_high)
    low, high = clip_fractions(*surrogate, scored.sampled_RT, config.clip_low, config.clip_high, denominators)
    metrics = {"clip_low_fraction": low, "clip_high_fraction": high}
    if reference_BT is not None:
        kl_RT = kl_estimate(logp_RT, reference_BT[scored.rows, :width], "k3")
        metrics["kl"] = aggregate(kl_RT.detach(), scored.sampled_RT, "sequence_sum", denominators)
        loss_RT = loss_RT + config.kl_loss_coef * kl_RT
    return aggregate(loss_RT, scored.sampled_RT, config.aggregation, denominators), metrics
