"""Tournaments between the agents of made-up results, before judges that are a line each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from benchmarks import statistics
from benchmarks.harness.results import load_results
from benchmarks.tournament import environments, play, table
from rewards.judge.chat import BaseChat, Reply, Request
from rewards.judge.pairwise import PairwiseJudge
from tests.benchmarks.harness.folders import write_answers, write_cell, write_suite

LONG, SHORT = ["aaaa"] * 5, ["a"] * 5


class Taste(BaseChat):
    """A judge that decides by a function of the two answers, as they are shown."""

    def __init__(self, decide: Callable[[str, str], str]) -> None:
        super().__init__("taste", None, None, None)
        self.decide = decide

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        shown = [
            re.findall(r"<answer-[AB]-\w+>\n(.*?)\n</answer-", str(r.messages[0]["content"]), re.DOTALL)
            for r in requests
        ]
        self.calls += len(requests)
        return [Reply(json.dumps({"reason": "so", "winner": self.decide(*two)})) for two in shown]


def longer(a: str, b: str) -> str:
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def judge(decide: Callable[[str, str], str] = longer) -> PairwiseJudge:
    return PairwiseJudge(Taste(decide))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_suite(tmp_path / "results")


def column(made: Table, header: str) -> list[str]:
    (found,) = [column for column in made.columns if str(column.header) == header]
    return [str(cell) for cell in found.cells]


def test_who_writes_longer_wins_before_a_judge_of_length(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), LONG)
    write_answers(write_cell(folder, "ppo"), SHORT)
    played = play(load_results(folder), "sums", judge(), 4)
    assert played.win_PAA.shape == (4, 2, 2)
    assert played.win_PAA[:, 0, 1].tolist() == [1.0] * 4
    assert played.win_PAA[:, 1, 0].tolist() == [0.0] * 4
    assert played.longer_PAA[:, 1, 0].tolist() == [-3.0] * 4
    assert (played.compared, played.flipped, played.unjudged) == (4, 0, 0)
    made = table(played)
    assert column(made, "win rate") == ["100.0% [100.0%, 100.0%]", "0.0% [0.0%, 0.0%]"]
    assert column(made, "against grpo") == ["", "0.0% [0.0%, 0.0%]"]
    assert column(made, "Bradley–Terry") == [one.text(".0f") for one in statistics.bradley_terry(played.win_PAA)]
    assert column(made, "Elo") == [one.text(".0f") for one in statistics.elo(played.win_PAA)]


def test_a_judge_that_looks_at_the_place_alone_finds_a_tie_and_is_told_of(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), LONG)
    write_answers(write_cell(folder, "ppo"), SHORT)
    played = play(load_results(folder), "sums", judge(lambda a, b: "A"), 5)
    assert np.nanmean(played.win_PAA) == 0.5
    assert (played.compared, played.flipped) == (5, 5)
    assert "places: 100.0% [56.6, 100.0] of 5 pairs" in str(table(played).caption)


def test_a_win_in_one_order_and_a_tie_in_the_other_are_three_quarters(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), LONG)
    write_answers(write_cell(folder, "ppo"), SHORT)
    played = play(load_results(folder), "sums", judge(lambda a, b: "A" if a > b else "tie"), 5)
    assert played.win_PAA[:, 0, 1].tolist() == [0.75] * 5


def test_only_seeds_that_both_have_meet_and_count_as_one_game(folder: Path) -> None:
    for seed, texts in ((0, LONG), (1, SHORT)):
        write_answers(write_cell(folder, "grpo", seed), texts)
    for seed, texts in ((0, SHORT), (1, LONG), (2, LONG)):
        write_answers(write_cell(folder, "ppo", seed), texts)
    played = play(load_results(folder), "sums", judge(), 5)
    assert played.compared == 10
    assert played.win_PAA[:, 0, 1].tolist() == [0.5] * 5
    assert played.longer_PAA[:, 0, 1].tolist() == [0.0] * 5


def test_equal_answers_are_a_tie_without_a_call(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), LONG)
    write_answers(write_cell(folder, "ppo"), LONG)
    equal = judge()
    assert play(load_results(folder), "sums", equal, 5).win_PAA[:, 0, 1].tolist() == [0.5] * 5
    assert equal.chat.calls == 0


def test_pairs_without_a_verdict_count_nowhere(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), ["aaaa", "aaaa", "x"])
    write_answers(write_cell(folder, "ppo"), ["a", "a", "y"])
    played = play(load_results(folder), "sums", judge(lambda a, b: "neither" if a in "xy" else longer(a, b)), 3)
    assert np.isnan(played.win_PAA[2]).all()
    assert (played.compared, played.unjudged) == (2, 1)
    made = table(played)
    assert column(made, "against grpo") == ["", "0.0% [0.0%, 0.0%]"]
    assert "counted nowhere: 1 pairs" in str(made.caption)


def test_three_agents_without_any_verdict_have_no_figures(folder: Path) -> None:
    for agent, text in (("grpo", "x"), ("ppo", "y"), ("raft", "z")):
        write_answers(write_cell(folder, agent), [text])
    made = table(play(load_results(folder), "sums", judge(lambda a, b: "neither"), 1))
    for header in ("win rate", "Bradley–Terry", "Elo"):
        assert column(made, header) == ["–"] * 3


def test_agents_that_were_asked_other_problems_are_refused(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), LONG)
    write_answers(write_cell(folder, "ppo"), SHORT, list("abcde"))
    with pytest.raises(ValueError, match="ppo, seed 0 was asked other problems than grpo, seed 0"):
        play(load_results(folder), "sums", judge(), 5)


def test_broken_or_missing_answers_are_refused_by_name(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), LONG)
    cell = write_cell(folder, "ppo")
    with pytest.raises(ValueError, match="has no completions"):
        play(load_results(folder), "sums", judge(), 5)
    write_answers(cell, SHORT)
    path = cell / "completions" / "001.jsonl.gz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    for broken in (whole[:-15], b"{}", whole[:middle] + bytes(8) + whole[middle + 8 :]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"001\.jsonl\.gz cannot be read"):
            play(load_results(folder), "sums", judge(), 5)


def test_an_agent_alone_has_no_tournament(folder: Path) -> None:
    write_answers(write_cell(folder, "grpo"), LONG)
    with pytest.raises(ValueError, match="needs two agents with finished cells"):
        environments(load_results(folder))
