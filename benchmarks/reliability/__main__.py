"""Proves that a run survives, and writes what was seen to ``benchmarks/results``: ``python -m benchmarks.reliability``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tyro

RESULTS = Path(__file__).parents[1] / "results" / "reliability.md"
INTRODUCTION = """\
# reliability

`python -m benchmarks.reliability`

The trainings are of the tiny model on one-digit arithmetic, 16 completions a step. Two runs are *exactly* the same if
every file of them is: weights, optimiser, metrics, alarms, evaluations, rollouts decompressed. Left out are
TensorBoard's files, and metrics that measure the machine (seconds, tokens a second, memory).
"""
KILL = """\
A process trains and gets SIGKILL at a moment drawn uniformly from the time of the whole training, start and
evaluations included. Another goes on from what it finds, to the end, and the run is compared with one that was never
killed. Of every eleven kills the first waits for a checkpoint to be written; its unfinished folder was there after
the kill. PPO has a critic of its own and an adapted KL coefficient; GRPO samples one step ahead, for a reward with
running statistics; DAPO samples until its batch is full and adapts its KL coefficient, as RAFT does; all take several
optimiser steps a batch.
"""
FAULTS = """\
Each fault meets a training of twelve steps, mostly after the sixth, when the newest checkpoint is of the fourth. Then
it is mended and the run goes on. Of the messages the first line is shown. A reward is named as hanging after a
minute; here after half a second. A full disk is a real one, a small tmpfs. A garbled checkpoint is the newest of two.
"""
SOAK = """\
One training, looked at after every step. Growth is the slope of Theil and Sen with its 95 % interval, without the
first tenth of the steps. A figure is flat if it grows in 1,000 steps by no more than 4 MiB, half a file, half a
thread, or 5 % of a step's time. The memory stands on one of two levels, apart by the copy of a checkpoint (11 MiB),
which the allocator gives back or keeps.
"""
STILL = """\
At a learning rate of 0 all is done that a training does, the optimiser's steps included. The gap is that between the
log-probabilities of engine and learner; its growth is that of a line through it, from first step to last, ± its
standard error.
"""


def main(kills: int = 100, steps: int = 2000, out: Path = RESULTS) -> None:
    """Run all four programs, one after the other, and write what they print; exit status 1 if one of them failed.

    Args:
        kills: of the trainings.
        steps: of the long training.
        out: the file to write.
    """
    programs = {
        "kill": (KILL, ["--kills", kills]),
        "faults": (FAULTS, []),
        "soak": (SOAK, ["--steps", steps]),
        "still": (STILL, []),
    }
    sections, failed = [INTRODUCTION], []
    for name, (description, options) in programs.items():
        arguments = [f"benchmarks.reliability.{name}", *map(str, options)]
        print(f"python -m {' '.join(arguments)}", flush=True)
        done = subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        sections.append(f"## {name}\n\n`python -m {' '.join(arguments)}`\n\n{description}\n{done.stdout.strip()}\n")
        if done.returncode:
            failed.append(name)
            sections.append(f"**It failed, with exit status {done.returncode}.**\n")
    out.write_text("\n".join(sections))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {out}")


if __name__ == "__main__":
    tyro.cli(main)
