"""Where a result comes from: what must be the same for two results to be compared."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import rewards
from agents.core.config import TINY
from agents.core.policy import Policy
from benchmarks.harness.measuring import HELD_OUT_SEED
from benchmarks.harness.records import Cell
from benchmarks.harness.suite import Suite
from benchmarks.measure import installed_version, processor
from rewards.contract import FunctionReward
from textenv.registry import registry
from textenv.task import SPLITS, FunctionTask, Task
from textenv.tokenizer import Tokenizer

PACKAGES = (
    *("textenv", "torch", "transformers", "tokenizers", "gymnasium", "numpy", "stable-baselines3", "trl", "accelerate"),
    *("vllm", "peft", "openai", "math-verify", "reasoning-gym", "langdetect"),
)
"""Those that a number may depend on, where they are installed."""
LENGTH = 12
"""Hexadecimal digits that are kept of a hash."""
PROBLEMS = 32
"""Problems of each split by which a task's content is known."""


def provenance(suite: Suite, cell: Cell, task: Task, policy: Policy, settings: str | None = None) -> dict[str, str]:
    """What a cell is run with, by part; each a short text, which ends with a hash where there is content to tell apart.

    Args:
        suite: that it belongs to.
        cell: which one.
        task: the environment's, as it was made: some rewards change with use.
        policy: what its agent starts from.
        settings: of the agent, as it tells them itself; default those of the suite.
    """
    environment, agent = suite.environments[cell.environment], suite.agents[cell.agent]
    options = {**registry[environment.id].options, **environment.options}
    reward = rewards.as_reward(task.reward)
    parts = list(reward.walk())
    return {
        "environment": f"{environment.id} {as_json(options)}",
        "task": _task(task),
        "reward": f"{reward.name} {digest(reward)}",
        "verifier": f"{', '.join(dict.fromkeys(part.name for part in parts))} {digest([_source(p) for p in parts])}",
        "tokenizer": _tokenizer(policy.tokenizer),
        "model": _model(environment.model or TINY, policy),
        "budget": "" if suite.budget is None else f"{suite.budget.amount:g} {suite.budget.kind}",
        "evaluation": as_json(asdict(suite.evaluation)),
        "settings": f"{agent.kind} {as_json(agent.settings) if settings is None else settings}",
        "libraries": ", ".join(
            [f"python {platform.python_version()}"]
            + [f"{name} {found}" for name in PACKAGES if (found := installed_version(name))]
        ),
        "hardware": hardware(),
    }


def digest(content: Any) -> str:
    """The beginning of the SHA-256 of something as JSON.

    Example:
        >>> digest({"a": 1}), digest({"a": 2})
        ('#015abd7f5cc5', '#2f8aa2b3cc01')
    """
    return f"#{hashlib.sha256(as_json(content).encode()).hexdigest()[:LENGTH]}"


def hardware() -> str:
    """The processor, its cores, the memory, and the GPU if there is one."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().total / 2**30
    return ", ".join([processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB", *gpus])


def _task(task: Task) -> str:
    """What it is, how much it allows, and a hash of its code and its first problems."""
    sizes = {split: task.size(split) for split in SPLITS}
    problems = [
        asdict(task.problem(HELD_OUT_SEED, split, index))
        for split, size in sizes.items()
        for index in range(min(PROBLEMS, size or PROBLEMS))
    ]
    limits = {name: getattr(task, name) for name in ("turns", "max_new_tokens", "max_tokens", "stop", "system")}
    return f"{task}, {as_json(limits)} {digest([_source(task), sizes, problems])}"


def _tokenizer(tokenizer: Tokenizer) -> str:
    theirs = tokenizer.to_transformers()
    content = [sorted(theirs.get_vocab().items()), theirs.chat_template, tokenizer.eos_ids]
    return f"{_short(tokenizer.name)}, {tokenizer.vocab_size} ids {digest(content)}"


def _model(source: str, policy: Policy) -> str:
    """Where it is from, its size, and a hash of its weights."""
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    return f"{_short(source)}, {size / 1e6:.2f} M parameters {_weights(policy.model)}"


def _weights(model: nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        hashed.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        hashed.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"#{hashed.hexdigest()[:LENGTH]}"


def _source(thing: Any) -> list[str]:
    """The code that a task or a reward consists of: the files of its class and of all that this one inherits from."""
    code: list[Any] = list(type(thing).__mro__[:-1])
    if isinstance(thing, FunctionTask | FunctionReward):
        code.append(thing.function)
    return [_file_text(one) for one in code]


def _file_text(code: type | Callable[..., Any]) -> str:
    """The file that defines it, and of a package all files."""
    file = getattr(sys.modules.get(code.__module__), "__file__", None)
    if file is None:  # typed in, or built in
        return code.__qualname__
    path = Path(file)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return "".join(file.read_text() for file in files)


def _short(source: str) -> str:
    """A hub name, or the last part of a path: where a folder lies is of no account."""
    return Path(source).name if Path(source).exists() else source


def _plain(value: Any, inside: tuple[Any, ...] = ()) -> Any:
    """A value as data: of a path to a file or a model what lies there, of an object of this project what it holds, of any
    other what it is.

    Args:
        inside: the objects that it is held by, which are not gone into again.
    """
    if isinstance(value, str | Path) and "/" in str(value) and _is_content(str(value)):
        return f"{Path(value).name} {_files(Path(value))}"
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one, inside) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(as_json, value))
    if isinstance(value, list | tuple):
        return [_plain(one, inside) for one in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, nn.Module):
        return _weights(value)
    named = value if inspect.isfunction(value) or isinstance(value, type) else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    ours = isinstance(value, rewards.Reward) or name.startswith("rewards.")
    if named is value or not ours or not hasattr(value, "__dict__") or any(value is one for one in inside):
        return name
    return {"": name, **_plain(vars(value), (*inside, value))}


def _is_content(path: str) -> bool:
    return os.path.isfile(path) or os.path.isfile(os.path.join(path, "config.json"))


def _files(path: Path) -> str:
    """A hash of a file, or of all in a folder."""
    hashed = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            hashed.update(file.name.encode() + file.read_bytes())
    return f"#{hashed.hexdigest()[:LENGTH]}"


def as_json(content: Any) -> str:
    """Whatever it is as JSON, the same for the same content."""
    return json.dumps(_plain(content), sort_keys=True)
