"""The commands of the environments' floor: `textenv list`, `play`, `check` and `profile`."""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Mapping
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from textenv.registry import make_task, registry

Options = Annotated[
    dict[str, str],
    tyro.conf.arg(
        name="options", metavar="NAME VALUE ...", help="options of the environment, e.g. digits 3 operators +-"
    ),
]


def parse_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Option values as typed on a command line: JSON where they read as JSON, text otherwise. Other values stay.

    Example:
        >>> parse_options({"digits": "3", "operators": "+-"})
        {'digits': 3, 'operators': '+-'}
    """
    return {name: _value(value) for name, value in options.items()}


def _value(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def list_environments() -> None:
    """Show the registered environments."""
    table = Table("id", "turns", "reward", "licence", "what it asks", title="environments")
    for env_id in sorted(registry):
        entry = registry[env_id]
        task = make_task(env_id)
        reward = task.reward if isinstance(task.reward, str) else getattr(task.reward, "name", "function")
        asks = inspect.cleandoc(task.__doc__ or "").partition("\n")[0]
        table.add_row(env_id, str(task.turns), reward, task.licence, asks or str(entry.build))
    Console().print(table)


def play(env_id: Annotated[str, tyro.conf.Positional], /, *, seed: int = 0, options: Options = {}) -> None:  # noqa: B006
    """Answer an environment's problems yourself, in the terminal.

    Args:
        env_id: the environment.
        seed: which problems to get.
        options: options of the environment.
    """
    from textenv.wrappers import TextView

    console = Console(highlight=False)
    env = TextView(gym.make(env_id, level="sequence", **parse_options(options)))
    total, played = 0.0, 0
    console.print("[dim]an empty line ends the game[/dim]")
    observation, _ = env.reset(seed=seed)
    shown = 0
    while True:
        console.print(observation[shown:], end=" ", markup=False)
        try:
            answer = console.input("[bold]> [/bold]")
        except EOFError:
            break
        if not answer:
            break
        observation, reward, terminated, _, info = env.step(answer)
        shown = len(observation)
        if terminated:
            total, played = total + float(reward), played + 1
            console.print(f"[bold]{reward:g}[/bold], reference {info['reference']!r}", markup=True)
            observation, _ = env.reset()
            shown = 0
        else:
            shown = observation.rfind(answer) + len(answer)
    console.print(f"\n{played} played, mean reward {total / played:.2f}" if played else "\nnothing played")


def check(env_id: Annotated[str, tyro.conf.Positional], /, *, options: Options = {}) -> None:  # noqa: B006
    """Run every check on an environment, and say what to mend.

    Args:
        env_id: the environment.
        options: options of the environment.
    """
    from textenv.checks import check_environment

    results = check_environment(env_id, **parse_options(options))
    table = Table("", "check", "promise, or what to mend", title=env_id)
    for result in results:
        mark = "[green]ok[/green]" if result.problem is None else "[red]mend[/red]"
        table.add_row(mark, result.name, result.promise if result.problem is None else result.problem)
    Console().print(table)
    if any(result.problem for result in results):
        raise SystemExit(1)


def profile(
    env_id: Annotated[str, tyro.conf.Positional],
    /,
    *,
    num_envs: int = 256,
    episodes: int = 1024,
    options: Options = {},  # noqa: B006
) -> None:
    """Measure what an environment costs without a model, per token and per episode.

    Args:
        env_id: the environment.
        num_envs: episodes side by side.
        episodes: how many to play, at least.
        options: options of the environment.
    """
    costs = [
        _play_randomly(env_id, num_envs, parse_options(options), round) for round in range(-(-episodes // num_envs))
    ]
    table = Table("", "median cost", title=f"{env_id}, {num_envs} side by side, random tokens")
    for name, unit in (("begin", "episode"), ("step", "token"), ("end", "episode")):
        table.add_row(
            _COST_NAMES[name],
            f"{statistics.median(cost[name] for cost in costs) * 1e6:.2f} µs an {unit}"
            if unit == "episode"
            else f"{statistics.median(cost[name] for cost in costs) * 1e6:.3f} µs a {unit}",
        )
    Console().print(table)


_COST_NAMES = {"begin": "draw and encode a problem", "step": "one transition", "end": "decode and score an episode"}


def _play_randomly(env_id: str, num_envs: int, options: dict[str, Any], round: int) -> dict[str, float]:
    """Seconds for each episode begun, token stepped and episode ended, in one round of ``num_envs`` episodes."""
    envs = gym.make_vec(env_id, num_envs=num_envs, level="token", autoreset_mode="Disabled", **options)
    episodes = envs.unwrapped.episodes  # type: ignore[attr-defined]
    ordinary = np.setdiff1d(
        np.flatnonzero(episodes.tokenizer.decodable_V), [*episodes.tokenizer.eos_ids, *episodes.stop_ids]
    )
    end = episodes.tokenizer.eos_ids[0]
    rng = np.random.default_rng(round)
    started = time.perf_counter()
    envs.reset(seed=round)
    begun = time.perf_counter()
    steps = episodes.task.max_new_tokens - 1
    actions = rng.choice(ordinary, (steps, num_envs))
    stepping = time.perf_counter()
    for action_N in actions:
        envs.step(action_N)
    stepped = time.perf_counter()
    envs.step(np.full(num_envs, end))
    ended = time.perf_counter()
    return {
        "begin": (begun - started) / num_envs,
        "step": (stepped - stepping) / (steps * num_envs),
        "end": (ended - stepped) / num_envs,
    }
