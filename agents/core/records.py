"""Reading what a run left on disk, also while it is still training. Nothing here writes, and nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.core.sources import checkpoints, damage_of
from rewards.rows import read_rows, row_error

SCHEMA = 1
METRICS_FILE = "metrics.jsonl"
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
    described = read_json(path) if path.exists() else {}
    if "agent" not in described:
        raise ValueError(f"no run in {run}; give the folder that a run printed as its own")
    if described.get("schema") != SCHEMA:
        raise ValueError(
            f"the run in {run} was written with schema {described.get('schema')}, this version reads {SCHEMA}; take the "
            f"version that wrote it, textenv {described.get('versions', {}).get('textenv', 'unknown')}"
        )
    return described


def read_json(path: Path) -> Any:
    """What a file of a run holds.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; bring it back from a copy") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that grows by lines, none if there is no file; each has its ``step``.

    A last line without its newline is still being written, or was when the run was killed: it is left out.

    Raises:
        ValueError: the file is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} is damaged in line {number}: {error}; bring it back from a copy") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path} is damaged in line {number}: no step in it; bring it back from a copy")
        rows.append(row)
    return rows


def read_metrics(run: Path) -> dict[int, dict[str, Any]]:
    """The metrics of every step of a run, by its number; None for what was no number.

    Raises:
        ValueError: the file is damaged.
    """
    return {row["step"]: row for row in read_lines(run / METRICS_FILE)}


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
