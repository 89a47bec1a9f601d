"""Which problem comes next: positions in the ``(seed, split, index)`` addresses of a task's problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from textenv.task import SPLITS, Problem, Task, as_problem

RESET_OPTIONS = ("problems", "index", "repeat")

Address = tuple[int, ...]
"""(seed, split number, index, copy): where a problem comes from, and which member of its group an episode is."""


class ProblemStream:
    """Hands out a task's problems in the order of their index.

    The same seed gives the same problems however many episodes take them at a time.

    Example:
        >>> from textenv import make_task
        >>> one, many = (ProblemStream(make_task("textenv/Copy-v0"), "train") for _ in range(2))
        >>> one.start(7), many.start(7)
        (None, None)
        >>> [one.take(1)[0][0] for _ in range(4)] == [problem for problem, _ in many.take(4)]
        True
    """

    def __init__(self, task: Task, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.task, self.split = task, split
        self.seed: int | None = None
        self.index = 0

    def start(self, seed: int) -> None:
        """Begin at the first problem of ``seed``."""
        self.seed, self.index = _whole("a seed", seed, 0), 0

    def take(self, n: int, options: Mapping[str, Any] | None = None) -> list[tuple[Problem, Address]]:
        """The problems of the next ``n`` episodes.

        Args:
            options: ``repeat`` gives each problem to that many neighbouring episodes, a group; ``index`` goes on from that
                problem; ``problems`` uses these instead of drawing any.

        Raises:
            ValueError: no seed yet, an unknown or impossible option, a number of episodes that groups do not divide, or a
                number of given problems other than that of the groups.
        """
        if self.seed is None:
            raise ValueError("there is no seed yet; start(seed) comes first")
        options = options or {}
        unknown = sorted(set(options) - set(RESET_OPTIONS))
        if unknown:
            raise ValueError(f"reset has no option {', '.join(map(repr, unknown))}; it has {', '.join(RESET_OPTIONS)}")
        repeat = _whole("repeat", options.get("repeat", 1), 1)
        if n % repeat:
            raise ValueError(f"repeat={repeat} must divide the {n} episodes that are reset into whole groups")
        first = _whole("index", options.get("index", self.index), 0)
        indices = range(first, first + n // repeat)
        if "problems" in options:
            problems = self._given(options["problems"], len(indices))
        else:
            problems = [self.task.problem(self.seed, self.split, index) for index in indices]
        self.index = indices.stop
        split = SPLITS.index(self.split)
        return [
            (problem, (self.seed, split, index, copy))
            for index, problem in zip(indices, problems, strict=True)
            for copy in range(repeat)
        ]

    def _given(self, problems: Any, groups: int) -> list[Problem]:
        if len(problems) != groups:
            raise ValueError(f"options['problems'] must hold {groups} problem(s), one a group, got {len(problems)}")
        return [as_problem(problem, self.task) for problem in problems]

    def snapshot(self) -> dict[str, Any]:
        return {"seed": self.seed, "index": self.index}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seed, self.index = state["seed"], state["index"]


def _whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is a whole number from {least} on, got {value!r}")
    return int(value)
