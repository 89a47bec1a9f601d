"""GRPO with outcome supervision, as in DeepSeekMath (arXiv:2402.03300, section 4.1).

A step: sample G completions for each of P problems; an episode's advantage is its return, less the mean of its group,
over the group's standard deviation; minimise the clipped surrogate, averaged within each sequence first and then over
sequences. Unlike the paper, no KL term by default (``kl_loss_coef=0``), and groups of 8.

Shapes: P problems, G completions a problem, B = P·G episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Self

from agents.core.losses import Aggregation
from agents.core.policy_gradient import AdvantageConfig, PolicyGradient, compare_in_groups, policy_loss
from agents.core.training import Callback
from agents.core.trajectories import summary


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(AdvantageConfig):
    """Settings of GRPO; the defaults are the paper's loss without its KL term (there ``kl_loss_coef`` is 0.04)."""

    aggregation: Aggregation = "sequence_mean"
    """How the loss is averaged over tokens; "sequence_mean" is GRPO's, "token_mean" DAPO's, "constant" Dr. GRPO's."""


class GRPO(PolicyGradient):
    """Group Relative Policy Optimisation.

    Example::

        agent = GRPO("textenv/Arithmetic-v0", GRPOConfig(group_size=8))
        agent.learn(total_episodes=20_000)
        print(agent.evaluate().accuracy_text())
    """

    name = "grpo"
    config_class = GRPOConfig
    config: GRPOConfig

    def learn(self, total_episodes: int | None = None, callback: Callback | None = None) -> Self:
        config = self.config
        rollout, reference = self.rollout(), self.reference()
        sample = self.sampler(rollout, lambda step, index: self.sample(rollout, index, (step,)))
        with self.training(total_episodes, config.prompts_per_step * config.group_size, callback) as training:
            for step in training:
                batch = sample(step, training.episodes // config.group_size)
                batch = self.penalise(batch, reference)
                advantage_B = compare_in_groups(batch, config)
                batch.note("advantage", advantage_B)
                loss = partial(
                    policy_loss,
                    config=config,
                    advantage=advantage_B,
                    reference_BT=batch.reference_BT,
                    kl_loss_coef=config.kl_loss_coef * self.kl_factor,
                )
                # Without a KL term an episode with advantage 0 has no gradient, so it need not be scored at all.
                trained_B = batch.graded_B if config.kl_loss_coef else advantage_B != 0
                metrics = self.update(batch, loss, step, trained_B=trained_B) | self.adapt_kl(batch)
                training.log(batch, summary(batch) | metrics)
        return self
