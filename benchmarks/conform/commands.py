"""The command `textenv conform`. torch is imported where it is used."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from textenv.cli import load_module

if TYPE_CHECKING:
    from benchmarks.conform.cases import Trainer

AGENTS, TRAINERS = "textenv.agents", "textenv.trainers"
VARIANTS = {"raft++": ("raft", {"variant": "raft++"})}
"""Agents under other settings than their defaults."""
TRL = {"trl-grpo": "benchmarks.conform.trl:GRPO", "trl-rloo": "benchmarks.conform.trl:RLOO"}


def conform(
    names: tuple[str, ...] = ("all",), /, *, trainer: tuple[str, ...] = (), results: Path | None = None
) -> None:
    """Check trainers for the silent faults of others, and print a score card; exit status 1 if one has any.

    Args:
        names: agents, trl-grpo, trl-rloo, adapters of installed packages, or all of them.
        trainer: further adapters, as module:Class.
        results: a folder that keeps the card of each, for a report.
    """
    from benchmarks.conform.card import card, examine, footer, keep, reasons

    adapters = [*(find_trainer(name) for name in _expand(names, trainer)), *(_load(path) for path in trainer)]
    console = Console(highlight=False)
    findings = []
    for adapter in adapters:
        with console.status(f"checking {adapter.name}"):
            found = examine(adapter)
        if results is not None:
            keep(adapter.name, found, results)
        findings += found
    console.print(card(findings))
    for line in (*reasons(findings), *footer()):
        console.print(line, soft_wrap=True)
    if any(finding.verdict == "FAIL" for finding in findings):
        raise SystemExit(1)


def _expand(names: tuple[str, ...], paths: tuple[str, ...]) -> list[str]:
    if "all" not in names:
        return list(names)
    if paths:  # those that are named, and not all others too
        return []
    return [name for name in known_trainers() if name not in TRL or find_spec("trl")]


def known_trainers() -> list[str]:
    """Names that the command takes: every agent that samples what it learns from, and the adapters of other trainers."""
    from agents.core.policy_gradient import PolicyGradient

    agents = [entry.name for entry in entry_points(group=AGENTS) if issubclass(entry.load(), PolicyGradient)]
    return [*sorted([*agents, *VARIANTS]), *TRL, *sorted(entry.name for entry in entry_points(group=TRAINERS))]


def find_trainer(name: str) -> Trainer:
    """The adapter of that name.

    Raises:
        ValueError: there is none.
        ImportError: what it adapts is not installed.
    """
    from benchmarks.conform.ours import Ours

    if name not in known_trainers():
        raise ValueError(
            f"no trainer {name!r} to check; there are {', '.join(known_trainers())}, or --trainer module:Class"
        )
    if name in TRL:
        return _load(TRL[name])
    adapters = entry_points(group=TRAINERS, name=name)
    if adapters:
        return next(iter(adapters)).load()()
    agent, settings = VARIANTS.get(name, (name, {}))
    (entry,) = entry_points(group=AGENTS, name=agent)
    return Ours(entry.load(), name, **settings)


def _load(path: str) -> Any:
    """An adapter from ``module:Class``."""
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"--trainer takes module:Class, got {path!r}")
    return getattr(load_module(module), name)()
