"""The command `textenv bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def bench(
    suite: Literal["speed"],
    /,
    *,
    only: tuple[str, ...] = (),
    rounds: int = 5,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    quick: bool = False,
    out: Path | None = None,
) -> None:
    """Measure speed beside that of other libraries, in turns, and print ratios with their spread.

    Args:
        suite: what to measure.
        only: names of parts; default all: generation, step, arithmetic, logprobs, packing, sync.
        rounds: measurements of each thing; medians and quartiles are shown.
        threads: CPU threads of a tensor operation.
        device: where models run.
        quick: toy sizes, to see that all of it runs; the figures then say nothing.
        out: a markdown file to write the tables to.
    """
    from benchmarks.speed.bench import bench_speed
    from benchmarks.speed.report import Settings

    bench_speed(only, Settings(rounds, threads, device, quick), out)
