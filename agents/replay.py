"""`textenv replay`: a step of a run once more from what is on disk, or its episodes under another reward.

Reading a run needs nothing heavy: :func:`read_rollout` for the episodes of a step. torch is imported where a step is taken.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from agents.commands import _agent_class
from agents.core.records import (
    Row,
    checkpoint_before,
    read_config,
    read_metrics,
    read_rollout,
    rollout_path,
    steps_of,
    value_of,
)
from rewards import Reward, RewardError, Score, score_samples
from rewards.intervals import Share
from rewards.options import parse_options
from textenv.cli import import_module
from textenv.scoring import RewardOptions, make_reward, sample_of, scored_row

if TYPE_CHECKING:
    from agents.core.replaying import Figure, Taken

SHOWN = 4
"""Changed completions that are shown."""
LONGEST_CELL = 160


def replay(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    step: int | None = None,
    sample_again: bool = False,
    rescore: str | None = None,
    options: RewardOptions = {},  # noqa: B006
    out: Path | None = None,
) -> None:
    """Take a step of a run again and show any difference, or score its episodes with another reward.

    The step is taken on the stored episodes, from the newest checkpoint before it, or from the start of the run; the steps
    between are taken on the way. Figures that differ by more than rounding end it with status 1. The run is only read.

    Args:
        run: the folder of a run, which may still be training.
        step: the step, counted from 1; with rescore default all of them.
        sample_again: also sample the step's episodes again, with its seeds, and say whether they come out as stored. On a CPU
            they do, bit for bit; on a GPU, or from an engine that is not repeatable, few or none may.
        rescore: instead score the stored episodes with this reward, a registered name, and show which verdicts change.
        options: options of that reward.
        out: write the episodes whose verdict changes here, a JSON line each, with step and new score.
    """
    described = read_config(run)
    steps = steps_of(run)
    if step is not None and step not in steps:
        raise ValueError(f"the run in {run} has no step {step}; it has {steps[0]} to {steps[-1]}")
    if rescore is None:
        if step is None or options or out is not None:
            raise ValueError(
                "give the --step to take again, or --rescore REWARD; --options and --out go with --rescore"
            )
        _show_step(run, described, step, sample_again)
        return
    if sample_again:
        raise ValueError("--sample-again goes with a step that is taken again, and not with --rescore")
    if out is not None and (not out.parent.is_dir() or out.resolve().is_relative_to(run.resolve())):
        raise ValueError(f"--out must be a file in a folder that exists, outside of the run, got {out}")
    maker = make_reward(rescore, parse_options(options))
    episodes = rescored(run, maker, steps if step is None else [step], described["settings"])
    print(f"{len(episodes)} episodes of {run} under the reward {rescore!r}")
    _show_rescored(episodes)
    if out is not None:
        _write_changed(out, episodes)
    if all(one.after.value is None for one in episodes):
        raise RewardError(
            f"the reward {rescore!r} could grade none of them; the first error was:\n{episodes[0].after.error}"
        )


# A step once more --------------------------------------------------------------------------------------------------


def _show_step(run: Path, described: Mapping[str, Any], step: int, sample_again: bool) -> None:
    """Raises SystemExit: something differs by more than rounding."""
    taken = replayed(run, described, step, sample_again)
    last, sampled = taken[-1], taken[-1].sampled
    console = Console(highlight=False)
    console.print(_figures_table(last.figures))
    if sample_again:
        console.print(
            f"sampled again, {sampled.tokens} of {sampled.completions} completions come out as stored, with {sampled.scores} "
            f"of the scores, and the log-probabilities of {sampled.logprobs} bit for bit"
        )
    differing = [one for one in taken if one.differing]
    if differing and differing[0] is not last:
        names = ", ".join(differing[0].differing)
        console.print(f"step {differing[0].step}, on the way, differs already: {escape(names)}")
    if last.differing:
        names = ", ".join(last.differing)
        console.print(
            f"{len(last.differing)} of {len(last.figures)} figures differ by more than rounding: {escape(names)}"
        )
    else:
        console.print(f"all {len(last.figures)} figures are as logged, but for rounding")
    if differing or sampled.differs:
        raise SystemExit(1)


def replayed(run: Path, described: Mapping[str, Any], step: int, sample_again: bool = False) -> list[Taken]:
    """Take a step of a run again, after those between it and the newest whole checkpoint before it.

    Raises:
        ValueError: what is needed for it is not there, or cannot be read.
        OSError: a training at work there dropped the checkpoint while it was read.
    """
    from agents.core.replaying import take_again

    for module in described["imports"]:
        import_module(module)
    agent_class = _agent_class(described["agent"])
    checkpoint = checkpoint_before(run, step)
    steps = range(1 if checkpoint is None else int(checkpoint.name) + 1, step + 1)
    metrics = read_metrics(run)
    missing = sorted({*steps} - {*steps_of(run)})
    since = "the start" if checkpoint is None else f"checkpoint {checkpoint.name}"
    if missing:
        raise ValueError(f"step {step} is to be taken from {since} on, but the run has not kept step {missing[0]}")
    way = f", {len(steps) - 1} steps on the way" if len(steps) > 1 else ""
    print(f"taking step {step} of {run} again, from {since}{way}", flush=True)
    kept = ((read_rollout(rollout_path(run, number)), metrics[number]) for number in steps)
    try:
        return take_again(agent_class, described, checkpoint, steps, kept, sample_again=sample_again)
    except OSError as error:
        if checkpoint is None or checkpoint.exists():
            raise
        raise OSError(f"the training at work in {run} has dropped {checkpoint} meanwhile; replay again") from error


def _figures_table(figures: Sequence[Figure]) -> Table:
    table = Table("", "logged", "now", "difference")
    for figure in figures:
        difference = "none" if figure.difference == 0 else f"{figure.difference:.2g}"
        cells = (escape(figure.name), f"{figure.logged:.6g}", f"{figure.now:.6g}", difference)
        table.add_row(*cells, style="bold" if figure.differs else None)
    return table


# Another reward ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rescored:
    """An episode with the score that it was given and that of another reward."""

    step: int
    row: Row
    before: Score
    after: Score

    @property
    def verdicts(self) -> tuple[str, str]:
        """Before and after."""
        return verdict(self.before), verdict(self.after)

    @property
    def changed(self) -> bool:
        return verdict(self.before) != verdict(self.after)


def rescored(run: Path, reward: Reward, steps: Sequence[int], settings: Mapping[str, Any]) -> list[Rescored]:
    """The stored episodes of ``steps`` under another reward.

    Raises:
        ValueError: a rollout is damaged, or does not tell what its episodes scored.
        RewardError: the reward broke its contract.
    """
    episodes = []
    for step in steps:
        rows = read_rollout(rollout_path(run, step))
        given = [Score(value_of(row, settings), row["parts"], error=row["error"], info=row["verdict"]) for row in rows]
        scores = score_samples(reward, [sample_of(row) for row in rows])
        episodes += [Rescored(step, *both) for both in zip(rows, given, scores, strict=True)]
    return episodes


def verdict(score: Score) -> str:
    """What a score says of an answer: right, wrong, ungraded, or nothing, as a grade or a style alone does."""
    if score.value is None:
        return "ungraded"
    if not score.tells:
        return "no verdict"
    return "right" if score.correct else "wrong"


def _show_rescored(episodes: Sequence[Rescored]) -> None:
    changed = [one for one in episodes if one.changed]
    console = Console(highlight=False)
    console.print(_verdicts_table(episodes))
    console.print(_changes_table(changed, len(episodes)))
    if changed:
        console.print(_changed_table(changed))


def _write_changed(out: Path, episodes: Sequence[Rescored]) -> None:
    rows = ({"step": one.step, **scored_row(one.row, one.after)} for one in episodes if one.changed)
    with out.open("w") as lines:
        lines.writelines(json.dumps(row, default=str) + "\n" for row in rows)


def _verdicts_table(episodes: Sequence[Rescored]) -> Table:
    table = Table("", "before", "after")
    sides = [one.before for one in episodes], [one.after for one in episodes]
    means = [fmean([s.value for s in side if s.value is not None] or [math.nan]) for side in sides]
    table.add_row("mean reward", *(f"{mean:.4g}" for mean in means))
    counts = [Counter(map(verdict, side)) for side in sides]
    for said in ("right", "wrong", "no verdict", "ungraded"):
        if any(count[said] for count in counts):
            table.add_row(said, *(str(count[said]) for count in counts))
    return table


def _changes_table(changed: Sequence[Rescored], total: int) -> Table:
    """How many verdicts changed and how, as shares of all episodes, which count as independent."""
    table = Table("verdict", "share of the episodes, with its 95 % interval")
    counts = Counter({("right", "wrong"): 0, ("wrong", "right"): 0})
    counts.update(one.verdicts for one in changed)
    for change, count in counts.most_common():
        table.add_row(" → ".join(change), f"{count}: {Share(count, total)}")
    table.add_row("[bold]any change[/bold]", f"[bold]{len(changed)}: {Share(len(changed), total)}[/bold]")
    return table


def _changed_table(changed: Sequence[Rescored]) -> Table:
    some = changed[:: math.ceil(len(changed) / SHOWN)]
    texts = [Column(name, overflow="fold") for name in ("prompt", "answer", "reference")]
    table = Table("step", *texts, "before", "after", title=f"{len(some)} of {len(changed)} that changed")
    for one in some:
        shown = (one.row["prompt"], " | ".join(one.row["completions"]), str(one.row["reference"]))
        table.add_row(str(one.step), *(escape(_on_one_line(text)) for text in shown), *one.verdicts)
    return table


def _on_one_line(text: str) -> str:
    """A text that a model wrote, safe to show: what is no visible character is escaped, and a long one cut."""
    line = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return line if len(line) <= LONGEST_CELL else line[: LONGEST_CELL - 1] + "…"
