"""What a token costs without a model: ``python -m benchmarks.speed.token_steps``.

Times are µs for each environment and token, medians of measurements taken in turns. N environments, T context tokens.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import textenv  # noqa: F401 - registers the environments
from benchmarks.measure import machine, medians

ENV_ID = "textenv/Arithmetic-v0"
PROMPT_ROOM = 16
"""Tokens of a context kept free for the prompt; the rest is the completion's budget."""
STEPS = 40
"""Steps in one measurement, few enough that no episode ends."""
TARGET_US = {256: 0.3, 1024: 0.12}
"""Most µs an environment and token for the public step, by N."""
CONTEXTS = (64, 512, 4096)


def main(rounds: int = 25, num_envs: tuple[int, ...] = (256, 1024), contexts: tuple[int, ...] = CONTEXTS) -> None:
    """Print what a token-level vector environment costs without a model.

    Args:
        rounds: measurements of each, in turns; their medians are shown.
        num_envs: how many environments side by side.
        contexts: context sizes in tokens; the first one is that of every table but its own.
    """
    console = Console(width=110)
    print(machine())
    console.print(steps_table(num_envs, contexts[0], rounds))
    console.print(contexts_table(num_envs[0], contexts, rounds))
    console.print(memory_table(num_envs, contexts))
    console.print(episodes_table(num_envs, contexts[0], rounds))


def steps_table(num_envs: tuple[int, ...], context: int, rounds: int) -> Table:
    table = Table("N", "native step", "public step", "target", "SyncVectorEnv", "native", "public")
    table.title = f"µs a token, contexts of {context}; right: how many times faster than SyncVectorEnv"
    for num in num_envs:
        envs, trivial = make_envs(num, context), make_trivial(num, context)
        cost = medians(
            {
                "native": partial(step_cost, envs, envs.episodes.step),
                "public": partial(step_cost, envs, envs.step),
                "sync": partial(step_cost, trivial, trivial.step),
            },
            rounds,
        )
        ratios = [f"{cost['sync'] / cost[name]:.0f} ×" for name in ("native", "public")]
        target = f"{TARGET_US[num]:g}" if num in TARGET_US else ""
        table.add_row(str(num), *_us(cost["native"], cost["public"]), target, *_us(cost["sync"]), *ratios)
    return table


def contexts_table(num: int, contexts: tuple[int, ...], rounds: int) -> Table:
    table = Table("T", "native step", "public step, copying every context into the observation")
    table.title = f"µs a token, {num} environments: the native step must not grow with the context"
    measures: dict[str, Callable[[], float]] = {}
    for context in contexts:
        envs = make_envs(num, context)
        measures[f"native {context}"] = partial(step_cost, envs, envs.episodes.step)
        measures[f"public {context}"] = partial(step_cost, envs, envs.step)
    cost = medians(measures, rounds)
    for context in contexts:
        table.add_row(f"{context:,}", *_us(cost[f"native {context}"], cost[f"public {context}"]))
    return table


def memory_table(num_envs: tuple[int, ...], contexts: tuple[int, ...]) -> Table:
    table = Table("N", "T", "episodes alone", "vector environment, its spaces and an observation")
    table.title = "bytes for each environment and context token: must not grow with N or T"
    for num in num_envs:
        for context in contexts:
            episodes, everything = memory(num, context)
            table.add_row(str(num), f"{context:,}", f"{episodes:.1f}", f"{everything:.1f}")
    return table


def episodes_table(num_envs: tuple[int, ...], context: int, rounds: int) -> Table:
    table = Table("N", "draw and encode", "steps", "decode and score", "whole episode", "a token, all told")
    table.title = f"whole episodes of {STEPS} tokens through the public interface: µs an episode"
    for num in num_envs:
        envs = make_envs(num, context, max_new_tokens=STEPS)
        parts = np.median([episode_cost(envs) for _ in range(rounds)], axis=0)
        table.add_row(str(num), *(f"{part:.1f}" for part in (*parts, parts.sum())), f"{parts.sum() / STEPS:.2f}")
    return table


def make_envs(num: int, context: int, max_new_tokens: int | None = None) -> Any:
    """A token-level vector environment of ``num`` episodes with contexts of that many tokens."""
    budget = context - PROMPT_ROOM if max_new_tokens is None else max_new_tokens
    return gym.make_vec(ENV_ID, num_envs=num, level="token", max_tokens=context, max_new_tokens=budget)


def make_trivial(num: int, context: int) -> gym.vector.SyncVectorEnv:
    """Gymnasium's own vector environment over ``num`` environments that do nothing at all."""
    return gym.vector.SyncVectorEnv([lambda: Trivial(context)] * num)


class Trivial(gym.Env[np.ndarray, np.int64]):
    """Returns the same context whatever is done."""

    def __init__(self, context: int) -> None:
        self.observation_space = gym.spaces.Box(0, 99, (context,), np.int64)
        self.action_space = gym.spaces.Discrete(100)
        self.observation = np.zeros(context, dtype=np.int64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self.observation, {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation, 0.0, False, False, {}


def step_cost(envs: Any, step: Callable[[np.ndarray], Any]) -> float:
    """µs an environment and token of ``STEPS`` steps after a fresh reset."""
    envs.reset(seed=0)
    actions = random_actions(envs.num_envs)
    started = time.perf_counter()
    for action_N in actions:
        step(action_N)
    return (time.perf_counter() - started) / actions.size * 1e6


def episode_cost(envs: Any) -> tuple[float, float, float]:
    """µs an episode: beginning it, its steps but the last, and the last one, which decodes and scores it."""
    actions = random_actions(envs.num_envs)
    started = time.perf_counter()
    envs.reset(seed=0)
    begun = time.perf_counter()
    for action_N in actions[:-1]:
        envs.step(action_N)
    stepped = time.perf_counter()
    envs.step(actions[-1])
    ended = time.perf_counter()
    times = np.diff([started, begun, stepped, ended]) / envs.num_envs * 1e6
    return float(times[0]), float(times[1]), float(times[2])


def random_actions(num: int) -> np.ndarray:
    """Ids ``(STEPS, num)`` of ordinary characters, which end no episode."""
    return np.random.default_rng(0).integers(1, 90, (STEPS, num))


def memory(num: int, context: int) -> tuple[float, float]:
    """Bytes for each environment and context token: of the episodes alone, and of all that stands after a reset."""
    tracemalloc.start()
    envs = make_envs(num, context)
    observation, _ = envs.reset(seed=0)
    everything, _ = tracemalloc.get_traced_memory()
    arrays = sum(value.nbytes for value in vars(envs.episodes).values() if isinstance(value, np.ndarray))
    tracemalloc.stop()
    del observation
    return arrays / (num * context), everything / (num * context)


def _us(*costs: float) -> tuple[str, ...]:
    return tuple(f"{cost:.3f}" for cost in costs)


if __name__ == "__main__":
    tyro.cli(main)
