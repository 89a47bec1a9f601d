"""Rollouts: an engine plays an environment's episodes, and trajectories come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from threading import Event, Thread

import numpy as np

import rewards
from agents.core.engines.base import Completions, Engine, EngineError, OnEnd, Sampling, check_budgets
from agents.core.policy import Policy
from agents.core.timing import Clock
from agents.core.trajectories import Trajectories, from_episodes
from rewards.registry import Spec
from textenv.episodes import Episodes
from textenv.problems import ProblemStream
from textenv.task import Task, Transcript
from textenv.tokenizer import Tokenizer

SAMPLING = 0x5A3B
"""First word of every sampling seed, which sets its stream apart from those of problems, replies and shuffles."""
PATIENCE = 60.0
"""Seconds after which a reward that has not answered is named; and again after twice as many, and so on."""
LOGP_ROUNDING = 1e-3
"""So far above 0 rounding may bring a log-probability, in nats."""


class Rollout:
    """Plays episodes of one task with one engine.

    Everything random is a function of what is passed in, so a rollout can be repeated from its numbers alone.

    Args:
        task: what is asked.
        reward: what scores the episodes; default the task's own.
        engine: generates the completions.
        policy: with whose weights it generates.
        seed: of the problems.
        split: ``train`` or ``eval``.
        max_ungraded: largest share of a rollout that the reward may leave ungraded before the run stops.
        clock: adds up the seconds of ``sync``, ``generate`` and ``score``.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        policy: Policy,
        *,
        reward: Spec | None = None,
        seed: int = 0,
        split: str = "train",
        max_ungraded: float = 0.5,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.task, self.engine, self.policy = task, engine, policy
        self.reward = rewards.as_reward(task.reward if reward is None else reward)
        self.split = split
        self.max_ungraded = max_ungraded
        self._problems = ProblemStream(task, split)
        self._problems.start(seed)

    def begin(self, index: int, prompts: int, group_size: int = 1, *, scored: bool = True) -> Episodes:
        """Episodes on problems ``index`` to ``index + prompts - 1``, the members of a group beside each other.

        ``scored`` is that of :class:`textenv.Episodes`.

        Raises:
            ValueError: a problem that cannot be asked: see :class:`textenv.Episodes`.
        """
        num = prompts * group_size
        episodes = Episodes(
            self.task,
            num,
            tokenizer=self.policy.tokenizer,
            reward=self.reward,
            vocab_size=self.policy.vocab_size,
            split=self.split,
            scored=scored,
        )
        drawn = self._problems.take(num, {"index": index, "repeat": group_size})
        episodes.begin(range(num), [problem for problem, _ in drawn], [address for _, address in drawn])
        return episodes

    def collect(
        self, index: int, prompts: int, group_size: int, *, temperature: float, seed: tuple[int, ...]
    ) -> Trajectories:
        """Sample ``group_size`` completions for each of ``prompts`` problems, from problem ``index`` on.

        A reward that waits for something scores what has ended while the rest is being written. At the end the engine gives
        back the memory that only generation needs.

        Args:
            temperature: of the sampling; 0 is greedy.
            seed: of the sampling.

        Raises:
            rewards.RewardError: the reward left more than ``max_ungraded`` of the episodes ungraded; the message carries
                its first error.
            RuntimeError: the engine died, or gave what cannot be; see :func:`generate`.
        """
        episodes = self.begin(index, prompts, group_size, scored=False)
        scoring = Scoring(self.reward, episodes, group_size)
        logp_NT = np.zeros(episodes.tokens_NT.shape, dtype=np.float32)
        self.engine.keep_contexts = self.task.turns > 1
        turn = 0
        try:
            while not episodes.done_N.all():
                rows = episodes.running
                shared = group_size if turn == 0 else 1  # after the first turn the members of a group have parted
                sampling = Sampling(
                    max_new_tokens=self.task.max_new_tokens,
                    temperature=temperature,
                    stop_ids=episodes.stop_ids,
                    seed=(SAMPLING, *seed, turn),
                )
                starts = episodes.length_N[rows]
                completions = generate(
                    self.engine,
                    self.policy,
                    [episodes.context(n).tolist() for n in rows[::shared]],
                    sampling,
                    n=shared,
                    budgets=(episodes.limit_N - episodes.length_N)[rows].tolist(),
                    on_end=partial(scoring.extend, rows) if scoring.early else None,
                    clock=self.clock,
                )
                if not scoring.early:
                    episodes.extend(completions.tokens, rows)
                for n, start, logprobs in zip(rows, starts, completions.logprobs, strict=True):
                    logp_NT[n, start : start + len(logprobs)] = logprobs
                turn += 1
        finally:
            self.engine.keep_contexts = False
            self.engine.release()
        with self.clock("score"), naming_who_hangs(self.reward.name, episodes.num):
            scoring.finish()
        check_graded([score for score in episodes.scores if score is not None], self.reward.name, self.max_ungraded)
        return from_episodes(episodes, logp_NT, np.arange(episodes.num) // group_size, scoring.samples)


def generate(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    n: int = 1,
    budgets: Sequence[int] | None = None,
    on_end: OnEnd | None = None,
    clock: Clock | None = None,
) -> Completions:
    """Generate with the policy's weights as they are now, all of :meth:`Engine.generate`'s arguments being as there.

    An engine that dies is begun anew and asked again, once. What had ended before is not handed to ``on_end`` again.

    Raises:
        RuntimeError: the engine died again, or wrote something else than before; or what it wrote cannot be: see
            :func:`fault_of`.
    """
    clock = clock or Clock()
    ended: dict[int, np.ndarray] = {}

    def end_once(row: int, tokens: np.ndarray) -> None:
        if row not in ended and on_end is not None:
            ended[row] = tokens.copy()
            on_end(row, tokens)

    def ask() -> Completions:
        if engine.policy is not policy or engine.version != policy.version:
            with clock("sync"):
                engine.sync(policy)
        with clock("generate"):
            return engine.generate(prompts, sampling, n, budgets, None if on_end is None else end_once)

    try:
        completions = ask()
    except EngineError as error:
        print(f"the engine died and is begun anew: {error}", flush=True)
        completions = _ask_again(engine, policy, ask, clock)
    budget_B = check_budgets(prompts, sampling, n, budgets, None)
    if (fault := fault_of(completions, budget_B, sampling, policy.tokenizer)) is not None:
        raise RuntimeError(
            f"the engine gave {fault}; nothing was learned from it. Mend the engine, then go on with --resume, from the last "
            "checkpoint"
        )
    if any(not np.array_equal(completions.tokens[row], tokens) for row, tokens in ended.items()):
        raise RuntimeError(
            "the engine died, was begun anew and wrote other completions than before, some of which are scored already; go "
            "on with --resume, from the last checkpoint"
        )
    return completions


def _ask_again(engine: Engine, policy: Policy, ask: Callable[[], Completions], clock: Clock) -> Completions:
    try:
        with clock("sync"):
            engine.restart(policy)
        return ask()
    except EngineError as error:
        raise RuntimeError(
            f"the engine died, was begun anew and died again: {error}; mend what ended it, then go on with --resume, "
            "from the last checkpoint"
        ) from error


def fault_of(completions: Completions, budget_B: np.ndarray, sampling: Sampling, tokenizer: Tokenizer) -> str | None:
    """What an engine gave that it never may, in words; None if all is well.

    It may be of the wrong number or length, hold ids without text, go on after an end or stop before one, or have
    log-probabilities that are none.

    Args:
        completions: what it gave.
        budget_B: most tokens of each completion that was asked for.
        sampling: what it was asked to do.
        tokenizer: of the policy.
    """
    tokens, logprobs, asked = completions.tokens, completions.logprobs, len(budget_B)
    if not len(tokens) == len(logprobs) == asked:
        return (
            f"{len(tokens)} completions and {len(logprobs)} rows of log-probabilities, {asked} of each were asked for"
        )
    length_B = np.array([len(row) for row in tokens])
    token_M, logp_M = np.concatenate(tokens), np.concatenate(logprobs)
    row_M = np.repeat(np.arange(asked), length_B)
    if (wrong_B := (length_B == 0) | (length_B > budget_B)).any():
        row = wrong_B.argmax()
        return f"{length_B[row]} tokens as completion {row}, which may have from 1 to {budget_B[row]}"
    if token_M.dtype.kind not in "iu":
        return f"tokens of type {token_M.dtype}, where ids belong"
    text_V = tokenizer.decodable_V
    if (wrong_M := ~text_V[np.clip(token_M, 0, len(text_V) - 1)] | (token_M < 0) | (token_M >= len(text_V))).any():
        at = wrong_M.argmax()
        return f"the id {token_M[at]} in completion {row_M[at]}, which stands for no text in {tokenizer.name!r}"
    end_M = (token_M[:, None] == np.array([*tokenizer.eos_ids, *sampling.stop_ids])).any(axis=1)
    last_B = length_B.cumsum() - 1
    short_B = ~end_M[last_B] & (length_B < budget_B)
    if short_B.any() and not sampling.stop_texts:
        row = short_B.argmax()
        return f"{length_B[row]} tokens as completion {row}, which neither end nor fill their budget of {budget_B[row]}"
    end_M[last_B] = False
    if end_M.any():
        return f"tokens after the end of completion {row_M[end_M.argmax()]}"
    if [len(row) for row in logprobs] != length_B.tolist():
        return f"{len(logp_M)} log-probabilities for {len(token_M)} tokens"
    if not (logp_M.max() <= LOGP_ROUNDING and logp_M.min() > -np.inf):  # false as well of NaN
        at = (~np.isfinite(logp_M) | (logp_M > LOGP_ROUNDING)).argmax()
        return (
            f"the log-probability {logp_M[at]:g} in completion {row_M[at]}, which must be a finite number of at most 0"
        )
    return None


@contextmanager
def naming_who_hangs(reward: str, episodes: int) -> Iterator[None]:
    """Within, say now and then that a reward has not answered yet: nobody else can tell what a training waits for."""
    over = Event()

    def tell() -> None:
        waited = 0.0
        while not over.wait(waited or PATIENCE):
            waited = 2 * waited or PATIENCE
            print(
                f"\nthe reward {reward!r} has been scoring {episodes} episodes for {waited:g} s; if it hangs, end the run by "
                "Ctrl-C twice, mend the reward and go on with --resume, from the last checkpoint",
                flush=True,
            )

    Thread(target=tell, name="patience", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class Scoring:
    """Scores the episodes of a rollout: together when all have ended, or each as it ends, beside the generation.

    Args:
        reward: if its scores depend on the other answers to a problem, a group is scored when all of it has ended.
        episodes: that are not scored otherwise.
        group_size: how many neighbours share a problem.

    Attributes:
        early: whether episodes are scored as they end.
        samples: what was scored, once all of it is, if it was scored together.
    """

    def __init__(self, reward: rewards.Reward, episodes: Episodes, group_size: int) -> None:
        self.reward, self.episodes = reward, episodes
        self.early = any(part.waits for part in reward.walk())
        self.unit = group_size if any(part.whole_groups for part in reward.walk()) else 1
        self.samples: list[rewards.Sample] | None = None
        self._under_way: dict[range, Future[list[rewards.Score]]] = {}

    def extend(self, rows: Sequence[int], row: int, tokens: np.ndarray) -> None:
        """Write a completion to the episode ``rows[row]``, and start to score what it completes."""
        n = rows[row]
        self.episodes.extend([tokens], [n])
        first = n - n % self.unit
        unit = range(first, first + self.unit)
        if self.episodes.done_N[unit].all():
            self._under_way[unit] = self.reward.score_async([self.episodes.sample(n) for n in unit])

    def finish(self) -> None:
        """Write the scores, when all are there.

        Raises:
            rewards.RewardError: the reward broke its contract.
        """
        if not self.early:
            every = range(self.episodes.num)
            self.samples = [self.episodes.sample(n) for n in every]
            self.episodes.scores = list(rewards.score_samples(self.reward, self.samples))
        for unit, future in self._under_way.items():
            for n, score in zip(unit, future.result(), strict=True):
                self.episodes.scores[n] = score


def demonstrations(episodes: Episodes) -> Trajectories:
    """Play begun episodes with what their task demonstrates. Behaviour log-probabilities are 0: nobody sampled.

    Raises:
        ValueError: see :func:`encode_demonstration`.
    """
    while not episodes.done_N.all():
        rows = episodes.running
        shown = [encode_demonstration(episodes.task, episodes.tokenizer, episodes.transcript(n)) for n in rows]
        episodes.extend(shown, rows)
    return from_episodes(episodes, np.zeros(episodes.tokens_NT.shape), np.arange(episodes.num))


def encode_demonstration(task: Task, tokenizer: Tokenizer, transcript: Transcript) -> np.ndarray:
    """The tokens of what the task would say next, ended unless they fill the whole budget.

    Raises:
        ValueError: the task demonstrates nothing, or something longer than its own budget.
    """
    shown = task.demonstrate(transcript)
    if shown is None:
        raise ValueError(
            f"{task} has no demonstrations to learn from: give its problems text references, or write demonstrate()"
        )
    ids = tokenizer.encode(shown)
    if len(ids) > task.max_new_tokens:
        raise ValueError(
            f"a demonstration of {task} is {len(ids)} tokens long, but max_new_tokens is {task.max_new_tokens}; "
            f"raise it: {shown[:60]!r}"
        )
    return np.array([*ids, tokenizer.eos_ids[0]][: task.max_new_tokens])


def check_graded(scores: Sequence[rewards.Score], reward: str, max_ungraded: float) -> None:
    """Stop when a reward grades too little of a rollout to learn from."""
    errors = [score.error for score in scores if score.error is not None]
    if len(errors) > max_ungraded * len(scores):
        raise rewards.RewardError(
            f"the reward {reward!r} left {len(errors)} of {len(scores)} episodes ungraded, more than "
            f"max_ungraded={max_ungraded:g}; the first error was:\n{errors[0]}"
        )
