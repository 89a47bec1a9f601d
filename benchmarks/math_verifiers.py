"""Math verifiers on one table of answers, ours and math-verify: ``python -m benchmarks.math_verifiers``.

A table is a file of JSON lines with ``completion``, ``reference`` and ``correct``; the verdict of each verifier on each line is
compared with the last. Lines that say ``ungraded`` have a reference that nobody can read; those of the kind "convention" have a
verdict that reasonable people dispute, and are counted in brackets. math-verify alone means its ``parse`` and ``verify`` as its
documentation shows them, with the time limits that it brings along.
"""

from __future__ import annotations

import json
import logging
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

import rewards
from benchmarks.measure import machine, medians, seconds
from rewards import Sample

CASES = Path("tests/rewards/math_cases.jsonl")
OURS, THEIRS = "math (ours)", "math-verify"
HEADERS = ("accuracy", "FP (disputed)", "FN (disputed)", "ungraded", "median ms", "p95 ms", "max ms")
FIELDS = ("completion", "reference", "correct")
BATCH = 256
"""Answers in a measurement of throughput."""

Grade = Callable[[Sample], bool | None]
"""Whether an answer is right; None when it was not graded."""


@dataclass(frozen=True)
class Case:
    """A line of the table. ``correct`` is None where the reference is unreadable."""

    sample: Sample
    correct: bool | None
    disputed: bool


@dataclass(frozen=True)
class Verdict:
    """What a verifier made of a case, and how long it took."""

    case: Case
    correct: bool | None
    ms: float


@dataclass(frozen=True)
class Section:
    """A table for terminals and for Markdown: a row a verifier, its name first."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def terminal(self) -> Table:
        made = Table("", title=self.title)
        for header in self.headers:
            made.add_column(header, justify="right")
        for row in self.rows:
            made.add_row(*row)
        return made

    def markdown(self) -> str:
        lines = [("", *self.headers), ("---", *("---:" for _ in self.headers)), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def main(cases: Path = CASES, rounds: int = 5, out: Path | None = None) -> None:
    """Print errors and times of each verifier on the table, and answers a second, one by one and in a batch.

    Args:
        cases: the table.
        rounds: measurements of throughput, in turns; their medians are shown.
        out: file for the same tables in Markdown.
    """
    table = read_cases(cases)
    right = sum(case.correct is True for case in table)
    sections = (
        Section(f"{len(table)} answers of {cases.name}, {right} of them right", HEADERS, errors_rows(table)),
        Section(
            f"answers a second, {BATCH} at a time, median of {rounds} rounds",
            ("one by one", "in a batch"),
            throughput_rows(table, rounds),
        ),
    )
    print(where())
    for section in sections:
        Console(width=110).print(section.terminal())
    if out is not None:
        head = ("# math_verifiers", "`python -m benchmarks.math_verifiers --out FILE`", where())
        out.write_text("\n\n".join([*head, *(section.markdown() for section in sections)]) + "\n", encoding="utf-8")


def read_cases(path: Path) -> list[Case]:
    """The cases in ``path``.

    Raises:
        ValueError: there are none, or a line lacks a field.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no cases; give a file of JSON lines with {', '.join(FIELDS)}")
    for number, line in enumerate(lines, start=1):
        if missing := [field for field in FIELDS if field not in line]:
            raise ValueError(f"case {number} of {path} lacks {', '.join(missing)}; each needs {', '.join(FIELDS)}")
    return [
        Case(
            Sample(prompt="", completion=line["completion"], reference=line["reference"]),
            None if line.get("ungraded") else line["correct"],
            line.get("kind") == "convention",
        )
        for line in lines
    ]


def where() -> str:
    packages = [f"{name} {version(name)}" for name in ("sympy", "math-verify") if find_spec(name.replace("-", "_"))]
    return ", ".join([machine(), *packages])


def verifiers() -> dict[str, Grade]:
    """The verifiers that can be run here."""
    ours = rewards.make("math")
    found: dict[str, Grade] = {OURS: lambda sample: ours([sample])[0].correct}
    if find_spec("math_verify"):
        found[THEIRS] = math_verify_grade
    return found


def math_verify_grade(sample: Sample) -> bool | None:
    """math-verify's verdict; None where it raises or reads nothing in the reference."""
    from math_verify import parse, verify  # type: ignore[import-untyped]

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        reference = parse(in_formula(sample.reference))
        return verify(reference, parse(sample.completion)) if reference else None
    except Exception:  # noqa: BLE001 - what another library raises is a result here
        return None


def in_formula(reference: Any) -> Any:
    """``reference`` as math-verify wants it: LaTeX between dollar signs."""
    return f"${reference}$" if isinstance(reference, str) and "$" not in reference.replace(r"\$", "") else reference


def errors_rows(table: Sequence[Case]) -> list[list[str]]:
    """A row a verifier: how often it is right, its errors, its times."""
    rows = []
    for name, grade in verifiers().items():
        grade(table[0].sample)  # what is imported and started once is not the first answer's time
        rows.append([name, *errors([judge(grade, case) for case in table])])
    return rows


def judge(grade: Grade, case: Case) -> Verdict:
    got: list[bool | None] = []
    took = seconds(lambda: got.append(grade(case.sample)))
    return Verdict(case, got[0], took * 1000)


def errors(verdicts: Sequence[Verdict]) -> list[str]:
    """Accuracy, wrong answers accepted, right ones not accepted, readable cases not graded; median, p95 and longest ms.

    A right answer that is not graded is not accepted; a case with an unreadable reference is right when it is not graded.
    """
    accepted = [verdict for verdict in verdicts if verdict.correct is True and verdict.case.correct is not True]
    refused = [verdict for verdict in verdicts if verdict.correct is not True and verdict.case.correct is True]
    ungraded = sum(verdict.correct is None and verdict.case.correct is not None for verdict in verdicts)
    agree = statistics.mean(verdict.correct == verdict.case.correct for verdict in verdicts)
    ms = sorted(verdict.ms for verdict in verdicts)
    times = (statistics.median(ms), ms[math.ceil(0.95 * len(ms)) - 1], ms[-1])
    return [f"{agree:.1%}", count(accepted), count(refused), str(ungraded), *(f"{time:,.1f}" for time in times)]


def count(verdicts: Sequence[Verdict]) -> str:
    """How many, and how many of them are disputed."""
    return f"{len(verdicts)} ({sum(verdict.case.disputed for verdict in verdicts)})"


def throughput_rows(table: Sequence[Case], rounds: int) -> list[list[str]]:
    """A row a verifier: answers a second one by one and, for ours, in a batch."""
    samples = mix(table)
    measures: dict[str, Callable[[], float]] = {
        name: partial(seconds, partial(one_by_one, grade, samples)) for name, grade in verifiers().items()
    }
    measures["batch"] = partial(seconds, partial(rewards.make("math"), samples))
    measures["batch"]()  # starts the workers
    took = medians(measures, rounds)
    rows = [[name, f"{BATCH / took[name]:,.0f}", "–"] for name in measures if name != "batch"]
    rows[0][2] = f"{BATCH / took['batch']:,.0f}"
    return rows


def mix(table: Sequence[Case]) -> list[Sample]:
    """As many answers as a batch has, drawn from the whole table with a fixed seed, repeated if it is short."""
    draw = random.Random(0)
    samples = [case.sample for case in table]
    return [sample for _ in range(math.ceil(BATCH / len(samples))) for sample in draw.sample(samples, len(samples))][
        :BATCH
    ]


def one_by_one(grade: Grade, samples: Sequence[Sample]) -> None:
    for sample in samples:
        grade(sample)


if __name__ == "__main__":
    tyro.cli(main)
