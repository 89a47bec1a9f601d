"""What a person sees while training: a live line, and in a log file a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rewards.terminal import visible

LOG_EVERY_SECONDS = 10.0

SHOWN = (
    ("reward", "reward {:.3f}"),
    ("accuracy", "accuracy {:.1%}"),
    ("kept_share", "kept {:.0%}"),
    ("accepted_share", "accepted {:.0%}"),
    ("nll", "nll {:.3f}"),
    ("kl", "kl {:.3f}"),
    ("entropy", "entropy {:.3f}"),
    ("new_tokens_mean", "length {:.1f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
)
WATCHED = ("monitor/", "held_out")
"""Beginnings of the names of metrics that somebody asked for."""


class LiveLine:
    """One line that is kept up to date; where there is no terminal, a line every ten seconds.

    Args:
        title: stands before everything.
        total: how much there is to do.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.console = Console()
        self._live = Live(console=self.console, refresh_per_second=4, transient=True)
        self._started = self._log_next = time.monotonic()
        self._done_at_start: int | None = None

    def __enter__(self) -> LiveLine:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show how much is done and the metrics that people look at."""
        line = f"{self.title}  {done:,}/{self.total:,}{self._time_left(done)}  {self._describe(metrics)}"
        if self.console.is_terminal:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() >= self._log_next or done >= self.total:
            self._log_next = time.monotonic() + LOG_EVERY_SECONDS
            print(line, flush=True)

    def _describe(self, metrics: Mapping[str, float]) -> str:
        watched = [(name, "{name} {:.3f}") for name in metrics if name.startswith(WATCHED)]
        shown = [*SHOWN[:2], *watched, *SHOWN[2:]]
        # The name of a reward is a value, never a part of the format.
        return "  ".join(
            text.format(metrics[name], name=visible(name))
            for name, text in shown
            if name in metrics and not math.isnan(metrics[name])
        )

    def _time_left(self, done: int) -> str:
        if self._done_at_start is None:
            self._done_at_start, self._started = done, time.monotonic()
            return ""
        seconds = time.monotonic() - self._started
        left = seconds * (self.total - done) / max(1, done - self._done_at_start)
        return f"  {int(left) // 60}:{int(left) % 60:02d} left"
