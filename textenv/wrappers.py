"""Wrappers for people, API models and Gymnasium agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from textenv.envs import TextEnv
from textenv.episodes import Source

LogProbs = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``(context (T,), completion (K,)) -> (K,)``: log-probability in nats of each token of the completion."""


def kl_penalty(logp: Any, reference_logp: Any, beta: float) -> Any:
    """The reward of each token for staying near the reference: ``-beta * (logp - reference_logp)``, in reward units.

    This is the k1 estimate of KL(policy || reference) on the token that was taken, as in Ziegler et al. 2019
    (arXiv:1909.08593, eq. 2). Works on numbers, arrays and tensors.
    """
    return -beta * (logp - reference_logp)


class KLPenalty(gym.Wrapper[Any, Any, Any, Any]):
    """Takes ``beta`` times the policy's log ratio to a reference off each step's reward, at either level.

    ``info["kl"]`` holds the step's log ratio, the sum over its tokens.

    Args:
        env: a textenv environment.
        logp: the policy's log-probabilities, see :data:`LogProbs`.
        reference_logp: the reference's.
        beta: weight of the penalty, in reward per nat.

    Example:
        >>> import gymnasium as gym, textenv
        >>> sure, torn = (lambda context, completion, p=p: np.full(len(completion), np.log(p)) for p in (1.0, 0.5))
        >>> env = KLPenalty(gym.make("textenv/Copy-v0", level="token"), sure, torn, beta=0.1)
        >>> _ = env.reset(seed=0)
        >>> round(env.step(1)[1], 4)
        -0.0693
    """

    def __init__(self, env: gym.Env[Any, Any], logp: LogProbs, reference_logp: LogProbs, beta: float) -> None:
        super().__init__(env)
        _require_text_env(env, "KLPenalty")
        self.logp, self.reference_logp, self.beta = logp, reference_logp, beta

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        episodes = self.unwrapped.episodes  # type: ignore[attr-defined]
        context = episodes.context(0).copy()
        observation, reward, terminated, truncated, info = self.env.step(action)
        taken = _taken_tokens(episodes, len(context))
        logp, reference_logp = self.logp(context, taken), self.reference_logp(context, taken)
        info["kl"] = float(np.sum(logp - reference_logp))
        total = float(reward) + float(np.sum(kl_penalty(logp, reference_logp, self.beta)))
        return observation, total, terminated, truncated, info


def _taken_tokens(episodes: Any, before: int) -> np.ndarray:
    """The tokens that the last action added, without the environment's reply to it."""
    added = slice(before, int(episodes.length_N[0]))
    return episodes.tokens_NT[0, added][episodes.source_NT[0, added] == Source.SAMPLED].copy()


class AnyText(spaces.Text):
    """Text in any alphabet, up to a length."""

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


class TextView(gym.Wrapper[str, str, Any, Any]):
    """A sequence-level environment in text, for people and for models behind an API.

    The observation is the decoded context. The action is the answer as text: it is encoded, cut to the budget, and
    ended with an end-of-sequence token, and ``info["view"]`` says so. What such an episode records is not what a policy
    would have sampled, so never train on its tokens.

    Example:
        >>> import gymnasium as gym, textenv
        >>> env = TextView(gym.make("textenv/Arithmetic-v0"))
        >>> question, info = env.reset(seed=0)
        >>> env.step(info["reference"])[1]
        1.0
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        _require_text_env(env, "TextView")
        if self.unwrapped.level != "sequence":  # type: ignore[attr-defined]
            raise ValueError('TextView takes whole answers; make the environment with level="sequence"')
        self._episodes = self.unwrapped.episodes  # type: ignore[attr-defined]
        longest = 64 * self._episodes.task.max_tokens
        self.observation_space = AnyText(min_length=0, max_length=longest)
        self.action_space = AnyText(min_length=0, max_length=longest)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        _, info = self.env.reset(seed=seed, options=options)
        return self._episodes.text(0), info

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        tokenizer, room = self._episodes.tokenizer, int(self._episodes.limit_N[0] - self._episodes.length_N[0])
        ids = tokenizer.encode(action)
        tokens: Any = np.array([*ids, tokenizer.eos_ids[0]])  # what exceeds the room is not looked at
        _, reward, terminated, truncated, info = self.env.step(tokens)
        ending = f"cut at the {room} there is room for" if len(ids) >= room else "ended with an end-of-sequence token"
        view = f"{len(action)} characters encoded to {len(ids)} tokens, {ending}"
        return self._episodes.text(0), reward, terminated, truncated, {**info, "view": view}


def _require_text_env(env: gym.Env[Any, Any], wrapper: str) -> None:
    if not isinstance(env.unwrapped, TextEnv):
        raise TypeError(f"{wrapper} wraps a textenv environment, got {env.unwrapped}")
