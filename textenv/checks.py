"""Checks that anybody's environment keeps textenv's promises; `textenv check ID` runs them all.

A check raises :class:`CheckError` with what to mend. They take an id and the options of ``gym.make``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from textenv.envs import LEVELS, TextEnv, make_env, make_episodes
from textenv.episodes import Episodes
from textenv.problems import ProblemStream
from textenv.registry import make_task
from textenv.task import SPLITS, Finish, Problem, Task, Transcript
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
        # Copies, since a task that hands out one object over and over would be compared with itself.
        forward = [copy.deepcopy(first.problem(SEED, split, i)) for i in range(PROBLEMS)]
        backward = [copy.deepcopy(second.problem(SEED, split, i)) for i in reversed(range(PROBLEMS))][::-1]
        for i, (one, other) in enumerate(zip(forward, backward, strict=True)):
            _require(
                one == other,
                f"problem {i} of {split} came out as {one} and as {other}: draw all randomness from the rng that draw() is "
                "given, and make new objects in it",
            )


def check_prompts(env_id: str, **options: Any) -> None:
    """Every prompt can be written in tokens and leaves room for an answer, in both splits."""
    for split in SPLITS:
        episodes = make_episodes(env_id, 4 * PROBLEMS, **{**options, "split": split})
        episodes.check_prompts()
        _begin(episodes, SEED)


def check_splits(env_id: str, **options: Any) -> None:
    """No problem of the eval split occurs in training."""
    task = make_task(env_id, **_task_options(options))
    if task.holdout == 0:
        return
    train, held_out = ([task.problem(SEED, split, i) for i in range(4 * PROBLEMS)] for split in SPLITS)
    names: tuple[Callable[[Problem], str], ...] = (task.key, lambda problem: repr((problem.prompt, problem.reference)))
    for name in names:
        shared = {name(problem) for problem in train} & {name(problem) for problem in held_out}
        _require(
            not shared, f"both splits hold {sorted(shared)[:3]}: let key() tell problems apart by their content alone"
        )


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
    played = _play_randomly(env_id, episodes, seed, options)
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
                    "completions are appended; draw(), reply() and the reward must depend on their arguments alone",
                )


Completions = list[np.ndarray]
Answer = Callable[[Episodes, int], np.ndarray]


def _play(
    env_id: str, num: int, seed: int, options: dict[str, Any], answer: Answer
) -> tuple[Episodes, list[Completions]]:
    """Play ``num`` episodes natively with the completions that ``answer`` gives, and tell which these were."""
    episodes = make_episodes(env_id, num, **options)
    _begin(episodes, seed)
    problems = copy.deepcopy(episodes.problems)
    taken: list[Completions] = [[] for _ in range(num)]
    while rows := episodes.running:
        completions = [answer(episodes, n) for n in rows]
        episodes.extend(completions, rows)
        for n, completion in zip(rows, completions, strict=True):
            taken[n].append(completion)
    _require(
        problems == episodes.problems,
        "playing an episode changed its problem: reply() and the reward must leave its reference and info as they are",
    )
    return episodes, taken


def _play_randomly(
    env_id: str, num: int, seed: int, options: dict[str, Any]
) -> list[tuple[dict[str, Any], Completions]]:
    """Random episodes: what each came to, and the completions that led there."""
    episodes, taken = _play(env_id, num, seed, options, _random_answers(seed))
    return [(_record(episodes, n, _return(episodes, n)), taken[n]) for n in range(num)]


def _return(episodes: Episodes, n: int) -> float:
    score = episodes.scores[n]
    return 0.0 if score is None or score.value is None else score.value


def _begin(episodes: Episodes, seed: int) -> None:
    stream = ProblemStream(episodes.task, episodes.split)
    stream.start(seed)
    drawn = stream.take(episodes.num)
    episodes.begin(range(episodes.num), [problem for problem, _ in drawn], [address for _, address in drawn])


def _random_answers(seed: int) -> Answer:
    rng = np.random.default_rng(seed)
    return lambda episodes, n: _random_completion(episodes, n, rng)


def _random_completion(episodes: Episodes, n: int, rng: np.random.Generator) -> np.ndarray:
    """One of four kinds: any tokens, an early end, the whole budget without an end, a demonstration."""
    budget, tokenizer = episodes.task.max_new_tokens, episodes.tokenizer
    ordinary = episodes.ordinary_ids
    kind = rng.integers(4)
    if kind == 3:
        return np.resize(_demonstration(episodes, n), budget)
    any_ids = np.array([*ordinary, *tokenizer.eos_ids, *episodes.stop_ids])
    completion = rng.choice(any_ids if kind == 0 else ordinary, budget)
    if kind == 1:
        completion[rng.integers(min(3, budget))] = tokenizer.eos_ids[0]
    return completion


def _demonstration(episodes: Episodes, n: int) -> np.ndarray:
    shown = episodes.task.demonstrate(episodes.transcript(n)) or ""
    try:
        return np.array([*episodes.tokenizer.encode(shown), episodes.tokenizer.eos_ids[0]])
    except ValueError as error:
        raise CheckError(
            f"demonstrate() must return text that can be written, or None for no answer: {error}"
        ) from error


def _empty(episodes: Episodes, n: int) -> np.ndarray:
    return np.array([episodes.tokenizer.eos_ids[0]])


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
    alone = []
    for i in range(8):
        env.reset(seed=SEED if i == 0 else None)
        alone.append(env.episodes.problems[0])
    envs = make_vector_env(env_id, num_envs=8, **options)
    envs.reset(seed=SEED)
    together = list(envs.episodes.problems)
    _require(alone == together, f"seed {SEED} starts on {alone[:2]} alone and on {together[:2]} vectorised")
    envs.reset(seed=SEED, options={"repeat": 4})
    grouped = list(envs.episodes.problems)
    _require(grouped == [alone[0]] * 4 + [alone[1]] * 4, f"repeat=4 must give a problem to four neighbours: {grouped}")
    task = make_task(env_id, **_task_options(options))
    one, other = ([task.problem(seed, "train", i) for i in range(PROBLEMS)] for seed in (SEED, SEED + 1))
    varied = len({task.key(problem) for problem in one}) > 1
    _require(one != other or not varied, "two seeds give the same problems: use the rng that draw() is given")


def check_snapshot(env_id: str, **options: Any) -> None:
    """A snapshot restores exactly, in the middle of an episode too, and forks start from it."""
    played = _play_randomly(env_id, 8, SEED, options)
    for level in LEVELS:
        env = make_env(env_id, level=level, **options)
        for i, (_, completions) in enumerate(played):
            env.reset(seed=SEED if i == 0 else None)
            _check_branching(env, level, completions)


def _check_branching(env: TextEnv, level: str, completions: Completions) -> None:
    """Play an episode, then every step of it again from the snapshot before it, last step first."""
    steps = []
    while not env.episodes.done_N[0]:
        state, key = env.snapshot(), env.state_key()
        action = _actions(level, completions, env.episodes, 0)
        steps.append((state, key, action, _outcome(env, action)))
    for state, key, action, outcome in reversed(steps):
        env.restore(state)
        _require(env.state_key() == key, f"at {level} level the state after restore() is not the one snapshot() took")
        again = _outcome(env, action)
        _require(
            again == outcome,
            f"at {level} level a restored episode goes on as {again}, not {outcome}: draw reply()'s randomness from "
            "transcript.rng, and keep nothing between its calls",
        )
    state, key, *_ = steps[-1]
    _require(
        env.fork(state, 1, seed=0)[0].state_key() == key, f"at {level} level a fork does not start from its snapshot"
    )


def _outcome(env: TextEnv, action: Any) -> tuple[Any, ...]:
    _, reward, terminated, truncated, _ = env.step(action)
    return env.episodes.text(0), reward, terminated, truncated


def check_credit(env_id: str, **options: Any) -> None:
    """Rewards are per token: what an episode's tokens are credited with sums to its return."""
    episodes, _ = _play(env_id, PROBLEMS, SEED, options, _random_answers(SEED))
    for n in range(PROBLEMS):
        credit, want = episodes.credit(n), _return(episodes, n)
        _require(
            bool(np.isclose(credit.sum(), want, rtol=1e-9, atol=1e-9)),
            f"the tokens of episode {n} are credited with {credit.sum()}, but its return is {want}; "
            "the tokens of a Score must sum to its value",
        )


def check_reward(env_id: str, **options: Any) -> None:
    """The reward grades every answer, counts demonstrations as right, and pays empty answers less."""
    kinds = {"a demonstration": _demonstration, "an empty answer": _empty, "a random answer": _random_answers(SEED)}
    played = {kind: _play(env_id, 16, SEED, options, answer)[0] for kind, answer in kinds.items()}
    for kind, episodes in played.items():
        for score in episodes.scores:
            error = "" if score is None or score.error is None else score.error.strip().splitlines()[-1]
            _require(not error, f"the reward could not grade {kind}: {error}")
    shown, empty = played["a demonstration"], played["an empty answer"]
    if not _demonstrates(shown.task):
        return
    for n, score in enumerate(shown.scores):
        finish = Finish(shown.finish_N[n]).label
        _require(
            score is not None and bool(score.correct),
            f"the demonstration {shown.completions[n][-1]!r} earns {_return(shown, n):g} (finish {finish}) and does not count "
            'as right, which takes parts["correct"] 1.0 or, without parts, a value from 1.0 on: mend demonstrate(), the '
            "reward, or max_new_tokens if it was cut",
        )
    means = [np.mean([_return(episodes, n) for n in range(episodes.num)]) for episodes in (shown, empty)]
    _require(
        bool(means[0] > means[1]),
        "an empty answer earns as much as a demonstration, so there is nothing to learn from this reward: mend it",
    )


def _demonstrates(task: Task) -> bool:
    return task.demonstrate(Transcript(task.problem(SEED, "train", 0), (), (), Finish.NONE, (SEED,))) is not None


CHECKS: tuple[Callable[..., None], ...] = (
    check_described,
    check_problems,
    check_prompts,
    check_splits,
    check_seeding,
    check_gymnasium,
    check_stable_baselines3,
    check_equivalence,
    check_snapshot,
    check_credit,
    check_reward,
)
