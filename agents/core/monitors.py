"""Monitors: what is measured beside a training and never trained on, to see whether it learns what was meant.

A policy that games its reward betrays itself where it is not paid: another reward stands still or falls, or a task that has
nothing to do with the training moves.
"""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from agents.core.evaluate import Evaluation, evaluate
from agents.core.rollout import Rollout
from agents.core.trajectories import Trajectories
from rewards import as_reward, score_samples
from rewards.registry import Spec
from rewards.terminal import visible
from textenv.episodes import Episodes
from textenv.registry import make_task
from textenv.tokenizer import Tokenizer

if TYPE_CHECKING:
    from agents.core.training import Callback, Training


class Monitor(ABC):
    """A callback that measures: what it returns is logged with the step. It changes no number of the training.

    Attributes:
        name: stands in the names of its metrics.
        flag: the flag and its value that make the same monitor on a command line, for a run to remember; or None.
    """

    name: str
    flag: tuple[str, str] | None = None

    def check(self, tokenizer: Tokenizer) -> None:  # noqa: B027 - few have anything to check
        """Refuse, before a model loads, what cannot be measured with its tokenizer.

        Raises:
            ValueError: there is such a thing.
        """

    def start(self, training: Training) -> None:  # noqa: B027 - few need it
        """Called once before the first step, and again when a run is resumed."""

    @abstractmethod
    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        """The metrics of a step, from the training, whose ``step`` counts this one too, and the batch that it sampled."""

    def __call__(self, training: Training) -> bool | None:
        return None


class RewardMonitor(Monitor):
    """Scores what each step sampled with another reward than the one that is trained on: ``monitor/NAME``, its mean.

    Ungraded episodes are left out of the mean; the first step in which all of them are is told in a line.

    Args:
        reward: a registered name, a reward or a function ``(prompt, completion, reference)``.

    Raises:
        ValueError: no reward has this name.

    Example::

        agent.learn(callback=RewardMonitor("math"))
    """

    def __init__(self, reward: Spec) -> None:
        self.reward = as_reward(reward)
        self.name = self.reward.name
        self.metric = f"monitor/{self.name}"
        self.flag = ("monitor", reward) if isinstance(reward, str) else None
        self._warned = False

    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        scores = score_samples(self.reward, batch.samples)
        values = [score.value for score in scores if score.value is not None]
        if not values and scores and not self._warned:
            self._warned = True
            why = visible((scores[0].error or "").strip().rpartition("\n")[2])
            print(f"monitor {self.name}: it could grade no episode of step {training.step}: {why}", flush=True)
        return {self.metric: fmean(values) if values else float("nan")}


class TripwireTask(Monitor):
    """Plays a task whose reward should not move while another one is trained, and says so when it does.

    The same held-out problems are played greedily before the first step, every so many steps and in the last:
    ``tripwire/NAME`` is their mean reward, ``tripwire_moved/NAME`` is 1 while it is outside the 95 % interval that it had
    at the start, else 0. Where all rewards were equal then, as in a task without a right answer, that interval is a point.
    When the mean leaves it, one line is printed.

    Args:
        env_id: a registered id.
        episodes: how many problems.
        every: steps from one time to the next.
        options: of the environment.

    Raises:
        ValueError: an unknown id or option, or too few episodes or steps; when training starts, a model that cannot play
            the task, or a reward that grades fewer than two episodes.
    """

    def __init__(self, env_id: str, *, episodes: int = 256, every: int = 50, **options: Any) -> None:
        if episodes < 2 or every < 1:
            raise ValueError(f"a tripwire plays at least 2 episodes every 1 step, got {episodes=} and {every=}")
        self.name = env_id
        self.flag = None if options else ("tripwire", env_id)
        self.episodes, self.every = episodes, every
        self.task = make_task(env_id, **options)

    def check(self, tokenizer: Tokenizer) -> None:
        try:
            Episodes(self.task, 1, tokenizer=tokenizer, split="eval").check_prompts()
        except ValueError as error:
            raise ValueError(f"the tripwire {self.name} cannot be played: {error}") from error

    def start(self, training: Training) -> None:
        policy, state = training.agent.policy, training.agent.state
        self.check(policy.tokenizer)
        if policy.max_context is not None and policy.max_context < self.task.max_tokens:
            raise ValueError(
                f"the tripwire {self.name} has max_tokens={self.task.max_tokens}, the model only a context of "
                f"{policy.max_context}; give the tripwire a lower max_tokens"
            )
        if self._key("low") in state:  # a resumed run goes on from its own start
            return
        found = self._play(training)
        if self.episodes - found.ungraded < 2:
            raise ValueError(f"the tripwire {self.name} cannot tell: {found.ungraded} of its episodes were ungraded")
        state |= {self._key("low"): found.reward_low, self._key("high"): found.reward_high, self._key("moved"): 0}
        print(f"tripwire {self.name}: reward {found.reward_text()} at the start", flush=True)

    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        if training.step % self.every and training.episodes < training.total_episodes:
            return {}
        state, found = training.agent.state, self._play(training)
        low, high = state[self._key("low")], state[self._key("high")]
        moved = found.reward < low or found.reward > high
        if moved and not state[self._key("moved")]:
            print(
                f"tripwire {self.name}: the reward moved to {found.reward:.3f} in step {training.step}, out of the 95 % "
                f"interval [{low:.3f}, {high:.3f}] of the start, though nothing here is trained on it",
                flush=True,
            )
        state[self._key("moved")] = int(moved)
        return {f"tripwire/{self.name}": found.reward, f"tripwire_moved/{self.name}": float(moved)}

    def _play(self, training: Training) -> Evaluation:
        agent = training.agent
        seed = agent.config.seed
        rollout = Rollout(self.task, agent.engine, agent.policy, seed=seed, split="eval", max_ungraded=1.0)
        return evaluate(rollout, self.episodes)

    def _key(self, what: str) -> str:
        return f"tripwire/{self.name}/{what}"


class HeldOutMonitor(Monitor):
    """Plays held-out problems of the task that is trained on, greedily, every so many steps and in the last.

    The problems are the same each time. ``held_out`` is the mean of the task's own reward, ``held_out/NAME`` that of another
    one; ungraded episodes are left out of it.

    Args:
        reward: a registered name, a reward or a function ``(prompt, completion, reference)``; default the task's own.
        episodes: how many problems.
        every: steps from one time to the next.

    Raises:
        ValueError: no reward has this name; fewer than one episode or step.
    """

    def __init__(self, reward: Spec | None = None, *, episodes: int = 256, every: int = 10) -> None:
        if episodes < 1 or every < 1:
            raise ValueError(f"at least 1 held-out problem is played every 1 step, got {episodes=} and {every=}")
        self.reward = None if reward is None else as_reward(reward)
        self.name = "" if self.reward is None else self.reward.name
        self.metric = f"held_out/{self.name}" if self.name else "held_out"
        self.episodes, self.every = episodes, every

    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        if training.step % self.every and training.episodes < training.total_episodes:
            return {}
        agent = training.agent
        other = {} if self.reward is None else {"reward": self.reward}
        rollout = agent.rollout("eval", **other, max_ungraded=1.0)
        return {self.metric: evaluate(rollout, self.episodes).reward}


class StopWhenFalls(Monitor):
    """Stops a training when what should have risen has fallen below its best by more than its noise: see :class:`FallTest`.

    With a reward that is not trained on, it ends a training that has begun to game the one that is. The policy at the end of
    the best window so far is kept as a transformers folder in that of the run, such as ``best-monitor-exact``. A training
    that was stopped so takes no further step when it is resumed.

    Args:
        source: what is watched: ``"monitor/NAME"``, the reward NAME on what each step samples; ``"held_out"`` or
            ``"held_out/NAME"``, the task's own reward or another on held-out problems; or such a monitor itself, for a
            reward without a name. It is logged as by that monitor alone.
        window: values that are averaged, one a step, or for held-out problems one every so many steps. A dip much shorter
            than a window passes.
        alpha: how likely a training that does not get worse may be stopped.

    Raises:
        ValueError: another ``source``, a reward of no known name, a window of fewer than two values, an alpha outside 0 to 1.

    Example::

        agent.learn(callback=StopWhenFalls("held_out/math"))
    """

    def __init__(self, source: str | RewardMonitor | HeldOutMonitor, *, window: int = 10, alpha: float = 0.01) -> None:
        if window < 2 or not 0 < alpha < 1:
            raise ValueError(
                f"a fall is judged by windows of 2 values or more, alpha in (0, 1), got {window=}, {alpha=}"
            )
        self.source = _source(source) if isinstance(source, str) else source
        self.name = self.source.name
        self.flag = ("stop_when_falls", source) if isinstance(source, str) else None
        self.window, self.alpha = window, alpha

    def check(self, tokenizer: Tokenizer) -> None:
        self.source.check(tokenizer)

    def start(self, training: Training) -> None:
        self.source.start(training)

    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        found = self.source.measure(training, batch)
        value = found.get(self.source.metric, math.nan)
        if not math.isnan(value):
            self._watch(training, value)
        return found

    def _watch(self, training: Training, value: float) -> None:
        state, key = training.agent.state, f"fall/{self.source.metric}/"
        kept: dict[str, Any] = {"window": self.window, "alpha": self.alpha}
        kept |= {field.name: state[key + field.name] for field in fields(FallTest) if key + field.name in state}
        test = FallTest(**kept)
        best = training.run.folder / f"best-{self.source.metric.replace('/', '-')}"
        if test.add(training.step, value):
            training.stop(
                f"{self.source.metric} fell to {test.last:.4g} from {test.best:.4g}, its mean over the {self.window} values "
                f"that ended with step {test.best_step:.0f}; the model of that step is in {best}"
            )
        elif test.best_step == training.step:
            new = best.with_name(best.name + ".new")
            training.agent.policy.save(new)
            shutil.rmtree(best, ignore_errors=True)
            new.rename(best)
        state |= {key + name: number for name, number in asdict(test).items()}


LEAST_NOISE = 0.01
"""A series is taken to scatter by this share of itself at least: one that is played greedily may not scatter at all."""


@dataclass
class FallTest:
    """Whether a series has fallen below its best by more than its noise, told value by value.

    The values are averaged over windows that do not overlap. The variance of their noise is half the mean square of the
    difference of neighbours (von Neumann, 1941), which a trend hardly touches, and not less than that of a deviation of
    :data:`LEAST_NOISE` of the mean; for normal noise it has about
    2 (w - 1)² / (3 w - 4) degrees of freedom in a window of w. After window k, from the second on, its mean is held against
    the best of those before by Welch's one-sided t-test. The series has fallen where the p-value is below
    ``alpha / (k (k - 1)²)``: window k could be compared with k - 1 others, and 1 / (k (k - 1)) sums to 1 over all k. So a
    series that only scatters, with independent normal noise, around a mean that never falls is said to have fallen with
    probability ``alpha`` at most, however long it is.

    Attributes:
        window: values in a window.
        alpha: probability of a false alarm.
        best, best_variance: mean of the best window, and variance of its noise.
        best_step: that of its last value.
        last: mean of the last whole window.
        windows: whole windows so far.
        count, total, squares, previous: of the window that is being filled: values, their sum, the sum of squared differences
            of neighbours, and the newest value.
    """

    window: int = 10
    alpha: float = 0.01
    best: float = 0.0
    best_variance: float = 0.0
    best_step: float = 0
    last: float = 0.0
    windows: float = 0
    count: float = 0
    total: float = 0.0
    squares: float = 0.0
    previous: float = 0.0

    def add(self, step: int, value: float) -> bool:
        """Take the value of a step; True if with it the series has fallen."""
        if self.count:
            self.squares += (value - self.previous) ** 2
        self.count, self.total, self.previous = self.count + 1, self.total + value, value
        if self.count < self.window:
            return False
        self.last, variance = self.total / self.window, self.squares / (2 * (self.window - 1))
        self.windows += 1
        fell = self.windows > 1 and self._p_value(variance) < self.alpha / (self.windows * (self.windows - 1) ** 2)
        if self.windows == 1 or self.last > self.best:
            self.best, self.best_variance, self.best_step = self.last, variance, step
        self.count, self.total, self.squares = 0, 0.0, 0.0
        return fell

    def _p_value(self, variance: float) -> float:
        from scipy import stats

        if self.last >= self.best:
            return 1.0
        least = (LEAST_NOISE * max(abs(self.best), abs(self.last))) ** 2
        best_variance, variance = max(self.best_variance, least), max(variance, least)
        noise = best_variance + variance
        one_window = 2 * (self.window - 1) ** 2 / (3 * self.window - 4)
        freedom = noise**2 / (best_variance**2 + variance**2) * one_window
        return float(stats.t.sf((self.best - self.last) / math.sqrt(noise / self.window), freedom))


def _source(metric: str) -> RewardMonitor | HeldOutMonitor:
    kind, _, reward = metric.partition("/")
    if kind == "monitor" and reward:
        return RewardMonitor(reward)
    if kind == "held_out":
        return HeldOutMonitor(reward or None)
    raise ValueError(f"what may fall is monitor/REWARD, held_out or held_out/REWARD, got {metric!r}")


class Together(Monitor):
    """Several callbacks and monitors as one; training stops when any of them returns False.

    Args:
        callbacks: all are called in every step.

    Raises:
        ValueError: two monitors of one kind have the same name.

    Example::

        agent.learn(callback=Together(RewardMonitor("math"), TripwireTask("textenv/Copy-v0"), print_metrics))
    """

    name = "together"

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks
        self.monitors = [callback for callback in callbacks if isinstance(callback, Monitor)]
        measured = [each.source if isinstance(each, StopWhenFalls) else each for each in self.monitors]
        names = [(type(monitor).__name__, monitor.name) for monitor in measured]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError("two monitors have the same name: {} {!r}; drop one or rename it".format(*twice.pop()))

    def check(self, tokenizer: Tokenizer) -> None:
        for monitor in self.monitors:
            monitor.check(tokenizer)

    def start(self, training: Training) -> None:
        for monitor in self.monitors:
            monitor.start(training)

    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        return {name: value for monitor in self.monitors for name, value in monitor.measure(training, batch).items()}

    def __call__(self, training: Training) -> bool | None:
        answers = [callback(training) for callback in self.callbacks]
        return not any(answer is False for answer in answers)


def watch(flags: Sequence[Sequence[str]]) -> Together:
    """The monitors that flags name: ``("monitor", REWARD)``, ``("tripwire", ENVIRONMENT)`` or ``("stop_when_falls", METRIC)``
    each.

    Raises:
        ValueError: see :class:`RewardMonitor`, :class:`TripwireTask` and :class:`StopWhenFalls`; a reward that cannot do
            without options.
    """
    kinds: dict[str, Callable[[str], Monitor]] = {
        "monitor": RewardMonitor,
        "tripwire": TripwireTask,
        "stop_when_falls": StopWhenFalls,
    }
    # What stops a training when it falls is logged anyway.
    logged = {("monitor", metric.removeprefix("monitor/")) for kind, metric in flags if kind == "stop_when_falls"}
    try:
        return Together(*[kinds[kind](name) for kind, name in flags if (kind, name) not in logged])
    except TypeError as error:
        raise ValueError(f"a tripwire is made without options: {error}") from error


def flags_of(callback: Callback | None) -> list[tuple[str, str]]:
    """The flags that make the same monitors again, for :func:`watch`; those that no flag makes are left out."""
    monitors = callback.monitors if isinstance(callback, Together) else [callback]
    return [monitor.flag for monitor in monitors if isinstance(monitor, Monitor) and monitor.flag is not None]
