"""The vector environments: N episodes as arrays, stepped together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from textenv.envs import action_space, check_level, final_info, make_episodes, observation_space, observe, reset_info
from textenv.episodes import Episodes, Snapshot
from textenv.problems import ProblemStream

VectorObservation = dict[str, np.ndarray]


def make_vector_env(
    task: str,
    num_envs: int = 1,
    level: str = "sequence",
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    render_mode: str | None = None,
    **options: Any,
) -> TextVectorEnv:
    """What ``gym.make_vec`` calls. ``options`` are those of :class:`textenv.envs.TextEnv`.

    Raises:
        ValueError: an unknown level, mode or option.
    """
    check_level(level)
    episodes = make_episodes(task, num_envs, **options)
    view = TokenVectorEnv if level == "token" else SequenceVectorEnv
    return view(episodes, AutoresetMode(autoreset_mode), render_mode)


class TextVectorEnv(gym.vector.VectorEnv[VectorObservation, Any, np.ndarray]):
    """N episodes of one task. Made by ``gym.make_vec(id, num_envs=N, level=…, …)``.

    ``reset(seed=s)`` starts on problems 0, 1, …, N - 1 of seed s; a list of seeds gives each episode a stream of its own.
    Options of ``reset`` are those of :class:`textenv.envs.TextEnv` and ``reset_mask``, bool ``(N,)``.

    With ``autoreset_mode="Disabled"`` an episode that is done stays so until it is reset: its actions are ignored, its
    reward is 0, and it goes on being ``terminated``.
    """

    level: str

    def __init__(self, episodes: Episodes, autoreset_mode: AutoresetMode, render_mode: str | None = None) -> None:
        self.episodes = episodes
        self.num_envs = episodes.num
        self.autoreset_mode = autoreset_mode
        self.metadata = {"autoreset_mode": autoreset_mode, "render_modes": ["ansi"], "render_fps": 4}
        self.render_mode = render_mode
        self.single_observation_space = observation_space(episodes)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = action_space(episodes, self.level)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._streams = [ProblemStream(episodes.task, episodes.split)]

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[VectorObservation, dict[str, Any]]:
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, dtype=bool))
        self._check_mask(mask)
        self._seed(seed)
        rows: list[int] = np.flatnonzero(mask).tolist()
        self._begin(rows, options)
        return observe(self.episodes), self._merge(rows, (reset_info(self.episodes, n) for n in rows))

    def _check_mask(self, mask: Any) -> None:
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must be a bool array of shape ({self.num_envs},) with a True in it, "
                f"got {mask!r}"
            )

    def _seed(self, seed: int | Sequence[int] | None) -> None:
        if seed is None and self._streams[0].seed is not None:
            return
        if seed is None or isinstance(seed, int | np.integer):
            self._streams = self._streams[:1]
            self._streams[0].start(int(self.np_random.integers(2**31)) if seed is None else int(seed))
            return
        if len(seed) != self.num_envs:
            raise ValueError(f"a list of seeds needs one for each of the {self.num_envs} environments, got {len(seed)}")
        self._streams = [ProblemStream(self.episodes.task, self.episodes.split) for _ in seed]
        for stream, own in zip(self._streams, seed, strict=True):
            stream.start(own)

    def _begin(self, rows: Sequence[int], options: Mapping[str, Any] | None = None) -> None:
        if len(self._streams) == 1:
            drawn = self._streams[0].take(len(rows), options)
        else:
            drawn = [taken for n in rows for taken in self._streams[n].take(1, options)]
        self.episodes.begin(rows, [problem for problem, _ in drawn], [address for _, address in drawn])

    def step(self, actions: Any) -> tuple[VectorObservation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        episodes = self.episodes
        before = episodes.done_N.copy()
        reward_N = self._advance(np.asarray(actions))
        terminated_N = episodes.done_N.copy()
        ended: list[int] = np.flatnonzero(terminated_N & ~before).tolist()
        infos = self._merge(ended, (final_info(episodes, n) for n in ended))
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and before.any():
            self._begin(np.flatnonzero(before).tolist())
            terminated_N &= ~before
        elif self.autoreset_mode is AutoresetMode.SAME_STEP and ended:
            infos = self._final(ended, infos)
            self._begin(ended)
        return observe(episodes), reward_N, terminated_N, np.zeros(self.num_envs, dtype=bool), infos

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _final(self, ended: Sequence[int], infos: dict[str, Any]) -> dict[str, Any]:
        """The last observation and info of episodes about to be replaced, in Gymnasium's places for them."""
        observation = observe(self.episodes)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for n in ended:
            final_obs[n] = {name: array_N[n].copy() for name, array_N in observation.items()}
        mask = np.isin(np.arange(self.num_envs), ended)
        return {"final_obs": final_obs, "_final_obs": mask, "final_info": infos, "_final_info": mask.copy()}

    def _merge(self, rows: Sequence[int], infos: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """One info for all, in Gymnasium's shape: an array a key, and a mask ``_key`` of who has it.

        Numbers stay float64; everything else is an object array, so that nothing is cast by the first value's type.
        """
        merged: dict[str, Any] = {}
        for n, info in zip(rows, infos, strict=True):
            self._put(merged, info, n)
        return merged

    def _put(self, merged: dict[str, Any], info: Mapping[str, Any], n: int) -> None:
        for key, value in info.items():
            if key not in merged:
                merged[key] = self._empty(value)
                merged[f"_{key}"] = np.zeros(self.num_envs, dtype=bool)
            if isinstance(value, dict) and isinstance(merged[key], dict):
                self._put(merged[key], value, n)
            else:
                merged[key][n] = value
            merged[f"_{key}"][n] = True

    def _empty(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {}
        return np.zeros(self.num_envs) if isinstance(value, float) else np.full(self.num_envs, None, dtype=object)

    def render(self) -> tuple[str, ...] | None:
        """``ansi``: every context as text."""
        return tuple(self.episodes.text(n) for n in range(self.num_envs)) if self.render_mode == "ansi" else None

    def snapshot(self) -> list[Snapshot]:
        """One state for each episode; a single environment can restore any of them."""
        streams = self._streams * (self.num_envs if len(self._streams) == 1 else 1)
        return [
            {"episode": self.episodes.snapshot(n), "problems": stream.snapshot()} for n, stream in enumerate(streams)
        ]

    def restore(self, states: Sequence[Snapshot]) -> None:
        """Go back to ``states``, one for each episode."""
        if len(states) != self.num_envs:
            raise ValueError(f"restore needs a state for each of the {self.num_envs} episodes, got {len(states)}")
        for n, state in enumerate(states):
            self.episodes.restore(n, state["episode"])
        for stream, state in zip(self._streams, states, strict=False):
            stream.restore(state["problems"])

    def fork(self, state: Snapshot, n: int, seed: int) -> TextVectorEnv:
        """A new vector environment of ``n`` episodes that all go on from ``state``, each with its own randomness."""
        ours = self.episodes
        episodes = Episodes(
            ours.task, n, tokenizer=ours.tokenizer, reward=ours.reward, vocab_size=ours.vocab_size, split=ours.split
        )
        child = type(self)(episodes, self.autoreset_mode, self.render_mode)
        for row in range(n):
            episodes.restore(row, state["episode"])
            episodes.episode_seeds[row] = (seed, row)
        child._streams[0].start(int(np.random.default_rng(seed).integers(2**31)))
        return child

    def state_key(self) -> list[str]:
        """A name for each episode's state, equal for equal states."""
        return [self.episodes.state_key(n) for n in range(self.num_envs)]


class TokenVectorEnv(TextVectorEnv):
    """The action is the next token of each episode, ``(N,)``."""

    level = "token"

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        return self.episodes.step(actions)


class SequenceVectorEnv(TextVectorEnv):
    """The action is a completion for each episode, ``(N, max_new_tokens)``."""

    level = "sequence"

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        rows = self.episodes.running
        return self.episodes.extend([actions[n] for n in rows], rows)
