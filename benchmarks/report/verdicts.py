"""What results hold beside their cells' measurements: claims, score cards, and what programs have printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.records import LOG_FILE
from benchmarks.harness.results import Results
from benchmarks.harness.suite import PROGRAMS
from benchmarks.report.page import Section, Table
from benchmarks.report.text import shortened
from benchmarks.statistics import UNKNOWN, Interval

VERDICTS_FILE = "verdicts.json"
LOG_CHARACTERS = 20_000
NOT_EXAMINED = "–"


def claims(folder: Path) -> list[Section]:
    """Published claims that were put to the test, as ``python -m benchmarks.claims verdicts`` keeps them.

    Raises:
        ValueError: they are broken.
    """
    path = folder / VERDICTS_FILE
    if not path.exists():
        return []
    with _reading(path):
        verdicts = json.loads(path.read_text())
        rows = [
            [one["name"], one["statement"], one["verdict"], one["sentence"], _interval(one["interval"])]
            for one in verdicts
        ]
        rules = [[one["name"], one["source"], one["protocol"], one["refuted_by"]] for one in verdicts]
    return [
        Section(
            "Claims",
            ["What these small tasks say of published claims, and no more."],
            tables=[Table(["claim", "statement", "verdict", "what was seen", "95 % interval"], rows)],
            folded=[Table(["claim", "source", "protocol", "refuted by"], rules, "Sources and protocols")],
        )
    ]


def _interval(bounds: Sequence[float | None]) -> str:
    value, low, high = bounds
    return UNKNOWN.text() if value is None or low is None or high is None else Interval(value, low, high).text("+.3f")


def cards(folder: Path) -> list[Section]:
    """What ``textenv conform`` kept: a row a check, a column a trainer, and why what did not pass did not.

    Raises:
        ValueError: a card is broken.
    """
    findings: dict[tuple[str, int], Mapping[str, Any]] = {}
    for path in sorted(folder.glob("cards/*.json")):
        with _reading(path):
            card = json.loads(path.read_text())
            findings |= {(card["trainer"], one["trap"]): one for one in card["findings"]}
    if not findings:
        return []
    trainers = list(dict.fromkeys(trainer for trainer, _ in findings))
    promises = dict(sorted((trap, one["promise"]) for (_, trap), one in findings.items()))
    verdicts = {key: one["verdict"] for key, one in findings.items()}
    rows = [
        [str(trap), promise, *(verdicts.get((trainer, trap), NOT_EXAMINED) for trainer in trainers)]
        for trap, promise in promises.items()
    ]
    why = [
        [name, str(trap), one["verdict"], one["why"]]
        for (name, trap), one in findings.items()
        if one["verdict"] != "pass"
    ]
    folded = [Table(["trainer", "check", "verdict", "why"], why, "What did not pass, and why")] if why else []
    return [Section("Conformance", tables=[Table(["", "promise", *trainers], rows)], folded=folded)]


def programs(results: Results) -> list[Section]:
    """What the programs of a suite have printed."""
    paths = {cell.cell.agent: cell.folder / LOG_FILE for cell in results.cells if cell.cell.environment == PROGRAMS}
    logs = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in paths.items() if path.exists()}
    return (
        [Section("Programs", logs={name: shortened(log, LOG_CHARACTERS) for name, log in logs.items()})] if logs else []
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file that something is wrong with."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken ({error!r}); remove it, or have it written again") from error
