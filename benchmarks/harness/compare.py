"""Tables of results: of one folder, or of several held against each other where that is fair.

Nothing is printed without an interval. It is over seeds; with a single seed it is over the held-out problems, where the figure
is known for each of them, and marked with a star. What has neither is a dash.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from benchmarks import statistics
from benchmarks.harness.figures import (
    COUNTS,
    Cells,
    area,
    at,
    by_seed,
    curve,
    final,
    over_seeds_or_problems,
    paired,
    share_to,
)
from benchmarks.harness.records import LOG_FILE
from benchmarks.harness.results import CellResult, Results
from benchmarks.harness.toml_file import nearest

ACCURACY = "greedy/accuracy"
FIGURES = {
    "what was learned": (ACCURACY, "greedy/reward", "sampled/accuracy", "sampled/reward"),
    "how it answers": (
        "sampled/kl",
        "sampled/entropy",
        "sampled/length",
        "sampled/cut_share",
        "sampled/ungraded_share",
        "sampled/unique_share",
    ),
    "what it took": ("tokens", "seconds", "tokens_per_second", "peak_memory_mb", "energy_j"),
}
"""The tables of an environment; the first one also has the largest pass@k."""
MACHINE_METRICS = ("seconds", "measuring_seconds", "tokens_per_second", "memory_peak_mb", "peak_memory_mb", "energy_j")
"""Those that the machine decides, and the libraries on it."""
MACHINES_OWN = ("libraries", "hardware")
CONTENDERS_OWN = ("settings",)
NONE = "–"
NONE_NOTE = f"{NONE} not measured, or one seed, which has no interval."
ONE_SEED_NOTE = "* over the problems of one seed: it does not tell how another training would end."
PAIRS_NOTE = (
    "Differences are paired by seed; p is of a permutation test, at least 2 / 2^n with n pairs, and p (Holm) is corrected for "
    "the number of agents."
)
TIME_NOTE = "Who does not reach it counts with the whole budget; who was only evaluated needs none."
FORMS = {
    "accuracy": ".1%",
    "share": ".1%",
    "length": ".1f",
    "seconds": ",.1f",
    "tokens": ",.0f",
    "episodes": ",.0f",
    "updates": ",.0f",
    "second": ",.0f",
    "mb": ",.0f",
    "j": ",.0f",
}
"""How figures are written, by the last word of a metric's name."""


@dataclass(frozen=True)
class Entrant:
    """A row of the tables: an agent of one of the folders.

    Attributes:
        label: its name in the tables.
        cells: those that are done, by environment and seed.
    """

    label: str
    cells: Mapping[str, Cells]


@dataclass(frozen=True)
class Difference:
    """A part of the provenance in which two cells differ."""

    part: str
    cells: tuple[CellResult, CellResult]

    def __str__(self) -> str:
        told = [cell.provenance.get(self.part, "not told") for cell in self.cells]
        first, second = (
            f"{_unlike(text, other)} for {cell.cell.name} in {cell.folder}"
            for text, other, cell in zip(told, told[::-1], self.cells, strict=True)
        )
        return f"{self.part} is {first}, but {second}"


def _unlike(text: str, other: str) -> str:
    """What of a list with commas is not in the other one; all of it if that is nothing."""
    others = other.split(", ")
    return ", ".join(item for item in text.split(", ") if item not in others) or text


def show_tables(results: Results, *, metric: str | None = None) -> list[Table]:
    """What the agents of a folder have come to at the end of their budget.

    For each environment what was learned, how the agents answer, and what it took. Over all environments ``metric``:
    interquartile mean, area under the learning curve, share of the budget to a threshold, and how each agent stands against
    the first one. Last, what is missing.

    Args:
        results: what to show.
        metric: as in the points, or ``seconds``, ``tokens``, ``peak_memory_mb`` and the like; default the greedy accuracy, or
            where no reward tells right from wrong the greedy reward.

    Raises:
        ValueError: no cell is done, or none has that metric.
    """
    entrants = _entrants([results])
    metric = _check_metric(entrants, metric)
    notes = [f"Not all was run alike: {difference}." for difference in _differences(entrants)]
    tables = [table for name in _environments(entrants) for table in _environment_tables(entrants, name)]
    return [*tables, *_overall_tables(entrants, metric, notes), *_missing_tables([results])]


def compare_tables(results: Sequence[Results], *, metric: str | None = None, allow: Sequence[str] = ()) -> list[Table]:
    """Hold the agents of one or several folders against the first of them, if they were run under the same conditions.

    Cells on one environment that differ in a part of their provenance are refused. Settings may differ, since they are what
    is compared; libraries and hardware may where they do not decide the figure, which is then said below the table.

    Args:
        results: at least one; the environments that all of them have are compared.
        metric: see :func:`show_tables`.
        allow: parts of the provenance that may differ all the same.

    Raises:
        ValueError: a part differs (the message tells both values), there is no common environment, or no such metric or part.
    """
    entrants = _entrants(results)
    metric = _check_metric(entrants, metric)
    _check_known("part of the provenance", allow, _parts(entrants))
    everywhere = [name for name in _environments(entrants) if all(name in folder.environments for folder in results)]
    if not everywhere:
        raise ValueError(f"the folders have no environment in common: {', '.join(_environments(entrants))}")
    notes = [
        f"{name} is not in all folders, and left out." for name in _environments(entrants) if name not in everywhere
    ]
    entrants = [
        Entrant(one.label, {name: one.cells[name] for name in everywhere if name in one.cells}) for one in entrants
    ]
    for difference in _differences(entrants):
        harmless = difference.part in MACHINES_OWN and not _machine_decides(entrants, metric)
        if not harmless and difference.part not in allow:
            raise ValueError(
                f"these results cannot be compared: {difference}. Run one of them again under the conditions of the other, or "
                f"compare all the same with --allow {difference.part}"
            )
        notes.append(f"{'Should not matter here' if harmless else 'Allowed'}: {difference}.")
    tables = []
    if len(everywhere) > 1:
        tables = [_against_first_table([e for e in entrants if name in e.cells], [name], metric) for name in everywhere]
    return [*tables, *_overall_tables(entrants, metric, notes), *_missing_tables(results)]


def write_csv(results: Results, path: str | Path) -> None:
    """Write every point of every cell as it was measured: a row a point, a column a figure."""
    points = [(result, point) for result in results.cells for point in result.points]
    metrics = sorted({name for _, point in points for name in point.metrics})
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["environment", "agent", "seed", "state", "share", *COUNTS, *metrics])
        for result, point in points:
            cell = result.cell
            figures = [at(point, name) for name in (*COUNTS, *metrics)]
            writer.writerow([cell.environment, cell.agent, cell.seed, result.state, point.share, *figures])


def markdown(tables: Iterable[Table]) -> str:
    """Tables as GitHub's markdown."""
    return "\n\n".join(map(_markdown, tables)) + "\n"


def _markdown(table: Table) -> str:
    headers = [_plain(column.header) for column in table.columns]
    rows = zip(*(map(_plain, column.cells) for column in table.columns), strict=True)
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(part for part in (f"### {_plain(table.title)}", body, _plain(table.caption)) if part)


def _plain(content: object) -> str:
    return "" if content is None else str(content).replace("|", "\\|").replace("\n", "<br>")


# Who is compared, and whether that is fair


def _entrants(results: Sequence[Results]) -> list[Entrant]:
    """The agents of all folders that have finished cells with points; the folder is named where several have the agent."""
    entrants = []
    for folder in results:
        for agent in folder.agents:
            found = {name: folder.done(name, agent) for name in folder.environments}
            cells = {name: by_seed for name, by_seed in found.items() if by_seed}
            shared = sum(agent in other.agents for other in results) > 1
            if cells:
                entrants.append(Entrant(f"{agent} ({folder.folder})" if shared else agent, cells))
    if not entrants:
        folders = ", ".join(str(folder.folder) for folder in results)
        raise ValueError(f"no agent has finished a cell in {folders}; `textenv bench run SUITE --out FOLDER` runs them")
    return entrants


def _environments(entrants: Iterable[Entrant]) -> list[str]:
    return list(dict.fromkeys(name for entrant in entrants for name in entrant.cells))


def _cells(entrants: Iterable[Entrant], environment: str | None = None) -> list[CellResult]:
    return [
        cell
        for entrant in entrants
        for name, cells in entrant.cells.items()
        for cell in cells.values()
        if environment in (None, name)
    ]


def _parts(entrants: Iterable[Entrant]) -> list[str]:
    return list(dict.fromkeys(part for cell in _cells(entrants) for part in cell.provenance))


def _differences(entrants: Sequence[Entrant]) -> list[Difference]:
    """On each environment the first difference in each part; contenders differ in their settings, seeds of one do not."""
    found: dict[tuple[str, str], Difference] = {}
    for name in _environments(entrants):
        cells = [(entrant, cell) for entrant in entrants for cell in entrant.cells.get(name, {}).values()]
        for part in _parts(entrants):
            like: dict[str, CellResult] = {}
            for entrant, cell in cells:
                first = like.setdefault(entrant.label if part in CONTENDERS_OWN else "", cell)
                if first.provenance.get(part) != cell.provenance.get(part):
                    found.setdefault((name, part), Difference(part, (first, cell)))
    return list(found.values())


def _machine_decides(entrants: Iterable[Entrant], metric: str) -> bool:
    """Whether a figure is one of time or memory, or the budget was a time."""
    return metric in MACHINE_METRICS or any("seconds" in cell.provenance.get("budget", "") for cell in _cells(entrants))


def _check_metric(entrants: Iterable[Entrant], metric: str | None) -> str:
    """The metric, once it is sure that some cell has it."""
    cells = _cells(entrants)
    known = {name for cell in cells for names in (cell.points[-1].metrics, cell.done, COUNTS) for name in names}
    measured = sorted(name for name in known if any(final(cell, name) is not None for cell in cells))
    if metric is None:
        metric = ACCURACY if ACCURACY in measured else "greedy/reward"
    _check_known("metric", [metric], known)
    if metric not in measured:
        raise ValueError(f"{metric} was not measured in any cell; there are {', '.join(measured)}")
    return metric


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; {nearest(name, known)}")


# Tables


def _environment_tables(entrants: Sequence[Entrant], environment: str) -> list[Table]:
    """What was learned on an environment, how it answers, and what it took; figures that were never measured are left out."""
    entrants = [entrant for entrant in entrants if environment in entrant.cells]
    cells = _cells(entrants, environment)
    passes = {name for cell in cells for name in cell.points[-1].metrics if name.startswith("sampled/pass@")}
    most = sorted(passes, key=lambda name: int(name.rpartition("@")[2]))[-1:]
    notes = [*_seed_notes(entrants, [environment]), f"Evaluation: {cells[0].provenance.get('evaluation', 'not told')}."]
    tables = []
    for number, (title, metrics) in enumerate(FIGURES.items()):
        measured = [
            metric
            for metric in (*metrics, *(most if number == 0 else ()))
            if any(final(cell, metric) is not None for cell in cells)
        ]
        columns = {metric: [_text(entrant.cells[environment], metric) for entrant in entrants] for metric in measured}
        tables.append(_table(f"{environment}: {title}", entrants, columns, notes))
    return tables


def _overall_tables(entrants: Sequence[Entrant], metric: str, notes: Sequence[str]) -> list[Table]:
    """A metric over all environments, and against the first: a row for each agent that has finished cells on all of them."""
    measured = [
        Entrant(one.label, {name: cells for name, cells in one.cells.items() if by_seed(cells, metric)})
        for one in entrants
    ]
    environments = _environments(measured)
    whole = [entrant for entrant in measured if len(entrant.cells) == len(environments)]
    lacking = [one.label for one in measured if len(one.cells) < len(environments)]
    notes = [*notes, *(f"{label} is left out: it has not finished on all of them." for label in lacking)]
    title = f"{metric} over {_listed(environments)}"
    if not whole:
        return [_table(title, [], {}, notes)]
    finals = [[list(by_seed(one.cells[name], metric).values()) for name in environments] for one in whole]
    columns = {"interquartile mean": [statistics.interquartile_mean(final).text(_form(metric)) for final in finals]}
    if metric not in (*MACHINE_METRICS, *COUNTS):
        curves, told = _curve_columns(whole, environments, metric)
        above = [statistics.probability_of_improvement(final, finals[0]).text(".0%") for final in finals[1:]]
        columns |= {**curves, f"above {whole[0].label}": ["", *above]}
        notes = [told, *notes]
    return [_table(title, whole, columns, notes), _against_first_table(whole, environments, metric)]


def _curve_columns(
    entrants: Sequence[Entrant], environments: Sequence[str], metric: str
) -> tuple[dict[str, list[str]], str]:
    """Of the learning curves: the area under them, and how much of the budget it took to a threshold; and what that is."""
    thresholds = {name: _threshold(entrants, name, metric) for name in environments}
    areas, times, reached = [], [], []
    for entrant in entrants:
        cells_MN = [[cell for cell in entrant.cells[name].values() if curve(cell, metric)[0]] for name in environments]
        areas.append(statistics.mean([[area(cell, metric) for cell in cells] for cells in cells_MN]))
        shares = [
            [share_to(value, cell, metric) for cell in cells]
            for value, cells in zip(thresholds.values(), cells_MN, strict=True)
            if value is not None
        ]
        times.append(statistics.restricted_mean_time(shares, 1.0) if shares else statistics.UNKNOWN)
        reached.append(f"{sum(share <= 1 for part in shares for share in part)} of {sum(map(len, shares))}")
    columns = {
        "area under the curve": [interval.text(_form(metric)) for interval in areas],
        "budget to the threshold": [interval.text(".0%") for interval in times],
        "reached it": reached,
    }
    told = _listed(f"{name} {value:{_form(metric)}}" for name, value in thresholds.items() if value is not None)
    return (
        columns,
        f"Threshold, half-way from the start to the best end: {told or 'none, as nobody improved'}. {TIME_NOTE}",
    )


def _threshold(entrants: Sequence[Entrant], environment: str, metric: str) -> float | None:
    """Half-way from the mean start to the end of the agent that ends best on an environment; None where nobody improved."""
    curves = [curve(cell, metric)[1] for cell in _cells(entrants, environment)]
    starts = [values[0] for values in curves if len(values) > 1]  # who was only evaluated may be more than the start
    end = max(np.mean(list(by_seed(entrant.cells[environment], metric).values())) for entrant in entrants)
    return float(np.mean(starts) + end) / 2 if starts and end > np.mean(starts) else None


def _against_first_table(entrants: Sequence[Entrant], environments: Sequence[str], metric: str) -> Table:
    """How a metric of each agent stands against that of the first; p-values are corrected for the number of agents."""
    found = [_difference(entrant, entrants[0], environments, metric) for entrant in entrants[1:]]
    corrected = iter(statistics.holm([difference.p for difference, _ in found if difference is not None]))
    rows = [("", "", "", "")]
    for difference, star in found:
        if difference is None:
            rows.append((NONE, "0", "", ""))
        else:
            text = difference.difference.text(f"+{_form(metric)}")
            rows.append((text + star, f"{difference.pairs}{star}", f"{difference.p:.3f}", f"{next(corrected):.3f}"))
    headers = [f"less {entrants[0].label}", "pairs", "p", "p (Holm)"]
    columns = dict(zip(headers, zip(*rows, strict=True), strict=True))
    if len(environments) == 1:
        columns = {metric: tuple(_text(entrant.cells[environments[0]], metric) for entrant in entrants)} | columns
    title = f"{metric} against {entrants[0].label}, over {_listed(environments)}"
    return _table(title, entrants, columns, [*_seed_notes(entrants, environments), PAIRS_NOTE])


def _table(
    title: str, entrants: Sequence[Entrant], columns: Mapping[str, Sequence[str]], notes: Sequence[str]
) -> Table:
    """A row an agent, a column a figure; what the marks in it mean is told below."""
    # As Text, since rich reads brackets in a string as its markup.
    texts = [text for column in columns.values() for text in column]
    marks = [ONE_SEED_NOTE] * any("*" in text for text in texts) + [NONE_NOTE] * (NONE in texts)
    table = Table("", title=Text(title), caption=Text("\n".join([*notes, *marks])), caption_justify="left")
    for header in columns:
        table.add_column(Text(header), justify="right", overflow="fold")
    for entrant, *cells in zip(entrants, *columns.values(), strict=True):
        table.add_row(Text(entrant.label), *cells)
    return table


def _missing_tables(results: Sequence[Results]) -> list[Table]:
    """What failed, was not finished or is broken; no table if there is nothing."""
    table = Table("left out", title="not in these tables")
    for folder in results:
        for result in folder.cells:
            if result.state == "failed":
                table.add_row(Text(f"{result.cell.name} failed: {result.error}; see {result.folder / LOG_FILE}"))
        for problem in folder.problems:
            table.add_row(Text(problem))
    return [table] if table.row_count else []


def _seed_notes(entrants: Sequence[Entrant], environments: Sequence[str]) -> list[str]:
    """What the figures are means of, and which agent lacks a seed that another one has."""
    notes = []
    for name in environments:
        cells = {entrant.label: entrant.cells[name] for entrant in entrants if name in entrant.cells}
        seeds = sorted({seed for one in cells.values() for seed in one})
        notes.append(f"{name}: means at the end of the budget, with 95 % intervals; seeds {_listed(seeds)}.")
        for label, one in cells.items():
            missing = [seed for seed in seeds if seed not in one]
            if missing:
                notes.append(
                    f"{label} lacks the seeds {_listed(missing)} on {name}: pairs are only of those that both have."
                )
    return notes


def _text(cells: Cells, metric: str) -> str:
    values, of_problems = over_seeds_or_problems(cells, metric)
    interval = statistics.mean([values]) if values else statistics.UNKNOWN
    if not interval.known:
        return NONE
    measured = len(by_seed(cells, metric))
    fewer = f" of {measured} seeds" if measured < len(cells) else ""
    return interval.text(_form(metric)) + "*" * of_problems + fewer


def _difference(
    ours: Entrant, first: Entrant, environments: Sequence[str], metric: str
) -> tuple[statistics.PairedDifference | None, str]:
    """An agent less the first one over the seeds that both have, and a star if it is over the problems of one seed.

    None where an environment has no seed that both have, or pairs problems while another pairs seeds.
    """
    sides = [paired(ours.cells[name], first.cells[name], metric) for name in environments]
    of_problems = {len(seeds) == 1 and len(values) > 1 for seeds, values, _ in sides}
    if len(of_problems) > 1 or not all(seeds for seeds, _, _ in sides):
        return None, ""
    difference = statistics.paired_difference([our for _, our, _ in sides], [their for _, _, their in sides])
    return difference, "*" * (of_problems == {True})


def _form(metric: str) -> str:
    return ".1%" if "pass@" in metric else FORMS.get(metric.replace("/", "_").rpartition("_")[2], ".3f")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
