"""CPU seconds to 90 % on the task of :mod:`benchmarks.sample_efficiency`, our GRPO against TRL's, seed by seed in turns."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from unittest import mock

from benchmarks.sample_efficiency import ENVIRONMENT, Goal, Point, cost, find_row, median_cost, shown, train
from benchmarks.speed.report import Settings, Table
from benchmarks.speed.step import warm_model

OURS, THEIRS = "grpo", "trl-grpo"
SEEDS = (0, 1, 2)
TOY = Goal(held_out=8, evaluate_every=128, samples_at_most=256)


def run(settings: Settings) -> Iterator[Table]:
    """A run a trainer and seed, each in a fresh process, on one CPU thread whatever the settings say."""
    labels = [label for label in (OURS, THEIRS) if label == OURS or find_spec("trl")]
    goal, seeds = (TOY, SEEDS[:1]) if settings.quick else (Goal(), SEEDS)
    curves: dict[str, list[list[Point]]] = {label: [] for label in labels}
    with (
        warm_model(settings.quick) as model,
        mock.patch.dict(os.environ, ENVIRONMENT),
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        for seed in seeds:
            for label in labels:
                curves[label].append(pool.submit(train, find_row(label), seed, str(model), goal).result())
    yield table(curves, goal)


def table(curves: Mapping[str, list[list[Point]]], goal: Goal) -> Table:
    """Samples and CPU seconds of each seed, and their medians over ours."""
    rows = []
    ours = median_cost(curves[OURS], goal.accuracy)[1]
    for label, runs in curves.items():
        samples, seconds = zip(*(cost(run, goal.accuracy) for run in runs), strict=True)
        median = median_cost(runs, goal.accuracy)[1]
        factor = median / ours if math.isfinite(ours) else math.nan
        rows.append(
            [label, " / ".join(map(shown, samples)), " / ".join(map(shown, seconds)), shown(factor, "{:.2f} ×")]
        )
    notes = ["One CPU thread. A dash: not reached."]
    if THEIRS not in curves:
        notes.append("TRL is not installed, so it is not measured: pip install 'textenv[trl]'")
    headers = ("trainer", "samples, a figure a seed", "CPU seconds", "median, of ours")
    return Table(f"from one warm start to {100 * goal.accuracy:.0f} % on Arithmetic, two digits", headers, rows, notes)
