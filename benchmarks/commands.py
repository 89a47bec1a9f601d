"""The command `textenv bench`. What needs torch is imported where it is used."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from textenv.cli import imported

USAGE = """\
usage: textenv bench COMMAND [ARGUMENTS]

Compare agents on equal terms: the same problems, in the same order, under one budget, with intervals on everything.
"""
HINTS = """
`textenv bench COMMAND --help` shows a command's own arguments. A suite is a TOML file, or the name of a shipped one.

    textenv bench list                                what is shipped, and who can be compared
    textenv bench run quick                           four agents, two tasks, three seeds, in minutes
    textenv bench show results/quick                  what came of it
    textenv report results/quick                      the same as a page to look at
    textenv bench compare results/quick results/mine  refused where it would not be fair
"""

Parts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PART ...")]


def bench(arguments: list[str]) -> None:
    """Compare agents on equal terms, and measure speed: textenv bench list|run|show|compare|speed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_map()
        return
    name, *others = arguments
    if name not in COMMANDS:
        from benchmarks.harness.toml_file import nearest

        raise ValueError(f"no command {name!r} of bench; {nearest(name, COMMANDS)}")
    tyro.cli(COMMANDS[name], prog=f"textenv bench {name}", args=others)


bench.takes_arguments = True  # type: ignore[attr-defined]  # each of its commands has its own


def run(
    suite: Annotated[str, tyro.conf.arg(metavar="SUITE")],
    /,
    *,
    out: Path | None = None,
    at_once: int | None = None,
    retry: bool = False,
) -> None:
    """Run a suite, or go on with it: what is done stays done.

    Every agent meets every environment with every seed, each in a process of its own. Exit status 1 if any of them fails;
    the others run all the same.

    Args:
        suite: a TOML file, or the name of a shipped suite.
        out: folder of the results; default results/SUITE.
        at_once: most that run at a time; default one for each core, as far as memory lasts.
        retry: run those again that have failed.
    """
    from benchmarks.harness.runner import read_error, run_suite
    from benchmarks.harness.suite import load_suite

    loaded = load_suite(suite)
    if unnamed := [module for module in imported if module not in loaded.imports]:
        raise ValueError(f"a suite itself names the modules that it needs, in place of --import: imports = {unnamed}")
    folder = out or Path("results", loaded.path.stem)
    console = Console(highlight=False)
    options = {"--out": out, "--at-once": at_once}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    again = shlex.join(["textenv", "bench", "run", suite, *given])
    try:
        failed = run_suite(loaded, folder, at_once=at_once, retry=retry)
    except KeyboardInterrupt:
        console.print(f"What is done is kept in {escape(str(folder))}. To go on: {escape(again)}", soft_wrap=True)
        raise
    for cell in failed:
        error = read_error(folder / cell.path)
        console.print(f"[red]failed[/red] {escape(f'{cell.name}: {error} ({folder / cell.path})')}", soft_wrap=True)
    if failed:
        console.print(f"To run what has failed again: {escape(again)} --retry", soft_wrap=True)
        raise SystemExit(1)
    console.print(f"All {len(loaded.cells)} are done. textenv bench show {escape(str(folder))}", soft_wrap=True)
    _print_tables(_verdicts(folder))


def list_suites() -> None:
    """Show the suites that are shipped, and the agents that a suite can name."""
    from benchmarks.harness.contenders import contender_names
    from benchmarks.harness.suite import read_suite, shipped_suites

    table = Table(Column("suite", no_wrap=True), "what it compares", Column("cells", justify="right"))
    for name in shipped_suites():
        suite = read_suite(name)
        table.add_row(name, escape(suite.title), str(len(suite.cells)))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"agents: {', '.join(contender_names())}, and your own as module:Class")


def show(results: Annotated[Path, tyro.conf.arg(metavar="RESULTS")], /, *, metric: str | None = None) -> None:
    """Show what a results folder holds, with intervals.

    Args:
        results: the folder; it may still be filling.
        metric: what agents are held against each other by; default greedy/accuracy, or greedy/reward where there is none.
    """
    from benchmarks.harness.compare import show_tables
    from benchmarks.harness.records import CLAIMS, PROGRAMS
    from benchmarks.harness.results import load_results

    verdicts = _verdicts(results)
    loaded = load_results(results)
    played = any(result.cell.environment not in (CLAIMS, PROGRAMS) for result in loaded.cells)
    _print_tables([*(show_tables(loaded, metric=metric) if played or not verdicts else []), *verdicts])


def compare(
    results: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RESULTS ...")],
    /,
    *,
    metric: str | None = None,
    allow: Parts = (),
) -> None:
    """Compare the agents of several results folders, if they were run under the same conditions.

    Args:
        results: two folders or more.
        metric: what to compare; default as in show.
        allow: parts of the conditions that may differ, such as hardware.
    """
    from benchmarks.harness.compare import compare_tables
    from benchmarks.harness.results import load_results

    if len(results) < 2:
        raise ValueError("name two results folders or more; one alone is shown by `textenv bench show`")
    _print_tables(compare_tables([load_results(folder) for folder in results], metric=metric, allow=allow))


def speed(
    *,
    only: tuple[str, ...] = (),
    rounds: int = 5,
    threads: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    quick: bool = False,
    out: Path | None = None,
) -> None:
    """Measure speed beside that of other libraries, in turns, and print ratios with their spread.

    Args:
        only: names of parts; default all: generation, step, arithmetic, logprobs, packing, sync.
        rounds: measurements of each thing; medians and quartiles are shown.
        threads: CPU threads of a tensor operation.
        device: where models run.
        quick: toy sizes, to see that all of it runs; the figures then say nothing.
        out: a markdown file to write the tables to.
    """
    from benchmarks.speed.bench import bench_speed
    from benchmarks.speed.report import Settings

    bench_speed(only, Settings(rounds, threads, device, quick), out)


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_suites,
    "run": run,
    "show": show,
    "compare": compare,
    "speed": speed,
}


def _print_map() -> None:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"  [bold]{name}[/bold]", (command.__doc__ or "").splitlines()[0])
    console = Console(highlight=False)
    console.print(USAGE, soft_wrap=True)
    console.print(table)
    console.print(HINTS, soft_wrap=True)


def _verdicts(results: Path) -> list[Table]:
    """What came of the claims in a results folder, where it has any."""
    from benchmarks.claims.__main__ import table, tell
    from benchmarks.harness.records import CLAIMS, DONE_FILE

    done = any((results / "cells" / CLAIMS).glob(f"*/*/{DONE_FILE}"))
    return [table(tell(results))] if done else []


def _print_tables(tables: list[Table]) -> None:
    console = Console(highlight=False)
    for table in tables:
        console.print(table)
