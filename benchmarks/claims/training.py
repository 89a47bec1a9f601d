"""What the experiments share: short trainings of our agents from one start, and looks at the policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.core.agent import Agent
from agents.core.models import build_tiny
from agents.core.policy import Policy
from agents.core.training import Training
from agents.sft import SFT, SFTConfig
from benchmarks.harness.measuring import divergence
from textenv import make_task

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "learning_rate": 3e-4,
    "learning_rate_decay": "constant",
    "prompts_per_step": 16,
    "group_size": 8,
    "eval_episodes": 1,  # the claims look closer
    "checkpoint_every": 10**6,
}
"""Of all trainings, unless a claim says otherwise: 128 episodes a step, Adam at 3e-4."""
SORT = "textenv/Sort-v0"
"""Words of three to five letters to write in order: of our small tasks the one that reinforcement is soonest seen on."""


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        steps: of a training.
        problems: held-out, the same at each look.
        samples: completions of each, where several are wanted.
    """

    steps: int
    problems: int
    samples: int = 1


QUICK = Scale(steps=2, problems=8, samples=4)
"""As little as shows that an experiment works."""


@dataclass(frozen=True)
class Arm:
    """One of the trainings that an experiment compares: an agent and its settings, beside those that all share."""

    agent: type[Agent]
    settings: Mapping[str, Any]


def make(arm: Arm, folder: Path, seed: int, env_id: str = SORT, model: str = "tiny") -> Agent:
    """The agent of an arm, at the start."""
    settings = {**SETTINGS, "seed": seed, "model": model, "run_dir": str(folder), **arm.settings}
    return arm.agent(env_id, arm.agent.config_class(**settings))


def train(agent: Agent, steps: int, look: Callable[[Training], bool | None] | None = None) -> list[dict[str, float]]:
    """Train for so many steps; what each logged. ``look`` is called after each and ends the training by False."""
    torch.set_num_threads(1)
    logged: list[dict[str, float]] = []

    def keep(training: Training) -> bool:
        logged.append(training.metrics)
        goes_on = look is None or look(training) is not False
        return goes_on and len(logged) < steps

    agent.learn(total_episodes=10**9, callback=keep)
    return logged


def curve(agent: Agent, scale: Scale, points: int, measure: Callable[[Agent, int], float]) -> list[float]:
    """Train, and ``measure`` on the held-out problems so often, evenly spaced, start and end included."""
    measured = [measure(agent, scale.problems)]
    due = {math.ceil(scale.steps * point / (points - 1)) for point in range(1, points)}

    def look(training: Training) -> None:
        if training.step in due:
            measured.append(measure(agent, scale.problems))

    train(agent, scale.steps, look)
    return measured


def entropy(agent: Agent, problems: int) -> float:
    """Of the policy, in nats a token, exact over the vocabulary, where its own answers to held-out problems lead it."""
    batch = agent.rollout("eval").collect(0, problems, 1, temperature=1.0, seed=(agent.config.seed,))
    return float(divergence(agent.policy, None, batch.tokens_BT, batch.sampled_BT, 1.0)[1].mean())


def accuracy(agent: Agent, problems: int) -> float:
    """Share of held-out problems that one completion, sampled at temperature 1, solves."""
    return agent.evaluate(problems, temperature=1.0).accuracy


def right_counts(agent: Agent, problems: int, samples: int, at_once: int = 512) -> np.ndarray:
    """How many of ``samples`` completions at temperature 1 are right, for each of so many held-out problems."""
    rollout, counts = agent.rollout("eval"), []
    step = max(1, at_once // samples)
    for index in range(0, problems, step):
        batch = rollout.collect(
            index, min(step, problems - index), samples, temperature=1.0, seed=(agent.config.seed, index)
        )
        counts.append((batch.outcome_B >= 1).view(-1, samples).sum(dim=1).numpy())
    return np.concatenate(counts)


def imitate(env_id: str, folder: Path, seed: int, enough: float, most_steps: int = 600, problems: int = 256) -> Path:
    """Save a tiny model, taught by a task's demonstrations until it solves a share of held-out problems, sampled at
    temperature 1; its folder.
    """
    task = make_task(env_id)
    Policy(build_tiny(task.tokenizer(), seed, max(1024, task.max_tokens)), task.tokenizer()).save(folder / "fresh")
    settings = {name: value for name, value in SETTINGS.items() if name != "group_size"}
    settings |= {"learning_rate": 1e-3, "prompts_per_step": 64}
    config = SFTConfig(model=str(folder / "fresh"), seed=seed, run_dir=str(folder / "sft"), **settings)
    agent = SFT(env_id, config)
    train(agent, most_steps, lambda training: training.step % 5 > 0 or accuracy(agent, problems) < enough)
    agent.policy.save(folder / "start")
    return folder / "start"
