"""Monitors: what is measured beside a training and never trained on, to see whether it learns what was meant.

A policy that games its reward betrays itself where it is not paid: another reward stands still or falls, or a task that has
nothing to do with the training moves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from agents.core.evaluate import Evaluation, evaluate
from agents.core.rollout import Rollout
from agents.core.trajectories import Trajectories
from rewards import as_reward, score_samples
from rewards.registry import Spec
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
        self.flag = ("monitor", reward) if isinstance(reward, str) else None
        self._warned = False

    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        scores = score_samples(self.reward, batch.samples())
        values = [score.value for score in scores if score.value is not None]
        if not values and scores and not self._warned:
            self._warned = True
            why = (scores[0].error or "").strip().rpartition("\n")[2]
            print(f"monitor {self.name}: it could grade no episode of step {training.step}: {why}", flush=True)
        return {f"monitor/{self.name}": fmean(values) if values else float("nan")}


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
        names = [(type(monitor).__name__, monitor.name) for monitor in self.monitors]
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
    """The monitors that flags name: ``("monitor", REWARD)`` or ``("tripwire", ENVIRONMENT)`` each.

    Raises:
        ValueError: see :class:`RewardMonitor` and :class:`TripwireTask`; a reward that cannot do without options.
    """
    kinds = {"monitor": RewardMonitor, "tripwire": TripwireTask}
    try:
        return Together(*[kinds[kind](name) for kind, name in flags])
    except TypeError as error:
        raise ValueError(f"what watches a training is made without options: {error}") from error


def flags_of(callback: Callback | None) -> list[tuple[str, str]]:
    """The flags that make the same monitors again, for :func:`watch`; those that no flag makes are left out."""
    monitors = callback.monitors if isinstance(callback, Together) else [callback]
    return [monitor.flag for monitor in monitors if isinstance(monitor, Monitor) and monitor.flag is not None]
