"""Suites: which agents meet which environments, with which seeds, under one budget. Each is a TOML file::

    title = "GRPO and PPO on sums"
    seeds = [0, 1, 2]
    imports = ["my_module"]        # optional: modules that register environments and rewards

    [budget]                       # exactly one of episodes, tokens, updates (optimiser steps) and seconds (of training)
    episodes = 20_000

    [evaluation]                   # optional; the defaults are those of EvaluationPlan
    points = 5                     # evenly spaced over the budget, start and end included
    problems = 128                 # held-out problems at each point
    samples = 8                    # sampled completions of each
    temperature = 1.0

    [environments.sums]            # the name in the results
    id = "textenv/Arithmetic-v0"
    options = { digits = 1 }       # optional
    model = "tiny"                 # optional: what all agents start from

    [agents.patient]               # the name in the results
    kind = "grpo"                  # which contender; may be left out where it is the name
    settings = { group_size = 8 }  # optional, of the contender

A suite may instead hold claims to be tested, each with each seed, or programs to be run, each once::

    [claims]
    names = ["clip_higher"]        # optional; default all

    [programs.generation]
    command = ["textenv", "bench", "speed", "--only", "generation"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_type_hints

from benchmarks.harness.records import CLAIMS, PROGRAMS, Cell, file_name
from benchmarks.harness.toml_file import Keys, TomlFile, nearest
from textenv.cli import import_module
from textenv.registry import make_task, registry

SHIPPED = Path(__file__).parent.parent / "suites"
ENVIRONMENTS, AGENTS = "environments", "agents"
"""Tables of a suite, beside those of claims and programs."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long every agent may train: exactly one of these.

    Attributes:
        episodes: sampled in training.
        tokens: sampled in training.
        updates: steps of the optimiser.
        seconds: of training; what measuring takes does not count.

    Raises:
        ValueError: there is not exactly one, or it is not above 0.
    """

    episodes: int | None = None
    tokens: int | None = None
    updates: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [one.name for one in fields(self) if getattr(self, one.name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget is one of episodes, tokens, updates and seconds, got {' and '.join(given) or 'none'}"
            )
        if self.amount <= 0:
            raise ValueError(f"a budget is above 0, got {self.amount:g} {self.kind}")

    @property
    def kind(self) -> Literal["episodes", "tokens", "updates", "seconds"]:
        """Its unit."""
        kinds: tuple[Literal["episodes", "tokens", "updates", "seconds"], ...]
        kinds = ("episodes", "tokens", "updates", "seconds")
        return next(kind for kind in kinds if getattr(self, kind) is not None)

    @property
    def amount(self) -> float:
        """How much."""
        return getattr(self, self.kind)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """When and how policies are measured on held-out problems.

    Attributes:
        points: how often, evenly spaced over the budget, start and end included.
        problems: how many at each point; the same at all points and for all agents.
        samples: completions of each problem, beside the greedy one.
        temperature: of those samples.

    Raises:
        ValueError: a value out of its range.
    """

    points: int = 3
    problems: int = 128
    samples: int = 8
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("points", 2), ("problems", 1), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature:g}; greedy is measured anyway")


@dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """An environment of a suite.

    Attributes:
        id: a registered one.
        options: of the environment.
        model: that agents start from; default their own default.
    """

    id: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class AgentSpec:
    """An agent of a suite.

    Attributes:
        kind: the contender that plays it.
        settings: of the contender.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is compared.

    Attributes:
        title: for people.
        path: the file that it was read from.
        seeds: one for each repetition; agents that share one meet the same problems.
        budget: None where there are no agents.
        evaluation: the same for all agents.
        environments, agents: by their names in the results.
        claims: names of published claims.
        programs: command lines by name.
        imports: modules of the user's.
    """

    title: str
    path: Path
    seeds: tuple[int, ...] = ()
    budget: Budget | None = None
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    environments: Mapping[str, EnvironmentSpec] = field(default_factory=dict)
    agents: Mapping[str, AgentSpec] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    programs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    imports: tuple[str, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        """All that is to be run. Seed by seed, so that an early look sees every agent."""
        return [
            *(Cell(env, agent, seed) for seed in self.seeds for agent in self.agents for env in self.environments),
            *(Cell(CLAIMS, claim, seed) for seed in self.seeds for claim in self.claims),
            *(Cell(PROGRAMS, program, 0) for program in self.programs),
        ]


def shipped_suites() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_suite(source: str | Path) -> Suite:
    """Read a suite, and check all of it that can be checked before anything starts.

    Args:
        source: a TOML file, or the name of a shipped suite.

    Raises:
        ValueError: there is none, or something is wrong with it; the message names the line and the nearest known name.
        ImportError: an agent needs what is not installed.

    Example:
        >>> load_suite("quick").seeds
        (0, 1, 2)
    """
    suite = read_suite(source)
    file = TomlFile(suite.path)
    for name, environment in suite.environments.items():
        told = "options" if environment.id in registry else "id"
        file.checked((ENVIRONMENTS, name, told), make_task, environment.id, **environment.options)
    for name in suite.agents:
        _check_agent(file, suite, name)
    return suite


def read_suite(source: str | Path) -> Suite:
    """Read a suite without a look at what agents and environments take; for one that was checked before.

    Raises:
        ValueError: there is none, or it is no suite.
    """
    file = TomlFile(_find(source))
    file.check_names((), ("title", "seeds", "imports", "budget", "evaluation", ENVIRONMENTS, AGENTS, CLAIMS, PROGRAMS))
    for there, missing in ((AGENTS, ENVIRONMENTS), (ENVIRONMENTS, AGENTS)):
        if (there,) in file and not file.names((missing,)):
            file.fail((there,), f"there are {there} but no {missing}; add a table [{missing}.NAME]")
    imports = file.read(("imports",), list[str]) if ("imports",) in file else []
    for module in imports:
        file.checked(("imports",), import_module, module)
    suite = Suite(
        title=file.read(("title",), str),
        path=file.path,
        seeds=_seeds(file),
        budget=_budget(file),
        evaluation=file.record(("evaluation",), EvaluationPlan),
        environments={name: file.record((ENVIRONMENTS, name), EnvironmentSpec) for name in _names(file, ENVIRONMENTS)},
        agents={name: file.record((AGENTS, name), AgentSpec, kind=name) for name in _names(file, AGENTS)},
        claims=_claims(file),
        programs={name: _program(file, name) for name in _names(file, PROGRAMS)},
        imports=tuple(imports),
    )
    if not suite.cells:
        file.fail((), f"nothing to run; a suite has tables [{AGENTS}.NAME], [{CLAIMS}] or [{PROGRAMS}.NAME]")
    return suite


def _find(source: str | Path) -> Path:
    shipped, path = shipped_suites(), Path(source)
    if path.is_file():
        return path
    if str(source) not in shipped:
        raise ValueError(f"no suite {str(source)!r}; {nearest(str(source), shipped)}, or name a TOML file")
    return shipped[str(source)]


def _seeds(file: TomlFile) -> tuple[int, ...]:
    if (AGENTS,) not in file and (CLAIMS,) not in file:
        if ("seeds",) in file:
            file.fail(("seeds",), "only agents and claims have seeds")
        return ()
    seeds = file.read(("seeds",), list[int])
    if not seeds:
        file.fail(("seeds",), "a suite needs at least one seed, as in seeds = [0, 1, 2]")
    for seed in seeds:
        if seeds.count(seed) > 1:
            file.fail(("seeds",), f"the seed {seed} is there {seeds.count(seed)} times; each counts once")
        if not 0 <= seed < 2**32:
            file.fail(("seeds",), f"a seed is a whole number from 0 to 2**32 - 1, got {seed}")
    return tuple(seeds)


def _budget(file: TomlFile) -> Budget | None:
    if (AGENTS,) not in file:
        if ("budget",) in file:
            file.fail(("budget",), "only agents have a budget")
        return None
    if ("budget",) not in file:
        file.fail((), "agents need a [budget], one of episodes, tokens, updates and seconds")
    return file.record(("budget",), Budget)


def _names(file: TomlFile, table: str) -> list[str]:
    """The names in a table of tables. Each has a folder of its own."""
    folders: dict[str, str] = {}
    for name in file.names((table,)):
        other = folders.setdefault(file_name(name), name)
        if other != name:
            file.fail((table, name), f"{name!r} and {other!r} would share a folder; rename one")
    return list(folders.values())


def _claims(file: TomlFile) -> tuple[str, ...]:
    if (CLAIMS,) not in file:
        return ()
    from benchmarks.claims import claim_names

    file.check_names((CLAIMS,), ("names",))
    names = file.read((CLAIMS, "names"), list[str]) if (CLAIMS, "names") in file else claim_names()
    for name in names:
        file.check_name((CLAIMS, "names"), f"claim {name!r}", name, claim_names())
    return tuple(names)


def _program(file: TomlFile, name: str) -> tuple[str, ...]:
    file.check_names((PROGRAMS, name), ("command",))
    command = file.read((PROGRAMS, name, "command"), list[str])
    if not command:
        file.fail((PROGRAMS, name, "command"), "a command line has at least one word")
    return tuple(command)


def _check_agent(file: TomlFile, suite: Suite, name: str) -> None:
    """Check an agent's kind, its settings under the budget, and, of an agent of ours, that the budget lasts for a step."""
    from benchmarks.harness.contenders import Describes, contender_names, make_contender

    keys, agent, budget = (AGENTS, name), suite.agents[name], suite.budget
    assert budget is not None
    if ":" not in agent.kind:  # those are module:Class
        file.check_name((*keys, "kind"), f"agent {agent.kind!r}", agent.kind, contender_names())
    ours = {entry.name: entry for entry in entry_points(group="textenv.agents")}
    if agent.kind in ours:
        _check_ours(file, keys, agent, budget, ours[agent.kind].load().config_class)
    contender = file.checked((*keys, "settings"), make_contender, agent.kind, agent.settings)
    if isinstance(contender, Describes):
        file.checked((*keys, "settings"), contender.described, budget)


def _check_ours(file: TomlFile, keys: Keys, agent: AgentSpec, budget: Budget, config_class: type[Any]) -> None:
    hints = get_type_hints(config_class, include_extras=True)
    for setting in agent.settings:
        told = (*keys, "settings", setting)
        file.check_name(told, f"setting {setting!r} of {agent.kind}", setting, hints)
        file.read(told, hints[setting])
    config = file.checked((*keys, "settings"), config_class, **agent.settings)
    prompts, group = config.prompts_per_step, getattr(config, "group_size", 1)
    # No episode is shorter than a token.
    least = {"episodes": prompts * group, "tokens": prompts * group, "updates": 1, "seconds": 0}[budget.kind]
    if budget.amount < least:
        file.fail(
            ("budget", budget.kind),
            f"{budget.amount:g} {budget.kind} are too few for one step of {keys[-1]}, which samples {prompts * group} "
            f"episodes: prompts_per_step {prompts} × group_size {group}; raise the one or lower the others",
        )
