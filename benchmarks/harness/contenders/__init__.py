"""Contenders: what plays in an :class:`~benchmarks.harness.arena.Arena`, and how it is found.

One of your own is a class with a ``train``; its settings in a suite are the arguments of its constructor::

    class Mine:
        def __init__(self, learning_rate: float = 1e-4) -> None:
            self.learning_rate = learning_rate

        def train(self, arena):
            policy, episodes, tokens, updates = arena.policy(), 0, 0, 0
            trainer = MyTrainer(policy.model, self.learning_rate, problems=arena.task, seed=arena.seed)
            arena.begin()
            while arena.spent(policy, episodes=episodes, tokens=tokens, updates=updates):
                ...  # a step

Name it in the entry-point group ``textenv.contenders``, or write ``kind = "my_module:Mine"`` in the suite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from benchmarks.harness.toml_file import nearest
from textenv.cli import load_module

if TYPE_CHECKING:
    from benchmarks.harness.arena import Arena
    from benchmarks.harness.suite import Budget

AGENTS_GROUP, GROUP = "textenv.agents", "textenv.contenders"
_HERE = "benchmarks.harness.contenders"
SHIPPED: Mapping[str, str] = {
    "start": f"{_HERE}.evaluated:Start",
    "model": f"{_HERE}.evaluated:Model",
    "best-of-n": f"{_HERE}.evaluated:BestOfN",
    "api": f"{_HERE}.evaluated:API",
    "sb3-ppo": f"{_HERE}.sb3:SB3PPO",
    "trl-grpo": f"{_HERE}.trl:GRPO",
    "trl-rloo": f"{_HERE}.trl:RLOO",
}
"""Adapters beside those of our own agents; loaded when they are asked for."""
ENDLESS = 10**9
"""Steps or episodes of a training that its budget ends."""


class Contender(Protocol):
    """What plays in an arena."""

    def train(self, arena: Arena) -> None:
        """Train from the arena's start until its budget is spent; see :meth:`benchmarks.harness.arena.Arena.spent`."""


@runtime_checkable
class Describes(Protocol):
    """A contender that tells its settings itself, since some depend on the budget."""

    def described(self, budget: Budget) -> str:
        """What it is going to train with, for the provenance of its results.

        Raises:
            ValueError: a setting does not go with the budget.
        """


def contender_names() -> list[str]:
    """All kinds that a suite can name, beside ``module:Class``."""
    return sorted({*SHIPPED, *_installed(AGENTS_GROUP), *_installed(GROUP)})


def find_contender(kind: str) -> Callable[..., Contender]:
    """The class of a contender: called with the settings, it gives one.

    Raises:
        ValueError: there is no such contender; the message names the nearest.
        ImportError: it needs something that is not installed.
    """
    if kind in (agents := _installed(AGENTS_GROUP)):
        from benchmarks.harness.contenders.agents import Ours

        return partial(Ours, agents[kind].load())
    if kind in (others := _installed(GROUP)):
        return others[kind].load()
    module, _, name = SHIPPED.get(kind, kind).partition(":")
    if not name:
        raise ValueError(f"no agent {kind!r}; {nearest(kind, contender_names())}, or write module:Class")
    found = getattr(load_module(module), name, None)
    if found is None:
        raise ValueError(f"the module {module!r} has no {name!r}")
    return found


def make_contender(kind: str, settings: Mapping[str, Any]) -> Contender:
    """A contender with its settings.

    Raises:
        ValueError: as :func:`find_contender`; an unknown setting, a missing one, or one that is refused.
        ImportError: as :func:`find_contender`.
    """
    make = find_contender(kind)
    signature = inspect.signature(make)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        check_settings(kind, settings, signature.parameters)
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ValueError(f"{kind} wants other settings: {error}") from None
    return make(**settings)


def check_settings(kind: str, settings: Iterable[str], known: Collection[str], given: Collection[str] = ()) -> None:
    """Refuse settings that a contender does not have, and those that the arena gives, the same to all.

    Raises:
        ValueError: there is one; the message names the nearest.
    """
    for name in settings:
        if name in given:
            raise ValueError(f"{name} is not for {kind} to set: it is the same for all, as the suite says")
        if name not in known:
            raise ValueError(
                f"{kind} has no setting {name!r}; {nearest(name, [one for one in known if one not in given])}"
            )


def _installed(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}
