"""Results as read from disk: whatever is whole of a results folder, and a line for each thing that is not."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.records import (
    CELL_FILE,
    CLAIMS,
    DONE_FILE,
    FAILED_FILE,
    POINTS_FILE,
    PROGRAMS,
    SCHEMA,
    Cell,
    Point,
    State,
    state,
)

SUITE_FILE = "suite.toml"


@dataclass(frozen=True)
class CellResult:
    """What there is of a cell.

    Attributes:
        cell: which one.
        state: "done", "failed" or "killed"; a cell that is running now has not ended either and reads "killed".
        points: those that were measured, in order; also of a cell that failed or was killed.
        provenance: by part, what it was run with.
        done: the content of ``done.json``; empty for a cell that is not done.
        error: why it failed, for one that did.
        folder: where it lies.
    """

    cell: Cell
    state: State
    points: list[Point]
    provenance: Mapping[str, str]
    done: Mapping[str, Any]
    error: str | None
    folder: Path


@dataclass(frozen=True)
class Results:
    """What there is of a suite.

    Attributes:
        folder: where it lies.
        suite_title: of the suite.
        cells: those that have begun, environments and agents in the order of the suite, then seeds.
        problems: for people, a line for each thing that is broken or was not finished, with what to do about it.
    """

    folder: Path
    suite_title: str
    cells: list[CellResult]
    problems: list[str] = field(default_factory=list)

    @property
    def environments(self) -> list[str]:
        """In the order of the suite."""
        return list(dict.fromkeys(result.cell.environment for result in self.cells))

    @property
    def agents(self) -> list[str]:
        """In the order of the suite."""
        return list(dict.fromkeys(result.cell.agent for result in self.cells))

    def done(self, environment: str, agent: str) -> dict[int, CellResult]:
        """The cells of an agent on an environment that are done and have a point, by seed."""
        return {
            result.cell.seed: result
            for result in self.cells
            if (result.cell.environment, result.cell.agent, result.state) == (environment, agent, "done")
            and result.points
        }


class _BrokenError(Exception):
    """A file that cannot be used; the text says why."""


class _SchemaError(_BrokenError):
    """A cell of another version."""


def load_results(folder: str | Path) -> Results:
    """Read a results folder, also while it is being filled.

    What is broken or only half written is left out and named in ``problems``: a line of points, or a cell.

    Raises:
        ValueError: it is no results folder, or one of a version that this one cannot read.
    """
    folder = Path(folder)
    suite = _read_suite(folder)
    cells: list[CellResult] = []
    problems: list[str] = []
    unknown: list[str] = []
    for path in sorted(folder.glob(f"cells/*/*/*/{CELL_FILE}")):
        try:
            result, broken = _read_cell(path.parent)
        except _SchemaError as error:
            unknown.append(_again(folder, path.parent, str(error)))
        except _BrokenError as error:
            problems.append(_again(folder, path.parent, str(error)))
        else:
            cells.append(result)
            problems += [_again(folder, path.parent, what) for what in broken]
            if result.state == "killed":
                problems.append(_again(folder, path.parent, "not finished: killed, or still running"))
    if unknown and not cells:
        raise ValueError(f"{folder} was written by another version of textenv: {unknown[0]}")
    environment, agent = (_places(suite.get(table, {})) for table in ("environments", "agents"))
    cells.sort(
        key=lambda result: (
            environment.get(result.cell.environment, len(environment)),
            result.cell.environment,
            agent.get(result.cell.agent, len(agent)),
            result.cell,
        )
    )
    return Results(folder, str(suite.get("title", folder.name)), cells, problems + unknown)


def _read_suite(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; results are what `textenv bench run SUITE --out FOLDER` fills")
    path = folder / SUITE_FILE
    if not path.exists():
        what = "is empty" if not any(folder.iterdir()) else f"is no results folder: it has no {SUITE_FILE}"
        raise ValueError(f"{folder} {what}; results are what `textenv bench run SUITE --out FOLDER` fills")
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no TOML ({error}); put the suite that the results are of in its place") from error


def _read_cell(folder: Path) -> tuple[CellResult, list[str]]:
    """A cell, and what of it is broken."""
    head = _read_json(folder / CELL_FILE)
    if head.get("schema") != SCHEMA:
        raise _SchemaError(f"{CELL_FILE} has the schema {head.get('schema')!r}, this version of textenv reads {SCHEMA}")
    try:
        cell = Cell(str(head["environment"]), str(head["agent"]), int(head["seed"]))
        provenance = {str(part): str(value) for part, value in head["provenance"].items()}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise _BrokenError(f"{CELL_FILE} does not tell which cell it is ({error!r})") from error
    points, broken = _read_points(folder / POINTS_FILE)
    become = state(folder)
    done: dict[str, Any] = {}
    why = None
    try:
        if become == "done":
            done = _read_json(folder / DONE_FILE)
        if become == "failed":
            why = str(_read_json(folder / FAILED_FILE).get("error"))
    except _BrokenError as error:
        broken.append(str(error))
        become = "killed"
    if become == "done" and not points and cell.environment not in (CLAIMS, PROGRAMS):
        broken.append(f"{POINTS_FILE} has no point, though the cell is done")
    return CellResult(cell, become, points, provenance, done, why, folder), broken


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _BrokenError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise _BrokenError(f"{path.name} is not an object")
    return content


def _read_points(path: Path) -> tuple[list[Point], list[str]]:
    """The points that are whole, and a line for each that is not."""
    points, broken = [], []
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        return [], [f"{path.name} cannot be read ({error})"]
    for number, line in enumerate(lines, start=1):
        try:
            point = Point.from_json(line.decode())
            _check(point)
            points.append(point)
        except (TypeError, ValueError, OverflowError) as error:
            broken.append(f"{path.name}, line {number}, is no point or only half of one ({error})")
    return points, broken


def _check(point: Point) -> None:
    """Refuse what is JSON but no point.

    Raises:
        TypeError: it is not.
    """
    for name in ("share", "episodes", "tokens", "updates", "seconds"):
        _check_numbers(name, [getattr(point, name)])
    for name in ("metrics", "greedy", "sampled"):
        if not isinstance(getattr(point, name), dict):
            raise TypeError(f"{name} is not an object")
    _check_numbers("metrics", (value for value in point.metrics.values() if value is not None))
    for name, values in point.greedy.items():
        _check_numbers(name, (value for value in values if value is not None))
    for name, rows in point.sampled.items():
        _check_numbers(name, (value for row in rows for value in row if value is not None))


def _check_numbers(name: str, values: Iterable[Any]) -> None:
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise TypeError(f"{name} is not made of finite numbers")


def _again(folder: Path, cell: Path, what: str) -> str:
    """A line for people. A run leaves alone what is done, so that has to go first, and failed cells unless told."""
    become = state(cell)
    return (
        f"{cell.relative_to(folder)}: {what}; left out. To run it again: "
        f"{'remove that folder, then ' if become == 'done' else ''}`textenv bench run {folder / SUITE_FILE} --out {folder}"
        f"{' --retry' if become == 'failed' else ''}`"
    )


def _places(names: Iterable[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}
