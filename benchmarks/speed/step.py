"""A training step on the task of :mod:`benchmarks.sample_efficiency`: GRPO against TRL's, its parts, and the other agents.

Every trainer has a process of its own and waits between its steps, so that all take turns. The learning rate is so small
that the model stays what it is: every round does the same work.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import rewards
from agents.core.agent import Agent
from agents.core.engines.base import Completions
from agents.core.models import load_model
from agents.core.policy import Policy
from agents.core.training import Training
from benchmarks.measure import Turn, ratios, spread
from benchmarks.sample_efficiency import ENV_ID, ENV_OPTIONS, GROUPS, OURS, THEIRS, arithmetic, warm_start
from benchmarks.speed.report import Settings, Table
from textenv.task import Task

MODEL = Path("runs/sample_efficiency_model")
"""The warm start, made when there is none."""
WARM_UP = 4
"""Steps that set things up; PPO's critic learns alone in the first two."""
RATE = 1e-9
"""Learning rate."""
OUR_GRPO, TRL_GRPO = "GRPO", "TRL's GRPO"
AGENTS: dict[str, tuple[str, dict[str, Any]]] = {
    OUR_GRPO: ("grpo", GROUPS),
    "DAPO": ("dapo", GROUPS),
    "RAFT": ("raft", GROUPS),
    "PPO, shared critic, one epoch": ("ppo", {**GROUPS, "epochs_per_batch": 1}),
    "PPO, its defaults: 128 problems, four epochs": ("ppo", {"prompts_per_step": 128}),
}
TARGETS = {"DAPO": 1.3, "RAFT": 1.3, "PPO, shared critic, one epoch": 1.6}
"""Most times that a step may take of GRPO's, for as many sampled tokens."""

Figures = dict[str, float]
"""Of the steps of a turn, each for one step: "seconds", "tokens" sampled, and the agent's own "time_…"."""


def run(settings: Settings) -> Iterator[Table]:
    """GRPO against TRL's, the parts of its step, and all agents for as many sampled tokens."""
    steps = 1 if settings.quick else 10
    with ExitStack() as stack:
        model = str(stack.enter_context(warm_model(settings.quick)))
        measures: dict[str, Callable[[], Figures]] = {}
        for name, (agent, options) in AGENTS.items():
            peer = settings.peer(agent_steps, agent, options, model, steps, settings.device)
            measures[name] = stack.enter_context(peer)
        if find_spec("trl"):
            batches = WARM_UP + steps * (settings.rounds + 1)  # a round sets things up
            peer = settings.peer(trl_steps, model, steps, batches, settings.device)
            measures[TRL_GRPO] = stack.enter_context(peer)
        figures = settings.in_turns(measures)
    yield trainers_table(figures, "a GRPO step: 16 prompts × 8 completions of at most 8 tokens, 0.8M parameters")
    yield parts_table(figures[OUR_GRPO])
    yield agents_table(figures)


@contextmanager
def warm_model(quick: bool) -> Iterator[Path]:
    """A folder with the warm start; a quick one solves little and does not stay."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            warm_start(Path(folder), enough=0.02)
            yield Path(folder)
    else:
        if not (MODEL / "config.json").exists():
            warm_start(MODEL)
        yield MODEL


def trainers_table(figures: Mapping[str, Sequence[Figures]], title: str) -> Table:
    """Seconds a step of our GRPO and TRL's."""
    rows = []
    ours = column(figures[OUR_GRPO], "seconds")
    for name in (OUR_GRPO, TRL_GRPO):
        if name in figures:
            took = column(figures[name], "seconds")
            rows.append([name, spread(took).text("{:.4f}"), ratios(took, ours).text("{:.2f}")])
    missing = (
        () if TRL_GRPO in figures else ("TRL is not installed, so it is not measured: pip install 'textenv[trl]'",)
    )
    headers = ("trainer", "seconds a step", "× ours")
    return Table(title, headers, rows, missing)


def parts_table(figures: Sequence[Figures]) -> Table:
    """Where a GRPO step's time goes, as far as the agent says."""
    whole = column(figures, "seconds")
    parts = {name: column(figures, name) for name in figures[0] if name.startswith("time_")}
    parts["the rest"] = [total - sum(known) for total, *known in zip(whole, *parts.values(), strict=True)]
    parts["whole step"] = whole
    rows = [
        [name.removeprefix("time_"), spread(took).text("{:.4f}"), ratios(took, whole).text("{:.2f}")]
        for name, took in parts.items()
    ]
    return Table("the parts of a GRPO step", ("part", "seconds", "share"), rows)


def agents_table(figures: Mapping[str, Sequence[Figures]]) -> Table:
    """Each agent's step against GRPO's, both divided by the tokens that they sampled."""
    grpos = per_token(figures[OUR_GRPO])
    rows = []
    for name in AGENTS:
        took = spread(column(figures[name], "seconds")).text("{:.4f}")
        target = f"{TARGETS[name]:.1f}" if name in TARGETS else ""
        rows.append([name, took, ratios(per_token(figures[name]), grpos).text("{:.2f}"), target])
    headers = ("agent", "seconds a step", "× GRPO's, a sampled token", "at most")
    return Table("a step of each agent, 128 completions", headers, rows)


def column(figures: Sequence[Figures], name: str) -> list[float]:
    return [figure[name] for figure in figures]


def per_token(figures: Sequence[Figures]) -> list[float]:
    return [figure["seconds"] / figure["tokens"] for figure in figures]


class Laps:
    """Counts a trainer's steps, and has each turn measure ``steps`` of them, after ``WARM_UP`` that set things up.

    Args:
        turn: see :class:`benchmarks.measure.Peer`.
        steps: of a turn.
    """

    def __init__(self, turn: Turn, steps: int) -> None:
        self.turn, self.steps = turn, steps
        self.left = WARM_UP
        self.sums: Figures = {}
        self.started: float | None = None
        """when the turn began; None while things are set up"""

    def add(self, figures: Mapping[str, float]) -> None:
        """Figures of the step under way."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def end_step(self) -> None:
        """A step has ended. If it was the last of its turn, the turn is handed over, and this returns with the next."""
        self.left -= 1
        if self.left:
            return
        if self.started is None:
            self.turn(None)
        else:
            self.add({"seconds": time.perf_counter() - self.started})
            self.turn({name: value / self.steps for name, value in self.sums.items()})
        self.sums, self.left = {}, self.steps
        self.started = time.perf_counter()


def agent_steps(turn: Turn, agent: str, options: dict[str, Any], model: str, steps: int, device: str) -> None:
    """A :class:`benchmarks.measure.Peer`'s program: steps of one of our agents."""
    (entry,) = entry_points(group="textenv.agents", name=agent)
    settings = {**OURS, **options, "learning_rate": RATE, "device": device, "model": model, "env_options": ENV_OPTIONS}
    train_agent(Laps(turn, steps), entry.load(), ENV_ID, settings)


def train_agent(laps: Laps, agent_class: type[Agent], env_id: str, settings: Mapping[str, Any]) -> None:
    """Train on and on, with all that an agent writes to disk but checkpoints; tokens and times go to ``laps``."""
    endless: dict[str, Any] = {"total_episodes": 10**9, "checkpoint_every": 10**9, "eval_episodes": 1}
    with tempfile.TemporaryDirectory() as folder:
        agent = agent_class(env_id, agent_class.config_class(**settings, **endless, run_dir=folder))
        generate = agent.engine.generate

        def counted(*arguments: Any, **named: Any) -> Completions:
            completions = generate(*arguments, **named)
            laps.add({"tokens": sum(map(len, completions.tokens))})
            return completions

        def after_step(training: Training) -> None:
            laps.add({name: value for name, value in training.metrics.items() if name.startswith("time_")})
            laps.end_step()

        agent.engine.generate = counted  # type: ignore[method-assign]
        agent.learn(callback=after_step)


def trl_steps(turn: Turn, model: str, steps: int, batches: int, device: str) -> None:
    """A :class:`benchmarks.measure.Peer`'s program: steps of TRL's GRPO on the same model, problems and reward."""
    prompts, group = GROUPS["prompts_per_step"], GROUPS["group_size"]
    settings = {
        **THEIRS,
        "learning_rate": RATE,
        "use_cpu": device == "cpu",
        "loss_type": "grpo",
        "num_generations": group,
        "per_device_train_batch_size": prompts * group,
    }
    train_trl(Laps(turn, steps), load_model(model), arithmetic(), prompts * batches, settings)


def train_trl(laps: Laps, policy: Policy, task: Task, num_problems: int, settings: Mapping[str, Any]) -> None:
    """Train with TRL's GRPO on the first problems of a task, each asked once; the steps go to ``laps``."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    reward = rewards.as_reward(task.reward)

    def score(prompts: list[str], completions: list[str], reference: list[str], **_: Any) -> list[float | None]:
        answers = zip(prompts, completions, reference, strict=True)
        samples = [rewards.Sample(prompt=p, completion=text, reference=wanted) for p, text, wanted in answers]
        return [score.value for score in rewards.score_samples(reward, samples)]

    class AfterStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            laps.end_step()

    problems = [task.problem(0, "train", index) for index in range(num_problems)]
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            policy.model,
            score,
            GRPOConfig(output_dir=folder, **settings),
            train_dataset=Dataset.from_list([{"prompt": p.prompt, "reference": p.reference} for p in problems]),
            processing_class=policy.tokenizer.to_transformers(),
            callbacks=[AfterStep()],
        ).train()
