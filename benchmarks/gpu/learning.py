"""Learning from nothing: demonstrations first, then each agent from there, on sums and differences of three digits."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agents.core.agent import Agent
from agents.core.training import Training
from agents.dapo import DAPO
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.raft import RAFT
from agents.sft import SFT
from benchmarks.gpu.sizes import precision, sizes
from benchmarks.speed.report import Settings, Table

ENV_ID = "textenv/Arithmetic-v0"
ENV_OPTIONS: dict[str, Any] = {"digits": 3, "operators": "+-"}
ENOUGH = 0.3
"""Greedy accuracy at which the demonstrations end."""
PROBE_EVERY = 25
"""Steps between the evaluations that tell."""
AGENTS: dict[type[Agent], dict[str, Any]] = {
    GRPO: {"prompts_per_step": 64, "group_size": 8},
    DAPO: {"prompts_per_step": 64, "group_size": 8},
    RAFT: {"prompts_per_step": 64, "group_size": 8},
    PPO: {"prompts_per_step": 512},
}
EPISODES, DEMONSTRATIONS = 102_400, 512_000
COLUMNS = ("step", "episodes", "seconds", "reward", "accuracy")


def run(settings: Settings, out: Path) -> Iterator[Table]:
    """Accuracy of each agent before and after, and its curve in ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        start = str(Path(folder, "start"))
        taught = teach(settings, Path(folder), start)
        rows = [["sft", *row_of(taught, out)]]
        for agent_class, options in AGENTS.items():
            run_dir = str(Path(folder, agent_class.name))
            agent = make(agent_class, settings, start, run_dir, learning_rate=1e-4, warmup_steps=0, **options)
            agent.learn(512 if settings.quick else EPISODES)
            rows.append([agent.name, *row_of(agent, out)])
    yield Table(
        f"learning {ENV_ID} with {ENV_OPTIONS}, {sizes(settings).scratch.name} parameters: held-out greedy accuracy",
        ("agent", "before, %", "after, %", "seconds of training", "episodes"),
        rows,
        ("The agents start from what the demonstrations left. The curves are in AGENT.csv.",),
    )


def teach(settings: Settings, folder: Path, start: str) -> Agent:
    """Save to ``start`` a fresh model taught by demonstrations until it solves ``ENOUGH``."""
    fresh = str(folder / "fresh")
    sizes(settings).scratch.policy(endless=False).save(fresh)
    agent = make(SFT, settings, fresh, str(folder / "sft"), learning_rate=5e-4, prompts_per_step=256)

    def goes_on(training: Training) -> bool:
        return training.step % PROBE_EVERY > 0 or agent.evaluate().accuracy < ENOUGH

    agent.learn(2560 if settings.quick else DEMONSTRATIONS, callback=goes_on)
    agent.policy.save(start)
    return agent


def make(agent_class: type[Agent], settings: Settings, model: str, run_dir: str, **options: Any) -> Agent:
    config = agent_class.config_class(
        model=model,
        env_options=ENV_OPTIONS,
        run_dir=run_dir,
        device=settings.device,  # type: ignore[arg-type]
        **precision(settings),
        eval_episodes=16 if settings.quick else 1024,
        **options,
    )
    return agent_class(ENV_ID, config)


def row_of(agent: Agent, out: Path) -> list[str]:
    """An agent's line of the table; its curve goes to ``out``."""
    training = agent.last_training
    assert training is not None
    lines = (training.run.folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    with open(out / f"{agent.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(steps)
    accuracies = [f"{100 * evaluation.accuracy:.1f}" for evaluation in (training.before, training.after) if evaluation]
    return [*accuracies, f"{training.seconds:.0f}", f"{training.episodes:,}"]
