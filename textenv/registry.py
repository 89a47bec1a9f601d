"""Registering tasks: from a function, a class or a dataset, each as one Gymnasium id with both levels."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym

from textenv.task import FunctionTask, Task

_RESERVED = ("task", "level", "split", "tokenizer", "vocab_size", "render_mode", "num_envs", "autoreset_mode")
"""What ``gym.make`` and ``gym.make_vec`` take before a task sees its options."""

_OVERRIDES = ("reward", "max_new_tokens", "max_tokens", "holdout", "stop", "system")
"""Attributes of every task that registration and ``gym.make`` may set."""


@dataclass(frozen=True)
class Registered:
    """A registered task: what builds it, and the options it was registered with."""

    id: str
    build: Callable[..., Task]
    options: Mapping[str, Any]


registry: dict[str, Registered] = {}


def register(id: str, target: Any = None, /, *, data: Any = None, **options: Any) -> Any:
    """Register a task under a Gymnasium id, usable at both levels, alone and vectorised.

    Four forms, one result:

    - a decorator on a function ``rng -> (prompt, reference)`` or on a :class:`Task` subclass;
    - a function as ``target``;
    - a :class:`Task` subclass as ``target``;
    - a dataset: ``data="file.jsonl"`` with the names of its fields, ``prompt="question", answer="answer"``
      (see :class:`textenv.datasets.DatasetTask`).

    Args:
        id: ``namespace/Name-v0``.
        target: the function or class; left out when used as a decorator or with ``data``.
        data: a jsonl, json, csv or parquet file (``.gz`` too), a folder of json files, or the name of a dataset on the hub.
        options: defaults for the task's own options and for ``reward``, ``max_new_tokens``, ``max_tokens``, ``holdout``,
            ``stop`` and ``system``; ``gym.make`` can override each.

    Raises:
        ValueError: the id is taken or malformed, an option is unknown, or both a target and ``data`` are given.

    Example:
        >>> @register("docs/Reverse-v0")
        ... def reverse(rng):
        ...     word = "".join(rng.choice(list("abcdef"), size=4))
        ...     return f"Reverse {word}:", word[::-1]
        >>> gym.make("docs/Reverse-v0").reset(seed=0)[1]["prompt"][:8]
        'Reverse '
    """
    if data is not None:
        if target is not None:
            raise ValueError(f"register({id!r}, …) takes a function or class, or data=…, not both")
        from textenv.datasets import DatasetTask

        _add(id, DatasetTask, {"data": data, **options})
        return None
    if target is None:
        return lambda decorated: register(id, decorated, **options) or decorated
    if isinstance(target, type) and issubclass(target, Task):
        _add(id, target, options)
    elif callable(target):
        _add(id, lambda: FunctionTask(target), options)
    else:
        raise ValueError(
            f"register({id!r}, …) takes a function rng -> (prompt, reference), a Task subclass or data=…, got {target!r}"
        )
    return None


def _add(id: str, build: Callable[..., Task], options: Mapping[str, Any]) -> None:
    if id in gym.registry:
        raise ValueError(f"{id!r} is registered already; choose another name or version")
    reserved = [name for name in _RESERVED if name in inspect.signature(build).parameters]
    if reserved:
        raise ValueError(f"{id}: gym.make has an option {reserved[0]!r} of its own; give the task's another name")
    _check_options(id, build, options)
    try:
        gym.register(
            id,
            entry_point="textenv.envs:make_env",
            vector_entry_point="textenv.vector:make_vector_env",
            kwargs={"task": id},
            # What the environment promises is checked once, by `textenv check`, not at every step of a training run.
            disable_env_checker=True,
        )
    except gym.error.Error as error:
        raise ValueError(f"an id is namespace/Name-v0, got {id!r}") from error
    registry[id] = Registered(id, build, dict(options))


def make_task(id: str, **options: Any) -> Task:
    """Build the task registered as ``id``, its registered options overridden by ``options``.

    Raises:
        ValueError: unknown id (the message names the nearest ones) or unknown option.
    """
    if id not in registry and id in gym.registry:
        raise ValueError(
            f"{id!r} is a Gymnasium environment without a token-level view, which only textenv.register makes; "
            "write its problems and its reward as a task and register that"
        )
    if id not in registry:
        nearest = difflib.get_close_matches(id, registry, n=3, cutoff=0.4)
        raise ValueError(
            f"no environment {id!r}; "
            + (f"did you mean {' or '.join(nearest)}? " if nearest else "")
            + "`textenv list` shows all; your own needs its module imported (--import my_module)"
        )
    entry = registry[id]
    _check_options(id, entry.build, options)
    settings = {**entry.options, **options}
    signature = inspect.signature(entry.build)
    # An option that the constructor takes is its own, whatever its name: other settings may depend on it.
    after = {name: settings.pop(name) for name in _OVERRIDES if name in settings and name not in signature.parameters}
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ValueError(f"{id} cannot be made: {error}; its options are {signature}") from None
    task = entry.build(**settings)
    for name, value in after.items():
        setattr(task, name, value)
    return task


def _check_options(id: str, build: Callable[..., Task], options: Mapping[str, Any]) -> None:
    own = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        return  # the task itself knows what it takes
    unknown = [name for name in options if name not in own and name not in _OVERRIDES]
    if unknown:
        known = ", ".join(dict.fromkeys([*own, *_OVERRIDES]))
        raise ValueError(f"{id} has no option {', '.join(map(repr, unknown))}; it has {known}")
