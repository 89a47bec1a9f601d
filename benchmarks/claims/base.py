"""What a claim is, and what a few seeds can say about it.

A claim is a module of this package with a ``CLAIM``, named as its file. Nothing else needs to know of it.

A verdict goes by differences that are paired over seeds. It takes two things, since intervals of few seeds are too narrow: the
95 % bootstrap interval leaves 0 out, and the exact sign-flip test of the same differences has p < 0.05, which fewer than
six seeds never have.

Shapes: N seeds.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np

import benchmarks.claims
from benchmarks.statistics import Interval, PairedDifference, paired_difference

Measured = Mapping[str, float | list[float]]
"""What one seed gave, by name: all finite."""
Text = Literal["holds here", "does not hold here", "not told apart"]

HELPERS = ("__main__", "base", "training")
"""Modules of this package that are no claims."""
LEVEL = 0.05
"""Of the sign-flip test."""


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of a claim.

    Attributes:
        text: in three words or fewer.
        interval: of the number that decides.
        sentence: what was seen, with figures; says no more than they do.
    """

    text: Text
    interval: Interval
    sentence: str


@dataclass(frozen=True)
class Claim:
    """A published claim and how it is put to the test.

    Attributes:
        name: that of its file.
        statement: what was claimed.
        source: where: paper, arXiv number, section.
        protocol: how it is tested here.
        refuted_by: what outcome would refute it.
        experiment: ``(seed, folder, quick)`` runs one seed, with runs kept in ``folder``, in minutes at most on a core; quick
            is as little as shows that it works.
        judge: the verdict, from what each of several seeds measured.
    """

    name: str
    statement: str
    source: str
    protocol: str
    refuted_by: str
    experiment: Callable[[int, Path, bool], Measured]
    judge: Callable[[Sequence[Measured]], Verdict]

    def verdict(self, measured: Sequence[Measured]) -> Verdict:
        """What the seeds say.

        Raises:
            ValueError: there are none.
        """
        if not measured:
            raise ValueError(f"a verdict on {self.name!r} takes the measurements of a seed or more, got none")
        return self.judge(measured)


def claim_names() -> list[str]:
    """The names of all claims, without importing them."""
    names = (module.name for module in pkgutil.iter_modules(benchmarks.claims.__path__))
    return sorted(name for name in names if name not in HELPERS)


def find_claim(name: str) -> Claim:
    """The claim of that name.

    Raises:
        ValueError: there is none, or its file does not hold it.
    """
    names = claim_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ValueError(
            f"no claim {name!r}; " + (f"did you mean {near[0]}? " if near else "") + f"there are {', '.join(names)}"
        )
    claim = getattr(import_module(f"benchmarks.claims.{name}"), "CLAIM", None)
    if not isinstance(claim, Claim) or claim.name != name:
        raise ValueError(f"benchmarks/claims/{name}.py must hold CLAIM = Claim(name={name!r}, …), got {claim!r}")
    return claim


def differences(measured: Sequence[Measured], first: str, second: str | None = None) -> PairedDifference:
    """``first`` less ``second`` of each seed; ``first`` alone where that is a difference already."""
    ours = [number(one, first) for one in measured]
    theirs = [number(one, second) if second else 0.0 for one in measured]
    return paired_difference([ours], [theirs])


def side(found: PairedDifference) -> Literal[-1, 0, 1]:
    """1 if a difference is above 0, -1 if below, 0 if that is not told."""
    interval = found.difference
    if found.p >= LEVEL or interval.low <= 0 <= interval.high:
        return 0
    return 1 if interval.value > 0 else -1


def number(measured: Measured, name: str) -> float:
    """A measurement that is a number."""
    value = measured[name]
    assert not isinstance(value, list), f"{name} is a list"
    return float(value)


def mean(measured: Sequence[Measured], name: str) -> float:
    """Of a measurement, over seeds."""
    return float(np.mean([number(one, name) for one in measured]))


def told(found: PairedDifference, form: str = "+.3f", factor: float = 1.0) -> str:
    """A difference with its interval, multiplied by ``factor``, such as 100 for points of a per cent."""
    interval = found.difference
    return Interval(factor * interval.value, factor * interval.low, factor * interval.high).text(form)


def conclude(conditions: Sequence[PairedDifference], sentence: str) -> Verdict:
    """The verdict on a claim that holds if all conditions are above 0, and does not if any is below.

    Args:
        conditions: of the first the interval is shown.
        sentence: what was seen. How few the seeds are is added where so few can tell nothing.
    """
    sides = [side(condition) for condition in conditions]
    text: Text = "not told apart"
    if -1 in sides:
        text = "does not hold here"
    elif all(sides):
        text = "holds here"
    seeds = conditions[0].pairs
    if 2.0 ** (1 - seeds) >= LEVEL:
        sentence += f" {seeds} {'seed is' if seeds == 1 else 'seeds are'} too few to tell anything apart."
    return Verdict(text, conditions[0].difference, sentence)
