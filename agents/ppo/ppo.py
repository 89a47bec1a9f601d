"""PPO for language models (arXiv:1707.06347; the loop of arXiv:2203.02155 and arXiv:2403.17031).

Every token is an action. A step: sample completions; take the KL to the start off each token's reward; value every state by
the critic; credit the tokens by generalised advantage estimates, whitened over the batch; several passes over the batch in
minibatches, each minimising the clipped surrogate and the critic's clipped squared error.

An episode's completion is sampled whole and replayed through the transition rule of the token-level environment, which
gives the same trajectories as stepping it token by token (:mod:`agents.core.stepping`).

Shapes: B episodes, T tokens, R rows of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from agents.core.advantages import gae, whiten
from agents.core.agent import load_policy, pick_device, pick_tokenizer
from agents.core.config import require
from agents.core.critic import (
    AdapterCritic,
    Critic,
    SeparateCritic,
    check_reward_model_fits,
    critic_from_reward_model,
)
from agents.core.kl import adapt_penalty_coef
from agents.core.learner import Beside, Scored, check_save_memory
from agents.core.losses import Denominators, aggregate, value_loss
from agents.core.policy_gradient import PolicyGradient, PolicyGradientConfig, Weigh, policy_loss
from agents.core.sources import find_model
from agents.core.training import Callback
from agents.core.trajectories import Trajectories, summary
from agents.ppo.pretraining import Texts, draw_texts, read_texts
from textenv.task import Finish

OWN_CRITICS = ("shared", "separate", "lora")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(PolicyGradientConfig):
    """Settings of PPO."""

    prompts_per_step: int = 128
    """Problems a step."""
    group_size: int = 1
    """Completions a problem. They are not compared with each other: the critic says what to expect."""
    epochs_per_batch: int = 4
    """Passes over the batch."""
    gae_lambda: float = 0.95
    """How far advantages trust the rewards that came (1) over the critic (0)."""
    critic: str = "shared"
    """The value function: "shared", a head on the policy's trunk; "separate", a trunk of its own that starts as the policy;
    "lora", an adapter on the policy's weights (with lora_rank); or the folder or hub name of a reward model to start from."""
    critic_learning_rate: float | None = None
    """Of the critic's own weights; default the policy's."""
    critic_warmup_steps: int = 2
    """Steps in which only the critic learns, before the policy moves."""
    value_loss_coef: float = 0.1
    """Weight of the critic's squared error in the loss."""
    value_clip: float | None = 0.2
    """How far a value may move from what it was before the batch, in units of reward."""
    kl_step_target: float | None = None
    """Hold the updates on a batch to this KL, in nats a token, by an adaptive penalty instead of the clip (PPO-penalty)."""
    ptx_coef: float = 0.0
    """Weight of the likelihood of pretraining text, raised in every update (PPO-ptx); InstructGPT has 27.8."""
    ptx_file: str | None = None
    """That text: a jsonl, csv or parquet file with a field "text", each text cut to the environment's max_tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.gae_lambda <= 1, "gae_lambda", "from 0 to 1", self.gae_lambda)
        require(self.critic_warmup_steps >= 0, "critic_warmup_steps", "0 or more", self.critic_warmup_steps)
        require(self.value_loss_coef > 0, "value_loss_coef", "more than 0", self.value_loss_coef)
        for name in ("critic_learning_rate", "value_clip", "kl_step_target"):
            require(getattr(self, name) is None or getattr(self, name) > 0, name, "more than 0", getattr(self, name))
        require(
            self.critic_learning_rate is None or self.learning_rate != 0,
            "critic_learning_rate", "left out with learning_rate 0, with which it rises and falls", self.critic_learning_rate,
        )  # fmt: skip
        require(
            self.clip_ratio_max is None or self.kl_step_target is None,
            "clip_ratio_max", "left out with kl_step_target, whose loss has no clip", self.clip_ratio_max,
        )  # fmt: skip
        require(
            self.critic in OWN_CRITICS or "/" in self.critic or Path(self.critic).is_dir(),
            "critic", f"{', '.join(map(repr, OWN_CRITICS))}, a folder or a hub name (owner/name)", repr(self.critic),
        )  # fmt: skip
        require(
            self.critic != "lora" or self.lora_rank > 0,
            'critic "lora"', "used with lora_rank above 0: it is a second adapter on the frozen weights", self.lora_rank,
        )  # fmt: skip
        require(
            self.ptx_coef >= 0 and (self.ptx_coef > 0) == (self.ptx_file is not None),
            "ptx_coef and ptx_file", "given together", (self.ptx_coef, self.ptx_file),
        )  # fmt: skip


class PPO(PolicyGradient):
    """Proximal policy optimisation, token by token, with a critic.

    Example::

        agent = PPO("textenv/Arithmetic-v0", PPOConfig(critic="separate"))
        agent.learn(total_episodes=20_000)
    """

    name = "ppo"
    config_class = PPOConfig
    config: PPOConfig

    bootstrapped: ClassVar[frozenset[Finish]] = frozenset({Finish.NONE})
    """Endings that end no episode but only its record, so that what was still to come is the critic's guess: a cut from
    outside. All others leave nothing to come: the budget (``LENGTH``, ``CONTEXT``) is part of the task, its rest part of the
    state. An ungraded episode is not trained on, however it ended."""

    texts: Texts | None = None
    """The pretraining text, if any."""

    def needs_the_start(self) -> bool:
        return super().needs_the_start() or self.config.critic == "separate"

    def check_before_loading(self) -> None:
        super().check_before_loading()
        config, task = self.config, self.task
        check_save_memory(config.save_memory, pick_device(config.device), adapts=config.critic == "lora")
        if config.critic not in OWN_CRITICS:
            check_reward_model_fits(find_model(config.critic), pick_tokenizer(task, config), task.max_tokens)
        if config.ptx_file is not None:
            self.texts = read_texts(config.ptx_file, pick_tokenizer(task, config), task.max_tokens)

    def make_critic(self) -> Critic:
        config = self.config
        rate = config.base_learning_rate
        factor = config.critic_learning_rate / rate if config.critic_learning_rate else 1.0
        if config.critic == "shared":
            return Critic(self.policy.hidden_size, self.policy.device, factor)
        if config.critic == "separate":
            start = load_policy(self.env_id, self.task, config)
            return SeparateCritic(start.model.get_decoder(), start.hidden_size, factor)
        if config.critic == "lora":
            return AdapterCritic(self.policy, config.lora_rank, config.seed + 1, factor)
        return critic_from_reward_model(find_model(config.critic), self.policy.device, factor)

    def learn(self, total_episodes: int | None = None, callback: Callback | None = None) -> Self:
        config, learner = self.config, self.learner
        critic = learner.critic
        assert critic is not None
        rollout, reference = self.rollout(), self.reference()
        sample = self.sampler(rollout, lambda step, index: self.sample(rollout, index, (step,)))
        with self.training(total_episodes, config.prompts_per_step * config.group_size, callback) as training:
            for step in training:
                batch = sample(step, training.episodes // config.group_size)
                old_BT, value_BT = learner.logprobs_and_values(batch, batch.rows)
                batch = self.penalise(batch, reference, old_BT)
                learned_BT = batch.sampled_BT & batch.graded_B.unsqueeze(1)
                advantage_BT, return_BT = gae(
                    batch.reward_BT.float(),
                    value_BT,
                    learned_BT,
                    lam=config.gae_lambda,
                    last_value_B=self.values_after_the_end(batch),
                )
                advantage_BT = whiten(advantage_BT, learned_BT)
                batch.note("advantage", advantage_BT)
                policy_moves = step >= config.critic_warmup_steps
                critic.detached = not policy_moves
                loss = partial(
                    ppo_loss,
                    config=config,
                    advantage_BT=advantage_BT,
                    old_value_BT=value_BT,
                    return_BT=return_BT,
                    policy_moves=policy_moves,
                    kl_step_coef=self.kl_step_coef,
                )
                metrics = self.update(
                    batch,
                    loss,
                    step,
                    trained_B=batch.graded_B,
                    counted_B=batch.graded_B,
                    old_BT=old_BT,
                    beside=self.draw_texts if policy_moves and self.texts is not None else None,
                )
                metrics |= self.adapt_kl(batch)
                if policy_moves:
                    metrics |= self.adapt_step_penalty(batch, old_BT, learned_BT)
                metrics["explained_variance"] = explained_variance(value_BT[learned_BT], return_BT[learned_BT])
                training.log(batch, summary(batch) | metrics)
        return self

    def values_after_the_end(self, batch: Trajectories) -> Tensor:
        """What each episode could still have earned ``(B,)``: 0, or the critic's guess if it was ``bootstrapped``."""
        open_B = torch.tensor(
            [Finish(finish) in self.bootstrapped for finish in batch.finish_B], device=batch.rows.device
        )
        if not open_B.any():
            return torch.zeros(len(batch), device=batch.rows.device)
        return torch.where(open_B, self.learner.last_values(batch), 0.0)

    def draw_texts(self, seed: tuple[int, ...], rows: int) -> Beside:
        """``rows`` pretraining texts, drawn with ``seed``, and what is to be learned from them."""
        assert self.texts is not None
        return draw_texts(self.texts, seed, rows, coef=self.config.ptx_coef, device=self.policy.device)

    @property
    def kl_step_coef(self) -> float:
        """The weight of PPO-penalty's penalty by now."""
        return self.state.get("kl_step_coef", 1.0)

    def adapt_step_penalty(self, batch: Trajectories, old_BT: Tensor, learned_BT: Tensor) -> dict[str, float]:
        """PPO-penalty: move the weight of the penalty for the next batch, by how far this one's updates went."""
        if self.config.kl_step_target is None:
            return {}
        log_ratio_N = (self.learner.logprobs(batch, batch.rows) - old_BT)[learned_BT]
        kl = float((log_ratio_N.exp() - 1 - log_ratio_N).mean())
        used = self.kl_step_coef
        self.state["kl_step_coef"] = adapt_penalty_coef(used, kl, self.config.kl_step_target)
        return {"kl_step": kl, "kl_step_coef": used}


def ppo_loss(
    scored: Scored,
    *,
    config: PPOConfig,
    advantage_BT: Tensor,
    old_BT: Tensor,
    old_value_BT: Tensor,
    return_BT: Tensor,
    denominators: Denominators,
    weigh: Weigh | None = None,
    policy_moves: bool = True,
    kl_step_coef: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of PPO's loss, the policy's and ``value_loss_coef`` times the critic's, and of its metrics.

    The policy's is the clipped surrogate (arXiv:1707.06347, eq. 7), or with ``kl_step_target`` the surrogate with a KL
    penalty (eq. 8), whose KL(old || new) is estimated by ``(r - 1) - log r``, never negative. The critic's is averaged over
    tokens.

    Args:
        scored: the micro-batch under the current weights, values included.
        config: clip ranges, aggregation, weights.
        advantage_BT, return_BT: of every token of the batch.
        old_BT, old_value_BT: log-probabilities and values before the first update on the batch.
        denominators: of the whole update batch.
        weigh: multiplies the policy's loss of each token for what sampled it.
        policy_moves: False while only the critic learns.
        kl_step_coef: weight of PPO-penalty's penalty.
    """
    assert scored.value_RT is not None
    squares_RT = value_loss(scored.value_RT, scored.of(old_value_BT), scored.of(return_BT), config.value_clip)
    critics = aggregate(squares_RT, scored.sampled_RT, "token_mean", denominators)
    metrics = {"value_loss": critics.detach()}
    if not policy_moves:
        return config.value_loss_coef * critics, metrics
    if config.kl_step_target is None:
        policys, own = policy_loss(
            scored,
            config=config,
            advantage=advantage_BT,
            old_BT=old_BT,
            denominators=denominators,
            weigh=weigh,
        )
        metrics |= own
    else:
        log_ratio_RT = (scored.logp_RT - scored.of(old_BT)).clamp(-20, 20)
        ratio_RT = log_ratio_RT.exp()
        surrogate_RT = -ratio_RT * scored.of(advantage_BT)
        if weigh is not None:
            weight_RT, tis_metrics = weigh(scored, scored.of(old_BT))
            surrogate_RT, metrics = surrogate_RT * weight_RT, metrics | tis_metrics
        loss_RT = surrogate_RT + kl_step_coef * (ratio_RT - 1 - log_ratio_RT)
        policys = aggregate(loss_RT, scored.sampled_RT, config.aggregation, denominators)
    return policys + config.value_loss_coef * critics, metrics


def explained_variance(value_N: Tensor, return_N: Tensor) -> float:
    """``1 - Var(return - value) / Var(return)``: 1 for a perfect critic, below 0 for one that is worse than none."""
    spread = float(return_N.var()) if len(return_N) > 1 else 0.0
    return 1 - float((return_N - value_N).var()) / spread if spread > 0 else float("nan")
