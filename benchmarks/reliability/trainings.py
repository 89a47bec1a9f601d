"""The small trainings that everything here is tried on, in processes that start at once, and whether two runs are the same."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from agents.core.agent import Agent
from agents.core.records import LOCK_FILE
from agents.dapo import DAPO
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.raft import RAFT
from rewards import Normalised, register

ENV = "textenv/Arithmetic-v0"
STEPS, CHECKPOINT_EVERY = 24, 4
SIZES: dict[str, Any] = {
    "env_options": {"digits": "1"},
    "prompts_per_step": 4,
    "group_size": 4,
    "warmup_steps": 4,
    "eval_episodes": 8,
    "checkpoint_every": CHECKPOINT_EVERY,
}
EPISODES = STEPS * SIZES["prompts_per_step"] * SIZES["group_size"]
STATISTICS = "reliability_normalised"
register(STATISTICS, Normalised("exact", center=False))
TRAININGS: dict[str, tuple[type[Agent], dict[str, Any]]] = {
    "ppo": (PPO, {"critic": "separate", "epochs_per_batch": 2, "kl_reward_coef": 0.1, "kl_target": 1e-3}),
    "grpo": (GRPO, {"reward": STATISTICS, "scale_rewards": "none", "staleness": 1, "updates_per_batch": 2}),
    "dapo": (DAPO, {"kl_reward_coef": 0.1, "kl_target": 1e-3, "max_sampling": 4, "total_episodes": 2 * EPISODES}),
    "raft": (RAFT, {"variant": "raft++", "kl_loss_coef": 0.1, "kl_target": 1e-3, "updates_per_batch": 2}),
    "plain": (GRPO, {}),
}
EVERY_AGENT = ("ppo", "grpo", "dapo", "raft")
"""These have state of all kinds beside the weights: a critic, statistics of a reward, a batch sampled ahead, one sampled
dynamically, adapted coefficients, several updates a batch."""
MEASURED = re.compile("seconds|tokens_per_second|time_.*|memory_peak_mb|mfu")
"""Metrics that measure the machine."""


def make_agent(name: str, folder: Path, *, resume: bool = False, **changes: Any) -> Agent:
    """One of the trainings, its run in ``folder``."""
    agent_class, settings = TRAININGS[name]
    settings = {**SIZES, "total_episodes": EPISODES, **settings, **changes, "run_dir": str(folder)}
    return agent_class(ENV, agent_class.config_class(**settings), resume=resume)


def make_models(folder: Path) -> None:
    """Make the tiny models that the trainings begin with, once and for all; a program for :func:`start`."""
    for name in TRAININGS:
        make_agent(name, folder / name)


def train(name: str, folder: Path) -> None:
    """Train, or go on where a training was killed; a program for :func:`start`. What is printed goes to a file of its own."""
    with log_of(folder).open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    make_agent(name, folder, resume=(folder / "config.json").exists()).learn()


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def preloaded() -> ForkServerContext:
    """Starts processes that have imported all there is to import, from one that has computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.utils.tensorboard", "transformers.models.llama"])
    return context


def start(context: ForkServerContext, program: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = context.Process(target=program, args=arguments, daemon=True)
    process.start()
    return process


def differences(one: Path, other: Path) -> list[str]:
    """What two runs have not in common, by name; of their metrics each step is one. What measures the machine is left out."""
    held, found = kept(one), kept(other)
    return sorted(name for name in held.keys() | found.keys() if held.get(name) != found.get(name))


def kept(run: Path) -> dict[str, Any]:
    """All that a run keeps: the bytes of every file, rollouts decompressed; a step's metrics as a dict."""
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_dir() or name == LOCK_FILE or name.startswith("tensorboard"):
            continue
        if name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found |= {f"metrics of step {line['step']}": _computed(line) for line in lines}
        else:
            found[name] = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return found


def _computed(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not MEASURED.fullmatch(name)}
