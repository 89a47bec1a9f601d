"""What is read of a results folder, and what is said about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.harness.records import CELL_FILE, DONE_FILE, FAILED_FILE, POINTS_FILE, Cell
from benchmarks.harness.results import load_results
from tests.benchmarks.harness.folders import DONE, point, write_cell, write_suite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_suite(tmp_path / "results")


def test_a_cell_is_read_as_it_was_written(folder: Path) -> None:
    path = write_cell(folder, "grpo", 1, (0.1, 0.2, 0.3), provenance={"reward": "another"})
    results = load_results(folder)
    (cell,) = results.cells
    assert (cell.cell, cell.state, cell.folder, cell.done, cell.error) == (
        Cell("sums", "grpo", 1),
        "done",
        path,
        DONE,
        None,
    )
    assert cell.points == [point(0.0, 0.1), point(0.5, 0.2), point(1.0, 0.3)]
    assert cell.provenance["reward"] == "another"
    assert (results.suite_title, results.problems) == ("made up", [])


def test_agents_and_environments_come_in_the_order_of_the_suite(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "results", ("raft", "grpo"), ("words", "sums"))
    for environment in ("sums", "words"):
        for agent in ("another", "grpo", "raft"):
            for seed in (10, 9):
                write_cell(folder, agent, seed, environment=environment)
    results = load_results(folder)
    assert (results.environments, results.agents) == (["words", "sums"], ["raft", "grpo", "another"])
    assert [cell.cell.seed for cell in results.cells[:2]] == [9, 10]
    assert list(results.done("words", "grpo")) == [9, 10]


def test_a_failed_cell_keeps_its_points_and_tells_why(folder: Path) -> None:
    write_cell(folder, error="ValueError: no")
    (cell,) = load_results(folder).cells
    assert (cell.state, cell.error, len(cell.points)) == ("failed", "ValueError: no", 3)
    assert load_results(folder).done("sums", "grpo") == {}


def test_a_cell_that_was_killed_is_named_with_how_to_go_on(folder: Path) -> None:
    write_cell(folder, done=None)
    results = load_results(folder)
    assert results.cells[0].state == "killed"
    (problem,) = results.problems
    assert problem.startswith("cells/sums/grpo/0: not finished")
    assert f"`textenv bench run {folder / 'suite.toml'} --out {folder}`" in problem
    assert "remove" not in problem


def test_half_a_line_is_left_out_and_named(folder: Path) -> None:
    path = write_cell(folder) / POINTS_FILE
    path.write_bytes(path.read_bytes()[:-20])
    results = load_results(folder)
    assert len(results.cells[0].points) == 2
    assert len(results.problems) == 1
    assert "cells/sums/grpo/0: points.jsonl, line 3, is no point or only half of one" in results.problems[0]
    # It says that it is done, so a run would leave it alone.
    assert "remove that folder, then `textenv bench run" in results.problems[0]


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "{}",
        '{"share": 1}',
        point(0.5, 0.5).to_json().replace("0.5", '"a"', 1),
        point(0.5, 0.5).to_json().replace('"sampled/kl": 0.5', '"sampled/kl": "a"'),
        point(0.5, 0.5).to_json().replace('"sampled/kl": 0.5', '"sampled/kl": NaN'),
        point(0.5, 0.5).to_json().replace('"metrics": {', '"metrics": 3, "x": {'),
        point(0.5, 0.5, [0.5]).to_json().replace("[0.5]", "5"),
        "\x00",
    ],
    ids=[
        "number",
        "empty",
        "too few",
        "text for a share",
        "text for a metric",
        "NaN",
        "unknown",
        "no list",
        "zero byte",
    ],
)
def test_what_is_json_but_no_point_is_left_out_and_named(folder: Path, line: str) -> None:
    path = write_cell(folder) / POINTS_FILE
    path.write_text(path.read_text() + line + "\n" + point(1.0, 0.9).to_json() + "\n")
    results = load_results(folder)
    assert len(results.cells[0].points) == 4
    assert "line 4" in results.problems[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "environment": "e"}'])
def test_a_cell_that_does_not_tell_what_it_is_is_left_out_and_named(folder: Path, content: str) -> None:
    (write_cell(folder, "ppo") / CELL_FILE).write_text(content)
    write_cell(folder, "grpo")
    results = load_results(folder)
    assert [cell.cell.agent for cell in results.cells] == ["grpo"]
    assert results.problems[0].startswith("cells/sums/ppo/0: cell.json")


@pytest.mark.parametrize(("name", "hint"), [(DONE_FILE, "remove that folder"), (FAILED_FILE, "--retry")])
def test_a_cell_whose_end_cannot_be_read_has_not_ended(folder: Path, name: str, hint: str) -> None:
    (write_cell(folder, done=None) / name).write_text('{"seconds": 1')
    results = load_results(folder)
    assert results.cells[0].state == "killed"
    assert f"{name} cannot be read" in results.problems[0]
    assert hint in results.problems[0]


def test_a_cell_of_another_version_is_left_out_and_named(folder: Path) -> None:
    head = write_cell(folder, "ppo") / CELL_FILE
    head.write_text(json.dumps({**json.loads(head.read_text()), "schema": 99}))
    write_cell(folder, "grpo")
    results = load_results(folder)
    assert [cell.cell.agent for cell in results.cells] == ["grpo"]
    assert "schema 99, this version of textenv reads 1" in results.problems[0]


def test_a_folder_of_another_version_is_refused(folder: Path) -> None:
    head = write_cell(folder) / CELL_FILE
    head.write_text(json.dumps({**json.loads(head.read_text()), "schema": 99}))
    with pytest.raises(ValueError, match=r"written by another version of textenv: .* schema 99"):
        load_results(folder)


def test_a_folder_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; results are what `textenv bench run SUITE"):
        load_results(tmp_path / "missing")
    with pytest.raises(ValueError, match="is empty"):
        load_results(tmp_path)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match=r"is no results folder: it has no suite\.toml"):
        load_results(tmp_path)
    (tmp_path / "suite.toml").write_text("title =")
    with pytest.raises(ValueError, match="is no TOML"):
        load_results(tmp_path)


def test_a_suite_that_has_not_begun_has_no_cells(folder: Path) -> None:
    assert load_results(folder).cells == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([CELL_FILE, POINTS_FILE, DONE_FILE]),
    where=st.floats(0, 1),
    byte=st.none() | st.integers(0, 255),
)
def test_no_cut_and_no_wrong_byte_is_a_crash(folder: Path, name: str, where: float, byte: int | None) -> None:
    path = folder / Cell("sums", "ppo", 0).path
    if not path.exists():
        write_cell(folder, "grpo")
        write_cell(folder, "ppo", greedy=[1.0, None, 0.0])
    whole = (path / name).read_bytes()
    at = int(where * (len(whole) - 1))
    try:
        (path / name).write_bytes(whole[:at] + (b"" if byte is None else bytes([byte]) + whole[at + 1 :]))
        results = load_results(folder)
    finally:
        (path / name).write_bytes(whole)
    assert "grpo" in results.agents
    if byte is None and whole[:at] and whole[at - 1 : at] not in b"}\n":
        assert results.problems
