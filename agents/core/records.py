"""Reading what a run left on disk, also while it is still training. Nothing here writes, and nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.core.sources import checkpoints, damage_of
from rewards.rows import read_rows, row_error

SCHEMA = 1
LOCK_FILE = "lock"
"""Held by the training at work in a run's folder."""
Row = dict[str, Any]
"""An episode as a rollout keeps it."""
FIELDS = (
    *("group", "prompt", "completions", "reference", "return", "parts", "error", "verdict", "finish"),
    *("tokens", "source", "logp", "reward"),
)
"""What every one has."""


def read_config(run: Path) -> dict[str, Any]:
    """The config of the run in a folder.

    Raises:
        ValueError: there is no run, or one that this version cannot read.
    """
    path = run / "config.json"
    try:
        described = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        described = {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if "agent" not in described:
        raise ValueError(f"no run in {run}; give the folder that a run printed as its own")
    if described.get("schema") != SCHEMA:
        raise ValueError(
            f"the run in {run} was written with schema {described.get('schema')}, this version reads {SCHEMA}; take the "
            f"version that wrote it, textenv {described.get('versions', {}).get('textenv', 'unknown')}"
        )
    return described


def read_metrics(run: Path) -> dict[int, dict[str, Any]]:
    """The metrics of every step of a run, by its number; None for what was no number.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / "metrics.jsonl"
    # A line without its newline is still being written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return {row["step"]: row for row in rows}


def rollout_path(run: Path, step: int) -> Path:
    """Where a run keeps the episodes of a step."""
    return run / "rollouts" / f"{step:06d}.jsonl.gz"


def steps_of(run: Path) -> list[int]:
    """The steps of which a run has kept metrics and episodes.

    Raises:
        ValueError: there is none, or the metrics are damaged.
    """
    steps = [step for step in sorted(read_metrics(run)) if rollout_path(run, step).exists()]
    if not steps:
        raise ValueError(f"the run in {run} has kept no step yet")
    return steps


def read_rollout(path: str | Path) -> list[Row]:
    """The episodes of a step, a dict each, from a file in the ``rollouts`` of a run.

    ``pandas.read_json(path, lines=True, precise_float=True)`` reads the same as a table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no rollout.
    """
    rows = []
    for number, row in read_rows(Path(path)):
        missing = [name for name in FIELDS if not isinstance(row, Mapping) or name not in row]
        if missing:
            raise row_error(path, number, f"no episode of a run: {missing[0]!r} is missing")
        rows.append(dict(row))
    if not rows:
        raise ValueError(f"{path} holds no episode, as a step always has some; it is damaged")
    return rows


def value_of(row: Row, settings: Mapping[str, Any]) -> float | None:
    """The value of an episode's score, without what penalties took off; None if it is ungraded.

    Args:
        row: of a rollout.
        settings: of the run.

    Raises:
        ValueError: the row has only the return, and there were penalties.
    """
    if "value" in row:
        return row["value"]
    if settings.get("kl_reward_coef") or settings.get("overlong_buffer"):
        raise ValueError(
            "the rollouts of this run are of an earlier version, which kept the return of an episode but not its score; with "
            "the run's penalties (kl_reward_coef, overlong_buffer) the score cannot be told from it"
        )
    return row["return"]


def checkpoint_before(run: Path, step: int) -> Path | None:
    """The newest whole checkpoint from before a step; None if there is none. Damaged ones are named on stdout."""
    for checkpoint in reversed(checkpoints(run)):
        if int(checkpoint.name) < step:
            damage = damage_of(checkpoint)
            if damage is None:
                return checkpoint
            print(f"the checkpoint {checkpoint} is damaged and left aside: {damage}", flush=True)
    return None
