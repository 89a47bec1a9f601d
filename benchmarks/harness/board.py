"""What a person sees while a suite runs: a live table of its cells; where there is no terminal, a line a cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import fmean
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from benchmarks.harness.records import Cell

REFRESH_SECONDS = 1.0
MARKS = {"waiting": "·", "done": "[green]done[/green]", "failed": "[red]failed[/red]"}


class Board:
    """The state of every cell, kept up to date.

    Args:
        title: of the suite.
        states: of the cells, "waiting", "running", "done" or "failed".
        seconds: that cells which have ended took.
        at_once: cells that run at a time.
    """

    def __init__(self, title: str, states: Mapping[Cell, str], seconds: Mapping[Cell, float], at_once: int) -> None:
        self.title, self.states, self.seconds, self.at_once = title, dict(states), dict(seconds), at_once
        self.console = Console(highlight=False)
        self._live = Live(console=self.console, auto_refresh=False)
        self._started: dict[Cell, float] = {}
        self._share: dict[Cell, float] = {}
        self._shown = 0.0

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.update(self.table(), refresh=True)
        self._live.stop()

    def start(self, cell: Cell) -> None:
        """A cell begins."""
        self.states[cell], self._started[cell] = "running", time.monotonic()

    def end(self, cell: Cell, state: str) -> None:
        """A cell has ended."""
        self.states[cell], self.seconds[cell] = state, time.monotonic() - self._started[cell]
        if not self.console.is_terminal:
            print(f"{cell.name}: {state} after {clock(self.seconds[cell])}; {self.summary()}", flush=True)

    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._shown >= REFRESH_SECONDS

    def show(self, shares: Mapping[Cell, float]) -> None:
        """Take note of the shares of the budget that running cells have spent, and refresh the table."""
        self._shown, self._share = time.monotonic(), dict(shares)
        if self.console.is_terminal:
            self._live.update(self.table(), refresh=True)

    def summary(self) -> str:
        """How far it is, in a line."""
        count = {state: list(self.states.values()).count(state) for state in ("done", "failed", "running")}
        failed = f", {count['failed']} failed" if count["failed"] else ""
        left = self.seconds_left()
        time_left = f", about {clock(left)} left" if left else ""
        return f"{count['done']} of {len(self.states)} done{failed}, {count['running']} running{time_left}"

    def table(self) -> Table:
        """A row for each agent on each environment, a column for each seed."""
        seeds = sorted({cell.seed for cell in self.states})
        environments = list(dict.fromkeys(cell.environment for cell in self.states))
        rows = dict.fromkeys((cell.environment, cell.agent) for cell in self.states)
        table = Table("", "", *(f"seed {seed}" for seed in seeds), title=escape(self.title), caption=self.summary())
        for environment, agent in sorted(rows, key=lambda row: environments.index(row[0])):
            cells = [Cell(environment, agent, seed) for seed in seeds]
            table.add_row(escape(environment), escape(agent), *map(self._mark, cells))
        return table

    def _mark(self, cell: Cell) -> str:
        if self.states.get(cell) == "running":
            return f"[bold]{self._share.get(cell, 0.0):.0%}[/bold] {clock(self._elapsed(cell))}"
        return MARKS.get(self.states.get(cell, ""), "")

    def seconds_left(self) -> float | None:
        """An estimate; None as long as there is nothing to go by."""
        running = {cell: self._elapsed(cell) / share for cell, share in self._share.items() if share > 0}
        known = {**running, **self.seconds}
        open_cells = [cell for cell, state in self.states.items() if state in ("waiting", "running")]
        if not known or not open_cells:
            return None
        left = [max(0.0, _expected(cell, known) - self._elapsed(cell)) for cell in open_cells]
        return max(max(left), sum(left) / self.at_once)

    def _elapsed(self, cell: Cell) -> float:
        return time.monotonic() - self._started[cell] if cell in self._started else 0.0


def _expected(cell: Cell, known: Mapping[Cell, float]) -> float:
    """Seconds that a cell will take, by what is most like it: itself, its other seeds, others in its environment, any."""
    alike: tuple[Callable[[Cell], bool], ...] = (
        lambda other: other == cell,
        lambda other: (other.environment, other.agent) == (cell.environment, cell.agent),
        lambda other: other.environment == cell.environment,
        lambda other: True,
    )
    return next(fmean(found) for like in alike if (found := [known[other] for other in known if like(other)]))


def clock(seconds: float) -> str:
    """Minutes and seconds.

    Example:
        >>> clock(75.2)
        '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
