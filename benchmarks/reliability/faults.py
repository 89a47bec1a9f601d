"""Faults, injected one at a time: ``python -m benchmarks.reliability.faults``.

Each meets a small training after some steps. Shown are what a person is told, what is kept by then, and whether the run, once
the fault is mended, ends exactly as one that never met it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from unittest import mock

import tyro
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from agents.core import rollout
from agents.core.agent import Agent
from agents.core.doctor import ALARMS_FILE
from agents.core.records import METRICS_FILE, read_metrics, read_rollout, rollout_path
from agents.core.sources import checkpoints
from agents.core.training import Training
from benchmarks.harness.compare import markdown
from benchmarks.measure import machine
from benchmarks.reliability.full_disk import train_on_full_disk
from benchmarks.reliability.injected import (
    GARBAGE,
    break_engine,
    break_reward,
    clock_going_back,
    flip_bit,
    grades_three_of_four,
    hangs,
    raises,
    scores_nan,
    scores_too_few,
    truncate,
    wrong_logprobs,
)
from benchmarks.reliability.trainings import SIZES, differences, make_agent

STEPS, AFTER = 12, 6
"""Of a training, and those that it has taken when it meets the fault."""
EPISODES = STEPS * SIZES["prompts_per_step"] * SIZES["group_size"]
GO_ON = "go on with: textenv train --resume"
AS_WITHOUT = "exactly as without it"


@dataclass(frozen=True)
class Outcome:
    """What a fault led to.

    Attributes:
        said: what a person is told, its first line.
        kept: what is there by then.
        end: how the run ends once the fault is mended.
        promised: whether all that is as it should be, the alarm included.
        alarms: the rules that told of it.
    """

    said: str
    kept: str
    end: str
    promised: bool
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lab:
    """Where a fault is tried: the folder of its run, and the run of the same training that met none."""

    run: Path
    whole: Path

    def agent(self, *, resume: bool = False) -> Agent:
        return make_agent("plain", self.run, resume=resume, total_episodes=EPISODES)

    def go_on(self) -> tuple[str, str]:
        """Go on with the run: how it ended, and what was printed."""
        error, printed = heard(lambda: self.agent(resume=True).learn())
        apart = differences(self.whole, self.run)
        return AS_WITHOUT if error is None and not apart else f"differently: {error or ', '.join(apart)}", printed

    def kept(self) -> str:
        whole = checkpoints(self.run)
        return f"{len(read_metrics(self.run))} steps, checkpoint {int(whole[-1].name) if whole else 'none'}"

    def alarms(self) -> tuple[str, ...]:
        path = self.run / ALARMS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        return tuple(dict.fromkeys(json.loads(line)["rule"] for line in lines))


def heard(program: Callable[[], object]) -> tuple[BaseException | None, str]:
    """What ended a program, if not it itself, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            program()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - shown is whatever a person would see
            return error, printed.getvalue()
    return None, printed.getvalue()


def line_with(text: str, printed: str) -> str:
    """The first line that holds a text; nothing if none does."""
    return next((line for line in printed.splitlines() if text in line), "")


# --- What happens ---


def stops(lab: Lab, *, inject: Callable[[Agent], None], told: str) -> Outcome:
    """A fault that ends the training, and is mended before it goes on."""
    agent = lab.agent()
    inject(agent)
    error, printed = heard(agent.learn)
    said, kept, alarms = str(error).partition("\n")[0], lab.kept(), lab.alarms()
    end, _ = lab.go_on()
    return Outcome(said, kept, end, told in said and GO_ON in printed and end == AS_WITHOUT, alarms)


def some_ungraded(lab: Lab) -> Outcome:
    """A reward that raises for one sample in four: the training goes on without these, and says so."""
    agent = lab.agent()
    break_reward(agent, grades_three_of_four, AFTER)
    error, printed = heard(agent.learn)
    shares = [line["ungraded_share"] for line in read_metrics(lab.run).values()]
    promised = error is None and shares == [0.0] * AFTER + [0.25] * (STEPS - AFTER) and lab.alarms() == ("ungraded",)
    return Outcome(line_with("ALARM", printed), lab.kept(), "with these episodes left out", promised, lab.alarms())


def reward_hangs(lab: Lab) -> Outcome:
    """A person reads that the reward has not answered, and presses Ctrl-C twice."""
    agent = lab.agent()
    break_reward(agent, hangs, AFTER)
    printed = io.StringIO()

    def interrupt() -> None:
        while "has been scoring" not in printed.getvalue():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    Thread(target=interrupt, daemon=True).start()
    with mock.patch.object(rollout, "PATIENCE", 0.5), contextlib.redirect_stdout(printed):
        try:
            agent.learn()
        except KeyboardInterrupt:
            stopped = True
        else:
            stopped = False
    said, kept = line_with("has been scoring", printed.getvalue()), lab.kept()
    end, _ = lab.go_on()
    return Outcome(said, kept, end, stopped and GO_ON in printed.getvalue() and end == AS_WITHOUT)


class CrashError(Exception):
    """Ends a training where nobody expects it."""


def crash(training: Training) -> None:
    if training.step == STEPS - 3:
        raise CrashError


def damaged_checkpoint(lab: Lab, *, damage: Callable[[Path], None], file: str) -> Outcome:
    """The newest checkpoint of a run that broke off is damaged."""
    heard(lambda: lab.agent().learn(callback=crash))
    kept = lab.kept()
    damage(checkpoints(lab.run)[-1] / file)
    end, printed = lab.go_on()
    said = line_with("is damaged and left aside", printed)
    return Outcome(said, kept, end, f"{file} is not as it was kept" in said and end == AS_WITHOUT)


def torn_metrics(lab: Lab) -> Outcome:
    """The last line of the metrics is cut, as when the machine goes down in the middle of it."""
    heard(lambda: lab.agent().learn(callback=crash))
    kept = lab.kept()
    path = lab.run / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-20])
    end, _ = lab.go_on()
    return Outcome("nothing: the step is done again", kept, end, end == AS_WITHOUT)


def truncated_metrics(lab: Lab) -> Outcome:
    """Half of the metrics is gone, and nobody has a copy."""
    heard(lambda: lab.agent().learn(callback=crash))
    kept = lab.kept()
    truncate(lab.run / METRICS_FILE)
    last = max(read_metrics(lab.run))
    error, printed = heard(lambda: lab.agent(resume=True).learn())
    checkpoint = STEPS - 4  # the last before the crash
    lost = [f"metrics of step {step}" for step in range(last + 1, checkpoint + 1)]
    said = line_with("lacks steps", printed)
    promised = error is None and bool(said) and differences(lab.whole, lab.run) == lost
    return Outcome(said, kept, f"exactly, but for the metrics of steps {last + 1} to {checkpoint}", promised)


def truncated_record(lab: Lab, *, file: str) -> Outcome:
    """A small file that the run needs is cut, and brought back from a copy."""
    heard(lambda: lab.agent().learn(callback=crash))
    kept = lab.kept()
    content = (lab.run / file).read_bytes()
    truncate(lab.run / file)
    error, _ = heard(lambda: lab.agent(resume=True).learn())
    (lab.run / file).write_bytes(content)
    end, _ = lab.go_on()
    promised = f"{file} is damaged" in str(error) and "bring it back from a copy" in str(error) and end == AS_WITHOUT
    return Outcome(str(error), kept, end, promised)


def truncated_rollout(lab: Lab) -> Outcome:
    """The episodes of a step are cut; nothing but who reads them needs them."""
    shutil.copytree(lab.whole, lab.run)
    path = rollout_path(lab.run, 3)
    truncate(path)
    error, _ = heard(lambda: read_rollout(path))
    return Outcome(str(error), lab.kept(), "no part of what goes on", "is not a whole gzip file" in str(error))


def full_disk(lab: Lab) -> Outcome:
    """A disk is full, and is given room once that was said."""
    printed = train_on_full_disk(lab.run.with_name(f"{lab.run.name}-disk"), lab.run, EPISODES, AFTER)
    said = line_with("is full", printed)
    apart = differences(lab.whole, lab.run)
    end = f"differently: {', '.join(apart)}" if apart else AS_WITHOUT
    return Outcome(
        said, "all, and it waits", end, "Training waits" in said and "there is room again" in printed and not apart
    )


def clock_goes_back(lab: Lab) -> Outcome:
    """At each look the clock shows an hour less."""
    with clock_going_back():
        heard(lambda: lab.agent().learn(callback=crash))
        kept = lab.kept()
        end, _ = lab.go_on()
    lines = read_metrics(lab.run)
    took = [
        value for line in lines.values() for name, value in line.items() if name in ("seconds", "tokens_per_second")
    ]
    board = EventAccumulator(str(lab.run / "tensorboard")).Reload()
    shown = {event.step for event in board.Scalars("reward")}
    promised = end == AS_WITHOUT and list(lines) == sorted(lines) and set(lines) == shown and min(took) > 0
    return Outcome("nothing: no name, order or duration goes by it", kept, end, promised)


def two_processes(lab: Lab) -> Outcome:
    """A second process is told to go on with a run at which the first is at work."""
    seen: list[subprocess.CompletedProcess[str]] = []

    def intrude(training: Training) -> None:
        if training.step == AFTER:
            command = [sys.executable, "-m", "textenv", "train", "--resume", str(lab.run)]
            seen.append(subprocess.run(command, capture_output=True, text=True))

    error, _ = heard(lambda: lab.agent().learn(callback=intrude))
    apart = differences(lab.whole, lab.run)
    said = line_with("another training is at work", seen[0].stderr)
    end = f"differently: {error or ', '.join(apart)}" if error or apart else AS_WITHOUT
    return Outcome(said, "all: the first goes on", end, bool(said) and seen[0].returncode == 2 and end == AS_WITHOUT)


def _reward(fault: Callable, told: str) -> Callable[[Lab], Outcome]:
    return partial(stops, inject=partial(break_reward, fault=fault, after=AFTER), told=told)


def _engine(fault: Callable, told: str) -> Callable[[Lab], Outcome]:
    return partial(stops, inject=partial(break_engine, fault=fault, after=AFTER), told=told)


UNGRADED = "left 16 of 16 episodes ungraded"
FAULTS: dict[str, Callable[[Lab], Outcome]] = {
    "reward: raises": _reward(raises, UNGRADED),
    "reward: raises for one in four": some_ungraded,
    "reward: returns NaN": _reward(scores_nan, UNGRADED),
    "reward: returns too few": _reward(scores_too_few, "must return a list with one Score a sample"),
    "reward: hangs": reward_hangs,
    **{f"engine: {fault.__name__.replace('_', ' ')}": _engine(fault, told) for fault, told in GARBAGE.items()},
    "engine: wrong log-probabilities": _engine(wrong_logprobs, "the engine sampled from another distribution"),
    "disk full": full_disk,
    "checkpoint truncated": partial(damaged_checkpoint, damage=truncate, file="model.safetensors"),
    "checkpoint, a bit flipped": partial(damaged_checkpoint, damage=flip_bit, file="optimizer.safetensors"),
    "metrics torn": torn_metrics,
    "metrics truncated": truncated_metrics,
    "config truncated": partial(truncated_record, file="config.json"),
    "evaluation truncated": partial(truncated_record, file="evaluation_before.json"),
    "rollout truncated": truncated_rollout,
    "clock goes back": clock_goes_back,
    "two processes": two_processes,
}


def main(only: tuple[str, ...] = ()) -> None:
    """Inject the faults and show what came of each; exit status 1 if one was not met as promised.

    Args:
        only: faults whose names begin with one of these; default all.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        whole = Path(folder, "whole")
        heard(lambda: make_agent("plain", whole, total_episodes=EPISODES).learn())
        chosen = {name: fault for name, fault in FAULTS.items() if not only or name.startswith(only)}
        outcomes = {
            name: fault(Lab(Path(folder, f"run-{at}"), whole)) for at, (name, fault) in enumerate(chosen.items())
        }
        shown = {name: outcome.said.replace(folder, "…") for name, outcome in outcomes.items()}
    made = Table("fault", "said", "kept by then", "alarm", "ends", "as promised", title=f"{len(outcomes)} faults")
    for name, outcome in outcomes.items():
        promised = "yes" if outcome.promised else "NO"
        made.add_row(name, shown[name], outcome.kept, ", ".join(outcome.alarms), outcome.end, promised)
    print(machine(), markdown([made]).replace(" ---:", " ---"), sep="\n\n")  # of texts, not numbers
    raise SystemExit(not all(outcome.promised for outcome in outcomes.values()))


if __name__ == "__main__":
    tyro.cli(main)
