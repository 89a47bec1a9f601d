"""Stepping the token-level environment: one token a step, and trajectories from what the environment says.

Agents sample whole completions and replay them through the same transition rule, which is faster and gives the same
trajectories. This is the plain way, for environments in wrappers, and to prove the other one by.

Shapes: N environments, T context positions, B = N episodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from agents.core.engines.sampling import draw
from agents.core.policy import Policy
from agents.core.trajectories import Trajectories
from rewards import Score
from textenv.episodes import Source
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
    options = dict(options or {})
    observation, begun = envs.reset(seed=seed, options=options)
    recording = _Recording(observation)
    while recording.running_N.any():
        length_N = observation["length"][:, 0]
        token_N, logp_N = choose(observation["tokens"], length_N)
        # The action of an episode that is over is ignored, unless it was truncated: then it is to end soon.
        observation, *outcome = envs.step(np.where(recording.running_N, token_N, end_id))
        recording.add(length_N, logp_N, observation, *outcome)
    return recording.trajectories([info_of(begun, n) for n in range(envs.num_envs)], options.get("repeat", 1))


class _Recording:
    """What N environments have said so far, each until its episode was over."""

    def __init__(self, observation: Mapping[str, np.ndarray]) -> None:
        self.tokens_NT = observation["tokens"].copy()
        num, width = self.tokens_NT.shape
        self.column_T = np.arange(width)
        begun_NT = self.column_T < observation["length"]
        self.source_NT = np.where(begun_NT, Source.PROMPT, Source.PAD).astype(np.uint8)
        self.logp_NT, self.reward_NT = np.zeros((num, width), np.float32), np.zeros((num, width))
        self.running_N = np.ones(num, dtype=bool)
        self.finish_N = np.full(num, Finish.NONE, dtype=np.uint8)
        self.scores = [Score(0.0)] * num
        self.completions: list[list[str]] = [[] for _ in range(num)]

    def add(
        self,
        length_N: np.ndarray,
        logp_N: np.ndarray,
        observation: Mapping[str, np.ndarray],
        reward_N: np.ndarray,
        terminated_N: np.ndarray,
        truncated_N: np.ndarray,
        infos: Mapping[str, Any],
    ) -> None:
        """Keep one step, which chose the tokens at ``length_N``."""
        running_N = self.running_N
        chosen = running_N, length_N[running_N]
        self.source_NT[chosen] = Source.SAMPLED
        self.logp_NT[chosen], self.reward_NT[chosen] = logp_N[running_N], reward_N[running_N]
        # Whatever else a context has grown by is a reply.
        grown_NT = (self.source_NT == Source.PAD) & (self.column_T < observation["length"])
        self.source_NT[grown_NT & running_N[:, None]] = Source.REPLY
        self.tokens_NT[running_N] = observation["tokens"][running_N]
        for n in np.flatnonzero(running_N & (terminated_N | truncated_N)).tolist():
            self._end(n, info_of(infos, n) if terminated_N[n] else None)
        self.running_N = running_N & ~(terminated_N | truncated_N)

    def _end(self, n: int, told: Mapping[str, Any] | None) -> None:
        """Close episode ``n``, of which ``told`` is the last info; None if it was truncated."""
        paid = float(self.reward_NT[n].sum())
        if told is None:
            self.scores[n] = Score(paid)
            return
        value, credit = None if told["ungraded"] else paid, told.get("credit")
        self.scores[n] = Score(value, told["parts"], credit, told.get("error"), told.get("verdict", {}))
        self.finish_N[n], self.completions[n] = Finish[told["finish"].upper()], [told["completion"]]
        if credit is not None:
            self.reward_NT[n, self.source_NT[n] == Source.SAMPLED] = credit

    def trajectories(self, asked: Sequence[Mapping[str, Any]], group_size: int) -> Trajectories:
        """The episodes, all over; ``asked`` is what each was told at its start."""
        width = int((self.source_NT != Source.PAD).sum(axis=1).max())
        return Trajectories(
            tokens_BT=torch.from_numpy(self.tokens_NT[:, :width]),
            source_BT=torch.from_numpy(self.source_NT[:, :width]),
            logp_BT=torch.from_numpy(self.logp_NT[:, :width]),
            reward_BT=torch.from_numpy(self.reward_NT[:, :width]),
            penalty_B=torch.zeros(len(asked), dtype=torch.float64),
            group_B=torch.arange(len(asked)) // group_size,
            scores=self.scores,
            finish_B=self.finish_N,
            prompts=[info["prompt"] for info in asked],
            completions=self.completions,
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
        token_B, logp_B = draw(logp_BV, torch.from_numpy(next(stream)).to(policy.device))
        return token_B.cpu().numpy(), logp_B.cpu().numpy()

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
