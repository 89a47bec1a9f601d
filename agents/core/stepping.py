"""Stepping the token-level environment: one token a step, and trajectories from what the environment says.

Agents sample whole completions and replay them through the same transition rule, which is faster and gives the same
trajectories. This is the plain way, for environments in wrappers, and to prove the other one by.

Shapes: N environments, T context positions, B = N episodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from agents.core.policy import Policy
from agents.core.trajectories import Trajectories
from rewards import Score
from textenv.episodes import Source
from textenv.registry import registry
from textenv.task import Finish
from textenv.vector import TokenVectorEnv

Chooser = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""``(tokens (N, T), length (N,)) -> token (N,), logp (N,)``: the next token of each context, and its log-probability in the
distribution it was drawn from."""


def step_episodes(
    envs: gym.vector.VectorEnv[Any, Any, Any],
    choose: Chooser,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> Trajectories:
    """Play one episode in each environment, token by token.

    An episode that is terminated has the finish, score and credit that ``info`` tells. One that is truncated, by a wrapper
    with a limit of its own, ended for no reason of the task's: its finish is ``NONE``, and its score what it had earned.
    Texts are those of the last completion, since no other is told.

    Args:
        envs: from ``gym.make_vec(id, level="token", autoreset_mode="Disabled")``, as it is or wrapped.
        choose: who plays; asked about every episode until all are over.
        seed, options: of ``reset``.

    Raises:
        ValueError: an environment that is not at token level, or that resets itself.

    Example:
        >>> import textenv
        >>> envs = gym.make_vec("textenv/ProbeLength-v0", num_envs=2, level="token", autoreset_mode="Disabled")
        >>> batch = step_episodes(envs, lambda tokens, length: (np.array([1, 0]), np.zeros(2)), seed=0)
        >>> batch.sampled_BT.sum(dim=1).tolist(), batch.return_B.tolist()
        ([6, 1], [1.0, 0.0])
    """
    end_id = _check_steppable(envs).episodes.tokenizer.eos_ids[0]
    observation, begun = envs.reset(seed=seed, options=dict(options or {}))
    num, width = observation["tokens"].shape
    column_T = np.arange(width)
    tokens_NT = observation["tokens"].copy()
    source_NT = np.where(column_T < observation["length"], Source.PROMPT, Source.PAD).astype(np.uint8)
    logp_NT, reward_NT = np.zeros((num, width), np.float32), np.zeros((num, width))
    finish_N = np.full(num, Finish.NONE, dtype=np.uint8)
    scores: list[Score] = [Score(0.0)] * num
    completions: list[list[str]] = [[] for _ in range(num)]
    running_N = np.ones(num, dtype=bool)

    while running_N.any():
        length_N = observation["length"][:, 0]
        token_N, logp_N = choose(observation["tokens"], length_N)
        # The action of an episode that is over is ignored, unless it was truncated: then it is to end soon.
        observation, earned_N, terminated_N, truncated_N, infos = envs.step(np.where(running_N, token_N, end_id))
        taken = running_N, length_N[running_N]
        source_NT[taken], logp_NT[taken], reward_NT[taken] = Source.SAMPLED, logp_N[running_N], earned_N[running_N]
        # Whatever else the context has grown by is a reply.
        new_NT = (source_NT == Source.PAD) & (column_T < observation["length"]) & running_N[:, None]
        source_NT[new_NT] = Source.REPLY
        tokens_NT[running_N] = observation["tokens"][running_N]

        over_N = running_N & (terminated_N | truncated_N)
        for n in np.flatnonzero(over_N):
            told = info_of(infos, n) if terminated_N[n] else {}
            scores[n] = _score(float(reward_NT[n].sum()), told)
            if told:
                finish_N[n], completions[n] = Finish[told["finish"].upper()], [told["completion"]]
            if scores[n].tokens is not None:
                reward_NT[n, source_NT[n] == Source.SAMPLED] = scores[n].tokens
        running_N &= ~over_N

    longest = int((source_NT != Source.PAD).sum(axis=1).max())
    asked = [info_of(begun, n) for n in range(num)]
    return Trajectories(
        tokens_BT=torch.from_numpy(tokens_NT[:, :longest]),
        source_BT=torch.from_numpy(source_NT[:, :longest]),
        logp_BT=torch.from_numpy(logp_NT[:, :longest]),
        reward_BT=torch.from_numpy(reward_NT[:, :longest]),
        penalty_B=torch.zeros(num, dtype=torch.float64),
        group_B=torch.arange(num) // (options or {}).get("repeat", 1),
        scores=scores,
        finish_B=finish_N,
        prompts=[info["prompt"] for info in asked],
        completions=completions,
        references=[info["reference"] for info in asked],
    )


def sampling(policy: Policy, temperature: float, uniforms: Iterable[np.ndarray]) -> Chooser:
    """Plays by drawing from the policy's distribution, computed anew from the whole context at every step.

    Args:
        policy: the environments must have its tokenizer, and its ``vocab_size``.
        temperature: greater than 0.
        uniforms: for every step numbers ``(N,)`` in [0, 1), at which the distribution function is inverted.
    """
    stream = iter(uniforms)

    @torch.inference_mode()
    def choose(tokens_NT: np.ndarray, length_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens_BT = torch.from_numpy(tokens_NT[:, : length_N.max()]).to(policy.device)
        columns_C, column_B = torch.from_numpy(length_N - 1).to(policy.device).unique(return_inverse=True)
        logits_BCV, _ = policy.logits(tokens_BT, columns_C, use_cache=False)
        logp_BV = policy.distribution(logits_BCV[torch.arange(len(column_B)), column_B], temperature)
        mass_BV = logp_BV.double().exp().cumsum(dim=1)
        uniform_B1 = torch.from_numpy(next(stream)).to(policy.device).unsqueeze(1)
        token_B1 = torch.searchsorted(mass_BV, uniform_B1 * mass_BV[:, -1:], right=True)
        return token_B1.squeeze(1).cpu().numpy(), logp_BV.gather(1, token_B1).squeeze(1).cpu().numpy()

    return choose


def info_of(infos: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The info of environment ``n`` alone, out of what a vector environment merged.

    Example:
        >>> mask = np.array([True, False])
        >>> info_of({"finish": np.array(["eos", None]), "_finish": mask}, 0)
        {'finish': 'eos'}
    """
    return {
        name: info_of(column, n) if isinstance(column, dict) else column[n]
        for name, column in infos.items()
        if f"_{name}" in infos and infos[f"_{name}"][n]
    }


def check_token_view(env_id: str) -> None:
    """Refuse an environment that has no token-level view.

    Raises:
        ValueError: it is Gymnasium's, but textenv did not register it.
    """
    if env_id in gym.registry and env_id not in registry:
        raise ValueError(
            f"{env_id!r} is a Gymnasium environment without a token-level view, which only textenv.register makes; "
            "write its problems and its reward as a task and register that"
        )


def _check_steppable(envs: gym.vector.VectorEnv[Any, Any, Any]) -> TokenVectorEnv:
    inner = envs.unwrapped
    if not isinstance(inner, TokenVectorEnv):
        raise ValueError(
            f"stepping takes a token-level vector environment of textenv, got {envs}; "
            'make it with gym.make_vec(id, num_envs=…, level="token", autoreset_mode="Disabled")'
        )
    if inner.autoreset_mode is not AutoresetMode.DISABLED:
        raise ValueError(
            f"stepping plays one episode in each environment, so they must not reset themselves; "
            f'got autoreset_mode={inner.autoreset_mode.value!r}, make them with autoreset_mode="Disabled"'
        )
    return inner


def _score(earned: float, told: Mapping[str, Any]) -> Score:
    """The score of an episode that was paid ``earned`` in all."""
    value = None if told.get("ungraded") else earned
    return Score(value, told.get("parts", {}), told.get("credit"), told.get("error"))
