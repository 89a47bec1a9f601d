"""One cell in a process of its own: ``python -m benchmarks.harness.run_cell SUITE ENVIRONMENT AGENT SEED FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness.arena import run_cell
from benchmarks.harness.records import Cell
from benchmarks.harness.suite import read_suite


def main(suite: str, environment: str, agent: str, seed: str, folder: str) -> None:
    """See :func:`benchmarks.harness.arena.run_cell`; what it raises ends the process with status 1."""
    run_cell(read_suite(suite), Cell(environment, agent, int(seed)), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
