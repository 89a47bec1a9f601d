"""What it costs to watch over a run, in steps of the tiny model: ``python -m benchmarks.reliability.cost``.

Doctor, gate, correction and rollout log are timed where they are called, as time of the processor, which other work beside it
hardly lengthens, and held against that of the whole step. What the thread that packs and writes rollouts takes is told apart:
it does not hold up the step. Of a checkpoint is told how long training waits for it, beside what copying its tensors takes, and
how long it takes to be on disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import tyro

from agents.core import learner, policy_gradient, run
from agents.core.doctor import Doctor
from agents.core.lora import merged_state
from agents.core.policy import copied
from agents.core.run import Run
from agents.core.training import Training
from agents.core.trajectories import Trajectories
from agents.grpo import GRPO, GRPOConfig
from benchmarks.measure import machine, spread

ENV = "textenv/Arithmetic-v0"
WATCHING: dict[str, list[tuple[Any, str]]] = {
    "doctor": [(Doctor, "look")],
    "gate and correction": [(learner, "gap_metrics"), (policy_gradient, "tis_weights")],
    "rollout log": [(Trajectories, "note"), (Run, "log_rollout")],
    "rollouts packed and written, in a thread": [(run, "_write_rollout")],
}
"""What watches over a step, by where it is called."""


@contextmanager
def timed(parts: dict[str, list[tuple[Any, str]]], seconds: dict[str, float]) -> Iterator[None]:
    """Within, what each part takes of its thread's processor is added up in ``seconds``."""

    def add_up(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed_work(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return work(*arguments, **options)
            finally:
                seconds[part] += time.thread_time() - started

        return timed_work

    with ExitStack() as stack:
        for part, places in parts.items():
            seconds[part] = 0.0
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, add_up(part, getattr(owner, name))))
        yield


def train(folder: Path, steps: int, callback: Callable[[Training], None], **settings: Any) -> None:
    config = GRPOConfig(
        prompts_per_step=16, total_episodes=16 * 8 * steps, eval_episodes=8, run_dir=str(folder), **settings
    )
    GRPO(ENV, config).learn(callback=callback)


def cost_of_watching(folder: Path, steps: int) -> list[str]:
    seconds: dict[str, float] = {}
    rows: list[dict[str, float]] = []

    def look(training: Training) -> None:
        rows.append({"step": time.thread_time(), **seconds})

    with timed(WATCHING, seconds):
        train(folder, steps, look, checkpoint_every=10**6)
    taken = [{name: later[name] - row[name] for name in row} for row, later in pairwise(rows[10:])]
    beside = list(WATCHING)[-1]
    for row in taken:
        row["all that the step waits for"] = sum(row[part] for part in WATCHING if part != beside)
    ms = statistics.median(row["step"] for row in taken) * 1e3
    return [f"| a step | {ms:.1f} ms |"] + [
        f"| {part} | {spread([100 * row[part] / row['step'] for row in taken]).text('{:.2f}')} % of a step |"
        for part in [*list(WATCHING)[:-1], "all that the step waits for", beside]
    ]


def cost_of_checkpoints(folder: Path, steps: int) -> list[str]:
    waited, copying, on_disk = [], [], []
    save = Run.save_checkpoint

    def timed_save(run: Run, step: int, policy: Any, trained: Any, *rest: Any) -> Path:
        started = time.perf_counter()
        copied(merged_state(policy.model))
        for tensors in trained.files().values():
            copied(tensors)
        copying.append(time.perf_counter() - started)
        started = time.perf_counter()
        path = save(run, step, policy, trained, *rest)
        waited.append(time.perf_counter() - started)
        assert run._checkpoint is not None
        run._checkpoint.add_done_callback(lambda _: on_disk.append(time.perf_counter() - started))
        return path

    with mock.patch.object(Run, "save_checkpoint", timed_save):
        train(folder, steps, lambda training: None, checkpoint_every=5)
    rows = {
        "a checkpoint: copying its tensors": copying,
        "a checkpoint: training waits": waited,
        "a checkpoint: until it is on disk": on_disk,
    }
    return [
        f"| {name} | {spread([1e3 * each for each in seconds]).text('{:.1f}')} ms |" for name, seconds in rows.items()
    ]


def main(steps: int = 300) -> None:
    """Print a table, of medians and quartiles.

    Args:
        steps: that are watched over.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [*cost_of_watching(Path(folder, "watched"), steps), *cost_of_checkpoints(Path(folder, "kept"), 100)]
    print("\n".join(["# What watching over a run costs", "", machine(), "", "| what | cost |", "|---|---|", *rows]))


if __name__ == "__main__":
    tyro.cli(main)
