"""Large models on one GPU: generation, the learner, a GRPO step, and learning: ``python -m benchmarks.gpu``.

All weights are made on the spot, so nothing is fetched. ``--quick --device cpu`` runs the same at toy sizes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import tyro

from benchmarks.speed.bench import find_part
from benchmarks.speed.report import Settings, Table, show_and_keep

PARTS = ("generation", "learner", "step", "learning")


def main(
    only: tuple[str, ...] = (),
    rounds: int = 2,
    device: Literal["cuda", "cpu"] = "cuda",
    threads: int = 1,
    quick: bool = False,
    out: Path = Path("runs/gpu"),
) -> None:
    """Measure on one GPU, and keep tables and learning curves.

    Args:
        only: names of parts; default all: generation, learner, step, learning.
        rounds: measurements of each thing, in turns, after one that sets things up.
        device: where models run.
        threads: CPU threads of a tensor operation.
        quick: toy sizes, to see that all of it runs; the figures then say nothing.
        out: folder of results.md and the learning curves.
    """
    names = [find_part(name, PARTS) for name in only] or PARTS
    settings = Settings(rounds, threads, device, quick)
    out.mkdir(parents=True, exist_ok=True)
    modules = [import_module(f"benchmarks.gpu.{name}") for name in names]
    show_and_keep(settings.heading("python -m benchmarks.gpu"), run(modules, settings, out), out / "results.md")


def run(modules: Sequence[ModuleType], settings: Settings, out: Path) -> Iterator[Table]:
    """The tables of the parts; between two of them memory is given back, for the processes that the next may start."""
    for module in modules:
        yield from module.run(settings, out)
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    tyro.cli(main)
