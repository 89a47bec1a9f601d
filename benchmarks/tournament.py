"""Which agents' answers a judge prefers: ``python -m benchmarks.tournament RESULTS --model MODEL --base-url URL``.

The greedy answers of a results folder, written at the end of each training, meet in pairs on every held-out problem and seed
that two agents have in common, and are shown to the judge in both orders.

Shapes: P problems, A agents.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import statistics
from benchmarks.harness.results import CellResult, Results, load_results
from rewards.intervals import Share
from rewards.judge.commands import ModelSettings
from rewards.judge.pairwise import Comparison, Pair, PairwiseJudge
from rewards.judge.template import PROMPTS

Answers = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
"""By agent and seed, a row for each held-out problem, see :func:`benchmarks.harness.records.problem_row`."""


@dataclass(frozen=True)
class Tournament:
    """What came of all games on an environment.

    Attributes:
        environment: its name in the results.
        agents: their names, in the order of the suite.
        win_PAA: how often the row's agent beat the column's on each problem, 0 to 1, a mean over both orders and the seeds; NaN
            without a game.
        longer_PAA: by how many tokens the row's answers were longer, likewise.
        compared: pairs of answers with a verdict in both orders; ``flipped`` of them had different ones.
        unjudged: pairs without a verdict, which count nowhere.
    """

    environment: str
    agents: Sequence[str]
    win_PAA: np.ndarray
    longer_PAA: np.ndarray
    compared: int
    flipped: int
    unjudged: int


def main(
    results: tyro.conf.Positional[Path],
    model: ModelSettings,
    problems: int = 64,
    judge_prompt: Path = PROMPTS / "pairwise.txt",
) -> None:
    """Let a judge compare what the agents of a results folder answer, and print win rates and ratings.

    Args:
        results: the folder.
        model: the judge.
        problems: of each environment, at most.
        judge_prompt: what the judge is asked.
    """
    loaded = load_results(results)
    judge = PairwiseJudge(model.chat(), prompt=judge_prompt, sampling=model.fields)
    model.probe()
    console = Console(highlight=False)
    for environment in environments(loaded):
        console.print(table(play(loaded, environment, judge, problems)))


def environments(results: Results) -> list[str]:
    """Those on which two agents at least have answers to compare.

    Raises:
        ValueError: there is none.
    """
    found = [name for name in results.environments if sum(bool(results.done(name, one)) for one in results.agents) > 1]
    if not found:
        raise ValueError(
            f"a tournament needs two agents with finished cells on an environment; {results.folder} has none"
        )
    return found


def play(results: Results, environment: str, judge: PairwiseJudge, problems: int) -> Tournament:
    """Compare the answers of each two agents to the first held-out problems, for each seed that both have.

    Raises:
        ValueError: a file of answers is missing or broken, or agents were asked different problems.
    """
    answers = {
        agent: {seed: read_answers(cell)[:problems] for seed, cell in results.done(environment, agent).items()}
        for agent in results.agents
        if results.done(environment, agent)
    }
    agents = list(answers)
    size = _check_same_problems(environment, answers)
    games = list(_games(answers))
    comparisons = judge.compare([pair for *_, pair in games])
    win_PAA, longer_PAA, played_PAA = np.zeros((3, size, len(agents), len(agents)))
    for (first, second, seed, problem, _), comparison in zip(games, comparisons, strict=True):
        if comparison.win is None:
            continue
        i, j = agents.index(first), agents.index(second)
        win = both_orders(comparison)
        longer = answers[first][seed][problem]["greedy"]["tokens"] - answers[second][seed][problem]["greedy"]["tokens"]
        for a, b, won, more in ((i, j, win, longer), (j, i, 1 - win, -longer)):
            win_PAA[problem, a, b] += won
            longer_PAA[problem, a, b] += more
            played_PAA[problem, a, b] += 1
    with np.errstate(invalid="ignore"):  # nothing played is NaN
        win_PAA, longer_PAA = win_PAA / played_PAA, longer_PAA / played_PAA
    judged = [comparison for comparison in comparisons if comparison.win is not None]
    flipped = sum(comparison.flipped for comparison in judged)
    return Tournament(environment, agents, win_PAA, longer_PAA, len(judged), flipped, len(comparisons) - len(judged))


def read_answers(cell: CellResult) -> list[dict[str, Any]]:
    """What a cell answered at its last point, a row for each held-out problem.

    Raises:
        ValueError: there is no such file, or it is broken.
    """
    files = sorted((cell.folder / "completions").glob("*.jsonl.gz"))
    if not files:
        raise ValueError(f"{cell.folder} has no completions; run the cell again")
    try:
        with gzip.open(files[-1], "rt") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"{files[-1]} cannot be read ({error}); remove {cell.folder} and run the cell again"
        ) from error


def both_orders(comparison: Comparison) -> float:
    """How much of a game the first answer won: the mean over both orders, a tie being half."""
    if not comparison.verdicts:  # equal answers are not asked about
        return 0.5
    given, swapped = (verdict.value for verdict in comparison.verdicts)
    return ({"A": 1.0, "tie": 0.5, "B": 0.0}[given] + {"A": 0.0, "tie": 0.5, "B": 1.0}[swapped]) / 2


def table(tournament: Tournament) -> Table:
    """A row an agent: win rate against all others and against the first, the same at equal length, and ratings."""
    agents, win_PAA = tournament.agents, tournament.win_PAA
    made = Table("", title=Text(f"{tournament.environment}: greedy answers before the judge"), caption_justify="left")
    for header in ("win rate", f"against {agents[0]}", "at equal length", "Bradley–Terry", "Elo"):
        made.add_column(Text(header), justify="right")
    ratings = zip(statistics.bradley_terry(win_PAA), statistics.elo(win_PAA), strict=True)
    for i, (agent, (strength, elo)) in enumerate(zip(agents, ratings, strict=True)):
        against_first = ["", ""]
        if i:
            played_P = ~np.isnan(win_PAA[:, i, 0])
            win_P, longer_P = win_PAA[played_P, i, 0], tournament.longer_PAA[played_P, i, 0]
            against_first = [
                _rate(win_P).text(".1%"),
                (statistics.length_controlled_win_rate(win_P, longer_P) if len(win_P) else statistics.UNKNOWN).text(
                    ".1%"
                ),
            ]
        others = [win for row in win_PAA[:, i] if len(win := row[~np.isnan(row)])]
        made.add_row(
            Text(agent),
            _rate([win.mean() for win in others]).text(".1%"),
            *against_first,
            strength.text(".0f"),
            elo.text(".0f"),
        )
    contradicted = Share(tournament.flipped, tournament.compared)
    made.caption = Text(
        f"{len(win_PAA)} problems, each pair in both orders; 95 % intervals over problems. The judge contradicted itself when "
        f"answers changed places: {contradicted} pairs. Without a verdict, and counted nowhere: {tournament.unjudged} pairs."
    )
    return made


def _rate(win_P: ArrayLike) -> statistics.Interval:
    return statistics.mean([win_P]) if np.size(win_P) else statistics.UNKNOWN


def _check_same_problems(environment: str, answers: Answers) -> int:
    """How many problems there are, which must be the same for all."""
    asked = {
        f"{agent}, seed {seed}": [row["prompt"] for row in rows]
        for agent, seeds in answers.items()
        for seed, rows in seeds.items()
    }
    (first, prompts), *others = asked.items()
    for name, other in others:
        if other != prompts:
            raise ValueError(f"on {environment}, {name} was asked other problems than {first}; run one of them again")
    return len(prompts)


def _games(answers: Answers) -> Iterator[tuple[str, str, int, int, Pair]]:
    """Two agents, a seed, the number of a problem, and the two answers."""
    for first, second in combinations(answers, 2):
        for seed in answers[first]:
            for problem, (ours, theirs) in enumerate(
                zip(answers[first][seed], answers[second].get(seed, []), strict=False)
            ):
                pair = Pair(
                    question=ours["prompt"],
                    first=ours["greedy"]["text"],
                    second=theirs["greedy"]["text"],
                    reference=ours["reference"],
                )
                yield first, second, seed, problem, pair


if __name__ == "__main__":
    tyro.cli(main)
