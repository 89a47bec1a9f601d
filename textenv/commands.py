"""The commands of the environments' floor: `textenv list`, `play`, `check` and `profile`."""

from __future__ import annotations

import inspect
import math
import re
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from rewards.options import parse_options
from rewards.terminal import plain, visible
from textenv.envs import make_env
from textenv.registry import make_task, registry
from textenv.task import Task
from textenv.tasks.reasoning_gym import NAMES, PREFIX, ReasoningGymReward
from textenv.tokenizer import Tokenizer
from textenv.vector import make_vector_env
from textenv.wrappers import TextView

EnvId = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENVIRONMENT")]
Options = Annotated[
    dict[str, str],
    tyro.conf.arg(
        name="options", metavar="NAME VALUE ...", help="options of the environment, e.g. digits 3 operators +-"
    ),
]


def list_environments() -> None:
    """Show the registered environments."""
    table = Table(
        Column("id", no_wrap=True), "turns", Column("reward", no_wrap=True), "what it asks", title="environments"
    )
    for env_id in sorted(env_id for env_id in registry if not env_id.startswith(PREFIX)):
        task = make_task(env_id)
        reward = task.reward if isinstance(task.reward, str) else getattr(task.reward, "name", "function")
        table.add_row(env_id, str(task.turns), plain(reward), plain(_what_it_asks(task)))
    # One line for all of these, which are made by a package that may not be installed and that takes long to import.
    table.add_row(
        f"{PREFIX}NAME-v0", "1", ReasoningGymReward.name, f"One of the {len(NAMES)} datasets of reasoning-gym."
    )
    console = Console()
    console.print(table)
    console.print(f"{PREFIX}NAME-v0: NAME is one of {', '.join(NAMES)}", highlight=False)


def _what_it_asks(task: Task) -> str:
    """The first sentence of a task's docstring, without its markup."""
    words = " ".join(inspect.cleandoc(task.__doc__ or "").split())
    first = re.split(r"(?<=\.) (?=[A-Z])", words)[0]
    return re.sub(r":\w+:`(.+?)`", r"\1", first).replace("``", "")


def play(env_id: EnvId, /, *, seed: int = 0, options: Options = {}) -> None:  # noqa: B006
    """Answer an environment's problems yourself, in the terminal.

    Args:
        env_id: the environment.
        seed: which problems to get.
        options: options of the environment.
    """
    env = TextView(make_env(env_id, **parse_options(options)))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    rewards: list[float] = []
    env.reset(seed=seed)
    console.print("an empty line ends the game", style="dim")
    while (reward := _play_episode(env, console)) is not None:
        rewards.append(reward)
        env.reset()
    graded = [reward for reward in rewards if not math.isnan(reward)]
    mean = f", mean reward {statistics.fmean(graded):.2f}" if graded else ""
    console.print(f"\n{len(rewards)} played{mean}")


def _play_episode(env: TextView, console: Console) -> float | None:
    """Ask until the episode is over: its reward, NaN when ungraded; None when the player has had enough."""
    episodes = env.unwrapped.episodes  # type: ignore[attr-defined]
    console.print(visible("\n".join(filter(None, [episodes.task.system, episodes.problems[0].prompt]))), end=" ")
    while answer := _read_answer(episodes.tokenizer, console):
        _, reward, terminated, _, info = env.step(answer)
        if terminated:
            worth = f"{reward:g}" if not info["ungraded"] else f"ungraded: {info['error'].strip().splitlines()[-1]}"
            cut = "" if info["finish"] in ("eos", "stop") else f" ({info['finish']})"
            console.print(visible(f"reward {worth}{cut}, reference {info['reference']!r}"), style="bold")
            return math.nan if info["ungraded"] else reward
        console.print(visible(episodes.replies[0][-1]), end=" ")
    return None


def _read_answer(tokenizer: Tokenizer, console: Console) -> str:
    """An answer that the tokenizer can write; empty at the end of the input."""
    while True:
        try:
            answer = console.input("> ")
            tokenizer.encode(answer)
        except EOFError:
            return ""
        except ValueError as error:
            console.print(visible(error), style="red")
        else:
            return answer


def check(env_id: EnvId, /, *, options: Options = {}) -> None:  # noqa: B006
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
        table.add_row(mark, result.name, plain(result.problem or result.promise))
    Console().print(table)
    if any(result.problem for result in results):
        raise SystemExit(1)


def profile(
    env_id: EnvId,
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
    if num_envs < 1 or episodes < 1:
        raise ValueError(f"profile plays at least one episode, got num_envs={num_envs} and episodes={episodes}")
    rounds = range(-(-episodes // num_envs))
    costs = [_play_randomly(env_id, num_envs, parse_options(options), round) for round in rounds]
    table = Table("", "median cost", title=f"{env_id}, {num_envs} side by side, random tokens")
    for name in costs[0]:
        table.add_row(name, f"{statistics.median(cost[name] for cost in costs) * 1e6:.3g} µs {_COSTS[name]}")
    Console().print(table)


_BEGIN, _STEP, _END = "draw and encode a problem", "one transition", "decode, and answer or score"
_COSTS = {_BEGIN: "an episode", _STEP: "a token", _END: "a completion"}


def _play_randomly(env_id: str, num_envs: int, options: dict[str, Any], round: int) -> dict[str, float]:
    """Seconds for each episode begun, token stepped and completion ended, in one round of ``num_envs`` episodes."""
    envs = make_vector_env(env_id, num_envs, level="token", autoreset_mode="Disabled", **options)
    episodes = envs.episodes
    end_N = np.full(num_envs, episodes.tokenizer.eos_ids[0])
    rng = np.random.default_rng(round)
    seconds, count = dict.fromkeys(_COSTS, 0.0), dict.fromkeys(_COSTS, 0)

    def measure(name: str, run: Callable[[], Any], times: int) -> None:
        started = time.perf_counter()
        run()
        seconds[name] += time.perf_counter() - started
        count[name] += times

    measure(_BEGIN, lambda: envs.reset(seed=round), num_envs)
    while running := len(episodes.running):
        room = int((episodes.limit_N - episodes.length_N)[episodes.running].min())
        for action_N in rng.choice(episodes.ordinary_ids, (room - 1, num_envs)):
            measure(_STEP, lambda action_N=action_N: envs.step(action_N), running)  # type: ignore[misc]
        measure(_END, lambda: envs.step(end_N), running)
    return {name: seconds[name] / count[name] for name in _COSTS if count[name]}
