"""The report of a suite's results."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import rich.table

from benchmarks import statistics
from benchmarks.harness.compare import ACCURACY, show_tables, write_csv
from benchmarks.harness.figures import Cells, by_seed, over_seeds_or_problems
from benchmarks.harness.results import SUITE_FILE, CellResult, Results, load_results
from benchmarks.harness.suite import AGENTS, CLAIMS, ENVIRONMENTS, PROGRAMS
from benchmarks.report.charts import Chart, Line
from benchmarks.report.curves import CURVES, interval_line, numbers, seeds_line
from benchmarks.report.page import Page, Section, Table
from benchmarks.report.rollouts import Allowance, Series, Tokenizers, held_out_series, training_series
from benchmarks.report.runs import at_work, read_metrics
from benchmarks.report.verdicts import VERDICTS_FILE, cards, claims, programs
from benchmarks.statistics import Interval

MEASURED = {
    "greedy/reward": "reward, greedy",
    "greedy/accuracy": "accuracy, greedy",
    "sampled/reward": "reward, sampled",
    "sampled/accuracy": "accuracy, sampled",
    "sampled/entropy": "entropy (nats a token)",
    "sampled/kl": "KL to the start (nats an answer)",
    "sampled/length": "length (tokens)",
    "sampled/cut_share": "share cut",
    "sampled/unique_share": "share of different answers",
    "sampled/ungraded_share": "share ungraded",
}
SPENT = ("episodes", "tokens", "updates", "seconds")
PASS = "sampled/pass@"
OVER = "Bands are 95 % bootstrap intervals over seeds; with a single seed over the held-out problems, where those are known."


def results_page(folder: Path, allowance: Allowance) -> Page:
    """What the results of a suite have to show.

    Raises:
        ValueError: nothing has been measured yet.
    """
    results = load_results(folder)
    others = [*claims(folder), *cards(folder), *programs(results)]
    measured = [cell for cell in results.cells if cell.points]
    told = list(results.problems)
    if any(folder.glob(f"cells/{CLAIMS}/*")) and not (folder / VERDICTS_FILE).exists():
        told.insert(0, f"Claims were tested; to have verdicts on them: python -m benchmarks.claims verdicts {folder}")
    if not measured and not others:
        broken = f" ({'; '.join(told)})" if told else ""
        raise ValueError(f"nothing to report yet: no cell of {folder} has measured a point{broken}")
    count = _count(results)
    over = not count["waiting"] and not count["not ended"]
    how = "running" if at_work(folder) else "stopped"
    going = f"This suite has not ended, it is {how}. The page shows what there was when it was written."
    results = replace(
        results, cells=[cell for cell in results.cells if cell.cell.environment not in (CLAIMS, PROGRAMS)]
    )
    places = {agent: number for number, agent in enumerate(results.agents)}
    return Page(
        title=results.suite_title,
        status=how if not over else "done, with failures" if count["failed"] else "done",
        facts={
            "cells": ", ".join(f"{number} {name}" for name, number in count.items() if number),
            "agents": ", ".join(results.agents),
            "environments": ", ".join(results.environments),
            "seeds": ", ".join(map(str, sorted({cell.cell.seed for cell in results.cells}))),
            **_common(measured, ("budget", "hardware")),
        },
        notices=[*([] if over else [going]), *told],
        sections=[
            *_tables(results),
            *(_learning_curves(results, name, places) for name in results.environments),
            _frontier(results, places),
            _pass_at_k(results, places),
            *(_training(results, name, places) for name in results.environments),
            *others,
            _cells(results),
        ],
        series=list(_series(measured, allowance)),
        write_csv=lambda path: write_csv(results, path),
    )


def _count(results: Results) -> dict[str, int]:
    """How many of the suite's cells are done, have failed, and so on."""
    found = [cell.state for cell in results.cells]
    suite = tomllib.loads((results.folder / SUITE_FILE).read_text(encoding="utf-8"))
    trainings = len(suite.get(AGENTS, ())) * len(suite.get(ENVIRONMENTS, ()))
    claims = len(suite.get(CLAIMS, {}).get("names", ()))
    wanted = len(suite.get("seeds", ())) * (trainings + claims) + len(suite.get(PROGRAMS, ()))
    counts = {"done": found.count("done"), "failed": found.count("failed")}
    return {**counts, "not ended": found.count("killed"), "waiting": max(0, wanted - len(found))}


def _common(cells: Sequence[CellResult], parts: Sequence[str]) -> dict[str, str]:
    """Parts of the provenance that are the same everywhere."""
    values = {part: list({cell.provenance.get(part, "") for cell in cells}) for part in parts}
    return {part: found[0] for part, found in values.items() if len(found) == 1}


# What was measured at the points


def _tables(results: Results) -> Iterator[Section]:
    done = [cell for cell in results.cells if cell.state == "done" and cell.points]
    if done:
        metric = (
            ACCURACY if any(cell.points[-1].metrics.get(ACCURACY) is not None for cell in done) else "greedy/reward"
        )
        tables = show_tables(results, metric=metric)
        yield Section("Results", tables=[_from_rich(table) for table in tables])


def _from_rich(table: rich.table.Table) -> Table:
    columns = [str(column.header) for column in table.columns]
    rows = [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    return Table(columns, rows, str(table.title), str(table.caption or ""))


def _begun(results: Results, environment: str, agent: str) -> Cells:
    """The cells that have a point, done or not, by seed."""
    return {
        cell.cell.seed: cell
        for cell in results.cells
        if (cell.cell.environment, cell.cell.agent) == (environment, agent) and cell.points
    }


def _until(cells: Cells, point: int) -> Cells:
    """The cells as they were after that point, those that have it."""
    return {
        seed: replace(cell, points=cell.points[: point + 1]) for seed, cell in cells.items() if len(cell.points) > point
    }


def _interval(cells: Cells, metric: str) -> Interval | None:
    values, _ = over_seeds_or_problems(cells, metric)
    return statistics.mean([values]) if values else None


def _mean(cells: Cells, metric: str) -> float:
    values = by_seed(cells, metric).values()
    return sum(values) / len(values)


def _at_points(cells: Cells, metric: str) -> list[tuple[Cells, Interval]]:
    """The cells of an agent as they were at each of its points, and what they measured there; points without it left out."""
    points = [_until(cells, point) for point in range(max((len(cell.points) for cell in cells.values()), default=0))]
    return [(at, interval) for at in points if (interval := _interval(at, metric)) is not None]


def _line(name: str, number: int, x: str, known: Sequence[tuple[Cells, Interval]]) -> Line | None:
    """What was measured at points, against another figure there; None if that one was not."""
    known = [(at, interval) for at, interval in known if by_seed(at, x)]
    if not known:
        return None
    notes = [f"{next(iter(at.values())).points[-1].share:.0%} of the budget" for at, _ in known]
    return interval_line(name, number, [_mean(at, x) for at, _ in known], [interval for _, interval in known], notes)


def _charts(
    results: Results, environment: str, places: Mapping[str, int], metric: str, x_kinds: Sequence[str]
) -> Iterator[tuple[str, list[Line]]]:
    """For each figure to draw to the right that was measured: its name, and a line for each agent."""
    known = {agent: _at_points(_begun(results, environment, agent), metric) for agent in places}
    for x in x_kinds:
        lines = [_line(agent, number, x, known[agent]) for agent, number in places.items()]
        if drawn := [line for line in lines if line is not None]:
            yield x, drawn


def _learning_curves(results: Results, environment: str, places: Mapping[str, int]) -> Section:
    charts = [
        Chart(title, x, lines, x_kind=x)
        for metric, title in MEASURED.items()
        for x, lines in _charts(results, environment, places, metric, SPENT)
        if any(len(line.x_N) > 1 for line in lines)
    ]
    return Section(f"Learning curves: {environment}", [f"On held-out problems. {OVER}"], charts)


def _frontier(results: Results, places: Mapping[str, int]) -> Section:
    charts = [
        Chart(environment, "KL to the start (nats an answer, drawn by its square root)", lines, x_scale="sqrt")
        for environment in results.environments
        for _, lines in _charts(results, environment, places, "sampled/reward", ["sampled/kl"])
    ]
    text = f"What is earned, sampled, for how far the policy has moved; a dot is an evaluation point. {OVER}"
    return Section("Reward–KL frontier", [text], charts)


def _pass_at_k(results: Results, places: Mapping[str, int]) -> Section:
    charts = []
    for environment in results.environments:
        ends = [_pass_line(_begun(results, environment, agent), agent, number) for agent, number in places.items()]
        lines = [line for line in ends if line is not None]
        starts = [_until(_begun(results, environment, agent), 0) for agent in places]
        start = next((cells for cells in starts if any(cell.points[-1].share == 0 for cell in cells.values())), None)
        if lines and start and (line := _pass_line(start, "the start", len(places))) is not None:
            lines.append(line)
        if lines:
            charts.append(Chart(environment, "k", lines, x_scale="log2"))
    text = f"The chance that one of k samples is right, without bias, at the end of the budget. {OVER}"
    return Section("pass@k", [text], charts)


def _pass_line(cells: Cells, name: str, number: int) -> Line | None:
    last = [cell.points[-1].metrics for cell in cells.values()]
    ks = sorted({int(metric.removeprefix(PASS)) for metrics in last for metric in metrics if metric.startswith(PASS)})
    known = [(k, interval) for k in ks if (interval := _interval(cells, f"{PASS}{k}")) is not None]
    return interval_line(name, number, [k for k, _ in known], [interval for _, interval in known]) if known else None


# What was logged while training


def _training(results: Results, environment: str, places: Mapping[str, int]) -> Section:
    """From the runs of those agents that keep one."""
    runs = {
        agent: [
            steps
            for cell in _begun(results, environment, agent).values()
            if (steps := read_metrics(cell.folder / "run"))
        ]
        for agent in places
    }
    furthest = max((steps[-1].get("episodes") or 0 for runs_S in runs.values() for steps in runs_S), default=0)
    charts = []
    for metric, title in CURVES.items():
        lines = []
        for agent, number in places.items():
            found = [xy_N2 for steps in runs[agent] if len(xy_N2 := numbers(steps, "episodes", metric))]
            if found:
                lines.append(seeds_line(agent, number, found, furthest))
        if lines:
            charts.append(Chart(title, "episodes", lines))
    text = "What the trainings themselves logged of the episodes that they learned from, means of stretches. Bands are 95 % "
    return Section(f"Training: {environment}", [text + "bootstrap intervals over seeds."], charts)


# The cells themselves


def _cells(results: Results) -> Section:
    rows = [
        [
            cell.cell.environment,
            cell.cell.agent,
            str(cell.cell.seed),
            cell.state,
            str(len(cell.points)),
            cell.error or "",
        ]
        for cell in results.cells
    ]
    parts = list(dict.fromkeys(chain.from_iterable(cell.provenance for cell in results.cells)))
    alike: dict[tuple[str, ...], list[str]] = {}
    for cell in results.cells:
        alike.setdefault(tuple(cell.provenance.get(part, "") for part in parts), []).append(cell.cell.name)
    provenance = [["cells", *parts], *([_few(names), *values] for values, names in alike.items())]
    return Section(
        "Cells",
        folded=[
            Table(["environment", "agent", "seed", "state", "points", "error"], rows, f"All {len(rows)} cells"),
            Table(provenance[0], provenance[1:], "Provenance"),
        ],
    )


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, and {len(names) - 1} more"


def _series(cells: Sequence[CellResult], allowance: Allowance) -> Iterator[Series]:
    """What was written for held-out problems, then what the runs kept of their training."""
    yield from held_out_series(cells, allowance)
    runs = [cell for cell in cells if any(cell.folder.glob("run/rollouts/*.jsonl.gz"))]
    tokenizers = Tokenizers()
    for cell in runs:
        group = f"training {cell.cell.environment} {cell.cell.seed}"
        series = training_series(
            f"{cell.cell.name}: training", group, cell.folder / "run", allowance, len(runs), tokenizers
        )
        if series is not None:
            yield series
