"""The embedded tiny model, taught enough by its task's demonstrations that reinforcement has something to reinforce."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

import rewards
from agents.core.config import TINY
from agents.core.engines.native import NativeEngine
from agents.core.evaluate import evaluate
from agents.core.learner import Learner
from agents.core.models import build_tiny, load_model
from agents.core.policy import Policy
from agents.core.progress import LiveLine
from agents.core.rollout import Rollout, demonstrations
from agents.sft import sft_step
from textenv.task import Finish, Problem, Task, Transcript
from textenv.tokenizer import Tokenizer

VERSION = 1
"""Raised whenever the same task would be warmed up differently, so that old caches are left alone."""
ENOUGH = 0.4
"""Greedy accuracy on training problems at which the warm-up ends: plenty right, plenty left to learn."""
MAX_STEPS = 500
BATCH = 64
PROBE_EVERY, PROBES = 5, 256
LEARNING_RATE, RISE_STEPS = 1e-3, 20
AVERAGE_DECAY = 0.97


def embedded_policy(env_id: str, task: Task, tokenizer: Tokenizer, *, seed: int, device: torch.device) -> Policy:
    """The tiny model for a task: from the cache, or built, warmed up and cached.

    A task without demonstrations gets the model with fresh weights.
    """
    policy = Policy(build_tiny(tokenizer, seed, max(1024, task.max_tokens)), tokenizer).to(device)
    if not _demonstrates(task):
        print(f"{env_id} has no demonstrations: the {TINY} model starts from fresh weights")
        return policy
    folder = cache_folder() / f"{TINY}-{_fingerprint(env_id, task, tokenizer, seed)}"
    if folder.exists():
        return load_model(folder, tokenizer, device)
    warm_up(policy, task, seed=seed)
    new = folder.with_name(f"{folder.name}.{os.getpid()}")
    policy.save(new)
    try:
        os.replace(new, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(new)  # another process has made the same model meanwhile
    return policy


def cache_folder() -> Path:
    """Where warmed-up models are kept: ``TEXTENV_CACHE``, or ``textenv`` in the user's cache folder."""
    folder = os.environ.get("TEXTENV_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "textenv")
    return Path(folder).expanduser()


def warm_up(policy: Policy, task: Task, *, seed: int) -> None:
    """Teach ``policy`` by supervised fine-tuning until it solves two fifths of unseen training problems.

    What is kept is the running average of the weights (Polyak and Juditsky, 1992), which solves far more than the weights
    of any one step and so starts reinforcement on firmer ground.
    """
    average = copy.deepcopy(policy)
    teacher = Rollout(task, NativeEngine(policy), policy, seed=seed)
    prober = Rollout(task, NativeEngine(average), average, reward=_right_or_wrong(teacher), seed=seed + 1)
    learner = Learner(policy)
    with LiveLine("warm-up", MAX_STEPS) as line:
        for step in range(1, MAX_STEPS + 1):
            learner.set_learning_rate(LEARNING_RATE * min(1.0, step / RISE_STEPS))
            batch = demonstrations(teacher.begin((step - 1) * BATCH, BATCH, scored=False)).to(policy.device)
            metrics = sft_step(learner, batch, torch.arange(BATCH, device=policy.device))
            _average_in(average, policy, min(AVERAGE_DECAY, step / (step + 10)))
            if step % PROBE_EVERY == 0:
                metrics["accuracy"] = evaluate(prober, PROBES).accuracy
                line.update(step, metrics)
                if metrics["accuracy"] >= ENOUGH:
                    break
    policy.load_state_dict(average.state_dict())
    policy.version += 1


def _right_or_wrong(teacher: Rollout) -> rewards.Reward:
    """What tells whether the warm-up is enough: the task's own reward, or whether an answer is the one demonstrated.

    The latter where the task's reward waits, compares answers, or does not call what is demonstrated right, as judges and
    reward models do not: it is spared the many answers of the warm-up.
    """
    if not any(part.waits or part.whole_groups for part in teacher.reward.walk()):
        shown = demonstrations(teacher.begin(0, BATCH)).scores
        if sum(score.correct is True for score in shown) >= ENOUGH * BATCH:
            return teacher.reward
    return _Demonstrated(teacher.task)


class _Demonstrated(rewards.Reward):
    """1 if the first completion is what the task would say."""

    name = "demonstrated"

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, samples: Sequence[rewards.Sample]) -> list[rewards.Score]:
        problems = [Problem(sample.prompt, sample.reference, sample.info) for sample in samples]
        shown = [self.task.demonstrate(Transcript(problem, (), (), Finish.NONE)) for problem in problems]
        return [rewards.Score(float(sample.turns[0] == text)) for sample, text in zip(samples, shown, strict=True)]


@torch.no_grad()
def _average_in(average: Policy, policy: Policy, decay: float) -> None:
    for kept, new in zip(average.parameters(), policy.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    average.version += 1


def _demonstrates(task: Task) -> bool:
    return task.demonstrate(Transcript(task.problem(0, "train", 0), (), (), Finish.NONE)) is not None


def _fingerprint(env_id: str, task: Task, tokenizer: Tokenizer, seed: int) -> str:
    """Names a warm-up by what it would teach: a task that was edited gets another one."""
    problems = [task.problem(seed, "train", i) for i in range(32)]
    shown = [task.demonstrate(Transcript(problem, (), (), Finish.NONE)) for problem in problems]
    # The reward says when it is enough, the limits what is asked of the model.
    task_settings = [rewards.as_reward(task.reward).name, task.max_new_tokens, task.max_tokens, task.turns]
    taught = [VERSION, env_id, tokenizer.name, seed, task_settings, [problem.prompt for problem in problems], shown]
    return hashlib.blake2b(json.dumps(taught).encode(), digest_size=8).hexdigest()
