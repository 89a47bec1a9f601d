"""What all agents have in common: a task, a policy, an engine, a learner, and the habits learn, predict, save, load."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from agents.core.boards import check_boards
from agents.core.config import TINY, AgentConfig
from agents.core.critic import Critic
from agents.core.engines.base import Sampling
from agents.core.engines.make import check_engine, make_engine
from agents.core.evaluate import Evaluation, evaluate
from agents.core.learner import Learner, check_precision, check_save_memory
from agents.core.lora import AdapterOff, add_lora, check_lora_installed
from agents.core.models import check_model_fits, load_model
from agents.core.policy import Policy, Scorer
from agents.core.rollout import Rollout, generate
from agents.core.run import STATE_FILE, check_run_folder
from agents.core.sources import find_model, newest_checkpoint, validate_model_source
from agents.core.training import Callback, Training
from rewards import as_reward
from rewards.options import parse_options
from textenv.episodes import Episodes
from textenv.registry import make_task
from textenv.task import Task
from textenv.tokenizer import Tokenizer, load_tokenizer


class Agent:
    """Trains a policy on a registered environment.

    Args:
        env_id: a registered id.
        config: an instance of the agent's own config class; default its defaults.
        resume: go on with the run in ``config.run_dir`` from its newest checkpoint; the next :meth:`learn` then ends as
            if it had never stopped.

    Attributes:
        task, reward, policy, engine, learner, config: the parts.
        checkpoint: the one that a resumed run goes on from.
        clock: where the time of a step goes, shared by the parts.
        flops: floating-point operations that the step under way has trained with.

    Raises:
        ValueError: anything wrong with the environment, its data, its options, the engine or the model's folder; raised
            before a model is loaded.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AgentConfig]]
    config: Any

    def __init__(self, env_id: str, config: AgentConfig | None = None, *, resume: bool = False) -> None:
        self.config = self.config_class() if config is None else config
        if not isinstance(self.config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(self.config).__name__}"
            )
        self.env_id = env_id
        run_dir = self.config.run_dir
        if run_dir is not None:
            check_run_folder(run_dir, resume=resume)
        checkpoint = newest_checkpoint(run_dir) if resume and run_dir is not None else None
        self.resumed, self.checkpoint = resume, checkpoint
        self.task = make_task(env_id, **task_options(self.config))
        self._reward_at_start = as_reward(self.task.reward)
        # One that adapts to the training does so for this agent alone: the registered one may be another's next.
        self.reward = copy.deepcopy(self._reward_at_start) if self._reward_at_start.adapts else self._reward_at_start
        self.check_before_loading()
        self.policy = self._load_policy(checkpoint)
        self.learner = Learner(
            self.policy,
            critic=self.make_critic(),
            weight_decay=self.config.weight_decay,
            max_grad_norm=self.config.max_grad_norm,
            tokens_per_microbatch=self.config.tokens_per_microbatch,
            temperature=self.temperature,
            precision=self.config.precision,
            save_memory=self.config.save_memory,
        )
        self.clock = self.learner.clock
        self.flops = 0.0
        self.last_training: Training | None = None
        self.start = 0
        """the first step that is still to do"""
        self.state: dict[str, float] = {}
        """numbers that grow from step to step, kept in every checkpoint"""
        self._state_at_start: dict[str, float] = {"episodes": 0}
        if checkpoint is not None:
            self.start = int(checkpoint.name)
            state = json.loads((checkpoint / STATE_FILE).read_text())
            self.reward.load_state_dict(state.pop("reward", {}))
            self._state_at_start = state
            self.learner.load(checkpoint)
        self.engine = make_engine(self.config.engine, self.policy)

    @property
    def temperature(self) -> float:
        """At which completions are sampled, and tokens scored."""
        return 1.0

    def check_before_loading(self) -> None:
        """Refuse what an agent cannot do, before its model loads."""
        check_boards()
        check_engine(self.config.engine)
        if self.config.engine.startswith("vllm") and self.config.model == TINY:
            raise ValueError(
                f"vLLM has no attention for the heads of the {TINY!r} model, which are 20 wide; use the native engine, or "
                "another model"
            )
        device = pick_device(self.config.device)
        check_precision(self.config.precision, device)
        check_save_memory(self.config.save_memory, device)
        if self.config.lora_rank:
            check_lora_installed()

    def make_critic(self) -> Critic | None:
        """The value function that is trained beside the policy, if any."""
        return None

    def learn(self, total_episodes: int | None = None, callback: Callback | None = None) -> Self:
        """Train, keeping a run; see ``run_dir`` of the config.

        Args:
            total_episodes: default that of the config.
            callback: called with the :class:`~agents.core.training.Training` after every step; returning False stops it.
        """
        raise NotImplementedError

    def training(self, total_episodes: int | None, episodes_per_step: int, callback: Callback | None) -> Training:
        """The frame of a run: counts steps, shows and keeps metrics, leaves checkpoints, evaluates before and after."""
        steps = math.ceil((total_episodes or self.config.total_episodes) / episodes_per_step)
        self.state = dict(self._state_at_start)
        self.last_training = Training(self, steps * episodes_per_step, callback)
        return self.last_training

    def next_batch_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the batch of the next step depends on, for a checkpoint, beside the policy, the settings and the step's number:
        the state of the reward; and weights that it is sampled with, if they are not the policy's.
        """
        return self.reward.state_dict(), {}

    def rollout(self, split: str = "train", **options: Any) -> Rollout:
        """A rollout of this agent's policy on its task. ``options``: see :class:`agents.core.rollout.Rollout`."""
        # What adapts would make an evaluation after the training another measure than the one before it.
        reward = self._reward_at_start if split == "eval" and self.reward.adapts else self.reward
        # One completion a problem leaves a reward that compares completions nothing to compare.
        compares = split == "eval" and any(part.whole_groups for part in reward.walk())
        max_ungraded = 1.0 if compares else self.config.max_ungraded
        options = {
            "reward": reward,
            "seed": self.config.seed,
            "max_ungraded": max_ungraded,
            "clock": self.clock,
            **options,
        }
        return Rollout(self.task, self.engine, self.policy, split=split, **options)

    def _load_policy(self, checkpoint: Path | None) -> Policy:
        if not self.config.lora_rank:
            return load_policy(self.env_id, self.task, self.config, checkpoint)
        policy = load_policy(self.env_id, self.task, self.config)
        add_lora(policy, self.config.lora_rank, seed=self.config.seed)
        return policy

    def frozen_reference(self) -> Scorer:
        """The policy as it was before the first step: a copy whose weights stay, or the policy with its adapters off."""
        if self.config.lora_rank:
            return AdapterOff(self.policy)
        source = self.policy if self.start == 0 else load_policy(self.env_id, self.task, self.config)
        return copy.deepcopy(source).requires_grad_(False)

    def evaluate(self, episodes: int | None = None, *, temperature: float = 0.0) -> Evaluation:
        """Play held-out problems; greedily by default."""
        return evaluate(self.rollout("eval"), episodes or self.config.eval_episodes, temperature=temperature)

    def predict(
        self, observation: Mapping[str, np.ndarray], *, deterministic: bool = True, seed: int = 0
    ) -> tuple[np.ndarray, None]:
        """The completion for a sequence-level observation, single or vectorised, as Stable-Baselines3 agents predict.

        Args:
            observation: of the environment: ``tokens`` ``(T,)`` or ``(N, T)``, with ``length`` and ``left``.
            deterministic: greedy, or sampled at temperature 1.
            seed: of the sampling.

        Returns:
            the action, ``(max_new_tokens,)`` or ``(N, max_new_tokens)``, filled up with 0 after its end; and None.
        """
        tokens_NT = np.atleast_2d(observation["tokens"])
        length_N, left_N = np.ravel(observation["length"]), np.ravel(observation["left"])
        stop_ids = Episodes(self.task, 1, tokenizer=self.policy.tokenizer, vocab_size=self.policy.vocab_size).stop_ids
        completions = generate(
            self.engine,
            self.policy,
            [tokens[:length].tolist() for tokens, length in zip(tokens_NT, length_N, strict=True)],
            Sampling(
                max_new_tokens=self.task.max_new_tokens,
                temperature=0.0 if deterministic else 1.0,
                stop_ids=stop_ids,
                seed=seed,
            ),
            budgets=np.maximum(left_N, 1).tolist(),
        )
        action_NT = np.zeros((len(tokens_NT), self.task.max_new_tokens), dtype=np.int64)
        for action, tokens in zip(action_NT, completions.tokens, strict=True):
            action[: len(tokens)] = tokens
        return (action_NT[0] if observation["tokens"].ndim == 1 else action_NT), None

    def save(self, folder: str | Path) -> None:
        """Save the policy as a transformers folder, and beside it what :meth:`load` needs."""
        self.policy.save(folder)
        # The default of the learning rate depends on the model's name, which is another one when loaded.
        settings = {**asdict(self.config), "learning_rate": self.config.base_learning_rate}
        described = {"agent": self.name, "env": self.env_id, "settings": settings}
        (Path(folder) / "agent.json").write_text(json.dumps(described, indent=2))

    def close(self) -> None:
        """End what the engine started, such as a server's process. The agent generates no more."""
        self.engine.close()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The agent that :meth:`save` left in ``folder``.

        Raises:
            ValueError: there is none, or it is another kind of agent.
        """
        path = Path(folder) / "agent.json"
        if not path.is_file():
            raise ValueError(f"no agent in {folder}: no agent.json there; give a folder that save() wrote")
        described = json.loads(path.read_text())
        if described["agent"] != cls.name:
            raise ValueError(f"{folder} holds an agent {described['agent']!r}, not {cls.name!r}")
        return cls(
            described["env"], cls.config_class(**{**described["settings"], "model": str(folder), "run_dir": None})
        )


def task_options(config: AgentConfig) -> dict[str, Any]:
    """The options of the environment that a config sets."""
    overrides = {name: getattr(config, name) for name in ("reward", "max_new_tokens", "max_tokens")}
    return {
        **parse_options(config.env_options),
        **{name: value for name, value in overrides.items() if value is not None},
    }


def load_policy(env_id: str, task: Task, config: AgentConfig, checkpoint: Path | None = None) -> Policy:
    """The policy that a config names, or its checkpoint, after checking that the task can be asked of it.

    Raises:
        ValueError: see :class:`Agent`.
    """
    device = pick_device(config.device)
    source = checkpoint or find_model(config.model)
    tokenizer = pick_tokenizer(task, config, checkpoint)
    check_task(task, tokenizer)
    if config.model == TINY and checkpoint is None:
        from agents.warmup import embedded_policy

        return embedded_policy(env_id, task, tokenizer, seed=config.seed, device=device)
    check_model_fits(source, tokenizer, task.max_tokens)
    return load_model(source, tokenizer, device)


def pick_tokenizer(task: Task, config: AgentConfig, checkpoint: Path | None = None) -> Tokenizer:
    """The tokenizer of the model that a config names: the task's own for the tiny one.

    Raises:
        ValueError: there is no such model.
    """
    if config.model == TINY:
        return task.tokenizer()
    return load_tokenizer(validate_model_source(checkpoint or find_model(config.model)))


def check_task(task: Task, tokenizer: Tokenizer) -> None:
    """Ask the task for problems of both splits and encode their prompts, before a model loads."""
    for split in ("train", "eval"):
        Episodes(task, 1, tokenizer=tokenizer, split=split).check_prompts()


def pick_device(device: str) -> torch.device:
    """The device that a setting names.

    Raises:
        ValueError: there is no GPU to use.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device "cuda" was asked for, but torch finds no GPU; use "auto" or "cpu"')
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)
