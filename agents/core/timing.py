"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the seconds spent in named parts. Within another part, a part's seconds are its own alone.

    On a GPU a part ends when the GPU has done its work.

    Example:
        >>> clock = Clock()
        >>> with clock("generate"):
        ...     pass
        >>> list(clock.take())
        ['generate']
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            seconds = self._now() - started
            own = seconds - self._inner.pop()
            self._inner[-1] += seconds
            self._seconds[part] = self._seconds.get(part, 0.0) + own

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
