"""The score card: every check on every trainer, and why what did not pass did not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table

from benchmarks.conform.cases import Lacks, Refused, Remembering, Trainer
from benchmarks.conform.checks import CHECKS, ELSEWHERE, Check, Fault
from benchmarks.harness.records import file_name
from benchmarks.measure import machine

Verdict = Literal["pass", "FAIL", "by choice", "n.a."]
SHOWN: dict[Verdict, str] = {
    "pass": "[green]pass[/green]",
    "FAIL": "[bold red]FAIL[/bold red]",
    "by choice": "[yellow]by choice[/yellow]",
    "n.a.": "[dim]n.a.[/dim]",
}


@dataclass(frozen=True)
class Finding:
    """What a check came to on a trainer, and why if it did not pass."""

    trainer: str
    check: Check
    verdict: Verdict
    why: str = ""


def examine(trainer: Trainer, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Run the checks on a trainer."""
    remembering = Remembering(trainer)
    return [_finding(remembering, check) for check in checks]


def _finding(trainer: Remembering, check: Check) -> Finding:
    try:
        check.run(trainer)
    except Lacks as lack:
        return Finding(trainer.name, check, "n.a.", f"it is without {lack}")
    except Fault as fault:
        choice = trainer.choices.get(check.number)
        if choice is not None:
            return Finding(trainer.name, check, "by choice", f"{fault}; {choice}")
        return Finding(trainer.name, check, "FAIL", str(fault))
    except Refused as refusal:
        return Finding(trainer.name, check, "FAIL", f"refused: {refusal}")
    except Exception as error:  # noqa: BLE001 - the boundary to anybody's trainer: one that breaks on a case does not pass
        return Finding(trainer.name, check, "FAIL", f"broke with {type(error).__name__}: {error}")
    return Finding(trainer.name, check, "pass")


def card(findings: Sequence[Finding]) -> Table:
    """A row a trap, a column a trainer."""
    trainers = list(dict.fromkeys(finding.trainer for finding in findings))
    verdicts = {(finding.trainer, finding.check.number): finding.verdict for finding in findings}
    table = Table("", "promise", *trainers, title="conformance")
    for check in CHECKS:
        cells = [SHOWN[verdicts[name, check.number]] for name in trainers]
        table.add_row(str(check.number), check.promise, *cells)
    table.add_section()
    passed = [sum(verdicts[name, check.number] == "pass" for check in CHECKS) for name in trainers]
    applied = [sum(verdicts[name, check.number] != "n.a." for check in CHECKS) for name in trainers]
    table.add_row("", "passed", *(f"{good} of {all_}" for good, all_ in zip(passed, applied, strict=True)))
    return table


def reasons(findings: Sequence[Finding]) -> Iterator[str]:
    """A line for everything that did not pass; trainers with one reason share it."""
    lines: dict[tuple[int, Verdict, str], list[str]] = {}
    for finding in findings:
        if finding.verdict != "pass":
            lines.setdefault((finding.check.number, finding.verdict, finding.why), []).append(finding.trainer)
    for verdict in ("FAIL", "by choice", "n.a."):
        for (number, other, why), trainers in sorted(lines.items(), key=lambda line: line[0][0]):
            if other == verdict:
                yield f"{SHOWN[verdict]} {number}, {', '.join(trainers)}: {escape(why)}"


def keep(trainer: str, findings: Sequence[Finding], results: Path) -> Path:
    """Keep a trainer's card in a folder of results, as ``cards/NAME.json``, and with it what it was made with."""
    card = {
        "trainer": trainer,
        "machine": machine(),
        "findings": [
            {"trap": one.check.number, "promise": one.check.promise, "verdict": one.verdict, "why": one.why}
            for one in findings
        ],
    }
    path = results / "cards" / f"{file_name(trainer)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card, indent=1))
    return path


def footer() -> Iterator[str]:
    """The rows that are tested elsewhere."""
    yield "Elsewhere: " + "; ".join(f"{number}, {where}" for number, where in ELSEWHERE.items())
