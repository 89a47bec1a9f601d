"""Intervals for what is counted."""

from __future__ import annotations


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share ``right / total``, for a total of at least 1.

    Example:
        >>> [round(end, 3) for end in wilson(8, 10)]
        [0.49, 0.943]
    """
    from scipy import stats

    interval = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
