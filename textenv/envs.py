"""The single environments: one task at token level and at sequence level."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from rewards.terminal import visible
from textenv.episodes import Episodes, Snapshot
from textenv.problems import ProblemStream
from textenv.registry import make_task
from textenv.task import Finish
from textenv.tokenizer import load_tokenizer

LEVELS = ("token", "sequence")

Observation = dict[str, np.ndarray]


def make_env(task: str, level: str = "sequence", render_mode: str | None = None, **options: Any) -> TextEnv:
    """What ``gym.make`` calls. ``options``: see :class:`TextEnv`; the rest go to the task.

    Raises:
        ValueError: an unknown level or option.
    """
    check_level(level)
    episodes = make_episodes(task, 1, **options)
    return TokenEnv(episodes, render_mode) if level == "token" else SequenceEnv(episodes, render_mode)


def make_episodes(
    task: str,
    num: int,
    *,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    split: str = "train",
    **options: Any,
) -> Episodes:
    """Episodes of a registered task. ``tokenizer``: see :func:`textenv.tokenizer.load_tokenizer`."""
    built = make_task(task, **options)
    return Episodes(
        built,
        num,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        vocab_size=vocab_size,
        split=split,
    )


def check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {' or '.join(map(repr, LEVELS))}, got {level!r}")


def check_render_mode(render_mode: str | None, modes: Sequence[str]) -> None:
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode must be one of {', '.join(modes)}, got {render_mode!r}")


def observation_space(episodes: Episodes) -> spaces.Space[Observation]:
    """One episode's observation: the context right-padded, its length, and what is left of the completion's budget."""
    size = episodes.task.max_tokens
    space: spaces.Space[Any] = spaces.Dict(
        tokens=spaces.Box(0, episodes.vocab_size - 1, (size,), np.int64),
        length=spaces.Box(0, size, (1,), np.int64),
        left=spaces.Box(0, episodes.task.max_new_tokens, (1,), np.int64),
    )
    return space


def action_space(episodes: Episodes, level: str) -> spaces.Discrete | spaces.MultiDiscrete:
    """A token, or a completion of ``max_new_tokens`` of which what follows the first end token is ignored."""
    if level == "token":
        return spaces.Discrete(episodes.vocab_size)
    return spaces.MultiDiscrete([episodes.vocab_size] * episodes.task.max_new_tokens)


def reset_info(episodes: Episodes, n: int) -> dict[str, Any]:
    problem = episodes.problems[n]
    return {
        "prompt": problem.prompt,
        "reference": copy.deepcopy(problem.reference),
        **copy.deepcopy(dict(problem.info)),
    }


def final_info(episodes: Episodes, n: int) -> dict[str, Any]:
    """What is told about an episode that is done. An ungraded one has ``ungraded`` 1.0 and says why in ``error``."""
    score = episodes.scores[n]
    assert score is not None
    info = {
        "finish": Finish(episodes.finish_N[n]).label,
        "completion": episodes.completions[n][-1],
        "reference": copy.deepcopy(episodes.problems[n].reference),
        "parts": {name: float(value) for name, value in score.parts.items()},
        "ungraded": float(score.value is None),
        "new_tokens": float(len(episodes.sample(n).tokens)),
        "turns": float(len(episodes.completions[n])),
    }
    if score.tokens is not None:
        info["credit"] = score.tokens
    if score.error is not None:
        info["error"] = score.error
    if score.info:
        info["verdict"] = dict(score.info)
    return info


class TextEnv(gym.Env[Observation, Any]):
    """One episode at a time. Made by ``gym.make(id, level=…, …)``.

    Options of ``gym.make``: ``split`` (``train`` or ``eval``), ``tokenizer`` (a folder, hub name or object), ``vocab_size``
    (width of the model's logits), ``reward``, ``max_new_tokens``, ``max_tokens``, ``holdout``, ``stop``, ``system``, and the
    task's own.

    Options of ``reset``: ``problems`` (a list of :class:`textenv.Problem` or pairs to use), ``index`` (go on at this
    problem), ``repeat`` (give each problem to that many episodes in a row).

    A cut completion is ``terminated``: its budget is part of the state. ``truncated`` is for limits from outside.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012 - as Gymnasium has it
    level: str

    def __init__(self, episodes: Episodes, render_mode: str | None = None) -> None:
        self.episodes = episodes
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.problems = ProblemStream(episodes.task, episodes.split)
        self.observation_space: spaces.Space[Observation] = observation_space(episodes)
        self.action_space = action_space(episodes, self.level)
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        if seed is not None:
            self.problems.start(seed)
        super().reset(seed=seed)
        if self.problems.seed is None:
            self.problems.start(int(self.np_random.integers(2**31)))
        drawn = self.problems.take(1, options)
        self.episodes.begin([0], [problem for problem, _ in drawn], [address for _, address in drawn])
        self._show()
        return self._observation(), reset_info(self.episodes, 0)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self.episodes.done_N[0]:
            raise ValueError("the episode is done; call reset() before the next step")
        reward = float(self._advance(action)[0])
        self._show()
        done = bool(self.episodes.done_N[0])
        return self._observation(), reward, done, False, final_info(self.episodes, 0) if done else {}

    def _advance(self, action: Any) -> np.ndarray:
        raise NotImplementedError

    def _observation(self) -> Observation:
        return {name: array_N[0] for name, array_N in observe(self.episodes).items()}

    def render(self) -> str | None:
        """``ansi``: the context as text. ``human``: nothing here, each step prints it."""
        return self.episodes.text(0) if self.render_mode == "ansi" else None

    def _show(self) -> None:
        if self.render_mode == "human":
            print(visible(self.episodes.text(0)))

    def snapshot(self) -> Snapshot:
        """The whole environment as plain data: the episode and the position among the problems."""
        return {"episode": self.episodes.snapshot(0), "problems": self.problems.snapshot()}

    def restore(self, state: Snapshot) -> None:
        """Go back to ``state``, taken from any view of this task."""
        self.episodes.restore(0, state["episode"])
        self.problems.restore(state["problems"])

    def fork(self, state: Snapshot, n: int, seed: int) -> list[TextEnv]:
        """``n`` new environments that go on from ``state``, each with its own randomness from here on."""
        return [self._forked(state, [seed, i]) for i in range(n)]

    def _forked(self, state: Snapshot, seed: list[int]) -> TextEnv:
        ours = self.episodes
        episodes = Episodes(
            ours.task, 1, tokenizer=ours.tokenizer, reward=ours.reward, vocab_size=ours.vocab_size, split=ours.split
        )
        child = type(self)(episodes, self.render_mode)
        child.spec = self.spec
        child.restore(state)
        child.episodes.episode_seeds[0] = tuple(seed)
        child.problems.start(int(np.random.default_rng(seed).integers(2**31)))
        return child

    def state_key(self) -> str:
        """A name for the state, equal for equal states."""
        return self.episodes.state_key(0)


class TokenEnv(TextEnv):
    """The action is the next token."""

    level = "token"

    def _advance(self, action: Any) -> np.ndarray:
        return self.episodes.step(np.array([action]))

    def action_masks(self) -> np.ndarray:
        """The tokens that ``step`` takes, bool ``(V,)``; ``sb3-contrib`` asks by this name."""
        episodes = self.episodes
        mask_V = np.zeros(episodes.vocab_size, dtype=bool)
        mask_V[episodes.ordinary_ids] = True
        mask_V[[*episodes.stop_ids, *episodes.tokenizer.eos_ids]] = True
        return mask_V


class SequenceEnv(TextEnv):
    """The action is a whole completion, ``(max_new_tokens,)`` or shorter if it ends."""

    level = "sequence"

    def _advance(self, action: Any) -> np.ndarray:
        return self.episodes.extend([action])


def observe(episodes: Episodes) -> dict[str, np.ndarray]:
    """Fresh arrays: tokens ``(N, T)``, length ``(N, 1)``, left ``(N, 1)``."""
    left_N = np.where(episodes.done_N, 0, episodes.limit_N - episodes.length_N)
    return {"tokens": episodes.tokens_NT.copy(), "length": episodes.length_N[:, None].copy(), "left": left_N[:, None]}
