"""The commands of the agents' floor: `textenv train`, `evaluate` and `generate`. torch is imported where it is used."""

from __future__ import annotations

import difflib
import inspect
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rewards.options import parse_options
from rewards.terminal import plain, visible
from textenv.cli import import_module, imported
from textenv.commands import EnvId, Options
from textenv.registry import make_task

if TYPE_CHECKING:
    from agents.core.agent import Agent
    from agents.core.best_of import BestOfEvaluation
    from agents.core.evaluate import Evaluation
    from agents.core.monitors import Together
    from agents.core.training import Training

GROUP = "textenv.agents"
LONGEST_CELL = 300
Rewards = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="REWARD")]
Environments = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="ENVIRONMENT")]
Metrics = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="METRIC")]
COMMAND_ARGUMENTS = """Args:
    env_id: a registered environment.
    monitor: a reward that is not trained on, to score with what each step samples; may be given several times.
    tripwire: an environment whose reward should not move, to play every 50 steps; may be given several times.
    stop_when_falls: stop when this falls below its best by more than its noise: monitor/REWARD on what each step samples,
        held_out or held_out/REWARD on held-out problems every 10 steps; may be given several times."""


def train(arguments: list[str]) -> None:
    """Train an agent on an environment: textenv train AGENT ENVIRONMENT [SETTINGS], or textenv train --resume RUN.

    `textenv train AGENT --help` lists an agent's settings.
    """
    if arguments[:1] == ["--resume"]:
        _show(*_resume(arguments[1:]))
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{inspect.cleandoc(train.__doc__ or '')}\n\nagents: {', '.join(sorted(_agents()))}")
        return
    agent_class = _agent_class(arguments[0])

    def command(
        env_id: EnvId,
        /,
        config: Annotated[Any, tyro.conf.arg(name="")],
        monitor: Rewards = (),
        tripwire: Environments = (),
        stop_when_falls: Metrics = (),
    ) -> None:
        from agents.core.agent import pick_tokenizer, task_options
        from agents.core.monitors import watch

        flags = {"monitor": monitor, "tripwire": tripwire, "stop_when_falls": stop_when_falls}
        monitors = watch([(flag, name) for flag, names in flags.items() for name in names])
        if tripwire:
            monitors.check(pick_tokenizer(make_task(env_id, **task_options(config)), config))
        _show(agent_class(env_id, config), monitors)

    command.__annotations__["config"] = Annotated[agent_class.config_class, tyro.conf.arg(name="")]
    command.__doc__ = f"{(agent_class.__doc__ or '').splitlines()[0]}\n\n{COMMAND_ARGUMENTS}"
    tyro.cli(command, prog=f"textenv train {arguments[0]}", args=arguments[1:])


train.takes_arguments = True  # type: ignore[attr-defined]  # which settings there are depends on the agent named


def _agents() -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _agent_class(name: str) -> type[Agent]:
    agents = _agents()
    if name not in agents:
        nearest = difflib.get_close_matches(name, agents, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"no agent {name!r}; {hint}there are {', '.join(sorted(agents))}")
    return agents[name].load()


def _resume(arguments: list[str]) -> tuple[Agent, Together, int | None]:
    from agents.core.monitors import watch
    from agents.core.records import read_config
    from agents.core.run import check_run_folder

    if len(arguments) != 1:
        raise ValueError("--resume takes the folder of a run and nothing else: its settings are kept there")
    check_run_folder(arguments[0], resume=True)
    described = read_config(Path(arguments[0]))
    for module in described["imports"]:
        import_module(module)
    agent_class = _agent_class(described["agent"])
    config = agent_class.config_class(**described["settings"], run_dir=arguments[0])
    monitors = watch(described.get("monitors", []))
    return agent_class(described["env"], config, resume=True), monitors, described.get("total_episodes")


def _show(agent: Agent, monitors: Together, total_episodes: int | None = None) -> None:
    """Train, then tell what came of it."""
    console = Console(highlight=False)
    try:
        training = agent.learn(total_episodes, callback=monitors).last_training
    finally:
        agent.close()
    assert training is not None
    assert training.after is not None
    console.print(_before_after(training))
    console.print(_samples_table(training.after))
    console.print(
        f"training took {training.seconds:.0f} s; the run is in [bold]{escape(str(training.run.folder))}[/bold]\n",
        soft_wrap=True,
    )
    if training.step == agent.start:
        console.print("This run was complete already: there was no step left to take.\n")
    elif not training.taught:
        why = training.stopped or "in no step was there anything to tell better answers by"
        console.print(f"[bold]Nothing was learned:[/bold] {escape(visible(why))}.")
        console.print("The first command below shows what is answered and what it earns.\n")
    console.print("What to try next:")
    for command in _next_steps(agent, training):
        console.print(f"  {escape(command)}", soft_wrap=True)


def _before_after(training: Training) -> Table:
    before, after = training.before, training.after
    assert before is not None
    assert after is not None
    table = Table("", "before", "after", title=f"{after.episodes} held-out problems, greedy, with 95 % intervals")
    table.add_row("accuracy", before.accuracy_text(), f"[bold]{after.accuracy_text()}[/bold]")
    table.add_row("reward", before.reward_text(), after.reward_text())
    table.add_row("tokens an answer", f"{before.new_tokens:.1f}", f"{after.new_tokens:.1f}")
    table.add_row("cut answers", f"{before.cut_share:.1%}", f"{after.cut_share:.1%}")
    if before.ungraded or after.ungraded:
        table.add_row("ungraded", str(before.ungraded), str(after.ungraded))
    return table


def _samples_table(evaluation: Evaluation) -> Table:
    title = "samples" if math.isnan(evaluation.accuracy) else "samples, wrong ones first"
    table = Table("prompt", "answer", "reference", "reward", "finish", title=title)
    for sample in evaluation.samples:
        reward = "ungraded" if sample["reward"] is None else f"{sample['reward']:g}"
        answer = " | ".join(sample["completions"])
        cells = (_shortened(sample["prompt"]), _shortened(answer), sample["reference"], reward, sample["finish"])
        table.add_row(*map(plain, cells))
    return table


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def _next_steps(agent: Agent, training: Training) -> list[str]:
    from agents.core.agent import task_options

    run, env_id = training.run.folder, agent.env_id
    options = " ".join(f"{name} {shlex.quote(str(value))}" for name, value in task_options(agent.config).items())
    with_options = f" --options {options}" if options else ""
    with_options += "".join(f" --import {module}" for module in imported)
    return [
        f"textenv generate {env_id} --model {run} --prompts 4 --group-size 4{with_options}",
        f"textenv evaluate {env_id} --model {run} --episodes 2000{with_options}",
        f"tensorboard --logdir {run}/tensorboard",
        "textenv list",
    ]


def evaluate(
    env_id: EnvId,
    /,
    *,
    model: str,
    episodes: int = 512,
    best_of: int = 1,
    temperature: float | None = None,
    seed: int = 0,
    split: Literal["train", "eval"] = "eval",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    engine: str = "native",
    options: Options = {},  # noqa: B006
    json_file: Path | None = None,
) -> None:
    """Measure a model on an environment's held-out problems.

    Args:
        env_id: a registered environment.
        model: a run's folder, a transformers folder or a hub name.
        episodes: how many problems to play.
        best_of: sample so many completions a problem, and tell what the best of 1, 2, 4, … of them earns when it is picked by
            the environment's reward; another reward picks with --options reward NAME.
        temperature: of the sampling; 0 is greedy. Default 0, and 1 with best_of.
        seed: of problems and sampling.
        split: which problems.
        device: where the model runs; "auto" takes a GPU when there is one.
        engine: what generates, with its options after its name: native, vllm, vllm_server.
        options: options of the environment.
        json_file: also write the figures here.
    """
    from agents.core.best_of import BestOfEvaluation, check_best_of, evaluate_best_of
    from agents.core.evaluate import evaluate as measure
    from agents.core.run import to_json

    if temperature is None:
        temperature = 0.0 if best_of == 1 else 1.0
    check_best_of(best_of, temperature)
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    console = Console(highlight=False)
    evaluation: Evaluation | BestOfEvaluation
    with _rollout(env_id, model, device, engine, seed, split, options) as rollout:
        if best_of == 1:
            evaluation = measure(rollout, episodes, temperature=temperature, seed=seed)
            title = f"{env_id}, {evaluation.episodes} problems of {split}, {how}, with 95 % intervals"
            tables = [_figures_table(evaluation, title), _samples_table(evaluation)]
        else:
            evaluation = evaluate_best_of(rollout, episodes, best_of, temperature=temperature, seed=seed)
            title = f"{env_id}, {evaluation.problems} problems of {split}, {how}, with 95 % intervals over problems"
            tables = [_best_of_table(evaluation, title)]
    for table in tables:
        console.print(table)
    if isinstance(evaluation, BestOfEvaluation) and evaluation.ungraded:
        console.print(
            f"{evaluation.ungraded} of {evaluation.problems * best_of} completions could not be graded and are left "
            "out; a problem counts as far as its graded ones go"
        )
    if json_file is not None:
        json_file.write_text(to_json(asdict(evaluation), indent=2))


def _figures_table(evaluation: Evaluation, title: str) -> Table:
    table = Table(show_header=False, title=title)
    table.add_row("accuracy", evaluation.accuracy_text())
    table.add_row("reward", evaluation.reward_text())
    table.add_row("tokens an answer", f"{evaluation.new_tokens:.1f}")
    table.add_row("cut answers", f"{evaluation.cut_share:.1%}")
    table.add_row("ungraded", str(evaluation.ungraded))
    return table


def _best_of_table(evaluation: BestOfEvaluation, title: str) -> Table:
    table = Table("best of", "problems", "reward", "accuracy", "KL at most", title=title)
    for row in evaluation.table:
        table.add_row(str(row.n), str(row.problems), row.reward_text(), row.accuracy_text(), f"{row.kl_bound:.3f} nats")
    return table


def generate(
    env_id: EnvId,
    /,
    *,
    model: str,
    prompts: int = 4,
    group_size: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    split: Literal["train", "eval"] = "eval",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    engine: str = "native",
    options: Options = {},  # noqa: B006
    out: Path | None = None,
) -> None:
    """Let a model answer an environment's problems, and show or keep the episodes.

    Args:
        env_id: a registered environment.
        model: a run's folder, a transformers folder or a hub name.
        prompts: how many problems.
        group_size: completions a problem.
        temperature: of the sampling; 0 is greedy.
        seed: of problems and sampling.
        split: which problems.
        device: where the model runs; "auto" takes a GPU when there is one.
        engine: what generates, with its options after its name: native, vllm, vllm_server.
        options: options of the environment.
        out: write the episodes here as JSON lines, tokens and log-probabilities included, instead of showing them.
    """
    from agents.core.run import episode_rows, to_line

    with _rollout(env_id, model, device, engine, seed, split, options) as rollout:
        batch = rollout.collect(0, prompts, group_size, temperature=temperature, seed=(seed,))
    if out is not None:
        out.write_bytes(b"".join(map(to_line, episode_rows(batch))))
        print(f"{len(batch)} episodes in {out}")
        return
    table = Table("prompt", "answer", "reference", "reward", "finish")
    for row in episode_rows(batch):
        reward = "ungraded" if row["return"] is None else f"{row['return']:g}"
        answer = " | ".join(row["completions"])
        cells = (_shortened(row["prompt"]), _shortened(answer), row["reference"], reward, row["finish"])
        table.add_row(*map(plain, cells))
    Console(highlight=False).print(table)


@contextmanager
def _rollout(
    env_id: str, model: str, device: str, engine: str, seed: int, split: str, options: dict[str, str]
) -> Iterator[Any]:
    """A rollout of a saved model; the environment and the engine are checked before the model loads."""
    from agents.core.agent import check_task, pick_device
    from agents.core.config import TINY
    from agents.core.engines.make import check_engine, make_engine
    from agents.core.models import load_model
    from agents.core.rollout import Rollout
    from agents.core.sources import find_model, validate_model_source
    from textenv.tokenizer import load_tokenizer

    if model == TINY:
        raise ValueError(f'the model "{TINY}" is made when training starts; give the folder of a run instead')
    task = make_task(env_id, **parse_options(options))
    check_engine(engine)
    source = find_model(model)
    validate_model_source(source)
    tokenizer = load_tokenizer(source)
    check_task(task, tokenizer)
    policy = load_model(source, tokenizer, pick_device(device))
    generates = make_engine(engine, policy)
    try:
        yield Rollout(task, generates, policy, seed=seed, split=split)
    finally:
        generates.close()
