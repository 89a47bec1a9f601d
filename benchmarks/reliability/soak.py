"""A long training of the tiny model, and whether it stays as it began: ``python -m benchmarks.reliability.soak``.

After every step are taken the memory of the process (resident set), its open files, its threads, and the step's time on the
clock and on the processor. The last tenth is held against the second, the first being where caches fill; the growth is the
slope of Theil and Sen (Sen 1968) from the second tenth on, with its 95 % interval.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro
from rich.table import Table
from scipy import stats

from agents.core.training import Training
from benchmarks.harness.compare import markdown
from benchmarks.measure import machine
from benchmarks.reliability.trainings import SIZES, make_agent

MOST = {"memory, MiB": 4.0, "open files": 0.5, "threads": 0.5}
"""Growth in 1,000 steps up to which a figure is flat."""
MOST_SHARE = 0.05
"""The same, as a share, of a step's time."""


@dataclass(frozen=True)
class Kept:
    """One figure of every step.

    Attributes:
        name: of the figure.
        early, late: medians of the second and of the last tenth of the steps.
        growth, low, high: in 1,000 steps, with its 95 % interval.
    """

    name: str
    early: float
    late: float
    growth: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        return self.growth <= MOST.get(self.name, MOST_SHARE * self.early)


def main(steps: int = 2000) -> None:
    """Train for so many steps and show what grew; exit status 1 if something did.

    Args:
        steps: of the training, 1,000 at least to tell growth from what fills up at first.
    """
    figures = [measured(name, values) for name, values in soak(steps).items()]
    table = Table("", "second tenth", "last tenth", "growth in 1,000 steps", "flat", title=f"{steps:,} steps")
    for figure in figures:
        growth = f"{figure.growth:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]"
        table.add_row(figure.name, f"{figure.early:.2f}", f"{figure.late:.2f}", growth, "yes" if figure.flat else "NO")
    print(machine(), markdown([table]), sep="\n\n")
    raise SystemExit(not all(figure.flat for figure in figures))


def soak(steps: int) -> dict[str, np.ndarray]:
    """What a training of so many steps took of the machine after each of them, ``(steps,)`` a figure."""
    process = psutil.Process()
    looks: dict[str, Callable[[Training], float]] = {
        "memory, MiB": lambda training: process.memory_info().rss / 2**20,
        "open files": lambda training: process.num_fds(),
        "threads": lambda training: process.num_threads(),
        "step, ms": lambda training: 1000 * training.metrics["seconds"],
        "step, ms of the processor": lambda training: 1000 * time.process_time(),
    }
    rows: list[list[float]] = []
    episodes = steps * SIZES["prompts_per_step"] * SIZES["group_size"]
    # With a KL term every completion is learned from, so that each step has as much to do as any other.
    changes = {"kl_loss_coef": 0.01, "checkpoint_every": 100, "total_episodes": episodes}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, contextlib.redirect_stdout(io.StringIO()):
        agent = make_agent("plain", Path(folder, "run"), **changes)
        agent.learn(callback=lambda training: rows.append([look(training) for look in looks.values()]))
    taken = dict(zip(looks, np.array(rows).T, strict=True))
    return taken | {name: np.diff(so_far_S) for name, so_far_S in taken.items() if name.endswith("processor")}


def measured(name: str, value_S: np.ndarray) -> Kept:
    """What became of a figure over S steps."""
    tenth = len(value_S) // 10
    late_S = value_S[tenth:]
    every = max(1, len(late_S) // 500)  # pairs of steps are many
    slope = stats.theilslopes(late_S[::every], np.arange(len(late_S))[::every] / 1000)
    early, late = np.median(value_S[tenth : 2 * tenth]), np.median(value_S[-tenth:])
    return Kept(name, float(early), float(late), slope.slope, slope.low_slope, slope.high_slope)


if __name__ == "__main__":
    tyro.cli(main)
