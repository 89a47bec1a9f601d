"""The reward contract: samples in, scores out.

A score is one of three things that are never confused: *scored* (a number), *scored low* (a number too), and *ungraded*
(``value=None`` with an ``error``): the reward could not tell. Ungraded samples leave baseline and gradient.
"""

from __future__ import annotations

import inspect
import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rewards.background import submit


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a reward sees: one finished episode.

    ``completion`` is the last thing the policy wrote, without its end-of-sequence token; ``turns`` holds every completion
    of the episode, oldest first; ``tokens`` are all token ids that the policy chose, end tokens included, and those of the
    last turn start at ``turn_start``. ``decode`` turns ids into text as the environment does; None where nobody knows, as
    for samples from a file. ``split`` is that of the problem, ``"train"`` or ``"eval"``.
    """

    prompt: str
    completion: str
    reference: Any = None
    turns: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    turn_start: int = 0
    decode: Callable[[Sequence[int]], str] | None = field(default=None, compare=False, repr=False)
    finish: str = "eos"
    split: str = "train"
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward returns for one sample.

    Args:
        value: the return of the episode, finite; ``None`` when the sample could not be graded.
        parts: named components, all finite floats. ``parts["correct"]`` (1.0 or 0.0), when given, is what accuracy counts.
        tokens: optional credit for each of ``sample.tokens``; its sum must be ``value``. Without it the whole value belongs
            to the last token.
        error: why the sample is ungraded; given if and only if ``value`` is ``None``.
        info: what the rule saw, as texts for people: the answer it extracted, the stage that decided.

    Raises:
        ValueError: a value or part that is not finite, or a ``None`` without an error.

    Example:
        >>> Score(0.0).correct, Score(1.0).correct, Score(None, error="time-out").correct
        (False, True, None)
    """

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[float, ...] | None = None
    error: str | None = None
    info: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.value is None) != (self.error is not None):
            raise ValueError(f"a score has a value or an error, not both or neither; got {self.value=}, {self.error=}")
        object.__setattr__(self, "value", None if self.value is None else float(self.value))
        object.__setattr__(self, "parts", {name: float(number) for name, number in self.parts.items()})
        numbers = {"value": 0.0 if self.value is None else self.value, **self.parts}
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise ValueError(f"a score's {name} must be a finite number, got {number}; use ungraded(why) instead")
        if self.tokens is not None and not math.isclose(
            math.fsum(self.tokens), numbers["value"], rel_tol=1e-9, abs_tol=1e-9
        ):
            raise ValueError(f"token credit must sum to the value {self.value}, got {math.fsum(self.tokens)}")

    @property
    def tells(self) -> bool:
        """Whether it says that the answer is right or wrong: a grade or a style alone does not."""
        return self.value is not None and ("correct" in self.parts or not self.parts)

    @property
    def correct(self) -> bool | None:
        """Whether the answer counts as right; None if ungraded.

        It is ``parts["correct"]`` if the reward names it. A reward without any parts counts as right from 1.0 on; one whose
        parts name other things (a format, a length) says nothing about the answer, which then does not count as right.
        """
        if self.value is None:
            return None
        return self.parts.get("correct", 0.0 if self.parts else self.value) >= 1.0


def ungraded(why: str) -> Score:
    """A score that says nothing about the sample: the reward itself could not work."""
    return Score(None, error=why)


class RewardError(RuntimeError):
    """A reward source broke, or broke its contract."""


class Reward(ABC):
    """Scores finished episodes, a batch at a time, one score a sample, in order.

    A source that fails on one sample returns :func:`ungraded` for it and goes on. One that is made of others names them in
    :meth:`components`, and has what follows from them.

    Attributes:
        name: for people and metrics.
        waits: whether scoring mostly waits for something else, a server or other processes. A rollout then hands
            completions over as they end, from several threads, while others are still being written.
        whole_groups: whether a score depends on the other answers to its prompt, which must then be in the same batch.
    """

    name: str = "reward"
    waits: bool = False
    whole_groups: bool = False

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> list[Score]: ...

    def components(self) -> Mapping[str, Reward]:
        """The rewards that this one is made of, by name."""
        return {}

    def walk(self) -> Iterator[Reward]:
        """This reward, and all that it is made of."""
        yield self
        for reward in self.components().values():
            yield from reward.walk()

    def score_async(self, samples: Sequence[Sample]) -> Future[list[Score]]:
        """Start to score on another thread; the future holds what :func:`score_samples` returns or raises."""
        return submit(score_samples, self, samples)

    @property
    def adapts(self) -> bool:
        """Whether :meth:`adapt` changes its scores, or those of a reward that it is made of."""
        return any(type(reward).adapt is not Reward.adapt for reward in self.walk())

    def adapt(self) -> None:
        """Called by an agent between two rollouts of its training: the only time at which scores may change."""
        for reward in self.components().values():
            reward.adapt()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`adapt` has changed, and what was spent of a budget, as JSON; empty if nothing.

        A run keeps it in its checkpoints.
        """
        states = {name: reward.state_dict() for name, reward in self.components().items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        for name, reward in self.components().items():
            if name in state:
                reward.load_state_dict(state[name])


PlainReward = Callable[..., Any]
"""``(prompt, completion, reference) -> float | Score``"""


class FunctionReward(Reward):
    """A plain function ``(prompt, completion, reference) -> float`` as a :class:`Reward`.

    When the function raises, that sample is ungraded and its error holds the traceback.

    Example:
        >>> shout = FunctionReward(lambda prompt, completion, reference: float(completion.isupper()))
        >>> [score.value for score in shout([Sample(prompt="", completion="HEY")])]
        [1.0]
    """

    def __init__(self, function: PlainReward, name: str | None = None) -> None:
        parameters = inspect.signature(function).parameters
        if len(parameters) != 3 and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            raise TypeError(
                f"a reward function takes (prompt, completion, reference), got {name or function!r} with "
                f"({', '.join(parameters)}); for more than that subclass rewards.Reward"
            )
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Score:
        try:
            result = self.function(sample.prompt, sample.completion, sample.reference)
            if result is None:
                return ungraded(f"{self.name} returned None")
            return result if isinstance(result, Score) else Score(float(result))
        except Exception:  # noqa: BLE001 - the boundary to user code: any failure is an ungraded sample, with its traceback
            return ungraded(traceback.format_exc())


def score_samples(reward: Reward, samples: Sequence[Sample]) -> list[Score]:
    """Score ``samples`` and hold the reward to its contract.

    An exception leaves the whole batch ungraded, each score carrying the traceback. This is the one place from which
    environments call rewards.

    Raises:
        RewardError: the reward returned something other than one :class:`Score` a sample.
    """
    try:
        scores: Any = reward(samples)
    except RewardError:
        raise
    except Exception:  # noqa: BLE001 - the boundary to user code, as above
        return [ungraded(traceback.format_exc())] * len(samples)
    if not isinstance(scores, list) or len(scores) != len(samples) or not all(isinstance(s, Score) for s in scores):
        raise RewardError(
            f"{reward.name} must return a list with one Score a sample, in order, for {len(samples)} samples; "
            f"got {str(scores)[:200]}"
        )
    for sample, score in zip(samples, scores, strict=True):
        if score.tokens is not None and len(score.tokens) != len(sample.tokens):
            raise RewardError(
                f"{reward.name} gave credit to {len(score.tokens)} tokens of a sample with {len(sample.tokens)}; "
                "give one number for each of sample.tokens"
            )
    return scores
