"""Steps of a run once more: its agent's own loop, on the episodes that it kept.

Nothing of an algorithm is written here a second time. The agent is made as it was before the steps, from the run's settings and
a checkpoint; its rollouts give it the stored episodes; what it would log is held against what was logged. It lives in a folder
of its own, and the run's is only read.

Shapes: B episodes, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.core.policy_gradient import PolicyGradient
from agents.core.records import SCHEMA, Row, value_of
from agents.core.rollout import Rollout
from agents.core.run import episode_rows, to_json
from agents.core.training import Training
from agents.core.trajectories import Trajectories
from rewards import Score
from textenv.episodes import Source
from textenv.task import Finish

if TYPE_CHECKING:
    from agents.core.agent import Agent

Kept = tuple[list[Row], Mapping[str, Any]]
"""What a run kept of a step: the rows of its episodes, and its metrics."""

RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Rounding: the most by which a figure may differ, in parts of itself or on the whole."""
DECIMAL = 1e-4
"""The last one of what is kept of a token."""
FIRST = ("loss", "advantage of tokens", "entropy", "logp_gap", "grad_norm")
"""The figures that are shown first."""


@dataclass(frozen=True)
class Figure:
    """A figure as it was logged and as it comes out now; of tokens the mean of their sizes.

    ``difference`` is the largest of any token; it is NaN where there is one figure and not the other.
    """

    name: str
    logged: float
    now: float
    difference: float
    differs: bool


@dataclass
class Sampled:
    """How many of a step's completions come out as they were kept when they are sampled again."""

    completions: int = 0
    tokens: int = 0
    scores: int = 0
    logprobs: int = 0

    @property
    def differs(self) -> bool:
        return min(self.tokens, self.scores) < self.completions


@dataclass(frozen=True)
class Taken:
    """A step that was taken again."""

    step: int
    figures: list[Figure]
    sampled: Sampled

    @property
    def differing(self) -> list[str]:
        """The names of the figures that differ by more than rounding."""
        return [figure.name for figure in self.figures if figure.differs]


def take_again(
    agent_class: type[Agent],
    described: Mapping[str, Any],
    checkpoint: Path | None,
    steps: Sequence[int],
    kept: Iterable[Kept],
    *,
    sample_again: bool = False,
) -> list[Taken]:
    """Take consecutive steps of a run again.

    Args:
        agent_class: of the run.
        described: its config.
        checkpoint: from before the first step; None for the start of the run.
        steps: their numbers, from 1 on.
        kept: what the run kept of each.
        sample_again: also sample the last one's episodes with its seeds, by the run's engine, and compare them with those that
            were kept. Learned from are these all the same.

    Raises:
        ValueError: the run cannot be taken again: its agent does not sample or samples a step ahead, its settings are not those
            of this version, or what it kept is not what its agent asks for.
    """
    settings = described["settings"]
    if not issubclass(agent_class, PolicyGradient):
        raise ValueError(f"an agent that samples can be replayed (dapo, grpo, ppo, raft), not {described['agent']!r}")
    if settings.get("staleness"):
        raise ValueError(
            "a run with staleness 1 cannot be replayed: its batches were sampled with weights from before its checkpoints"
        )
    with TemporaryDirectory(prefix="textenv-replay-") as scratch:
        # Another distribution is what a replay is to show, rather than to stop at.
        changes = {"run_dir": scratch, "max_logp_gap": math.inf} | ({} if sample_again else {"engine": "native"})
        try:
            config = agent_class.config_class(**settings | changes)
        except TypeError as error:
            raise ValueError(f"the settings of the run are not those of this version: {error}") from error
        if checkpoint is not None:
            _lay_out(Path(scratch), described, asdict(config), checkpoint)

        class Replayed(agent_class):  # type: ignore[valid-type, misc]
            def training(self, *_: Any) -> Training:
                self.state = dict(self._state_at_start)
                total_episodes = described.get("total_episodes", self.config.total_episodes)
                self.last_training = Replay(self, total_episodes, steps, kept, sample_again)
                return self.last_training

            def rollout(self, *arguments: Any, **options: Any) -> Rollout:
                rollout = super().rollout(*arguments, **options)
                sample = rollout.collect

                def collect(*arguments: Any, **options: Any) -> Trajectories:
                    return self.last_training.collect(sample, *arguments, **options)

                rollout.collect = collect
                return rollout

        agent = Replayed(described["env"], config, resume=checkpoint is not None)
        try:
            return agent.learn().last_training.taken
        finally:
            agent.close()


def _lay_out(folder: Path, described: Mapping[str, Any], settings: dict[str, Any], checkpoint: Path) -> None:
    """Make a folder look like that of a run which got as far as ``checkpoint``."""
    del settings["run_dir"]
    config = {"schema": SCHEMA, "agent": described["agent"], "env": described["env"], "settings": settings}
    (folder / "config.json").write_text(to_json(config))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / checkpoint.name).symlink_to(checkpoint.resolve())


class Replay(Training):
    """The frame of a run's steps when they are taken again: nothing is shown, evaluated or kept.

    Attributes:
        taken: the steps so far.
    """

    def __init__(
        self, agent: Agent, total_episodes: int, steps: Sequence[int], kept: Iterable[Kept], sample_again: bool
    ) -> None:
        super().__init__(agent, total_episodes, None)
        self.taken: list[Taken] = []
        self._steps, self._kept, self._sample_again = steps, kept, sample_again
        self._settings = asdict(agent.config)
        self._rows: list[Row] = []
        self._logged: Mapping[str, Any] = {}
        self._given = 0
        """rows that the step under way has asked for"""
        self._sampled = Sampled()

    def __enter__(self) -> Replay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.close()

    def __iter__(self) -> Iterator[int]:
        # The steps' own end comes first: beyond the last one the frame of a run would leave a checkpoint.
        for kept, step in zip(self._kept, super().__iter__(), strict=False):
            self._rows, self._logged = kept
            self._given, self._sampled = 0, Sampled()
            yield step
        if len(self.taken) < len(self._steps):
            raise ValueError(f"taken again, the run is over with step {self.step}, before step {self._steps[-1]}")

    def collect(
        self, sample: Callable[..., Trajectories], index: int, prompts: int, group_size: int, **options: Any
    ) -> Trajectories:
        """What :meth:`Rollout.collect` gave, from the rows of the step under way; sampled again with ``sample``, if wanted.

        Raises:
            ValueError: there are too few.
        """
        rows = self._rows[self._given : self._given + prompts * group_size]
        self._given += prompts * group_size
        if self._given > len(self._rows):
            raise self._wrong_number("more")
        last = self.step + 1 == self._steps[-1]
        # What the reward has learned from, it must learn from again.
        if self._sample_again and (last or self.agent.reward.adapts):
            self._compare(rows, sample(index, prompts, group_size, **options))
        return from_rows(rows, self._settings)

    def _wrong_number(self, than: str) -> ValueError:
        return ValueError(
            f"step {self.step + 1} asks for {than} episodes than the {len(self._rows)} in its rollout, which is not whole, or "
            "of another run"
        )

    def _compare(self, rows: list[Row], again: Trajectories) -> None:
        for then, now in zip(rows, episode_rows(again), strict=True):
            self._sampled.completions += 1
            self._sampled.tokens += np.array_equal(now["tokens"], then["tokens"])
            self._sampled.logprobs += np.array_equal(now["logp"], np.float32(then["logp"]))
            value = value_of(then, self._settings)
            self._sampled.scores += (now["return"], now["parts"]) == (value, then["parts"])

    def log(self, batch: Trajectories, metrics: Mapping[str, float]) -> None:
        if self._given < len(self._rows):
            raise self._wrong_number("fewer")
        self.step += 1
        self.agent.state["episodes"] += len(batch)
        found, logged = {**metrics, "episodes": self.episodes}, self._logged
        # A version may log what another does not, but for the figures that a step always has if it was learned from.
        names = [name for name in found if name in logged]
        names += [name for name in FIRST if (name in found) != (name in logged)]
        figures = [compared(name, [_number(logged.get(name))], [_number(found.get(name))]) for name in names]
        rows = list(episode_rows(batch))
        figures += [_tokens_compared(name, self._rows, rows) for name in batch.noted]
        figures.sort(key=lambda figure: FIRST.index(figure.name) if figure.name in FIRST else len(FIRST))
        self.taken.append(Taken(self.step, figures, self._sampled))


def from_rows(rows: Sequence[Row], settings: Mapping[str, Any]) -> Trajectories:
    """Episodes as they were sampled, from the rows of a rollout: before any penalty, and before learning noted anything.

    Args:
        rows: of whole groups, as :func:`agents.core.run.episode_rows` makes them.
        settings: of the run, which tell whether there were penalties.

    Raises:
        ValueError: see :func:`agents.core.records.value_of`.
    """
    scores = [_score_of(row, settings) for row in rows]
    labels = {finish.label: finish for finish in Finish}
    groups = torch.tensor([row["group"] for row in rows])
    return Trajectories(
        tokens_BT=_padded([row["tokens"] for row in rows], torch.int64),
        source_BT=_padded([row["source"] for row in rows], torch.uint8),
        logp_BT=_padded([row["logp"] for row in rows], torch.float32),
        reward_BT=_padded([_credit(row, score) for row, score in zip(rows, scores, strict=True)], torch.float64),
        penalty_B=torch.zeros(len(rows), dtype=torch.float64),
        group_B=groups - groups[0],
        scores=scores,
        finish_B=np.array([labels[row["finish"]] for row in rows], dtype=np.uint8),
        prompts=[row["prompt"] for row in rows],
        completions=[row["completions"] for row in rows],
        references=[row["reference"] for row in rows],
    )


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    x_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for x_T, row in zip(x_BT, rows, strict=True):
        x_T[: len(row)] = torch.tensor(row, dtype=dtype)
    return x_BT


def _score_of(row: Row, settings: Mapping[str, Any]) -> Score:
    credit = row.get("credit")
    return Score(
        value_of(row, settings),
        row["parts"],
        None if credit is None else tuple(credit),
        error=row["error"],
        info=row["verdict"],
    )


def _credit(row: Row, score: Score) -> list[float]:
    """The reward of each token of an episode before any penalty."""
    if "value" not in row:
        return row["reward"]
    sampled = [at for at, source in enumerate(row["source"]) if source == Source.SAMPLED]
    credit = [0.0] * len(row["source"])
    if score.tokens is not None:
        for at, reward in zip(sampled, score.tokens, strict=True):
            credit[at] = reward
    elif score.value is not None:
        credit[sampled[-1]] = score.value
    return credit


def compared(name: str, logged: Sequence[float], now: Sequence[float], absolute: float = ABSOLUTE) -> Figure:
    """A figure, or that of every token, as it was and as it is. What is no number twice is the same."""
    then_N, now_N = np.array(logged, dtype=float), np.array(now, dtype=float)
    nowhere_N = np.isnan(then_N) & np.isnan(now_N)
    difference_N = np.where(nowhere_N, 0.0, np.abs(now_N - then_N))
    same = np.isclose(now_N, then_N, rtol=RELATIVE, atol=absolute, equal_nan=True).all()
    then, now_ = (float(x_N[0]) if len(x_N) == 1 else float(np.abs(x_N).mean()) for x_N in (then_N, now_N))
    return Figure(name, then, now_, float(difference_N.max()), not same)


def _tokens_compared(name: str, logged: Sequence[Row], now: Sequence[Row]) -> Figure:
    """What learning noted of every token; a row that it did not look at has 0."""
    then_N, now_N = ([x for row in rows for x in row.get(name, [0.0] * len(row["tokens"]))] for rows in (logged, now))
    return compared(f"{name} of tokens", then_N, now_N, DECIMAL)


def _number(figure: float | None) -> float:
    return math.nan if figure is None else figure
