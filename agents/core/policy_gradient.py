"""What policy-gradient agents share: settings, the clipped loss, and the passes over a batch.

Shapes: B episodes, T tokens, R rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from torch import Tensor

from agents.core.advantages import group_advantages, part_advantages
from agents.core.agent import Agent
from agents.core.ahead import Ahead
from agents.core.config import TINY, AgentConfig, require
from agents.core.gate import check_logp_gap
from agents.core.kl import adapt_kl_coef, kl_estimate
from agents.core.learner import Beside, Scored, mean_metrics, shuffled_parts
from agents.core.losses import (
    Aggregation,
    Denominators,
    aggregate,
    clip_fractions,
    clipped_surrogate,
    count_denominators,
    token_ratio,
)
from agents.core.policy import Scorer
from agents.core.rollout import Rollout
from agents.core.sources import find_model, validate_model_source
from agents.core.trajectories import Trajectories
from agents.core.usage import training_flops
from textenv.wrappers import kl_penalty

SHUFFLING = 0x5A4C
"""First word of every shuffle's seed, which sets its stream apart from those of problems, replies and sampling."""
TIS_CAP = 2.0
"""Largest weight of a token that the learner finds likelier than what sampled it did."""

Batch = TypeVar("Batch")
Weigh = Callable[[Scored, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Takes a micro-batch and its log-probabilities before the update, gives the weights of its tokens and their metrics."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(AgentConfig):
    """Settings of every agent that learns from what it sampled."""

    group_size: int = 8
    """Completions a problem."""
    temperature: float = 1.0
    """Of the sampling; the learner scores tokens in the same distribution."""
    clip_low: float = 0.2
    """How far a token's ratio may fall below 1 before its gradient is cut. Acts from the second update on a batch on."""
    clip_high: float = 0.2
    """How far it may rise above 1."""
    clip_ratio_max: float | None = None
    """Largest ratio of a token with negative advantage, which the clip alone does not bound; above 1 + clip_high."""
    updates_per_batch: int = 1
    """Optimiser steps a batch, each on its own share of the episodes."""
    epochs_per_batch: int = 1
    """Times that a batch is gone through."""
    aggregation: Aggregation = "token_mean"
    """How the loss is averaged over tokens; "sequence_mean" is GRPO's, "token_mean" DAPO's and PPO's, "constant" Dr.
    GRPO's."""
    kl_reward_coef: float = 0.0
    """Weight of the k1 estimate of the KL to the start, taken off each token's reward."""
    kl_target: float | None = None
    """Adapt the KL coefficients so that the KL to the start stays near this, in nats a sequence; default they are fixed."""
    max_logp_gap: float = 0.1
    """Largest mean difference, in nats, between a token's log-probability when sampled and when scored; more stops the
    run, since the learner would train on another distribution than was sampled. Each token is weighed for what is less."""
    staleness: Literal[0, 1] = 0
    """1 samples the next batch while this one is learned from, so with weights one step old, which each token is weighed
    for; it takes a copy of the weights."""

    @property
    def kl_coefs(self) -> dict[str, float]:
        """The KL coefficients by their names, any above 0 of which needs a reference."""
        return {"kl_reward_coef": self.kl_reward_coef}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.group_size >= 1, "group_size", "at least 1", self.group_size)
        require(self.temperature > 0, "temperature", "more than 0 to explore", self.temperature)
        require(
            0 < self.clip_low < 1 and self.clip_high > 0,
            "clip_low and clip_high",
            "above 0 (clip_low below 1)",
            (self.clip_low, self.clip_high),
        )
        require(
            self.clip_ratio_max is None or self.clip_ratio_max > 1 + self.clip_high,
            "clip_ratio_max",
            f"more than 1 + clip_high = {1 + self.clip_high:g}",
            self.clip_ratio_max,
        )
        require(
            min(self.updates_per_batch, self.epochs_per_batch) >= 1,
            "updates_per_batch and epochs_per_batch",
            "at least 1",
            (self.updates_per_batch, self.epochs_per_batch),
        )
        for name, coef in self.kl_coefs.items():
            require(coef >= 0, name, "0 or more", coef)
        if self.kl_target is not None:
            require(self.kl_target > 0, "kl_target", "more than 0 nats a sequence", self.kl_target)
            require(
                max(self.kl_coefs.values()) > 0,
                " or ".join(self.kl_coefs),
                "above 0 when there is a kl_target, which adapts it",
                0.0,
            )


@dataclass(frozen=True, kw_only=True)
class GroupConfig(PolicyGradientConfig):
    """Settings of the agents that compare the completions of one problem with each other."""

    min_group_std: float = 0.0
    """Groups whose returns have a smaller standard deviation are not trained on, in units of reward."""
    kl_loss_coef: float = 0.0
    """Weight of the k3 estimate of the KL to the start, added to the loss."""

    @property
    def kl_coefs(self) -> dict[str, float]:
        return {**super().kl_coefs, "kl_loss_coef": self.kl_loss_coef}

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.group_size
        require(group >= 2, "group_size", "2 or more, since a lone completion has no group to be compared with", group)
        require(self.min_group_std >= 0, "min_group_std", "0 or more", self.min_group_std)


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(GroupConfig):
    """Settings of the agents whose advantage is how far an episode is above its group."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not at all."""
    part_weights: Annotated[dict[str, float], tyro.conf.arg(metavar="NAME WEIGHT ...")] = field(default_factory=dict)
    """Normalise each of these parts of the score by itself, as scale_rewards and min_group_std say, and add them up with
    these weights (GDPO), e.g. correct 1 format 0.2; default the score is normalised as a whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = list(self.part_weights.values())
        finite = all(map(math.isfinite, weights)) and (any(weights) or not weights)
        require(finite, "part_weights", "finite for every part, and not all 0", self.part_weights)
        require(
            not self.part_weights or self.kl_reward_coef == 0,
            "kl_reward_coef",
            "0 with part_weights, which leave no reward to take it off; kl_loss_coef goes with them",
            self.kl_reward_coef,
        )


class PolicyGradient(Agent):
    """An agent that samples, credits what it sampled, and raises or lowers its probability.

    A subclass writes ``learn``: :meth:`sample` by way of :meth:`sampler`, its own credit, :meth:`update`, :meth:`adapt_kl`.

    Attributes:
        ahead: with ``staleness`` 1, what samples the next batch while :meth:`update` learns from this one.
    """

    config: Any
    ahead: Ahead | None = None

    @property
    def temperature(self) -> float:
        return self.config.temperature

    def needs_the_start(self) -> bool:
        """Whether the run goes on using the model that it started from."""
        return max(self.config.kl_coefs.values()) > 0

    def check_before_loading(self) -> None:
        super().check_before_loading()
        if self.resumed and self.needs_the_start() and self.config.model != TINY:
            try:
                validate_model_source(find_model(self.config.model))
            except ValueError as error:
                raise ValueError(
                    f"to go on, the run needs the model that it started from, for its KL or its critic: {error}"
                ) from error

    def reference(self) -> Scorer | None:
        """The policy as it started, if any KL to it is wanted."""
        return self.frozen_reference() if max(self.config.kl_coefs.values()) > 0 else None

    def sample(self, rollout: Rollout, index: int, seed: tuple[int, ...], prompts: int | None = None) -> Trajectories:
        """A group of completions for each of ``prompts`` problems (default ``prompts_per_step``), from ``index`` on."""
        prompts = prompts or self.config.prompts_per_step
        batch = rollout.collect(
            index, prompts, self.config.group_size, temperature=self.temperature, seed=(self.config.seed, *seed)
        )
        rollout.reward.adapt()
        return batch.to(self.policy.device)

    def sampler(self, rollout: Rollout, sample: Callable[[int, int], Batch]) -> Callable[[int, int], Batch]:
        """What gives a step's batch, from its number and that of its first problem: ``sample``; or with ``staleness`` 1 what
        ``sample`` gave, by this rollout, while the step before was learned from.
        """
        if self.config.staleness == 0:
            return sample
        self.ahead = Ahead(self, rollout, sample)
        return self.ahead.take

    def next_batch_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.ahead is None:
            return super().next_batch_state()
        return self.ahead.reward_state, self.ahead.weights()

    def penalise(self, batch: Trajectories, reference: Scorer | None, old_BT: Tensor | None = None) -> Trajectories:
        """The batch with what the reference says of it, and the KL penalty taken off its rewards.

        Policy and reference are scored in the same way, by the learner: where they are equal the penalty is 0, and not the
        rounding of an engine, which a group without spread would blow up. ``old_BT`` is the policy's side, if it is known.
        """
        if reference is None:
            return batch
        if old_BT is None:
            old_BT = self.learner.logprobs(batch, batch.rows)
        reference_BT = self.learner.logprobs(batch, batch.rows, policy=reference)
        penalty_BT = kl_penalty(old_BT.double(), reference_BT.double(), self.config.kl_reward_coef * self.kl_factor)
        batch.note("kl", old_BT - reference_BT)
        kl_B = (old_BT.double() - reference_BT.double()).sum(dim=1)  # both are 0 where nothing was sampled
        return replace(batch, reference_BT=reference_BT, kl_B=kl_B).penalised(penalty_BT)

    @property
    def kl_factor(self) -> float:
        """What the KL coefficients are multiplied by by now, to keep the KL near its target."""
        return self.state.get("kl_factor", 1.0)

    def adapt_kl(self, batch: Trajectories) -> dict[str, float]:
        """Move the KL coefficients for the next batch, by the KL of this one."""
        if self.config.kl_target is None:
            return {}
        assert batch.kl_B is not None, "penalise comes first"
        used = self.kl_factor
        kl = float(batch.kl_B.mean())
        self.state["kl_factor"] = adapt_kl_coef(used, kl, self.config.kl_target, len(batch))
        return {"kl_factor": used}

    def update(
        self,
        batch: Trajectories,
        loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        step: int,
        *,
        trained_B: Tensor,
        counted_B: Tensor | None = None,
        old_BT: Tensor | None = None,
        beside: Callable[[tuple[int, ...], int], Beside] | None = None,
    ) -> dict[str, float]:
        """Go through a batch ``epochs_per_batch`` times, in ``updates_per_batch`` optimiser steps each.

        Args:
            batch: what was sampled.
            loss: takes a :class:`Scored`, ``old_BT``, ``denominators`` and ``weigh``, a :data:`Weigh`.
            step: the number of the step, for the seed of the shuffle.
            trained_B: bool, the rows that have a gradient; only these go through the model.
            counted_B: bool, the rows that count in the denominators; default all. The gradient is the same as if all of
                them had gone through the model.
            old_BT: log-probabilities before the first update; default they are taken where they are needed.
            beside: for an update's seed and number of rows, what else is to be learned in the same optimiser step.

        Returns:
            the metrics of the learner and the loss, averaged over the updates.

        Raises:
            RuntimeError: the batch was sampled from another distribution than the learner scores: see ``max_logp_gap``.
        """
        learn = partial(
            self._learn_from, batch, loss, step, trained_B=trained_B, counted_B=counted_B, old_BT=old_BT, beside=beside
        )
        if self.ahead is None:
            metrics = learn()
        else:
            late = self.ahead.measure_gap(batch) | {"staleness": float(self.ahead.staleness)}
            with self.ahead.sampling(step, self._problem_after(batch)):
                metrics = learn() | late
        check_logp_gap(metrics, self.config.max_logp_gap)
        return metrics

    def _problem_after(self, batch: Trajectories) -> int | None:
        """The number of the first problem of the step after the one with this batch; None if there is no such step."""
        training = self.last_training
        assert training is not None
        episodes = training.episodes + len(batch)
        return episodes // self.config.group_size if episodes < training.total_episodes else None

    def _learn_from(
        self,
        batch: Trajectories,
        loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        step: int,
        *,
        trained_B: Tensor,
        counted_B: Tensor | None,
        old_BT: Tensor | None,
        beside: Callable[[tuple[int, ...], int], Beside] | None,
    ) -> dict[str, float]:
        config, learner = self.config, self.learner
        rows = batch.rows if counted_B is None else batch.rows[counted_B]
        # Used once, a batch is compared with the very weights that score it: the ratio is 1 and needs no pass of its own.
        if old_BT is None and config.updates_per_batch * config.epochs_per_batch > 1:
            old_BT = learner.logprobs(batch, rows[trained_B[rows]])
        updates = []
        for epoch in range(config.epochs_per_batch):
            seed = (SHUFFLING, config.seed, step, epoch)
            for number, part in enumerate(shuffled_parts(rows, config.updates_per_batch, seed)):
                denominators = count_denominators(batch.sampled_BT[part], self.task.max_new_tokens * self.task.turns)
                trained = part[trained_B[part]]
                if len(trained):
                    also = None if beside is None else beside((*seed, number), len(part))
                    weigh = partial(tis_weights, behaviour_BT=batch.logp_BT, tokens=batch.sampled_BT[trained].sum())
                    own = partial(loss, old_BT=old_BT, denominators=denominators, weigh=weigh)
                    updates.append(learner.step(batch, trained, own, beside=also))
                    self.flops += training_flops(self.policy, batch.length_B[trained])
        metrics = mean_metrics(updates) if updates else learner.measure_gap(batch, batch.rows[: config.group_size])
        return {"trained_share": float(trained_B.float().mean()), **metrics}


def compare_in_groups(batch: Trajectories, config: AdvantageConfig, kept_B: Tensor | None = None) -> Tensor:
    """Advantages ``(B,)``, float32: how far an episode's return, or its parts by ``part_weights``, are above its group.

    Args:
        batch: what was sampled.
        config: how to normalise.
        kept_B: bool, the episodes that have a say; default all. The others get 0.

    Raises:
        ValueError: a part to be weighed is in no score of the batch.
    """
    normalise, min_std = config.scale_rewards, config.min_group_std
    none_B = torch.zeros_like(batch.graded_B) if kept_B is None else ~kept_B
    if not config.part_weights:
        return_B = batch.return_B.masked_fill(none_B, torch.nan)
        return group_advantages(return_B, batch.group_B, normalise, min_std=min_std).float()
    check_parts(batch, config.part_weights)
    part_KB = torch.stack([batch.part_B(name) for name in config.part_weights]).masked_fill(none_B, torch.nan)
    weights = list(config.part_weights.values())
    return part_advantages(part_KB, weights, batch.group_B, normalise, min_std=min_std).float()


def check_parts(batch: Trajectories, names: Iterable[str]) -> None:
    """Refuse parts that no score of a batch has: they would silently teach nothing.

    Raises:
        ValueError: there is one.
    """
    given = {name for score in batch.scores for name in score.parts}
    missing = [name for name in names if name not in given]
    if missing and batch.graded_B.any():
        raise ValueError(
            f"part_weights names {missing[0]!r}, but no score of the step has such a part; there are "
            f"{', '.join(sorted(given)) or 'none'}"
        )


def policy_loss(
    scored: Scored,
    *,
    config: PolicyGradientConfig,
    advantage: Tensor,
    old_BT: Tensor | None,
    denominators: Denominators,
    weigh: Weigh | None = None,
    reference_BT: Tensor | None = None,
    kl_loss_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the clipped surrogate with a KL term (PPO, arXiv:1707.06347, eq. 7; GRPO, arXiv:2402.03300,
    eq. 3), and of its metrics.

    Args:
        scored: the micro-batch under the current weights.
        config: clip range and aggregation.
        advantage: of every episode of the batch, ``(B,)``, or of every token, ``(B, T)``.
        old_BT: log-probabilities before the first update on the batch; None if this is the first.
        denominators: of the whole update batch.
        weigh: multiplies the loss of each token for what sampled it: :func:`tis_weights`.
        reference_BT: log-probabilities of the reference, for the KL term.
        kl_loss_coef: weight of the k3 estimate; 0 for no term.
    """
    logp_RT = scored.logp_RT
    old_RT = logp_RT.detach() if old_BT is None else scored.of(old_BT)
    surrogate = logp_RT, old_RT, scored.of(advantage)
    loss_RT = clipped_surrogate(*surrogate, config.clip_low, config.clip_high, config.clip_ratio_max)
    low, high = clip_fractions(*surrogate, scored.sampled_RT, config.clip_low, config.clip_high, denominators)
    metrics = {"clip_low_fraction": low, "clip_high_fraction": high}
    if weigh is not None:
        weight_RT, tis_metrics = weigh(scored, old_RT)
        loss_RT, metrics = loss_RT * weight_RT, metrics | tis_metrics
    if kl_loss_coef and reference_BT is not None:
        kl_RT, kl_metrics = kl_term(scored, reference_BT, kl_loss_coef, denominators)
        loss_RT, metrics = loss_RT + kl_RT, metrics | kl_metrics
    return aggregate(loss_RT, scored.sampled_RT, config.aggregation, denominators), metrics


def kl_term(
    scored: Scored, reference_BT: Tensor, coef: float, denominators: Denominators
) -> tuple[Tensor, dict[str, Tensor]]:
    """``coef`` times the k3 estimate of the KL to the reference at each token ``(R, T)``, and what it is a sequence."""
    kl_RT = kl_estimate(scored.logp_RT, scored.of(reference_BT), "k3")
    return coef * kl_RT, {"kl_k3": aggregate(kl_RT.detach(), scored.sampled_RT, "sequence_sum", denominators)}


def tis_weights(
    scored: Scored, old_RT: Tensor, *, behaviour_BT: Tensor, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Truncated importance weights ``min(exp(old - behaviour), TIS_CAP)`` of tokens ``(R, T)`` (Ionides 2008, J. Comput. Graph.
    Stat. 17, 295-311), and a micro-batch's share of their metrics.

    They correct for an engine that computes otherwise than the learner, and for older weights; where both are the same, they
    are 1 but for rounding. How far the updates on the batch go from ``old`` is the clip's affair. Each token is weighed by
    itself: the product over a sequence would be decided by its length.

    Args:
        scored: the micro-batch under the current weights.
        old_RT: its log-probabilities before the first update on the batch.
        behaviour_BT: log-probabilities of the whole batch when it was sampled.
        tokens: how many the whole update batch is trained on.
    """
    ratio_RT = token_ratio(old_RT, scored.of(behaviour_BT))
    weight_RT = ratio_RT.clamp(max=TIS_CAP)
    capped_RT = scored.sampled_RT & (ratio_RT > TIS_CAP)
    mean = torch.where(scored.sampled_RT, weight_RT, 0.0).sum() / tokens
    return weight_RT, {"tis_mean": mean, "tis_capped_share": capped_RT.sum() / tokens}
