"""Checks that anybody's environment keeps textenv's promises; `textenv check ID` runs them all.

A check raises :class:`CheckError` with what to mend. They take an id and the options of ``gym.make``.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

import rewards
from textenv.envs import LEVELS, make_env, make_episodes
from textenv.episodes import Episodes
from textenv.problems import ProblemStream
from textenv.registry import make_task
from textenv.task import SPLITS, Finish, Task, Transcript
from textenv.vector import make_vector_env

SEED = 20_240_501
PROBLEMS = 64


class CheckError(AssertionError):
    """A promise is broken; the message says which and what to mend."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check: ``problem`` is None when it passed, else what to mend."""

    name: str
    promise: str
    problem: str | None


def check_environment(env_id: str, **options: Any) -> list[CheckResult]:
    """Run every check on a registered environment.

    Args:
        env_id: the id.
        options: options of ``gym.make`` but ``level``.

    Raises:
        ValueError: an unknown id or option.
    """
    make_task(env_id, **_task_options(options))
    results = []
    for check in CHECKS:
        promise = (check.__doc__ or "").splitlines()[0]
        results.append(CheckResult(check.__name__.removeprefix("check_"), promise, _problem(check, env_id, options)))
    return results


def _problem(check: Callable[..., None], env_id: str, options: dict[str, Any]) -> str | None:
    try:
        check(env_id, **options)
    except Exception as error:  # noqa: BLE001 - a check runs anybody's code; whatever it raises is the finding
        return str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
    return None


def _require(condition: bool, what_to_mend: str) -> None:
    if not condition:
        raise CheckError(what_to_mend)


def _task_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("tokenizer", "vocab_size", "split")}


def check_described(env_id: str, **options: Any) -> None:
    """The task says what it asks and under which licence."""
    task = make_task(env_id, **_task_options(options))
    _require(bool(inspect.cleandoc(task.__doc__ or "")), f"give {task} a docstring that says what it asks")
    _require(bool(task.licence), f'set licence on {task}: "generated", or the licence of its data')


def check_gymnasium(env_id: str, **options: Any) -> None:
    """Gymnasium's checker passes at both levels, without a warning."""
    from gymnasium.utils.env_checker import check_env

    _run_checker(env_id, options, check_env)


def check_stable_baselines3(env_id: str, **options: Any) -> None:
    """Stable-Baselines3's checker passes at both levels, without a warning."""
    from stable_baselines3.common.env_checker import check_env

    _run_checker(env_id, options, check_env)


def _run_checker(env_id: str, options: dict[str, Any], checker: Callable[[Any], None]) -> None:
    for level in LEVELS:
        env = gym.make(env_id, level=level, **options).unwrapped
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # the human rendering prints
                    checker(env)
            except (AssertionError, Warning) as error:
                raise CheckError(f"at {level} level: {error}") from error


def check_problems(env_id: str, **options: Any) -> None:
    """A problem depends on its address (seed, split, index) alone: not on order, view or process state."""
    first, second = (make_task(env_id, **_task_options(options)) for _ in range(2))
    for split in SPLITS:
        forward = [first.problem(SEED, split, i) for i in range(PROBLEMS)]
        np.random.seed(0)
        backward = [second.problem(SEED, split, i) for i in reversed(range(PROBLEMS))][::-1]
        for i, (one, other) in enumerate(zip(forward, backward, strict=True)):
            _require(
                one == other,
                f"problem {i} of {split} came out as {one.prompt!r} and as {other.prompt!r}: "
                "draw all randomness from the rng that draw() is given",
            )


def check_splits(env_id: str, **options: Any) -> None:
    """No problem of the eval split occurs in training."""
    task = make_task(env_id, **_task_options(options))
    if task.holdout == 0:
        return
    train, held_out = ({task.key(task.problem(SEED, split, i)) for i in range(4 * PROBLEMS)} for split in SPLITS)
    shared = train & held_out
    _require(not shared, f"both splits hold {sorted(shared)[:3]}: let key() tell problems apart by their content")


def check_equivalence(env_id: str, *, episodes: int = 48, seed: int = SEED, **options: Any) -> None:
    """Token level, sequence level and their vector forms are one MDP: equal transcripts, returns and endings.

    Random completions are played through every view: ordinary ones, ones that end early, and ones that spend the budget.

    Args:
        env_id: a registered id.
        episodes: how many episodes to compare.
        seed: of problems and completions.
        options: options of ``gym.make`` but ``level``.

    Raises:
        CheckError: the first difference, with the problem it showed on.
    """
    played = _play_completions(env_id, episodes, seed, options)
    views = {
        "token": _record_single(env_id, "token", played, seed, options),
        "sequence": _record_single(env_id, "sequence", played, seed, options),
        "token, vectorised": _record_vector(env_id, "token", played, seed, options),
        "sequence, vectorised": _record_vector(env_id, "sequence", played, seed, options),
    }
    expected = [record for record, _ in played]
    for view, records in views.items():
        for i, (want, got) in enumerate(zip(expected, records, strict=True)):
            for name, value in want.items():
                _require(
                    value == got[name],
                    f"episode {i} at level {view} differs in its {name}: {got[name]!r}, but {value!r} when whole "
                    "completions are appended; draw() and reply() must depend on their arguments alone",
                )


Completions = list[np.ndarray]


def _play_completions(
    env_id: str, num: int, seed: int, options: dict[str, Any]
) -> list[tuple[dict[str, Any], Completions]]:
    """Play random completions natively: what each episode came to, and the completions that led there."""
    episodes = make_episodes(env_id, num, **options)
    _begin(episodes, seed)
    rng = np.random.default_rng(seed)
    taken: list[Completions] = [[] for _ in range(num)]
    return_N = np.zeros(num)
    while not episodes.done_N.all():
        rows = episodes.running
        completions = [_random_completion(episodes, n, rng) for n in rows]
        return_N += episodes.extend(completions, rows)
        for n, completion in zip(rows, completions, strict=True):
            taken[n].append(completion)
    return [(_record(episodes, n, return_N[n]), taken[n]) for n in range(num)]


def _begin(episodes: Episodes, seed: int) -> None:
    stream = ProblemStream(episodes.task, episodes.split)
    stream.start(seed)
    drawn = stream.take(episodes.num)
    episodes.begin(range(episodes.num), [problem for problem, _ in drawn], [address for _, address in drawn])


def _random_completion(episodes: Episodes, n: int, rng: np.random.Generator) -> np.ndarray:
    """One of three kinds: any tokens, an early end, the whole budget without an end; sometimes a demonstration."""
    task, tokenizer = episodes.task, episodes.tokenizer
    allowed = np.flatnonzero(tokenizer.decodable_V)
    ordinary = np.setdiff1d(allowed, [*tokenizer.eos_ids, *episodes.stop_ids])
    kind = rng.integers(4)
    if kind == 0:
        completion = rng.choice(allowed, task.max_new_tokens)
    elif kind == 1:
        completion = rng.choice(ordinary, task.max_new_tokens)
        completion[rng.integers(min(3, task.max_new_tokens))] = tokenizer.eos_ids[0]
    elif kind == 2:
        completion = rng.choice(ordinary, task.max_new_tokens)
    else:
        shown = task.demonstrate(episodes.transcript(n)) or ""
        ids = [*tokenizer.encode(shown), tokenizer.eos_ids[0]]
        completion = np.resize(np.array(ids), task.max_new_tokens)
    return completion


def _record(episodes: Episodes, n: int, total: float) -> dict[str, Any]:
    return {
        "tokens": episodes.context(n).tolist(),
        "sources": episodes.source_NT[n, : episodes.length_N[n]].tolist(),
        "completions": list(episodes.completions[n]),
        "replies": list(episodes.replies[n]),
        "finish": Finish(episodes.finish_N[n]).label,
        "return": float(total),
    }


def _actions(level: str, completions: Completions, episodes: Episodes, n: int) -> np.ndarray:
    """The next action of episode ``n``: the completion under way, or its next token."""
    completion = completions[len(episodes.completions[n])]
    return completion if level == "sequence" else completion[episodes.length_N[n] - episodes.start_N[n]]


def _record_single(
    env_id: str, level: str, played: Sequence[tuple[Any, Completions]], seed: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    env = make_env(env_id, level=level, **options)
    records = []
    for i, (_, completions) in enumerate(played):
        env.reset(seed=seed if i == 0 else None)
        total, done = 0.0, False
        while not done:
            _, reward, done, _, _ = env.step(_actions(level, completions, env.episodes, 0))
            total += float(reward)
        records.append(_record(env.episodes, 0, total))
    return records


def _record_vector(
    env_id: str, level: str, played: Sequence[tuple[Any, Completions]], seed: int, options: dict[str, Any]
) -> list[dict[str, Any]]:
    envs = make_vector_env(env_id, num_envs=len(played), level=level, autoreset_mode="Disabled", **options)
    envs.reset(seed=seed)
    episodes, return_N = envs.episodes, np.zeros(len(played))
    while not episodes.done_N.all():
        idle = np.zeros_like(envs.single_action_space.sample())
        actions = [
            idle if episodes.done_N[n] else _actions(level, completions, episodes, n)
            for n, (_, completions) in enumerate(played)
        ]
        return_N += envs.step(np.array(actions))[1]
    return [_record(episodes, n, return_N[n]) for n in range(len(played))]


def check_seeding(env_id: str, **options: Any) -> None:
    """One seed gives the same problems alone and vectorised; groups share theirs; another seed gives others."""
    env = make_env(env_id, **options)
    alone = [env.reset(seed=SEED if i == 0 else None)[1]["prompt"] for i in range(8)]
    envs = make_vector_env(env_id, num_envs=8, **options)
    together = list(envs.reset(seed=SEED)[1]["prompt"])
    _require(alone == together, f"seed {SEED} starts on {alone[:2]} alone and on {together[:2]} vectorised")
    grouped = list(envs.reset(seed=SEED, options={"repeat": 4})[1]["prompt"])
    _require(
        grouped == [alone[0]] * 4 + [alone[1]] * 4, f"repeat=4 must give each problem to four neighbours: {grouped}"
    )
    task = make_task(env_id, **_task_options(options))
    one, other = ([task.problem(seed, "train", i) for i in range(PROBLEMS)] for seed in (SEED, SEED + 1))
    varied = len({task.key(problem) for problem in one}) > 1
    _require(one != other or not varied, "two seeds give the same problems: use the rng that draw() is given")


def check_snapshot(env_id: str, **options: Any) -> None:
    """A snapshot restores exactly, at either level, and forks go on from it."""
    for level in LEVELS:
        env = make_env(env_id, level=level, **options)
        env.reset(seed=SEED)
        env.action_space.seed(SEED)
        state, key = env.snapshot(), env.state_key()
        action = env.action_space.sample()
        first = env.step(action)
        env.restore(state)
        _require(env.state_key() == key, f"at {level} level the state after restore() is not the one snapshot() took")
        child = env.fork(state, 1, seed=0)[0]
        for name, other in (("restored", env), ("forked", child)):
            again = other.step(action)
            _require(
                again[1:4] == first[1:4],
                f"at {level} level the {name} episode goes on as {again[1:4]}, not {first[1:4]}",
            )


def check_credit(env_id: str, **options: Any) -> None:
    """Rewards are per token: what an episode's tokens are credited with sums to its return."""
    episodes = make_episodes(env_id, PROBLEMS, **options)
    _begin(episodes, SEED)
    rng = np.random.default_rng(SEED)
    return_N = np.zeros(PROBLEMS)
    while not episodes.done_N.all():
        rows = episodes.running
        return_N += episodes.extend([_random_completion(episodes, n, rng) for n in rows], rows)
    for n in range(PROBLEMS):
        credit = episodes.credit(n)
        _require(
            bool(np.isclose(credit.sum(), return_N[n], rtol=1e-9, atol=1e-9)),
            f"the tokens of episode {n} are credited with {credit.sum()}, but its return is {return_N[n]}; "
            "the tokens of a Score must sum to its value",
        )


def check_reward(env_id: str, **options: Any) -> None:
    """The reward can tell good answers from bad: demonstrations score high, noise scores lower, and all are graded."""
    shown = _score_answers(env_id, options, lambda task, transcript: task.demonstrate(transcript))
    noise = _score_answers(env_id, options, lambda task, transcript: "")
    broken = next((score.error for score in [*shown, *noise] if score.error is not None), None)
    _require(broken is None, f"the reward could not grade an answer: {broken}")
    demonstrated = make_task(env_id, **_task_options(options))
    if _demonstrates(demonstrated):
        _require(
            all(score.correct for score in shown),
            "the reward does not count the task's own demonstration as correct: mend demonstrate() or the reward",
        )
        shown_mean, noise_mean = (np.mean([score.value or 0.0 for score in scores]) for scores in (shown, noise))
        _require(
            bool(shown_mean > noise_mean),
            "an empty answer earns as much as a demonstration, so there is nothing to learn from this reward",
        )


def _demonstrates(task: Task) -> bool:
    return task.demonstrate(Transcript(task.problem(SEED, "train", 0), (), (), Finish.NONE, (SEED,))) is not None


def _score_answers(
    env_id: str, options: dict[str, Any], answer: Callable[[Task, Transcript], str | None]
) -> list[rewards.Score]:
    episodes = make_episodes(env_id, 8, **options)
    _begin(episodes, SEED)
    while not episodes.done_N.all():
        rows = episodes.running
        texts = [answer(episodes.task, episodes.transcript(n)) or "" for n in rows]
        end = episodes.tokenizer.eos_ids[0]
        episodes.extend([np.array([*episodes.tokenizer.encode(text), end]) for text in texts], rows)
    return [score for score in episodes.scores if score is not None]


CHECKS: tuple[Callable[..., None], ...] = (
    check_described,
    check_problems,
    check_splits,
    check_seeding,
    check_gymnasium,
    check_stable_baselines3,
    check_equivalence,
    check_snapshot,
    check_credit,
    check_reward,
)
