"""TRL's GRPO and RLOO as contenders: the same start, problems, order and reward, and TRL's own algorithm and defaults."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainerCallback

import rewards
from agents.core.config import AgentConfig
from agents.core.models import load_model
from agents.core.policy import Policy
from benchmarks.harness.arena import Arena
from benchmarks.harness.contenders import ENDLESS, check_settings
from benchmarks.harness.provenance import as_json, digest
from benchmarks.harness.suite import Budget
from textenv.problems import ProblemStream
from textenv.task import Finish, Problem, Task

try:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
except ImportError as error:
    raise ImportError('trl-grpo and trl-rloo need TRL: pip install "textenv[trl]"') from error

DEFAULTS: dict[str, Any] = {
    # As our agents have them.
    "per_device_train_batch_size": 256,
    "num_generations": 8,
    "warmup_steps": 10,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    # TRL's own save memory at the price of time or precision, and write logs.
    "gradient_checkpointing": False,
    "bf16": False,
    "dataloader_pin_memory": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
GIVEN = ("output_dir", "seed", "max_steps", "num_train_epochs", "max_completion_length", "shuffle_dataset", "use_cpu")
"""Settings that the arena gives, the same to all."""


class TRL:
    """One of TRL's online trainers.

    Args:
        settings: of its config, but for :data:`GIVEN`.

    Raises:
        ValueError: an unknown setting, or one that the arena gives; when training starts, a task with several turns or with
            stop texts, which these trainers do not have.
    """

    trainer_class: Any
    config_class: Any

    def __init__(self, **settings: Any) -> None:
        check_settings(
            self.trainer_class.__name__, settings, [field.name for field in fields(self.config_class)], GIVEN
        )
        self.given = settings

    def chosen(self, budget: Budget) -> dict[str, Any]:
        """The settings given, and the default that depends on the budget: the learning rate falls where the end is known."""
        return {"lr_scheduler_type": "linear" if budget.kind == "episodes" else "constant_with_warmup", **self.given}

    def described(self, budget: Budget) -> str:
        """The settings chosen, and a hash of the defaults here; TRL's own belong to its version."""
        return f"{as_json(self.chosen(budget))} {digest(DEFAULTS)}"

    def train(self, arena: Arena) -> None:
        from datasets import IterableDataset

        task = arena.task
        if task.turns > 1 or task.stop:
            raise ValueError(f"{self.trainer_class.__name__} plays tasks of one turn without stop texts, not {task}")
        # From a folder, where the trainer looks for the start again if it needs a reference.
        policy = load_model(arena.start_folder(), arena.start.tokenizer, arena.start.device)
        config = self.config_class(
            **{
                **DEFAULTS,
                "learning_rate": AgentConfig(model=arena.model).base_learning_rate,
                **self.chosen(arena.budget),
            },
            output_dir=str(arena.run_folder),
            seed=arena.seed,
            max_steps=ENDLESS,
            max_completion_length=task.max_new_tokens,
            shuffle_dataset=False,
            use_cpu=policy.device.type == "cpu",
        )
        config.max_steps = steps(config, arena.budget)
        asked = Asked(task, policy, arena.seed)
        trainer = self.trainer_class(
            policy.model,
            asked.score,
            config,
            train_dataset=IterableDataset.from_generator(asked.problems),
            processing_class=policy.tokenizer.to_transformers(),
            callbacks=[Watcher(arena, policy, asked)],
        )
        trainer.train()


class GRPO(TRL):
    """``trl.GRPOTrainer``."""

    trainer_class, config_class = GRPOTrainer, GRPOConfig


class RLOO(TRL):
    """``trl.RLOOTrainer``."""

    trainer_class, config_class = RLOOTrainer, RLOOConfig


def updates_a_batch(config: Any) -> float:
    """Optimiser steps for what is sampled at once; below 1 where several samplings make a step."""
    return config.steps_per_generation * config.num_iterations / config.gradient_accumulation_steps


def steps(config: Any, budget: Budget) -> int:
    """Optimiser steps at most: by a budget in episodes those that use it up, in whole batches."""
    if budget.kind != "episodes":
        return ENDLESS
    return math.ceil(math.ceil(budget.amount / config.generation_batch_size) * updates_a_batch(config))


class Asked:
    """The problems of a training, and what was answered.

    Attributes:
        episodes, tokens: answered so far.
    """

    def __init__(self, task: Task, policy: Policy, seed: int) -> None:
        self.task, self.tokenizer, self.seed = task, policy.tokenizer, seed
        self.reward = rewards.as_reward(task.reward)
        self.chats = getattr(policy.tokenizer.to_transformers(), "chat_template", None) is not None
        self.episodes = self.tokens = 0

    def problems(self) -> Iterator[dict[str, Any]]:
        """Without end, in the order in which all contenders get them."""
        stream = ProblemStream(self.task, "train")
        stream.start(self.seed)
        while True:
            index = stream.index
            ((problem, _),) = stream.take(1)
            yield {"prompt": self.prompt(problem), "index": index}

    def prompt(self, problem: Problem) -> str | list[dict[str, str]]:
        """As TRL takes it, to become the tokens that our agents get."""
        system = self.task.system
        if not self.chats:
            return f"{system}\n{problem.prompt}" if system else problem.prompt
        opening = [{"role": "system", "content": system}] if system else []
        return [*opening, {"role": "user", "content": problem.prompt}]

    def score(self, completion_ids: Sequence[Sequence[int]], index: Sequence[int], **_: Any) -> list[float | None]:
        """What answers to problems are worth, from their tokens: the environment's reward."""
        self.episodes += len(completion_ids)
        self.tokens += sum(map(len, completion_ids))
        samples = [self.sample(list(ids), number) for ids, number in zip(completion_ids, index, strict=True)]
        return [score.value for score in rewards.score_samples(self.reward, samples)]

    def sample(self, ids: list[int], index: int) -> rewards.Sample:
        problem = self.task.problem(self.seed, "train", index)
        ended = bool(ids) and ids[-1] in self.tokenizer.eos_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        return rewards.Sample(
            prompt=problem.prompt,
            completion=text,
            reference=problem.reference,
            turns=(text,),
            tokens=tuple(ids),
            decode=self.tokenizer.decode,
            finish=(Finish.EOS if ended else Finish.LENGTH).label,
            info=problem.info,
        )


class Watcher(TrainerCallback):
    """Tells the arena what has been spent, when the updates on what was sampled are done."""

    def __init__(self, arena: Arena, policy: Policy, asked: Asked) -> None:
        self.arena, self.policy, self.asked = arena, policy, asked

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.arena.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked = self.asked
        if state.global_step % max(1, round(updates_a_batch(args))):
            return
        goes_on = self.arena.spent(self.policy, episodes=asked.episodes, tokens=asked.tokens, updates=state.global_step)
        control.should_training_stop |= not goes_on
