"""What it costs to watch over a run, in steps of the tiny model: ``python -m benchmarks.reliability.cost``.

Blocks of steps with doctor, gate, correction and rollout log alternate with blocks without them, in one training, so that both
kinds see the same machine; time is told by the clock, and as that of the processor in all threads, which other work does not
lengthen. Of a checkpoint is told how long training waits for it, beside what copying its tensors takes, and
how long it takes to be on disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro

from agents.core import learner, policy_gradient
from agents.core.doctor import Doctor
from agents.core.lora import merged_state
from agents.core.policy import copied
from agents.core.run import Run
from agents.core.training import Training
from agents.core.trajectories import Trajectories
from agents.grpo import GRPO, GRPOConfig
from benchmarks.measure import machine, ratios

ENV = "textenv/Arithmetic-v0"
CLOCKS = {"by the clock": time.perf_counter, "of the processor": time.process_time}


class Blocks:
    """A callback that times steps, and leaves out what watches over them in every other block.

    Args:
        length: steps a block; the first of each, into which the one before may reach, does not count.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.seconds: dict[tuple[str, bool], list[float]] = {
            (clock, on): [] for clock in CLOCKS for on in (True, False)
        }
        """of a step in each block, its median; by clock, and whether it was watched over"""
        self._block: list[dict[str, float]] = []
        self._unwatched = ExitStack()
        self._before = now()

    def __call__(self, training: Training) -> None:
        self._block.append({clock: at - self._before[clock] for clock, at in now().items()})
        if training.step % self.length == 0:
            watched = (training.step // self.length) % 2 == 1
            if training.step > self.length:  # in the first block all is warming up
                for clock in CLOCKS:
                    self.seconds[clock, watched].append(statistics.median(step[clock] for step in self._block[1:]))
            self._block = []
            self._unwatched.close()
            if watched:
                leave_unwatched(self._unwatched)
        self._before = now()


def now() -> dict[str, float]:
    return {name: clock() for name, clock in CLOCKS.items()}


def leave_unwatched(stack: ExitStack) -> None:
    """Until ``stack`` closes, nothing watches over a step."""
    zero = torch.zeros(())
    for owner, name, instead in (
        (Doctor, "look", lambda *_: None),
        (Run, "log_rollout", lambda *_: None),
        (Trajectories, "note", lambda *_: None),
        (learner, "gap_metrics", lambda *_: {"logp_gap": zero, "logp_gap_max": zero}),
        (policy_gradient, "tis_weights", lambda *_, **__: (1.0, {})),
    ):
        stack.enter_context(mock.patch.object(owner, name, instead))


def train(folder: Path, steps: int, callback: Callable[[Training], None], **settings: Any) -> GRPO:
    config = GRPOConfig(
        prompts_per_step=16, total_episodes=16 * 8 * steps, eval_episodes=8, run_dir=str(folder), **settings
    )
    return GRPO(ENV, config).learn(callback=callback)


def cost_of_watching(folder: Path, blocks: int, length: int) -> list[str]:
    timed = Blocks(length)
    train(folder, (2 * blocks + 1) * length, timed, checkpoint_every=10**6)
    return [
        f"| doctor, gate, correction and rollout log, {clock}, over a step without | "
        f"{ratios(timed.seconds[clock, True], timed.seconds[clock, False]).text('{:.3f}')} of "
        f"{statistics.median(timed.seconds[clock, False]) * 1e3:.1f} ms |"
        for clock in CLOCKS
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
        f"| {name} | {statistics.median(ms) * 1e3:.1f} ms, at most {max(ms) * 1e3:.1f} |" for name, ms in rows.items()
    ]


def main(blocks: int = 60, length: int = 8) -> None:
    """Print a table.

    Args:
        blocks: of each kind.
        length: steps a block.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *cost_of_watching(Path(folder, "watched"), blocks, length),
            *cost_of_checkpoints(Path(folder, "kept"), 100),
        ]
    print("\n".join([machine(), "", "| what | cost |", "|---|---|", *rows]))


if __name__ == "__main__":
    tyro.cli(main)
