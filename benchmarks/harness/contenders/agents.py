"""Our agents as contenders."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from agents.core.agent import Agent
from agents.core.monitors import Monitor
from agents.core.training import Training
from agents.core.trajectories import Trajectories
from benchmarks.harness.arena import Arena
from benchmarks.harness.contenders import ENDLESS, check_settings
from benchmarks.harness.provenance import as_json, digest
from benchmarks.harness.suite import Budget

GIVEN = (
    *("model", "env_options", "max_new_tokens", "max_tokens", "seed", "device"),
    *("total_episodes", "eval_episodes", "run_dir"),
)
"""Settings that the arena gives, the same to all."""


class Ours:
    """An agent of the entry-point group ``textenv.agents``.

    Another ``reward`` among the settings is trained on; measured is the environment's.

    Args:
        agent_class: which one.
        settings: of its config, but for :data:`GIVEN`.

    Raises:
        ValueError: an unknown setting, one that the arena gives, or a value out of its range.
    """

    def __init__(self, agent_class: type[Agent], **settings: Any) -> None:
        self.agent_class, self.given = agent_class, settings
        check_settings(agent_class.name, settings, [field.name for field in fields(agent_class.config_class)], GIVEN)
        agent_class.config_class(**settings)

    def chosen(self, budget: Budget) -> dict[str, Any]:
        """The settings given, and the default that depends on the budget.

        The learning rate falls to 0 with the last episode, which only a budget in episodes knows beforehand.

        Raises:
            ValueError: it is to fall, with another budget.
        """
        if budget.kind == "episodes":
            return self.given
        if self.given.get("learning_rate_decay") == "linear":
            raise ValueError(
                f"learning_rate_decay is 'linear', but a budget in {budget.kind} does not tell the last episode; make it "
                "'constant', or give a budget in episodes"
            )
        return {**self.given, "learning_rate_decay": "constant"}

    def described(self, budget: Budget) -> str:
        """The settings chosen, and a hash of all, defaults included."""
        chosen = self.chosen(budget)
        return f"{as_json(chosen)} {digest(asdict(self.agent_class.config_class(**chosen)))}"

    def train(self, arena: Arena) -> None:
        settings = self.chosen(arena.budget)
        # The start has a folder, but is to have the learning rate of the model that it is.
        default = self.agent_class.config_class(**settings, model=arena.model).base_learning_rate
        config = self.agent_class.config_class(
            **{"learning_rate": default, "checkpoint_every": ENDLESS, **settings},
            model=arena.start_folder(),
            env_options=arena.options,
            seed=arena.seed,
            device="cuda" if arena.start.device.type == "cuda" else "cpu",
            eval_episodes=1,  # the arena evaluates
            run_dir=str(arena.run_folder),
        )
        agent = self.agent_class(arena.env_id, config)
        episodes = int(arena.budget.amount) if arena.budget.kind == "episodes" else ENDLESS
        try:
            agent.learn(episodes, Watcher(arena))
        finally:
            agent.close()


class Watcher(Monitor):
    """Tells the arena what each step has spent."""

    name = "arena"

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.tokens = 0

    def start(self, training: Training) -> None:
        self.arena.begin()

    def measure(self, training: Training, batch: Trajectories) -> dict[str, float]:
        self.tokens += int(batch.sampled_BT.sum())
        return {}

    def __call__(self, training: Training) -> bool:
        policy = training.agent.policy
        return self.arena.spent(policy, episodes=training.episodes, tokens=self.tokens, updates=policy.version)
