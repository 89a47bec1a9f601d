"""What the code verifier costs a program, and what hostile programs get from it: ``python -m benchmarks.code_verifiers``."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.code_cases import PROBLEMS, TARGET, hostile_samples
from benchmarks.measure import machine, medians, seconds
from rewards import Sample, Score
from rewards.verifiers.code import Code

PROGRAMS = 64
TARGET_MS = 40
WORKERS = 2


def main(rounds: int = 7, runs: int = 1_000, out: Path | None = None) -> None:
    """Print the milliseconds a program, and a table of what came of hostile programs.

    Args:
        rounds: how often the programs are graded in each way, in turns; medians are shown.
        runs: hostile programs run, each kind in its share; each is followed by a right one.
        out: a markdown file for the same.
    """
    console = Console(width=110, record=True)
    console.print(machine(), soft_wrap=True)
    console.print(speed(rounds))
    console.print(hostile(runs))
    if out is not None:
        figures = "\n".join(line.rstrip() for line in console.export_text().splitlines())
        out.write_text(f"# code_verifiers\n\n`python -m benchmarks.code_verifiers`\n\n{NOTES}\n\n```\n{figures}\n```\n")


NOTES = """Ours are small problems in HumanEval's form, right answers. A program is a process of its own in the sandbox, and
its tests run in one of two judges. A hostile case is a program with its tests (functions meet a HumanEval check and MBPP's
asserts, scripts meet pairs of input and output); it has half a second, and the right program after it must pass. The
machine was shared."""


def speed(rounds: int) -> Table:
    """Milliseconds a program: all in one call, or a call for each."""
    code = Code(seconds=10, workers=WORKERS)
    problems = itertools.islice(itertools.cycle(PROBLEMS), PROGRAMS)
    samples = [Sample(prompt="", completion=problem.right, reference=problem.reference) for problem in problems]

    def together() -> None:
        assert all(score.correct for score in code(samples))

    def one_by_one() -> None:
        assert all(code([sample])[0].correct for sample in samples)

    first = seconds(together)  # the judges and their sandboxes start here
    ways = {f"one call, {WORKERS} workers": together, "a call for each": one_by_one}
    times = medians({name: partial(seconds, way) for name, way in ways.items()}, rounds)
    table = Table("", "ms a program", "target", title=f"{PROGRAMS} right programs with their tests")
    for name, time in {"one call, the first": first, **times}.items():
        table.add_row(name, f"{1000 * time / PROGRAMS:.1f}", f"{TARGET_MS}")
    return table


def hostile(runs: int) -> Table:
    """What came of ``runs`` hostile programs, by kind."""
    code = Code(seconds=0.5, workers=1)  # so that the right one meets the judge that the hostile one met
    good = Sample(prompt="", completion=TARGET.right, reference=TARGET.reference)
    cases: Counter[str] = Counter()
    outcomes: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder, "canary")
        canary.write_text("alive")
        samples = hostile_samples(str(canary))
        cases.update(kind for kind, _ in samples)
        for (kind, _), (text, reference) in itertools.islice(itertools.cycle(samples.items()), runs):
            score, following = code([Sample(prompt="", completion=text, reference=reference), good])
            outcomes.setdefault(kind, Counter()).update(_outcome(score, following))
        harmed = [path.name for path in Path(folder).iterdir()] != ["canary"] or canary.read_text() != "alive"
    columns = ("runs", "passed", "ungraded", "right one after it failed")
    table = Table(
        "",
        "cases",
        *columns,
        title=f"hostile programs; the file that some want gone: {'gone' if harmed else 'unharmed'}",
    )
    for kind, counts in {**outcomes, "all": sum(outcomes.values(), Counter())}.items():
        number = cases[kind] if kind in cases else cases.total()
        table.add_row(kind, f"{number}", *(f"{counts[column]:,}" for column in columns))
    return table


def _outcome(score: Score, following: Score) -> list[str]:
    marks = {
        "passed": score.correct,
        "ungraded": score.value is None,
        "right one after it failed": not following.correct,
    }
    return ["runs", *(mark for mark, holds in marks.items() if holds)]


if __name__ == "__main__":
    tyro.cli(main)
