"""Curves of trainings: many steps in few points, several seeds in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import statistics
from benchmarks.report.charts import Line
from benchmarks.statistics import Interval

BINS = 60
CURVES = {
    "reward": "reward",
    "accuracy": "accuracy",
    "entropy": "entropy (nats a token)",
    "new_tokens_mean": "length (tokens)",
    "kl": "KL to the start (nats)",
    "cut_share": "share cut",
}
"""The metrics of training steps that people look at first."""


def numbers(steps: Sequence[Mapping[str, float | None]], x: str, metric: str) -> np.ndarray:
    """``(N, 2)``: what is drawn to the right and upwards, for the steps that have both."""
    pairs = [(step.get(x), step.get(metric)) for step in steps]
    return np.array([pair for pair in pairs if all(map(_is_number, pair))], dtype=float).reshape(-1, 2)


def run_line(name: str, number: int, xy_N2: np.ndarray) -> Line:
    """A run's steps as at most :data:`BINS` means of stretches; the band is where the middle 80 % of their steps lie."""
    size = math.ceil(len(xy_N2) / BINS)
    parts = [xy_N2[start : start + size] for start in range(0, len(xy_N2), size)]
    x_N, y_N = zip(*(part.mean(axis=0).tolist() for part in parts), strict=True)
    if size == 1:
        return Line(name, number, x_N, y_N)
    low_N, high_N = zip(*(np.quantile(part[:, 1], [0.1, 0.9]).tolist() for part in parts), strict=True)
    return Line(name, number, x_N, y_N, low_N, high_N)


def seeds_line(name: str, number: int, runs: Sequence[np.ndarray], furthest: float) -> Line:
    """Several runs as means of the same stretches, up to ``furthest``; the band is the interval over seeds.

    R runs, N stretches that any of them has a step in.
    """
    edges = np.linspace(0, furthest, BINS + 1)
    means_RN2 = np.stack([_means(xy_N2, edges) for xy_N2 in runs])
    means_RN2 = means_RN2[:, ~np.isnan(means_RN2[:, :, 1]).all(axis=0)]
    there_RN = ~np.isnan(means_RN2[:, :, 1])
    intervals: dict[int, Interval] = {}
    for which_R in np.unique(there_RN, axis=1).T:  # an unfinished run is not in the later ones
        stretches = np.flatnonzero((there_RN == which_R[:, None]).all(axis=0))
        found = statistics.curve(means_RN2[which_R][:, stretches, 1])
        intervals |= dict(zip(stretches.tolist(), found, strict=True))
    x_N = np.nanmean(means_RN2[:, :, 0], axis=0).tolist()
    return interval_line(name, number, x_N, [intervals[i] for i in range(len(x_N))])


def _means(xy_N2: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """``(stretches, 2)``: the mean of the steps of each stretch, NaN of none."""
    where_N = np.searchsorted(edges, xy_N2[:, 0]) - 1
    means = np.full((len(edges) - 1, 2), np.nan)
    for i in np.unique(where_N):
        means[i] = xy_N2[where_N == i].mean(axis=0)
    return means


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def interval_line(
    name: str, number: int, x_N: Sequence[float], intervals_N: Sequence[Interval | None], notes_N: Sequence[str] = ()
) -> Line:
    """Intervals as a line with a band; a point without an interval is drawn and has no band."""
    return Line(
        name,
        number,
        x_N,
        [None if one is None else one.value for one in intervals_N],
        [one.low if one is not None and one.known else None for one in intervals_N],
        [one.high if one is not None and one.known else None for one in intervals_N],
        notes_N,
    )
