"""Stable-Baselines3's PPO as a contender, on the token view: a step of it is a token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import count
from typing import Any

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.core.config import AgentConfig
from agents.core.policy import Policy
from agents.sb3 import CausalLMPolicy
from benchmarks.harness.arena import Arena
from benchmarks.harness.contenders import ENDLESS, check_settings
from benchmarks.harness.provenance import as_json, digest
from benchmarks.harness.suite import Budget

GIVEN = ("policy", "env", "seed", "policy_kwargs")
"""Settings that the arena gives, the same to all."""
DEFAULTS: dict[str, Any] = {"n_steps": 128, "gamma": 1.0}
"""With 16 environments as many tokens a rollout as Stable-Baselines3 has with one; returns are not discounted."""


class SB3PPO:
    """``stable_baselines3.PPO``.

    Args:
        n_envs: episodes that are played side by side.
        settings: of ``PPO``, but for :data:`GIVEN`.

    Raises:
        ValueError: an unknown setting, or one that the arena gives.
    """

    def __init__(self, n_envs: int = 16, **settings: Any) -> None:
        known = [name for name in inspect.signature(PPO.__init__).parameters if name != "self"]
        check_settings("sb3-ppo", settings, ["n_envs", *known], GIVEN)
        if n_envs < 1:
            raise ValueError(f"n_envs must be at least 1, got {n_envs}")
        self.n_envs, self.given = n_envs, settings

    def described(self, budget: Budget) -> str:
        """The settings given, and a hash of the defaults here; those of Stable-Baselines3 belong to its version."""
        return f"{as_json({'n_envs': self.n_envs, **self.given})} {digest(DEFAULTS)}"

    def train(self, arena: Arena) -> None:
        policy, order = arena.policy(), count()

        def make() -> gym.Env:
            env = gym.make(
                arena.env_id,
                level="token",
                tokenizer=policy.tokenizer,
                vocab_size=policy.vocab_size,
                **arena.options,
            )
            return InOrder(env, arena.seed, order)

        settings = {**DEFAULTS, "learning_rate": AgentConfig(model=arena.model).base_learning_rate, **self.given}
        agent = PPO(
            CausalLMPolicy,
            DummyVecEnv([make] * self.n_envs),
            seed=arena.seed,
            device=policy.device,
            policy_kwargs={"model": policy},
            **settings,
        )
        agent.learn(ENDLESS, Watcher(arena, policy))


class InOrder(gym.Wrapper):
    """An environment whose episodes take the problems that several environments share in the order of their beginning.

    Args:
        env: one of them.
        seed: of the problems.
        order: numbers of the problems, shared.
    """

    def __init__(self, env: gym.Env, seed: int, order: Iterator[int]) -> None:
        super().__init__(env)
        self.seed, self.order = seed, order

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.env.reset(seed=self.seed, options={"index": next(self.order)})


class Watcher(BaseCallback):
    """Tells the arena what has been spent, before each rollout, when the updates on the last one are done."""

    def __init__(self, arena: Arena, policy: Policy) -> None:
        super().__init__()
        self.arena, self.lm = arena, policy
        self.episodes = self.updates = 0
        self.goes_on = True

    def _on_training_start(self) -> None:
        self.model.policy.optimizer.register_step_post_hook(self._count)
        self.arena.begin()

    def _count(self, *_: Any) -> None:
        self.updates += 1

    def _on_rollout_start(self) -> None:
        if self.updates:
            tokens = self.num_timesteps
            self.goes_on = self.arena.spent(self.lm, episodes=self.episodes, tokens=tokens, updates=self.updates)

    def _on_step(self) -> bool:
        self.episodes += int(self.locals["dones"].sum())
        return self.goes_on
