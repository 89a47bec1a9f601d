"""Made-up results folders."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.records import CELL_FILE, DONE_FILE, FAILED_FILE, POINTS_FILE, SCHEMA, Cell, Point, problem_row

PROVENANCE = {
    "environment": "sums, digits=1",
    "task": "1",
    "reward": "exact",
    "model": "tiny",
    "budget": "100 episodes",
    "evaluation": "3 points",
    "settings": "group_size=8",
    "libraries": "torch 2.13",
    "hardware": "a laptop",
}
DONE = {"seconds": 10.0, "measuring_seconds": 1.0, "peak_memory_mb": 500.0, "energy_j": None}


def write_suite(folder: Path, agents: Sequence[str] = ("grpo", "ppo"), environments: Sequence[str] = ("sums",)) -> Path:
    """A results folder without a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = "".join(
        f"[{kind}.{name}]\n" for kind, names in (("environments", environments), ("agents", agents)) for name in names
    )
    (folder / "suite.toml").write_text(f'title = "made up"\nseeds = [0, 1, 2]\n[budget]\nepisodes = 100\n{tables}')
    return folder


def write_cell(
    folder: Path,
    agent: str = "grpo",
    seed: int = 0,
    accuracies: Sequence[float] = (0.0, 0.25, 0.5),
    *,
    environment: str = "sums",
    provenance: Mapping[str, str] = {},
    done: Mapping[str, Any] | None = DONE,
    error: str | None = None,
    greedy: Sequence[float | None] = (),
) -> Path:
    """A cell with these accuracies, evenly spaced over its budget.

    Args:
        provenance: parts that differ from :data:`PROVENANCE`.
        done: None for a cell that is not.
        error: of a cell that failed.
        greedy: whether each problem is right, at all points.
    """
    cell = Cell(environment, agent, seed)
    path = folder / cell.path
    path.mkdir(parents=True)
    head = {"schema": SCHEMA, **vars(cell), "kind": agent, "provenance": {**PROVENANCE, **provenance}}
    (path / CELL_FILE).write_text(json.dumps(head))
    steps = max(1, len(accuracies) - 1)
    points = [point(i / steps, accuracy, greedy) for i, accuracy in enumerate(accuracies)]
    (path / POINTS_FILE).write_text("".join(one.to_json() + "\n" for one in points))
    if error is not None:
        (path / FAILED_FILE).write_text(json.dumps({"error": error, "traceback": ""}))
    elif done is not None:
        (path / DONE_FILE).write_text(json.dumps(done))
    return path


def point(share: float, accuracy: float, greedy: Sequence[float | None] = ()) -> Point:
    """A point of a budget of 100 episodes."""
    return Point(
        share=share,
        episodes=int(100 * share),
        tokens=int(1000 * share),
        updates=int(10 * share),
        seconds=10 * share,
        metrics={"greedy/accuracy": accuracy, "greedy/reward": accuracy, "sampled/kl": share},
        greedy={"correct": list(greedy), "reward": list(greedy)},
        sampled={"correct": [[1.0, 0.0, 0.0, None], [1.0, 1.0, 1.0, 1.0]]},
    )


def write_answers(cell: Path, texts: Sequence[str], prompts: Sequence[str] | None = None) -> None:
    """What a cell answered at its last point; a token a character."""
    folder = cell / "completions"
    folder.mkdir()
    rows = [
        problem_row(prompt, "r", {"text": text, "tokens": len(text)}, [])
        for prompt, text in zip(prompts or [f"p{i}" for i in range(len(texts))], texts, strict=True)
    ]
    for name, content in (("000", []), ("001", rows)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)
