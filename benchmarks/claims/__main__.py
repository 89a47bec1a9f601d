"""``python -m benchmarks.claims NAME SEED FOLDER`` and ``python -m benchmarks.claims verdicts RESULTS``."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import benchmarks.claims.base
from benchmarks.claims.base import Claim, Measured, claim_names, find_claim
from benchmarks.harness.provenance import PACKAGES, digest, hardware
from benchmarks.harness.records import CELL_FILE, CLAIMS, DONE_FILE, FAILED_FILE, SCHEMA, Cell, state, write_json
from benchmarks.measure import installed_version

VERDICTS_FILE = "verdicts.json"
USAGE = "python -m benchmarks.claims NAME SEED FOLDER, or python -m benchmarks.claims verdicts RESULTS"


def main(*arguments: str) -> None:
    """Run one seed of a claim, or tell the verdicts.

    Raises:
        ValueError: neither is asked for, or something that is not there.
    """
    if len(arguments) == 2 and arguments[0] == "verdicts":
        Console(width=140).print(table(tell(Path(arguments[1]))))
    elif len(arguments) == 3 and arguments[1].isdigit():
        run(find_claim(arguments[0]), int(arguments[1]), Path(arguments[2]))
    else:
        raise ValueError(f"use {USAGE}; got {' '.join(arguments) or 'nothing'}")


def run(claim: Claim, seed: int, folder: Path, *, quick: bool = False) -> None:
    """Run one seed of a claim as a cell of a results folder; ``done.json`` has what it ``measured``.

    Its trainings are thrown away. What an earlier try has left in the folder is removed.

    Raises:
        Exception: whatever the experiment raised, once ``failed.json`` tells of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DONE_FILE, FAILED_FILE):
        (folder / name).unlink(missing_ok=True)
    cell = Cell(CLAIMS, claim.name, seed)
    write_json(folder / CELL_FILE, {"schema": SCHEMA, **vars(cell), "provenance": provenance(claim, quick=quick)})
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as runs:
            measured = claim.experiment(seed, Path(runs), quick)
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        write_json(folder / FAILED_FILE, failed)
        raise
    write_json(folder / DONE_FILE, {"measured": measured, "seconds": time.monotonic() - started})


def provenance(claim: Claim, *, quick: bool) -> dict[str, str]:
    """What a claim's cells must share for a verdict."""
    package = Path(benchmarks.claims.base.__file__).parent
    code = [(package / f"{name}.py").read_text() for name in ("training", claim.name)]
    found = [f"{name} {version}" for name in PACKAGES if (version := installed_version(name))]
    return {
        "claim": f"{claim.name}{', quick' if quick else ''} {digest(code)}",
        "libraries": ", ".join([f"python {platform.python_version()}", *found]),
        "hardware": hardware(),
    }


def tell(results: Path) -> list[dict[str, Any]]:
    """The verdict on each claim that has a finished seed in a results folder; also written to ``verdicts.json`` there.

    Seeds that failed or were cut short are named on the way and left out.

    Raises:
        ValueError: no claim has a finished seed there, or the seeds of one are of different versions of it.
    """
    rows = []
    for name in claim_names():
        seeds, seconds = read_seeds(results, name)
        if seeds:
            claim = find_claim(name)
            verdict = claim.verdict(list(seeds.values()))
            interval = [verdict.interval.value, verdict.interval.low, verdict.interval.high]
            rows.append(
                {
                    **{
                        field: getattr(claim, field)
                        for field in ("name", "statement", "source", "protocol", "refuted_by")
                    },
                    "verdict": verdict.text,
                    "sentence": verdict.sentence,
                    "interval": interval if verdict.interval.known else [verdict.interval.value, None, None],
                    "seeds": list(seeds),
                    "seconds": sum(seconds) / len(seconds),
                }
            )
    if not rows:
        raise ValueError(f"no claim has a finished seed in {results}; textenv bench run claims --out FOLDER makes some")
    write_json(results / VERDICTS_FILE, rows)
    return rows


def read_seeds(results: Path, name: str) -> tuple[dict[int, Measured], list[float]]:
    """What each finished seed of a claim measured, by seed, and how many seconds each took.

    Raises:
        ValueError: they are of different versions of the claim.
    """
    seeds: dict[int, Measured] = {}
    seconds, versions = [], {}
    cells = Cell(CLAIMS, name, 0).path.parent
    for folder in sorted((results / cells).glob("*"), key=lambda path: path.name.zfill(12)):
        if state(folder) != "done":
            print(f"left out: {cells / folder.name} is {state(folder)}")
            continue
        try:
            done = json.loads((folder / DONE_FILE).read_text())
            versions[int(folder.name)] = json.loads((folder / CELL_FILE).read_text())["provenance"]["claim"]
            seeds[int(folder.name)] = done["measured"]
            seconds.append(float(done["seconds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"left out: {cells / folder.name} cannot be read ({error!r}); delete it and run it again")
    if len(set(versions.values())) > 1:
        raise ValueError(f"the seeds of {name!r} are of different versions of the claim, {versions}; run them again")
    return seeds, seconds


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(
        "claim", "verdict", "seeds", "seconds", "what was seen", title="claims, on small tasks", show_lines=True
    )
    for row in rows:
        made.add_row(row["name"], row["verdict"], str(len(row["seeds"])), f"{row['seconds']:.0f}", row["sentence"])
    return made


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
