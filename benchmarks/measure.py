"""Measuring on a machine that other work shares: things in turns, and the median of each."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version

PACKAGES = ("gymnasium", "numpy", "torch", "transformers")


def medians(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each measure returns, the measures taken in turns ``rounds`` times."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure())
    return {name: statistics.median(each) for name, each in values.items()}


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def machine() -> str:
    """Where figures come from, on a line: date, cores, load (mean number of busy processes over a minute), versions."""
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {packages}"
    )
