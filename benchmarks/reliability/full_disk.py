"""A training on a disk that fills up and is given room again: a real one, a small tmpfs in a namespace of its own (Linux)."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from unittest import mock

import tyro

from agents.core import run
from agents.core.training import Training
from benchmarks.reliability.injected import fill_disk
from benchmarks.reliability.trainings import make_agent

MEBIBYTES = 160
LONGEST_SECONDS = 60.0
"""Within which the full disk must have been noticed."""


def train_on_full_disk(folder: Path, copy: Path, episodes: int, after: int) -> str:
    """Train on a small disk mounted at ``folder``, full after so many steps, and copy the run; what was printed.

    Raises:
        OSError: this system lets nobody mount a disk; or the training failed.
    """
    folder.mkdir(parents=True)
    program = [sys.executable, "-m", __name__, folder, copy, "--episodes", episodes, "--after", after]
    mounted = f'mount -t tmpfs -o size={MEBIBYTES}m none "$0" && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, folder, *program]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"no training on a full disk: {done.stderr.strip()[-500:]}")
    return done.stdout


def main(disk: Path, copy: Path, /, episodes: int, after: int) -> None:
    """Train on ``disk``, which is full after so many steps and has room once that was said; then copy the run."""
    printed = io.StringIO()

    def fill(training: Training) -> None:
        if training.step == after:
            filler = fill_disk(disk)
            Thread(target=make_room, args=[filler, printed], daemon=True).start()

    agent = make_agent("plain", disk / "run", total_episodes=episodes)
    with contextlib.redirect_stdout(printed), mock.patch.object(run, "LOOKS_EVERY", 0.5):
        agent.learn(callback=fill)
    print(printed.getvalue())
    shutil.copytree(disk / "run", copy)


def make_room(filler: Path, printed: io.StringIO) -> None:
    """Remove what fills the disk, as a person does who reads that it is full."""
    until = time.monotonic() + LONGEST_SECONDS
    while "is full" not in printed.getvalue() and time.monotonic() < until:
        time.sleep(0.1)
    filler.unlink()


if __name__ == "__main__":
    tyro.cli(main)
