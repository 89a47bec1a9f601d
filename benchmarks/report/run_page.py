"""The report of one run."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.core.evaluate import Evaluation
from agents.core.progress import WATCHED
from benchmarks import statistics
from benchmarks.report.charts import Chart
from benchmarks.report.curves import BINS, CURVES, interval_line, numbers, run_line
from benchmarks.report.page import Page, Section, Table
from benchmarks.report.rollouts import (
    UNREADABLE,
    Allowance,
    Tokenizers,
    evaluation_series,
    right_by_group,
    training_series,
)
from benchmarks.report.runs import at_work, ended, read_alarms, read_metrics, read_run
from rewards.terminal import visible

FIRST = ("reward", "accuracy", *WATCHED, "nll", "entropy", "new_tokens_mean", "kl", "cut_share")
"""The metrics that people look at first, and beginnings of the names of those that somebody asked for."""


def run_page(folder: Path, allowance: Allowance) -> Page:
    """What a run has to show.

    Raises:
        ValueError: it has not logged a step yet.
    """
    config, steps = read_run(folder), read_metrics(folder)
    if not steps:
        raise ValueError(
            f"nothing to report yet: {folder} holds a run that has not logged a step; wait for its first one"
        )
    evaluations = {
        moment: found for moment in ("before", "after") if (found := _evaluation(folder, moment)) is not None
    }
    if not ended(folder):
        evaluations.pop("after", None)
    series = [
        training_series("rollouts of training", "", folder, allowance, 1, Tokenizers()),
        evaluation_series(evaluations),
    ]
    return Page(
        title=f"{config['agent']} on {config['env']}",
        status="done" if ended(folder) else "running" if at_work(folder) else "stopped",
        facts=_facts(config, steps, evaluations),
        notices=[] if ended(folder) else [_not_ended(folder, config, steps)],
        sections=[
            Section("Held-out problems", tables=[_before_after(evaluations)] if evaluations else []),
            _alarms(folder),
            _curves(steps),
            _frontier(steps),
            _pass_at_k(folder),
            Section(
                "Settings", folded=[_pairs("settings", config["settings"]), _pairs("versions", config["versions"])]
            ),
        ],
        series=[one for one in series if one is not None],
        write_csv=lambda path: _write_csv(steps, path),
    )


def _evaluation(folder: Path, moment: str) -> Evaluation | None:
    path = folder / f"evaluation_{moment}.json"
    return Evaluation(**json.loads(path.read_text())) if path.exists() else None


def _not_ended(folder: Path, config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime((folder / "metrics.jsonl").stat().st_mtime))
    done, total = steps[-1].get("episodes"), config["settings"].get("total_episodes")
    of = f", {done:,} of {total:,} episodes" if done and total else ""
    how = "is running" if at_work(folder) else f"was stopped, and goes on with: textenv train --resume {folder}"
    return (
        f"This training has not ended, it {how}. Its last step is {steps[-1]['step']}{of}, written {written}. The page shows "
        "what there was then."
    )


def _facts(
    config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Evaluation]
) -> dict[str, str]:
    settings = config["settings"]
    facts = {"model": f"{settings.get('model')}, {config['parameters']:,} parameters"}
    for name in ("accuracy", "reward"):
        told = [getattr(evaluation, f"{name}_text")() for evaluation in evaluations.values()]
        if told:
            facts[f"held-out {name}"] = " → ".join(told)
    episodes = steps[-1].get("episodes")
    facts["steps"] = f"{steps[-1]['step']:,}" + (f", {episodes:,} episodes" if episodes else "")
    facts["seed"] = str(settings.get("seed"))
    facts["device"] = config["device"]
    return facts


def _before_after(evaluations: Mapping[str, Evaluation]) -> Table:
    rows = [["accuracy", *(one.accuracy_text() for one in evaluations.values())]]
    rows.append(["reward", *(one.reward_text() for one in evaluations.values())])
    rows.append(["ungraded", *(str(one.ungraded) for one in evaluations.values())])
    episodes = max(one.episodes for one in evaluations.values())
    return Table(["", *evaluations], rows, f"{episodes:,} problems, answered greedily; 95 % intervals")


def _alarms(folder: Path) -> Section:
    rows = [
        [
            f"{alarm['step']:,}",
            f"{alarm['rule']}{' is over' * alarm['over']}",
            alarm["sentence"],
            f"{alarm['value']:.3g}, threshold {alarm['threshold']:g}",
            " ▪ ".join(alarm["samples"]),
        ]
        for alarm in read_alarms(folder)
    ]
    return Section(
        "Alarms", tables=[Table(["step", "alarm", "what is wrong", "measured", "completions"], rows)] if rows else []
    )


def _curves(steps: Sequence[Mapping[str, Any]]) -> Section:
    """What people look at first, and all else that was logged on demand."""
    names = [name for name in _metrics(steps) if name != "step"]
    first = [
        name for wanted in FIRST for name in names if name == wanted or (wanted in WATCHED and name.startswith(wanted))
    ]
    first = list(dict.fromkeys(first))
    charts = {name: chart for name in (*first, *names) if (chart := _chart(steps, name)) is not None}
    text = f"Of {len(steps):,} training steps, each measured on what it sampled, before it learned from that."
    if len(steps) > BINS:
        text += f" A point is the mean of some {round(len(steps) / BINS)} steps; the band holds 80 % of them."
    rest = [chart for name, chart in charts.items() if name not in first]
    return Section("Learning curves", [text], [charts[name] for name in first if name in charts], folded_charts=rest)


def _chart(steps: Sequence[Mapping[str, Any]], name: str) -> Chart | None:
    xy_N2 = numbers(steps, "step", name)
    return Chart(CURVES.get(name, name), "step", [run_line(name, 0, xy_N2)]) if len(xy_N2) else None


def _frontier(steps: Sequence[Mapping[str, Any]]) -> Section:
    xy_N2 = numbers(steps, "kl", "reward")
    if len(xy_N2) < 2:
        return Section("Reward and KL")
    line = run_line("reward", 0, xy_N2)
    chart = Chart("reward", "KL to the start (nats an answer, drawn by its square root)", [line], x_scale="sqrt")
    return Section(
        "Reward and KL", ["What was earned for how far the policy has moved, in the order of the steps."], [chart]
    )


def _pass_at_k(folder: Path) -> Section:
    """From the groups of the first and the last step that was kept."""
    files = sorted(folder.glob("rollouts/[0-9]*.jsonl.gz"))
    lines = []
    for number, path in enumerate(dict.fromkeys([*files[:1], *files[-1:]])):
        try:
            groups = right_by_group(path)
        except UNREADABLE:  # as the notes of its rollouts say
            continue
        samples = min((len(group) for group in groups), default=0)
        if len(groups) < 2 or samples < 2:
            continue
        ks = [2**power for power in range(samples.bit_length())]
        total_P, right_P = [len(group) for group in groups], [sum(group) for group in groups]
        intervals = [statistics.mean([statistics.pass_at_k(total_P, right_P, k)]) for k in ks]
        lines.append(interval_line(f"step {int(path.name.split('.')[0])}", number, ks, intervals))
    if not lines:
        return Section("pass@k")
    text = (
        "The chance that one of k samples is right, without bias, on the problems of the first and of the last step, which "
        "are training problems; 95 % intervals over problems."
    )
    return Section("pass@k", [text], [Chart("pass@k", "k", lines, x_scale="log2")])


def _pairs(title: str, content: Mapping[str, Any]) -> Table:
    return Table(["name", "value"], [[name, str(value)] for name, value in content.items()], title)


def _write_csv(steps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row a step, a column a metric."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        names = _metrics(steps)
        csv.writer(file, lineterminator="\n").writerow(map(visible, names))
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writerows(steps)


def _metrics(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for step in steps for name in step))
