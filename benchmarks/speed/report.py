"""What the parts of `textenv bench speed` share: how to measure, and the tables that come out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table
import torch
from rich.console import Console

from agents.core.agent import pick_device
from agents.core.config import require
from benchmarks.measure import Peer, Result, in_turns, machine, seconds


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: measurements of each thing, in turns.
        threads: CPU threads of a tensor operation.
        device: "cpu" or "cuda".
        quick: take toy sizes, to see that all of it runs; the figures then say nothing.

    Raises:
        ValueError: rounds or threads below 1, or no GPU.
    """

    rounds: int = 5
    threads: int = 1
    device: str = "cpu"
    quick: bool = False

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", "at least 1", self.rounds)
        require(self.threads >= 1, "threads", "at least 1", self.threads)
        pick_device(self.device)

    def in_turns(self, measures: Mapping[str, Callable[[], Result]]) -> dict[str, list[Result]]:
        """What each measure returns in each round; a round of which nothing is kept sets things up."""
        self.use_threads()
        in_turns(measures, 1)
        return in_turns(measures, self.rounds)

    def use_threads(self) -> None:
        """Have torch use as many threads as wanted, once policies are made: a small one sets it to 1."""
        torch.set_num_threads(self.threads)

    def peer(self, program: Callable[..., None], *arguments: object) -> Peer:
        """A process of its own that measures, with as many threads, and no network."""
        environment = {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        return Peer(program, *arguments, environment=environment)

    def heading(self, program: str) -> str:
        """The command line, the machine, and what the tables hold."""
        where = torch.cuda.get_device_name() if self.device == "cuda" else torch.backends.cpu.get_cpu_capability()
        command = shlex.join([*program.split(), *sys.argv[1:]])
        return (
            f"`{command}`\n\n{machine()}, {where}, threads {self.threads}\n\n"
            f"Figures are medians [quartiles] of {self.rounds} rounds in which all of a table take turns."
        )


def seconds_on(device: str, call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, with what it leaves the device to do."""

    def whole() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return seconds(whole)


@dataclass(frozen=True)
class Table:
    """Figures with their headers, and what has to be said about them."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([f"## {self.title}", *([table] if self.rows else []), *self.notes]) + "\n"

    def show(self, console: Console) -> None:
        """Print it on a terminal."""
        table = rich.table.Table(*self.headers)
        for row in self.rows:
            table.add_row(*row)
        console.print(self.title, style="bold")
        if self.rows:
            console.print(table)
        for note in self.notes:
            console.print(note)
        console.print()


def show_and_keep(heading: str, tables: Iterable[Table], out: Path | None) -> None:
    """Print each table when it is there, and have all of them so far in the markdown file ``out``."""
    console = Console(width=120, highlight=False, markup=False)
    written = heading + "\n"
    console.print(written)
    for table in tables:
        table.show(console)
        written += f"\n{table.markdown()}"
        if out is not None:
            out.write_text(written)
