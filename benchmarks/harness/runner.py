"""Fills a results folder: every cell of a suite in a process of its own.

The folder says what is left to do, so a runner that ends, in whatever way, is simply started again: cells that are done stay,
others are emptied and run. It is locked while a runner fills it, and no cell outlives its runner.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.board import REFRESH_SECONDS, Board
from benchmarks.harness.processes import preload, start_module, start_program, stop
from benchmarks.harness.records import (
    CELL_FILE,
    CLAIMS,
    DONE_FILE,
    FAILED_FILE,
    LOG_FILE,
    POINTS_FILE,
    PROGRAMS,
    SCHEMA,
    Cell,
    state,
    write_json,
    write_whole,
)
from benchmarks.harness.suite import Suite

SUITE_FILE, LOCK_FILE, OVERHEAD_FILE = "suite.toml", "lock", "overhead.json"
MEMORY_MB = 1024
"""What a cell is taken to need as long as none has told."""

Start = Callable[[Suite, Cell, Path], BaseProcess]
"""Starts the process of a cell in a folder."""


def run_suite(
    suite: Suite, folder: Path, *, at_once: int | None = None, retry: bool = False, start: Start | None = None
) -> list[Cell]:
    """Run what is not done yet of a suite: its programs one at a time, since agents may need what they make, then the rest.

    Args:
        suite: what to run.
        folder: of the results; made if there is none.
        at_once: most cells that run at a time; default one for each core, as far as memory lasts.
        retry: also run those again that have failed.
        start: in place of :func:`start_cell`.

    Returns:
        The cells that have failed, now or before.

    Raises:
        ValueError: the folder holds something else, or is being filled by another runner.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"at least one cell runs at a time, got at_once={at_once}")
    with _locked(folder):
        _check_same(suite, folder)
        # Cells read the suite that is kept here, whatever becomes of the other meanwhile.
        kept = replace(suite, path=folder / SUITE_FILE)
        _Runner(kept, folder, at_once or _cores(), start or start_cell).run(retry)
    return [cell for cell in suite.cells if state(folder / cell.path) == "failed"]


def start_cell(suite: Suite, cell: Cell, folder: Path) -> BaseProcess:
    """Start the process of a cell."""
    log = folder / LOG_FILE
    if suite.agents or suite.claims:
        preload()
    if cell.environment == PROGRAMS:
        first, *others = suite.programs[cell.agent]
        # Those that run now, be they on the path or not.
        own = {"textenv": [sys.executable, "-m", "textenv"], "python": [sys.executable]}
        return start_program([*own.get(first, [first]), *others], log)
    if cell.environment == CLAIMS:
        return start_module("benchmarks.claims", [cell.agent, str(cell.seed), str(folder)], log)
    arguments = [str(suite.path), cell.environment, cell.agent, str(cell.seed), str(folder)]
    return start_module("benchmarks.harness.run_cell", arguments, log)


def read_error(folder: Path) -> str:
    """Why a cell has failed, in one line."""
    error = str(json.loads((folder / FAILED_FILE).read_text()).get("error"))
    return " ".join(error.split())


# The folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runners out of a folder, until the end of the block or of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.iterdir()} - {LOCK_FILE, f"{SUITE_FILE}.new"}
    if others and SUITE_FILE not in others:
        raise ValueError(f"{folder} is not empty and holds no results; name a new folder with --out")
    with (folder / LOCK_FILE).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"{folder} is being filled by process {lock.read().strip()}; wait for it, or name another folder with --out"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _check_same(suite: Suite, folder: Path) -> None:
    """Leave the suite in the folder, or make sure that it is the one there."""
    kept, text = folder / SUITE_FILE, suite.path.read_text(encoding="utf-8")
    if not kept.exists():
        write_whole(kept, text.encode())
    try:
        before, now = tomllib.loads(kept.read_text(encoding="utf-8")), tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{kept} is not valid TOML: {error}; name another folder with --out") from None
    if before != now:
        raise ValueError(
            f"{folder} holds results of another suite: {'; '.join(_differences(before, now))}; "
            "name another folder with --out"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """In what two suites differ, a text for each value."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{prefix}{name}.")
        elif one != other:
            there, here = ("nothing" if value is None else json.dumps(value, default=str) for value in (one, other))
            found.append(f"{prefix}{name} is {there} there and {here} here")
    return found


# Running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Running:
    """A cell, and its process."""

    cell: Cell
    process: BaseProcess
    started: float


class _Runner:
    """Runs the cells of a suite in a folder that is its own."""

    def __init__(self, suite: Suite, folder: Path, at_once: int, start: Start) -> None:
        self.suite, self.folder, self.at_once, self.start = suite, folder, at_once, start
        self.running: list[_Running] = []
        self.overhead = Overhead(folder)

    def run(self, retry: bool) -> None:
        kept = ("done",) if retry else ("done", "failed")
        states = {cell: state(self.folder / cell.path) for cell in self.suite.cells}
        waiting = [cell for cell, now in states.items() if now not in kept]
        shown = {cell: "waiting" if cell in waiting else now for cell, now in states.items()}
        self.board = Board(self.suite.title, shown, self.overhead.wall_seconds(self.suite.cells), self.at_once)
        try:
            with self.board:
                self._run_all([cell for cell in waiting if cell.environment == PROGRAMS], 1)
                self._run_all([cell for cell in waiting if cell.environment != PROGRAMS], self.at_once)
        finally:
            for one in self.running:
                stop(one.process)
            self.overhead.save()

    def _run_all(self, waiting: Sequence[Cell], at_once: int) -> None:
        queue = list(waiting)
        while queue or self.running:
            while queue and len(self.running) < at_once and self._memory_lasts():
                self._begin(queue.pop(0))
            if self.board.due():
                self.board.show({one.cell: _share(self.folder / one.cell.path) for one in self.running})
            wait([one.process.sentinel for one in self.running], REFRESH_SECONDS)
            for one in [one for one in self.running if one.process.exitcode is not None]:
                self._end(one)

    def _memory_lasts(self) -> bool:
        """Whether there is memory for one more, if it and those that run grow as large as the largest so far."""
        if not self.running:
            return True
        need = self.overhead.largest_mb()
        to_come = sum(max(0.0, need - _memory_mb(one.process.pid)) for one in self.running)
        return psutil.virtual_memory().available / 2**20 > need + to_come

    def _begin(self, cell: Cell) -> None:
        folder = self.folder / cell.path
        if folder.exists():  # it was killed, or has failed
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        if cell.environment == PROGRAMS:
            head = {"schema": SCHEMA, "environment": cell.environment, "agent": cell.agent, "seed": cell.seed}
            write_json(folder / CELL_FILE, {**head, "provenance": {}})
        asked = time.monotonic()
        process = self.start(self.suite, cell, folder)
        self.running.append(_Running(cell, process, time.monotonic()))
        self.overhead.count_start(time.monotonic() - asked)
        self.board.start(cell)

    def _end(self, one: _Running) -> None:
        """Close the books on a cell whose process has ended."""
        seconds, folder, status = time.monotonic() - one.started, self.folder / one.cell.path, one.process.exitcode
        assert status is not None
        self.running.remove(one)
        if one.cell.environment == PROGRAMS and status == 0:
            write_json(folder / DONE_FILE, {"seconds": seconds, "measuring_seconds": 0.0, "status": status})
        elif state(folder) not in ("done", "failed"):
            log = (folder / LOG_FILE).read_text(errors="replace").strip()
            write_json(folder / FAILED_FILE, {"error": _why(status, log), "traceback": log[-10_000:]})
        self.overhead.add(one.cell, seconds)
        self.board.end(one.cell, state(folder))


def _why(status: int, log: str) -> str:
    """The error of a process that has left none."""
    last = f"the log ends: {log.splitlines()[-1]}" if log else "it has printed nothing"
    if status >= 0:
        return f"its process ended with status {status}; {last}"
    memory = ", perhaps for want of memory" if -status == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-status).name}{memory}; {last}"


def _share(folder: Path) -> float:
    """Of the budget that a cell has spent, by its last point; 0 before there is one."""
    path = folder / POINTS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return float(json.loads(line)["share"])
        except ValueError:
            continue  # half a line, being written
    return 0.0


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_mb(pid: int | None) -> float:
    """Of a process and all that it has started."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:  # it has just ended
        pass
    return total / 2**20


# What the harness itself costs ------------------------------------------------------------------------------------


class Overhead:
    """The seconds that go neither into the model at the start, nor into training or measuring, kept in ``overhead.json``.

    Those of a cell are the rest of its process's time: reading the suite, checking, writing. Those of the runner are
    its processor time and what it waits for processes to start. ``share`` is theirs of all seconds. What the first process
    waits for is apart, as ``imports_seconds``: it is what agents import, once for all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / OVERHEAD_FILE
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.cells: dict[str, dict[str, float]] = kept.get("cells", {})
        self._runner = kept.get("runner_seconds", 0.0) - time.process_time()
        self._imports = kept.get("imports_seconds", 0.0)
        self._largest_mb, self._has_started = 0.0, False

    def count_start(self, seconds: float) -> None:
        """Count what a process took to start."""
        if self._has_started:
            self._runner += seconds
        else:
            self._imports += seconds
        self._has_started = True

    def add(self, cell: Cell, seconds: float) -> None:
        """Count a cell whose process took so long; one that has failed does not tell what for."""
        done = self.folder / cell.path / DONE_FILE
        if not done.exists():
            return
        told = json.loads(done.read_text())
        self._largest_mb = max(self._largest_mb, told.get("peak_memory_mb") or 0.0)
        training, measuring = told["seconds"], told.get("measuring_seconds", 0.0)
        start = told.get("start_seconds", 0.0)
        self.cells[str(cell.path)] = {
            "wall_seconds": seconds,
            "training_seconds": training,
            "measuring_seconds": measuring,
            "start_seconds": start,
            "other_seconds": max(0.0, seconds - training - measuring - start),
        }
        self.save()

    def largest_mb(self) -> float:
        """Memory that the largest cell took."""
        return self._largest_mb or MEMORY_MB

    def wall_seconds(self, cells: Sequence[Cell]) -> dict[Cell, float]:
        """How long those cells took that were counted."""
        return {cell: self.cells[str(cell.path)]["wall_seconds"] for cell in cells if str(cell.path) in self.cells}

    def save(self) -> None:
        """Write what there is."""
        runner = self._runner + time.process_time()
        other = runner + sum(cell["other_seconds"] for cell in self.cells.values())
        total = runner + sum(cell["wall_seconds"] for cell in self.cells.values())
        told = {"share": other / total, "runner_seconds": runner, "imports_seconds": self._imports, "cells": self.cells}
        write_json(self.folder / OVERHEAD_FILE, told)
