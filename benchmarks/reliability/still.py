"""Trainings at a learning rate of 0: ``python -m benchmarks.reliability.still``.

All is done that a training does, but the weights must stay what they were, bit for bit; and the log-probabilities of engine and
learner must differ in the last step as in the first, by rounding alone: what drifts without learning is a fault.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.table import Table
from scipy import stats
from torch import Tensor

from agents.core.agent import Agent
from agents.core.records import read_metrics
from benchmarks.harness.compare import markdown
from benchmarks.measure import machine
from benchmarks.reliability.trainings import EVERY_AGENT, SIZES, make_agent

ROUNDING = 1e-5
"""Nats that the log-probabilities of engine and learner may differ by, in any token."""


@dataclass(frozen=True)
class Stood:
    """A training at rest.

    Attributes:
        name: of the training.
        steps: that it took.
        gap: mean over the steps of the mean difference of a token's log-probabilities, in nats.
        largest: of any token of any step.
        growth: of the mean difference, from the first step to the last; with its standard error.
        moved: the weights that are not what they were.
    """

    name: str
    steps: int
    gap: float
    largest: float
    growth: float
    error: float
    moved: list[str]

    @property
    def flat(self) -> bool:
        return self.largest <= ROUNDING and abs(self.growth) <= max(4 * self.error, 0.1 * self.gap)


def main(steps: int = 200) -> None:
    """Train the four agents at a learning rate of 0; exit status 1 if anything moved.

    Args:
        steps: of each training, or fewer where an agent samples more than it learns from.
    """
    stood = [stand_still(name, steps) for name in EVERY_AGENT]
    head = ("agent", "steps", "logp_gap, nats", "largest", "growth over the training", "flat", "weights moved")
    table = Table(*head, title=f"a learning rate of 0, up to {steps} steps")
    for each in stood:
        growth = f"{each.growth:+.1e} ± {each.error:.1e}"
        moved = ", ".join(each.moved) or "none"
        flat = "yes" if each.flat else "NO"
        table.add_row(each.name, str(each.steps), f"{each.gap:.2e}", f"{each.largest:.2e}", growth, flat, moved)
    print(machine(), markdown([table]), sep="\n\n")
    raise SystemExit(any(each.moved or not each.flat for each in stood))


def stand_still(name: str, steps: int) -> Stood:
    """Train at a learning rate of 0."""
    episodes = steps * SIZES["prompts_per_step"] * SIZES["group_size"]
    with tempfile.TemporaryDirectory(prefix="still-") as folder, contextlib.redirect_stdout(io.StringIO()):
        agent = make_agent(name, Path(folder, "run"), learning_rate=0.0, total_episodes=episodes, checkpoint_every=100)
        before = weights(agent)
        agent.learn()
        lines = read_metrics(Path(folder, "run"))
    after = weights(agent)
    moved = [name for name, tensor in before.items() if not same_bits(tensor, after[name])]
    gaps = np.array([line["logp_gap"] for line in lines.values()])
    slope = stats.linregress(np.linspace(0, 1, len(gaps)), gaps)
    largest = max(line["logp_gap_max"] for line in lines.values())
    return Stood(name, len(gaps), gaps.mean(), largest, slope.slope, slope.stderr, moved)


def weights(agent: Agent) -> dict[str, Tensor]:
    """Copies of all that is trained, the critic's included."""
    critic = agent.learner.critic
    named = [*agent.policy.named_parameters(), *([] if critic is None else critic.named_parameters("critic"))]
    return {name: tensor.detach().clone() for name, tensor in named}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal to the sign of a zero."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


if __name__ == "__main__":
    tyro.cli(main)
