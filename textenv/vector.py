"""The vector environments: N episodes as arrays, stepped together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from textenv.envs import (
    action_space,
    check_level,
    check_render_mode,
    final_info,
    make_episodes,
    observation_space,
    observe,
    reset_info,
)
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

    ``reset(seed=s)`` starts on problems 0, 1, …, N - 1 of seed s; a list of seeds gives each episode a stream of its own,
    to which the options then go one by one. Options of ``reset`` are those of :class:`textenv.envs.TextEnv` and
    ``reset_mask``, bool ``(N,)``: who is reset and, with a seed, seeded anew.

    With ``autoreset_mode="Disabled"`` an episode that is done stays so until it is reset: its actions are ignored, its
    reward is 0, and it goes on being ``terminated``.
    """

    level: str

    def __init__(self, episodes: Episodes, autoreset_mode: AutoresetMode, render_mode: str | None = None) -> None:
        self.episodes = episodes
        self.num_envs = episodes.num
        self.autoreset_mode = autoreset_mode
        self.metadata = {"autoreset_mode": autoreset_mode, "render_modes": ["ansi"], "render_fps": 4}
        check_render_mode(render_mode, ["ansi"])
        self.render_mode = render_mode
        self.single_observation_space = observation_space(episodes)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = action_space(episodes, self.level)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._streams = [self._new_stream()] * self.num_envs  # who shares a stream takes turns

    def _new_stream(self) -> ProblemStream:
        return ProblemStream(self.episodes.task, self.episodes.split)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[VectorObservation, dict[str, Any]]:
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, dtype=bool))
        self._check_mask(mask)
        rows: list[int] = np.flatnonzero(mask).tolist()
        self._seed(rows, seed)
        self._begin(rows, options)
        return observe(self.episodes), self._merge({n: reset_info(self.episodes, n) for n in rows})

    def _check_mask(self, mask: Any) -> None:
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must be a bool array of shape ({self.num_envs},) with a True in it, "
                f"got {mask!r}"
            )

    def _seed(self, rows: Sequence[int], seed: int | Sequence[int | None] | None) -> None:
        """Give ``rows`` a new stream in common, or one each; None leaves a stream as it is once it has a seed."""
        if seed is None and self._streams[rows[0]].seed is None:
            seed = int(self.np_random.integers(2**31))
        if isinstance(seed, int | np.integer):
            shared = self._new_stream()
            shared.start(int(seed))
            for n in rows:
                self._streams[n] = shared
        elif seed is not None:
            self._seed_each(rows, seed)

    def _seed_each(self, rows: Sequence[int], seeds: Sequence[int | None]) -> None:
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"a list of seeds needs one for each of the {self.num_envs} environments, got {len(seeds)}"
            )
        for n in rows:
            own = seeds[n]
            if own is None and self._streams[n].seed is None:
                own = int(self.np_random.integers(2**31))
            if own is not None:
                self._streams[n] = self._new_stream()
                self._streams[n].start(own)

    def _begin(self, rows: Sequence[int], options: Mapping[str, Any] | None = None) -> None:
        streams = [self._streams[n] for n in rows]
        if all(stream is streams[0] for stream in streams):
            drawn = streams[0].take(len(rows), options)
        else:
            drawn = [taken for stream in streams for taken in stream.take(1, options)]
        self.episodes.begin(rows, [problem for problem, _ in drawn], [address for _, address in drawn])

    def step(self, actions: Any) -> tuple[VectorObservation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        episodes = self.episodes
        if not episodes.length_N.any():
            raise ValueError("no episode has begun; call reset() before the first step")
        before = episodes.done_N.copy()
        reward_N = self._advance(np.asarray(actions))
        terminated_N = episodes.done_N.copy()
        ended: list[int] = np.flatnonzero(terminated_N & ~before).tolist()
        told: dict[int, dict[str, Any]] = {n: final_info(episodes, n) for n in ended}
        final: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and before.any():
            told |= self._begin_next(np.flatnonzero(before).tolist())
            terminated_N &= ~before
        elif self.autoreset_mode is AutoresetMode.SAME_STEP and ended:
            final = self._final(told)
            told = self._begin_next(ended)
        infos = {**final, **self._merge(told)}
        return observe(episodes), reward_N, terminated_N, np.zeros(self.num_envs, dtype=bool), infos

    def _advance(self, actions: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _begin_next(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        self._begin(rows)
        return {n: reset_info(self.episodes, n) for n in rows}

    def _final(self, told: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """The last observation and info of episodes about to be replaced, in Gymnasium's places for them."""
        observation = observe(self.episodes)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for n in told:
            final_obs[n] = {name: array_N[n].copy() for name, array_N in observation.items()}
        return {
            "final_obs": final_obs,
            "_final_obs": self._mask(told),
            "final_info": self._merge(told),
            "_final_info": self._mask(told),
        }

    def _merge(self, infos: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """One info for all, from those of some rows, in Gymnasium's shape: a column a key, a mask ``_key`` of who has it."""
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(key for info in infos.values() for key in info):
            values = {n: info[key] for n, info in infos.items() if key in info}
            merged[key], merged[f"_{key}"] = self._column(values), self._mask(values)
        return merged

    def _column(self, values: Mapping[int, Any]) -> Any:
        """Floats stay float64; all else is an object array, so that nothing is cast to the first value's type."""
        if all(isinstance(value, dict) for value in values.values()):
            return self._merge(values)
        floats = all(isinstance(value, float) for value in values.values())
        column = np.zeros(self.num_envs) if floats else np.full(self.num_envs, None, dtype=object)
        for n, value in values.items():
            column[n] = value
        return column

    def _mask(self, rows: Iterable[int]) -> np.ndarray:
        return np.isin(np.arange(self.num_envs), list(rows))

    def render(self) -> tuple[str, ...] | None:
        """``ansi``: every context as text."""
        return tuple(self.episodes.text(n) for n in range(self.num_envs)) if self.render_mode == "ansi" else None

    def snapshot(self) -> list[Snapshot]:
        """One state for each episode; a single environment can restore any of them."""
        return [
            {
                "episode": self.episodes.snapshot(n),
                "problems": stream.snapshot(),
                "shared_with": next(first for first, other in enumerate(self._streams) if other is stream),
            }
            for n, stream in enumerate(self._streams)
        ]

    def restore(self, states: Sequence[Snapshot]) -> None:
        """Go back to ``states``, one for each episode."""
        if len(states) != self.num_envs:
            raise ValueError(f"restore needs a state for each of the {self.num_envs} episodes, got {len(states)}")
        streams = [self._new_stream() for _ in states]
        self._streams = [streams[state.get("shared_with", n)] for n, state in enumerate(states)]
        for n, (stream, state) in enumerate(zip(self._streams, states, strict=True)):
            stream.restore(state["problems"])
            self.episodes.restore(n, state["episode"])

    def fork(self, state: Snapshot, n: int, seed: int) -> TextVectorEnv:
        """A new vector environment of ``n`` episodes that all go on from ``state``, each with its own randomness."""
        ours = self.episodes
        episodes = Episodes(
            ours.task, n, tokenizer=ours.tokenizer, reward=ours.reward, vocab_size=ours.vocab_size, split=ours.split
        )
        child = type(self)(episodes, self.autoreset_mode, self.render_mode)
        child.spec = self.spec
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
        if len(actions) != self.num_envs:
            raise ValueError(f"step takes a completion for each of the {self.num_envs} episodes, got {len(actions)}")
        rows = self.episodes.running
        return self.episodes.extend([actions[n] for n in rows], rows)
