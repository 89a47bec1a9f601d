"""The folder of a run, as far as a look at it needs it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from agents.core.records import LOCK_FILE


def is_run(folder: Path) -> bool:
    """Whether a training left this folder."""
    return (folder / "config.json").is_file() and "agent" in read_run(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """What was run.

    Raises:
        ValueError: the file that tells it is broken.
    """
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); put back the one that the training wrote") from error


def at_work(folder: Path) -> bool:
    """Whether a process holds the folder: it trains there, or fills the results."""
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def ended(folder: Path) -> bool:
    """Whether the training in the folder is over: its last evaluation is younger than its last step."""
    after, metrics = folder / "evaluation_after.json", folder / "metrics.jsonl"
    return after.exists() and (not metrics.exists() or after.stat().st_mtime >= metrics.stat().st_mtime)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged so far."""
    return [step for step in _lines(folder / "metrics.jsonl") if isinstance(step.get("step"), int)]


def read_alarms(folder: Path) -> list[dict[str, Any]]:
    """What looked wrong, as :mod:`agents.core.doctor` keeps it."""
    return _lines(folder / "alarms.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that grows by lines; a line that is only half written is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    return [content for line in lines if isinstance(content := _parsed(line), dict)]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
