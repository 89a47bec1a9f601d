"""What the results of a suite are made of, as they lie on disk.

A results folder holds ``suite.toml``, the suite that it was run from, and a folder ``cells/ENVIRONMENT/AGENT/SEED`` for
each cell:

- ``cell.json``: what the cell is, and its provenance; written before anything else.
- ``points.jsonl``: a line for each evaluation point, see :class:`Point`; one that is only evaluated has a single one.
- ``completions/NNN.jsonl.gz``: what was written at each point, a line a held-out problem, see :func:`problem_row`.
- ``start/``: what all agents start from, for those that load it by themselves; ``run/``: the run of an agent that keeps one.
- ``log.txt``: what it printed.
- ``done.json`` or ``failed.json``: written last. With neither, the cell was killed half-way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

SCHEMA = 1
CELL_FILE, POINTS_FILE, DONE_FILE, FAILED_FILE, LOG_FILE = (
    "cell.json",
    "points.jsonl",
    "done.json",
    "failed.json",
    "log.txt",
)

CLAIMS, PROGRAMS = "claims", "programs"
"""What stands for the environment of a cell that is a claim, or a program: these have no points."""

State = Literal["waiting", "killed", "failed", "done"]


@dataclass(frozen=True, order=True)
class Cell:
    """One agent on one environment with one seed; ``agent`` and ``environment`` are the names that the suite gives them."""

    environment: str
    agent: str
    seed: int

    @property
    def path(self) -> Path:
        """Where it lies in a results folder."""
        return Path("cells", file_name(self.environment), file_name(self.agent), str(self.seed))

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.agent} on {self.environment}, seed {self.seed}"


@dataclass(frozen=True)
class Point:
    """What was measured at one point of a training. P problems, G completions of each.

    Attributes:
        share: of the budget that is spent, 0 to 1.
        episodes, tokens, updates: of the training so far: episodes sampled, tokens sampled, optimiser steps.
        seconds: spent on training, what was spent on measuring left out.
        metrics: means over the problems by name, ``greedy/…`` and ``sampled/…``; see :mod:`benchmarks.harness.measuring`.
        greedy: by ``reward`` and ``correct``, a list with a number for each problem; None where ungraded or not told.
        sampled: likewise, for each problem a list with a number for each of its completions.
    """

    share: float
    episodes: int
    tokens: int
    updates: int
    seconds: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    greedy: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    sampled: Mapping[str, Sequence[Sequence[float | None]]] = field(default_factory=dict)

    def to_json(self) -> str:
        """A line of ``points.jsonl``, without its end."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        return cls(**json.loads(line))


def problem_row(
    prompt: str, reference: Any, greedy: Mapping[str, Any], sampled: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A held-out problem and what was written for it. A completion is ``text`` (the turns joined by line breaks), ``reward``,
    ``correct``, ``parts``, ``error``, ``finish`` and ``tokens`` (how many).
    """
    return {"prompt": prompt, "reference": reference, "greedy": dict(greedy), "sampled": [dict(one) for one in sampled]}


def state(folder: Path) -> State:
    """What has become of a cell."""
    if (folder / DONE_FILE).exists():
        return "done"
    if (folder / FAILED_FILE).exists():
        return "failed"
    return "killed" if (folder / CELL_FILE).exists() else "waiting"


def file_name(text: str) -> str:
    """A name as one that every file system takes: ``textenv/Arithmetic-v0`` is ``textenv-Arithmetic-v0``."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text)


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    write_whole(path, json.dumps(content, indent=2).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Likewise."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
