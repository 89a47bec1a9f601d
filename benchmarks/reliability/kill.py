"""Kills trainings at random moments and compares how they end: ``python -m benchmarks.reliability.kill``.

The trainings of :data:`benchmarks.reliability.trainings.EVERY_AGENT` are done once without a kill. Then they are done over and
over, each time in a new folder: a process trains and is killed by SIGKILL at a moment drawn uniformly from the time that the
whole took, from its very start to its end; another process goes on to the end; and all that the run then holds is compared,
byte for byte but for what measures the machine. Ten kills of a hundred wait for a checkpoint to be written: its unfinished
folder is left, which proves it.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import numpy as np
import tyro
from rich.table import Table

from agents.core.records import read_metrics
from agents.core.sources import checkpoints
from benchmarks.harness.compare import markdown
from benchmarks.measure import machine
from benchmarks.reliability.trainings import (
    CHECKPOINT_EVERY,
    EVERY_AGENT,
    differences,
    log_of,
    make_models,
    preloaded,
    start,
    train,
)
from rewards.workers import usable_cores

WRITE_SECONDS = 0.05
"""About as long as a checkpoint of these trainings is being written."""
LONGEST_SECONDS = 300.0
"""A training that takes longer hangs."""


@dataclass(frozen=True)
class Whole:
    """A training that was never killed: its run, and the seconds from the start of its process to the end."""

    name: str
    run: Path
    seconds: float

    @property
    def written(self) -> range:
        """The steps of which it wrote a checkpoint, but for the last."""
        return range(CHECKPOINT_EVERY, len(read_metrics(self.run)), CHECKPOINT_EVERY)


@dataclass(frozen=True)
class Killed:
    """What one kill met, and what came of it.

    Attributes:
        name: of the training.
        inside: a checkpoint was being written.
        early: there was no checkpoint yet.
        unstarted: not even a step had been kept.
        missed: attempts before it that did not hit their mark: the training, or the writing, was over.
        apart: what the run has not in common with the whole one.
    """

    name: str
    inside: bool
    early: bool
    unstarted: bool
    missed: int
    apart: list[str]


def main(kills: int = 100, seed: int = 0, folder: Path | None = None) -> None:
    """Kill trainings and show how many went on to exactly the same end; exit status 1 if one did not.

    Args:
        kills: how many, over the four agents in turns.
        seed: of the moments.
        folder: where the runs go; default one that is thrown away, unless a run is to be looked at.
    """
    folder = Path(tempfile.mkdtemp(prefix="kills-")) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, _ in zip(EVERY_AGENT, range(kills), strict=False)]
    killed, seconds = kill_all(names, kills, seed, folder)
    print(machine(), markdown([table(killed)]), sep="\n\n")
    missed = sum(each.missed for each in killed)
    print(
        f"Never killed, a training took {min(seconds):.1f} to {max(seconds):.1f} s with its process. Attempts that came too "
        f"late, after the end of the training or of the writing, and were made again: {missed}."
    )
    wrong = [each for each in killed if each.apart]
    for each in wrong:
        print(f"{each.name}: {', '.join(each.apart)}")
    if wrong:
        print(f"the runs are in {folder}")
        raise SystemExit(1)
    shutil.rmtree(folder)


def kill_all(names: Sequence[str], kills: int, seed: int, folder: Path) -> tuple[list[Killed], list[float]]:
    """``kills`` kills over these trainings in turns; and the seconds that each of the trainings takes without."""
    context = preloaded()
    finish(start(context, make_models, folder / "models"))
    with ThreadPoolExecutor(usable_cores()) as threads:
        wholes = list(threads.map(lambda name: train_whole(context, name, folder / name), names))

        def kill_one(number: int) -> Killed:
            return kill(context, wholes[number % len(names)], folder / f"{number:03d}", number, seed)

        return list(threads.map(kill_one, range(kills))), [whole.seconds for whole in wholes]


def train_whole(context: ForkServerContext, name: str, run: Path) -> Whole:
    started = time.perf_counter()
    finish(start(context, train, name, run))
    return Whole(name, run, time.perf_counter() - started)


def finish(process: ForkServerProcess) -> None:
    """Wait for the end of a training.

    Raises:
        RuntimeError: it failed, or hangs.
    """
    process.join(LONGEST_SECONDS)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"the training ended with {process.exitcode}; its log lies beside its run")


def kill(context: ForkServerContext, whole: Whole, run: Path, number: int, seed: int) -> Killed:
    """Kill a training once, let it go on and compare it; of every eleven kills the first waits for a checkpoint."""
    rng = np.random.default_rng((seed, number))
    missed = 0
    while True:
        process = start(context, train, whole.name, run)
        if number % 11 == 0:
            hit = _kill_inside(process, run, rng.choice(whole.written), rng.uniform(0, WRITE_SECONDS))
        else:
            process.join(rng.uniform(0, whole.seconds))
            process.kill()
            process.join()
            hit = process.exitcode == -signal.SIGKILL
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the training ended with {process.exitcode} by itself; see {log_of(run)}")
        if hit:
            break
        missed += 1
        shutil.rmtree(run, ignore_errors=True)
    inside = any(run.glob("checkpoints/*.new"))
    early, unstarted = not checkpoints(run), not (run / "metrics.jsonl").exists()
    try:
        finish(start(context, train, whole.name, run))
        apart = differences(whole.run, run)
    except RuntimeError as error:
        apart = [str(error)]
    if not apart:
        shutil.rmtree(run)
    return Killed(whole.name, inside, early, unstarted, missed, apart)


def _kill_inside(process: ForkServerProcess, run: Path, step: int, delay: float) -> bool:
    """Kill so many seconds after a step's checkpoint began to be written; whether its unfinished folder is left: the proof."""
    unfinished = run / "checkpoints" / f"{step:06d}.new"
    while process.is_alive() and not unfinished.exists():
        time.sleep(2e-4)
    time.sleep(delay)
    process.kill()
    process.join()
    return unfinished.exists()


def table(killed: Sequence[Killed]) -> Table:
    head = ("agent", "kills", "inside a checkpoint", "before the first checkpoint", "before the first step", "exact")
    made = Table(*head, title=f"{len(killed)} kills")
    for name in [*dict.fromkeys(each.name for each in killed), "all"]:
        of = [each for each in killed if name in (each.name, "all")]
        counts = np.sum([(1, each.inside, each.early, each.unstarted, not each.apart) for each in of], axis=0)
        made.add_row(name, *map(str, counts))
    return made


if __name__ == "__main__":
    tyro.cli(main)
