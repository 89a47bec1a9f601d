"""Figures of finished cells: at a point, by seed, by problem, and of whole learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from benchmarks import statistics
from benchmarks.harness.records import Point
from benchmarks.harness.results import CellResult

COUNTS = ("seconds", "tokens", "episodes", "updates")
"""What a point tells beside its metrics."""

Cells = Mapping[int, CellResult]
"""Finished cells of an agent on an environment, by seed."""


def at(point: Point, metric: str) -> float | None:
    """A figure at a point; None where it was not measured."""
    return getattr(point, metric) if metric in COUNTS else point.metrics.get(metric)


def final(cell: CellResult, metric: str) -> float | None:
    """A figure at the last point of a cell, or of the cell as a whole, such as ``peak_memory_mb``."""
    value = at(cell.points[-1], metric)
    return cell.done.get(metric) if value is None else value


def by_seed(cells: Cells, metric: str) -> dict[int, float]:
    """A figure at the end, of the seeds where it was measured."""
    return {seed: value for seed, cell in cells.items() if (value := final(cell, metric)) is not None}


def by_problem(point: Point, metric: str) -> list[float | None]:
    """A figure for each held-out problem, None for one that is ungraded; empty where it is known only for all together."""
    way, _, what = metric.partition("/")
    k = what.removeprefix("pass@")
    if what not in ("reward", "accuracy") and k == what:
        return []
    key = "reward" if what == "reward" else "correct"
    if way == "greedy":
        return list(point.greedy.get(key, ()))
    groups = [[value for value in group if value is not None] for group in point.sampled.get(key, ())]
    if k == what:
        return [float(np.mean(group)) if group else None for group in groups]
    return [_pass_at_k(group, int(k)) if len(group) >= int(k) else None for group in groups]


def _pass_at_k(right: list[float], k: int) -> float:
    return float(statistics.pass_at_k([len(right)], [sum(right)], k)[0])


def over_seeds_or_problems(cells: Cells, metric: str) -> tuple[list[float], bool]:
    """What an interval of a figure is taken over: seeds, or with a single seed held-out problems.

    Returns:
        the values, and whether they are of problems.
    """
    seeds = by_seed(cells, metric)
    if len(seeds) == 1:
        (seed,) = seeds
        problems = [value for value in by_problem(cells[seed].points[-1], metric) if value is not None]
        if problems:
            return problems, True
    return list(seeds.values()), False


def paired(ours: Cells, theirs: Cells, metric: str) -> tuple[list[int], list[float], list[float]]:
    """A figure of two agents on an environment, for each of the seeds that both have.

    With a single such seed the figures are of the problems that are graded for both, where they are known.

    Returns:
        the seeds, and the figures of each agent.
    """
    our, their = by_seed(ours, metric), by_seed(theirs, metric)
    common = [seed for seed in our if seed in their]
    if len(common) == 1:
        problems = (by_problem(cells[common[0]].points[-1], metric) for cells in (ours, theirs))
        both = [(x, y) for x, y in zip(*problems, strict=True) if x is not None and y is not None]
        if both:
            return common, [x for x, _ in both], [y for _, y in both]
    return common, [our[seed] for seed in common], [their[seed] for seed in common]


def curve(cell: CellResult, metric: str) -> tuple[list[float], list[float]]:
    """The learning curve of a cell: shares of the budget that were spent, and the figure there."""
    known = {point.share: at(point, metric) for point in cell.points}
    points = {share: value for share, value in known.items() if value is not None}
    return list(points), list(points.values())


def area(cell: CellResult, metric: str) -> float:
    """Mean height of the learning curve; who was only evaluated has been as good all along."""
    share, value = curve(cell, metric)
    return value[0] if len(share) == 1 else statistics.area_under_curve(share, value)


def share_to(threshold: float, cell: CellResult, metric: str) -> float:
    """Share of the budget to a threshold, infinite where it is not reached; who was only evaluated needs none of it."""
    share, value = curve(cell, metric)
    if len(share) == 1:
        return 0.0 if value[0] >= threshold else math.inf
    return statistics.time_to(threshold, share, value)
