"""Running one cell: a contender plays in an arena, which keeps its budget and measures it on held-out problems."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.core.agent import load_policy
from agents.core.config import TINY, AgentConfig
from agents.core.policy import Policy
from agents.core.usage import memory_peak_mb
from agents.warmup import cache_folder
from benchmarks.harness.contenders import Describes, make_contender
from benchmarks.harness.energy import Energy
from benchmarks.harness.measuring import Player, PolicyPlayer, measure
from benchmarks.harness.provenance import provenance
from benchmarks.harness.records import (
    CELL_FILE,
    DONE_FILE,
    FAILED_FILE,
    POINTS_FILE,
    SCHEMA,
    Cell,
    Point,
    write_json,
    write_whole,
)
from benchmarks.harness.suite import Suite
from textenv.registry import make_task

STALLED = 100
"""Steps without an update after which a training that has a budget of updates is ended: it may never get another."""
START_SEED = 0
"""Of the tiny model's weights. What agents start from belongs to the environment, and is the same for all seeds."""
COMPLETIONS, RUN, START = "completions", "run", "start"


@dataclass(frozen=True)
class Spent:
    """What a training has used up to its last step."""

    episodes: int = 0
    tokens: int = 0
    updates: int = 0
    seconds: float = 0.0


class Arena:
    """What a contender plays in: a task, a start that is the same for all contenders, and a budget.

    Args:
        suite: with the budget and the plan of evaluation.
        cell: which agent and environment of it, and the seed of problems and sampling.
        folder: of the cell.

    Attributes:
        env_id, options: what ``gym.make`` takes.
        task: the same as a task, with the reward that is measured.
        model: what the contender starts from: a transformers folder, a hub name or "tiny".
        seed: of the problems that are trained on, ``task.problem(seed, "train", 0)`` and so on in this order, and of all
            else that is random.
        budget: of the training.
        settings: of the contender, as the suite gives them.
        start: the policy that all contenders start from, not to be changed.
        run_folder: where the contender may leave a run.

    Raises:
        ValueError: the environment, its options or the model are wrong.
    """

    def __init__(self, suite: Suite, cell: Cell, folder: Path) -> None:
        environment = suite.environments[cell.environment]
        assert suite.budget is not None, "agents have one"
        self.env_id, self.options = environment.id, environment.options
        self.model = environment.model or TINY
        self.seed, self.budget, self.plan = cell.seed, suite.budget, suite.evaluation
        self.settings: Mapping[str, Any] = suite.agents[cell.agent].settings
        self.task = make_task(self.env_id, **self.options)
        self.folder, self.run_folder = folder, folder / RUN
        self.points: list[Point] = []
        self.measuring_seconds = 0.0
        self.energy = Energy()
        config = AgentConfig(model=self.model, env_options=self.options, seed=START_SEED)
        started = time.perf_counter()
        with _alone():
            self.start = load_policy(self.env_id, self.task, config).requires_grad_(False)
        self.start_seconds = time.perf_counter() - started
        """that the start took to be made, or loaded"""
        self._spent, self._policy, self._stalled = Spent(), self.start, 0
        self._clock = Clock()

    def policy(self) -> Policy:
        """A fresh start, to be trained; the same for all contenders."""
        return deepcopy(self.start).requires_grad_(True)

    def start_folder(self) -> str:
        """The start as a transformers folder or a hub name, for who loads models by themselves."""
        if self.model != TINY:
            return self.model
        folder = self.folder / START
        if not folder.exists():
            self.start.save(folder)
        return str(folder)

    def begin(self) -> None:
        """To be called once all is set up: measures the start, and starts the clock anew."""
        self._measure_start()
        self._clock.restart()

    def spent(self, policy: Policy, *, episodes: int, tokens: int, updates: int) -> bool:
        """To be called after every step of a training; measures the policy when it is time to.

        The clock of the training stands still meanwhile.

        Args:
            policy: as it is now.
            episodes, tokens: sampled so far, those among them that were not learned from.
            updates: steps of the optimiser so far.

        Returns:
            whether some of the budget is left.
        """
        with self._clock.stopped():
            self.energy.read()
            self._measure_start()
            self._stalled = 0 if updates > self._spent.updates else self._stalled + 1
            self._spent, self._policy = Spent(episodes, tokens, updates, self._clock.seconds), policy
            share = self._share()
            if self._due(share) > self._due(self.points[-1].share):
                self.evaluate(PolicyPlayer(self.task, policy, self.seed, self.start))
        if self.budget.kind == "updates" and self._stalled == STALLED:
            print(f"ended after {updates} updates: {STALLED} steps had nothing to learn from", flush=True)
            return False
        return share < 1

    def finish(self) -> None:
        """Measure what has not been: the start if nothing was trained, the end if the budget was not spent."""
        self._measure_start()
        if self._spent.episodes > self.points[-1].episodes:
            self.evaluate(PolicyPlayer(self.task, self._policy, self.seed, self.start))

    def evaluate(self, player: Player) -> None:
        """Measure a player, and keep it as the next point."""
        with self._clock.stopped():
            self._evaluate(player)

    def _evaluate(self, player: Player) -> None:
        started = time.perf_counter()
        measured = measure(player, self.plan)
        measured.metrics["memory_peak_mb"] = memory_peak_mb(self.start.device)
        if self._spent.tokens:
            measured.metrics["tokens_per_second"] = self._spent.tokens / self._spent.seconds
        point = Point(
            share=self._share(),
            **vars(self._spent),
            metrics=measured.metrics,
            greedy=measured.greedy,
            sampled=measured.sampled,
        )
        path = self.folder / COMPLETIONS / f"{len(self.points):03d}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row, default=repr) + "\n" for row in measured.rows)
        write_whole(path, gzip.compress(lines.encode(), mtime=0))
        with open(self.folder / POINTS_FILE, "a") as file:
            file.write(point.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.points.append(point)
        self.measuring_seconds += time.perf_counter() - started

    def _measure_start(self) -> None:
        if not self.points:
            self.evaluate(PolicyPlayer(self.task, self.start, self.seed, self.start))

    def _due(self, share: float) -> int:
        """How many points after the first are due by then."""
        return int(share * (self.plan.points - 1) + 1e-9)

    def _share(self) -> float:
        return min(1.0, getattr(self._spent, self.budget.kind) / self.budget.amount)


class Clock:
    """Counts the seconds of a training.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin at 0."""
        self._before, self._started = 0.0, time.perf_counter()
        self._runs = True

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._started if self._runs else 0.0)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It stands still meanwhile."""
        ran, self._before, self._runs = self._runs, self.seconds, False
        yield
        self._started, self._runs = time.perf_counter(), ran


def run_cell(suite: Suite, cell: Cell, folder: Path) -> None:
    """Run one cell of a suite: what it leaves in ``folder`` is told in :mod:`benchmarks.harness.records`.

    What an earlier try has left there is removed, but for its log.

    Raises:
        Exception: whatever the contender or anything else raised, once ``failed.json`` tells of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DONE_FILE, FAILED_FILE, CELL_FILE, POINTS_FILE, COMPLETIONS, RUN, START):
        _remove(folder / name)
    spec = suite.agents[cell.agent]
    described = {"schema": SCHEMA, **vars(cell), "kind": spec.kind}
    write_json(folder / CELL_FILE, {**described, "provenance": {}})
    try:
        contender = make_contender(spec.kind, spec.settings)
        assert suite.budget is not None, "agents have one"
        settings = contender.described(suite.budget) if isinstance(contender, Describes) else None
        arena = Arena(suite, cell, folder)
        unused = make_task(arena.env_id, **arena.options)
        parts = provenance(suite, cell, unused, arena.start, settings)
        write_json(folder / CELL_FILE, {**described, "provenance": parts})
        contender.train(arena)
        arena.finish()
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        write_json(folder / FAILED_FILE, failed)
        raise
    done = {
        "seconds": arena.points[-1].seconds,
        "measuring_seconds": arena.measuring_seconds,
        "start_seconds": arena.start_seconds,
        "peak_memory_mb": memory_peak_mb(arena.start.device),
        "energy_j": arena.energy.joules(),
    }
    write_json(folder / DONE_FILE, done)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: the first of a suite's cells makes the tiny model, the others find it in the cache."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
