"""A training in the terminal, seen from another window. What models wrote is shown as plain text, whatever is in it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from benchmarks.report.charts import short
from benchmarks.report.curves import CURVES
from benchmarks.report.rollouts import UNREADABLE, read_rows
from benchmarks.report.runs import at_work, ended, is_run, read_alarms, read_metrics, read_run
from benchmarks.report.text import shortened
from rewards.terminal import visible

LONGEST = 400
RECENT = 20
"""Steps that the time left is reckoned from."""
DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))
"""Of a braille character: its two columns, each from the bottom up."""


def watch_run(folder: Path, every: float = 2.0) -> None:
    """Show the training in ``folder`` until it has ended; once, where there is no terminal.

    Args:
        folder: of the run.
        every: seconds between looks.

    Raises:
        ValueError: there is no run.
    """
    if every <= 0:
        raise ValueError(f"--every takes seconds above 0, got {every:g}")
    if not is_run(folder):
        raise ValueError(f"no run in {folder}; give the folder that `textenv train` printed as its own")
    console = Console()
    if not console.is_terminal:
        console.print(picture(folder))
        return
    try:
        with Live(picture(folder), console=console, auto_refresh=False) as live:
            while not ended(folder):
                time.sleep(every)
                live.update(picture(folder), refresh=True)
            live.update(picture(folder), refresh=True)  # what came between the last look and the end
    except KeyboardInterrupt:
        return


def picture(folder: Path) -> RenderableType:
    """What there is to see of a run now."""
    config, steps = read_run(folder), read_metrics(folder)
    title = Text(visible(f"{config['agent']} on {config['env']}"), style="bold")
    if not steps:
        return Group(title, Text("no step yet"))
    return Group(title, _progress(folder, config, steps), *_alarms(folder), _curves(steps), *_samples(folder))


def _progress(folder: Path, config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> RenderableType:
    done, total = steps[-1].get("episodes") or 0, config["settings"].get("total_episodes") or 0
    parts = [f"step {steps[-1]['step']:,}", f"{done:,} of {total:,} episodes" if total else f"{done:,} episodes"]
    if ended(folder):
        parts.append("done")
    elif not at_work(folder):
        parts.append("stopped")
    elif (left := seconds_left(steps, total)) is not None:
        parts.append(f"{_clock(left)} left")
    if not total:
        return Text("  ".join(parts))
    line = Table.grid(padding=(0, 2))
    line.add_row(Text("  ".join(parts)), ProgressBar(total=total, completed=done, width=20))
    return line


def seconds_left(steps: Sequence[Mapping[str, Any]], total: int) -> float | None:
    """Until ``total`` episodes are played, as fast as in the last steps; None where these do not tell."""
    recent = [
        step for step in steps[-RECENT - 1 :] if step.get("episodes") is not None and step.get("seconds") is not None
    ]
    if len(recent) < 2:
        return None
    played = recent[-1]["episodes"] - recent[0]["episodes"]
    return (
        sum(step["seconds"] for step in recent[1:]) * max(0, total - recent[-1]["episodes"]) / played
        if played
        else None
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _alarms(folder: Path) -> list[RenderableType]:
    """Those that are on."""
    last = {alarm["rule"]: alarm for alarm in read_alarms(folder)}
    sentences = [f"ALARM since step {one['step']}: {one['sentence']}" for one in last.values() if not one["over"]]
    return [Text(visible(sentence), style="red") for sentence in sentences]


def _curves(steps: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*(Column(no_wrap=True) for _ in range(3)), box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, title in CURVES.items():
        values = [value for step in steps if (value := step.get(name)) is not None]
        if values:
            now = f"{short(values[-1])}\n{short(min(values))} to {short(max(values))}"
            table.add_row(title, Text("\n".join(braille(values)), style="cyan"), Text(now))
    return table


def braille(values_N: Sequence[float], width: int = 30, height: int = 2) -> list[str]:
    """A curve in braille dots, ``height`` lines of at most ``width`` characters; many values are averaged over stretches.

    Example:
        >>> braille([0, 1, 2, 3], width=2, height=1)
        ['⡠⠊']
    """
    parts = np.array_split(np.asarray(values_N, dtype=float), min(len(values_N), 2 * width))
    mean_N = np.array([part.mean() for part in parts])
    spread = float(np.ptp(mean_N)) or 1.0
    level_N = np.rint((mean_N - mean_N.min()) / spread * (4 * height - 1)).astype(int)
    cells = np.zeros((height, (len(level_N) + 1) // 2), dtype=int)
    for i, level in enumerate(level_N):
        # A steep piece is drawn through: from where the curve came, that point left out, to where it is.
        before = level_N[i - 1] if i else level
        low, high = (before + 1, level) if before < level else (level, max(level, before - 1))
        for dot in range(low, high + 1):
            cells[height - 1 - dot // 4, i // 2] |= DOTS[i % 2][dot % 4]
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def _samples(folder: Path) -> list[RenderableType]:
    """Two completions of the newest rollout, of different worth where there are such."""
    files = sorted(folder.glob("rollouts/[0-9]*.jsonl.gz"))
    if not files:
        return []
    try:
        first, *others = read_rows(files[-1])
        other = next((row for row in others if row["return"] != first["return"]), *others[:1] or [first])
        return [_sample(row) for row in (first, other)]
    except UNREADABLE as error:
        return [Text(visible(f"{files[-1].name} cannot be read: {error!r}"))]


def _sample(row: Mapping[str, Any]) -> Panel:
    worth = "ungraded" if row["return"] is None else f"reward {row['return']:.3g}"
    text = Text(visible(shortened(str(row["prompt"]).strip(), LONGEST)), style="dim")
    text.append("\n" + visible(shortened("\n".join(row["completions"]), LONGEST)), style="not dim")
    return Panel(text, title=Text(f"{worth}, {visible(row['finish'])}"), title_align="left", width=100)
