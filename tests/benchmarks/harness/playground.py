"""A task that takes milliseconds, suites of it, and contenders whose every step is written down."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks.harness.arena import Arena, run_cell
from benchmarks.harness.records import Cell, Point
from benchmarks.harness.suite import AgentSpec, Budget, EnvironmentSpec, EvaluationPlan, Suite
from textenv import Problem, Task, register

STEPS = "tests.benchmarks.harness.playground:Steps"
BROKEN = "tests.benchmarks.harness.playground:Broken"


def even(prompt, completion, reference):
    """1 for an answer whose first character has an even code, as even digits have."""
    return float(completion != "" and ord(completion[0]) % 2 == 0)


@register("playground/Digits-v0", reward=even, max_new_tokens=3, max_tokens=12)
def digits(rng):
    """Numbers; nothing is demonstrated, so that the tiny model starts from fresh weights."""
    number = int(rng.integers(1000))
    return Problem(f"{number}?", number)


@register("playground/Dialogue-v0", reward=even, max_new_tokens=2, max_tokens=24)
class Dialogue(Task):
    """Three turns, always."""

    turns = 3

    def draw(self, rng):
        return Problem(f"{int(rng.integers(1000))}?", None)

    def reply(self, transcript):
        return "no." if len(transcript.completions) < 3 else None


class Steps:
    """Steps of ``each`` episodes, two tokens an episode and an update a step, which push the weights about."""

    def __init__(self, each: int = 30, at_most: int = 1000):
        self.each, self.at_most = each, at_most

    def train(self, arena: Arena) -> None:
        policy = arena.policy()
        arena.begin()
        for step in range(1, self.at_most + 1):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.01)
            policy.version += 1
            if not arena.spent(policy, episodes=step * self.each, tokens=2 * step * self.each, updates=step):
                return


class Broken:
    """Fails when it is to train."""

    def train(self, arena: Arena) -> None:
        raise RuntimeError("the disk is on fire")


def suite(
    kind="start",
    settings=None,
    *,
    budget=None,
    points=3,
    samples=2,
    problems=4,
    env="playground/Digits-v0",
    options=None,
) -> Suite:
    """One agent on one environment."""
    return Suite(
        title="toy",
        path=Path("toy.toml"),
        seeds=(0, 1),
        budget=budget or Budget(episodes=100),
        evaluation=EvaluationPlan(points=points, problems=problems, samples=samples),
        environments={"toy": EnvironmentSpec(id=env, options=options or {})},
        agents={"agent": AgentSpec(kind=kind, settings=settings or {})},
    )


def run(folder: Path, kind="start", settings=None, *, seed=0, **given) -> list[Point]:
    """Run the cell of such a suite, and give its points."""
    run_cell(suite(kind, settings, **given), Cell("toy", "agent", seed), folder)
    return points(folder)


def points(folder: Path) -> list[Point]:
    """Those of a cell."""
    return [Point.from_json(line) for line in (folder / "points.jsonl").read_text().splitlines()]


def arena(folder: Path, seed=0, **given) -> Arena:
    """Where a contender of such a suite plays."""
    folder.mkdir(exist_ok=True)
    return Arena(suite(**given), Cell("toy", "agent", seed), folder)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
