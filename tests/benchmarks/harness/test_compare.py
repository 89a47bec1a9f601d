"""Tables of made-up results: which figures stand in them, and what is refused."""

from __future__ import annotations

import csv
import io
import itertools
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks import statistics
from benchmarks.harness.compare import compare_tables, markdown, show_tables, write_csv
from benchmarks.harness.figures import area, by_problem, paired, share_to
from benchmarks.harness.records import Point
from benchmarks.harness.results import load_results
from tests.benchmarks.harness.folders import DONE, point, write_cell, write_suite

HALF_RIGHT = [1.0, 0.0, 1.0, None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two agents with three seeds each; the second one starts and ends lower."""
    folder = write_suite(tmp_path / "results")
    for seed, end in enumerate((0.6, 0.7, 0.8)):
        write_cell(folder, "grpo", seed, (0.0, 0.5, end))
        write_cell(folder, "ppo", seed, (0.0, 0.1, round(end - 0.2, 1)))
    return folder


def shown(tables: list[Table]) -> dict[tuple[str, str, str], str]:
    """Every cell, by title of the table, label of the row and header of the column."""
    cells = {}
    for table in tables:
        labels, *columns = ([str(cell) for cell in column.cells] for column in table.columns)
        for column, texts in zip(table.columns[1:], columns, strict=True):
            for label, text in zip(labels, texts, strict=True):
                cells[str(table.title), label, str(column.header)] = text
    return cells


def captions(tables: list[Table]) -> str:
    return "\n".join(str(table.caption) for table in tables)


def test_figures_of_an_environment_are_means_over_seeds_at_the_end(folder: Path) -> None:
    cells = shown(show_tables(load_results(folder)))
    assert cells["sums: what was learned", "grpo", "greedy/accuracy"] == "70.0% [60.0%, 80.0%]"
    assert cells["sums: what was learned", "ppo", "greedy/reward"] == "0.500 [0.400, 0.600]"
    assert cells["sums: what it took", "grpo", "tokens"] == "1,000 [1,000, 1,000]"
    assert cells["sums: what it took", "grpo", "peak_memory_mb"] == "500 [500, 500]"
    assert ("sums: what it took", "grpo", "energy_j") not in cells  # nowhere measured


def test_figures_over_environments_are_those_of_the_statistics(folder: Path) -> None:
    for seed in range(3):
        write_cell(folder, "grpo", seed, (0.2, 0.4, 0.9), environment="words")
        write_cell(folder, "ppo", seed, (0.2, 0.3, 0.5 + 0.1 * seed), environment="words")
    tables = show_tables(load_results(folder))
    title, ours, theirs = (
        "greedy/accuracy over sums, words",
        [[0.6, 0.7, 0.8], [0.9] * 3],
        [[0.4, 0.5, 0.6], [0.5, 0.6, 0.7]],
    )
    cells = {
        row: [shown(tables)[title, row, str(column.header)] for column in tables[-2].columns[1:]]
        for row in ("grpo", "ppo")
    }
    # Half-way: sums from 0 to 0.7, words from 0.2 to 0.9. grpo gets there between the first two points, and between the last.
    time = statistics.restricted_mean_time([[0.35] * 3, [0.5 + 0.5 * (0.55 - 0.4) / 0.5] * 3], 1.0)
    assert cells["grpo"] == [
        statistics.interquartile_mean(ours).text(".1%"),
        statistics.mean([[(0.25 + (0.5 + end) / 2) / 2 for end in ours[0]], [(0.3 + 0.65) / 2] * 3]).text(".1%"),
        time.text(".0%"),
        "6 of 6",
        "",
    ]
    assert cells["ppo"][3] == "5 of 6"
    assert cells["ppo"][4] == statistics.probability_of_improvement(theirs, ours).text(".0%")
    found = statistics.paired_difference(theirs, ours)
    against = "greedy/accuracy against grpo, over sums, words"
    assert shown(tables)[against, "ppo", "less grpo"] == found.difference.text("+.1%")
    assert shown(tables)[against, "ppo", "pairs"] == "6"
    assert shown(tables)[against, "ppo", "p"] == f"{found.p:.3f}"
    assert "sums 35.0%, words 55.0%" in captions(tables)


def test_p_values_are_corrected_for_the_number_of_agents(folder: Path) -> None:
    for seed in range(3):
        write_cell(folder, "raft", seed, (0.0, 0.1, 0.3))
    cells = shown(show_tables(load_results(folder)))
    title = "greedy/accuracy against grpo, over sums"
    assert [cells[title, agent, "p"] for agent in ("ppo", "raft")] == ["0.250", "0.250"]
    assert [cells[title, agent, "p (Holm)"] for agent in ("ppo", "raft")] == ["0.500", "0.500"]


def test_no_number_stands_without_an_interval(tmp_path: Path) -> None:
    folder = write_suite(tmp_path)
    for agent in ("grpo", "ppo"):
        write_cell(folder, agent, 0, done=DONE | {"energy_j": 3.0})
    tables = show_tables(load_results(folder))
    figures = {
        key: text
        for key, text in shown(tables).items()
        if key[2] not in ("p", "p (Holm)", "pairs", "reached it") and text
    }
    assert set(figures.values()) == {"–"}
    assert "one seed, which has no interval" in captions(tables)


def test_with_one_seed_the_interval_is_over_problems_and_marked(tmp_path: Path) -> None:
    folder = write_suite(tmp_path)
    write_cell(folder, "grpo", 0, greedy=[1.0, 1.0, 1.0, 1.0, 0.0, None])
    write_cell(folder, "ppo", 0, greedy=[0.0, 0.0, 1.0, None, 0.0, 1.0])
    tables = show_tables(load_results(folder))
    cells = shown(tables)
    wanted = statistics.mean([[1.0, 1.0, 1.0, 1.0, 0.0]]).text(".1%")
    assert cells["sums: what was learned", "grpo", "greedy/accuracy"] == f"{wanted}*"
    # Problems that are graded for both are paired.
    found = statistics.paired_difference([[0.0, 0.0, 1.0, 0.0]], [[1.0, 1.0, 1.0, 0.0]])
    assert cells["greedy/accuracy against grpo, over sums", "ppo", "less grpo"] == f"{found.difference.text('+.1%')}*"
    assert cells["greedy/accuracy against grpo, over sums", "ppo", "pairs"] == "4*"
    assert cells["greedy/accuracy over sums", "ppo", "interquartile mean"] == "–"
    assert "does not tell how another training would end" in captions(tables)


def test_only_seeds_that_both_have_are_paired(folder: Path) -> None:
    for seed in (1, 2, 7):
        write_cell(folder, "raft", seed, (0.0, 0.1, 0.3))
    tables = show_tables(load_results(folder))
    assert shown(tables)["greedy/accuracy against grpo, over sums", "raft", "pairs"] == "2"
    assert "raft lacks the seeds 0 on sums" in captions(tables)
    assert "ppo lacks the seeds 7 on sums" in captions(tables)


def test_agents_without_a_common_seed_have_no_difference(folder: Path) -> None:
    write_cell(folder, "raft", 7, (0.0, 0.1, 0.3))
    write_cell(folder, "raft", 8, (0.0, 0.1, 0.3))
    cells = shown(show_tables(load_results(folder)))
    assert cells["greedy/accuracy against grpo, over sums", "raft", "less grpo"] == "–"


def test_a_figure_of_fewer_seeds_than_there_are_says_so(folder: Path) -> None:
    for seed in range(3):
        write_cell(folder, "raft", seed, (0.0, 0.1, 0.3), done=DONE | {"energy_j": 3.0 if seed else None})
    cells = shown(show_tables(load_results(folder)))
    assert cells["sums: what it took", "raft", "energy_j"] == "3 [3, 3] of 2 seeds"


def test_who_has_not_finished_everywhere_is_left_out_over_all_environments(folder: Path) -> None:
    for seed in range(3):
        write_cell(folder, "grpo", seed, environment="words")
    tables = show_tables(load_results(folder))
    assert ("sums: what was learned", "ppo", "greedy/accuracy") in shown(tables)
    assert ("greedy/accuracy over sums, words", "ppo", "interquartile mean") not in shown(tables)
    assert "ppo is left out: it has not finished on all of them" in captions(tables)


def test_failed_killed_and_broken_cells_are_named(folder: Path) -> None:
    write_cell(folder, "raft", 0, error="ValueError: [bold]no[/]")
    write_cell(folder, "raft", 1, done=None)
    (write_cell(folder, "raft", 2) / "cell.json").write_text("{")
    *_, missing = show_tables(load_results(folder))
    failed, killed, broken = sorted(
        map(str, missing.columns[0].cells), key=lambda line: ("failed" not in line, "killed" not in line)
    )
    assert failed.startswith("raft on sums, seed 0 failed: ValueError: [bold]no[/]")
    assert killed.startswith("cells/sums/raft/1: not finished")
    assert broken.startswith("cells/sums/raft/2: cell.json cannot be read")
    console = Console(width=400, file=io.StringIO())
    with console.capture() as printed:
        console.print(missing)
    assert "[bold]no[/]" in printed.get()


def test_nothing_done_is_refused(tmp_path: Path) -> None:
    write_cell(write_suite(tmp_path), done=None)
    with pytest.raises(ValueError, match="no agent has finished a cell in"):
        show_tables(load_results(tmp_path))


def test_an_unknown_metric_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(ValueError, match="no metric 'greedy/acuracy'; did you mean greedy/accuracy"):
        show_tables(load_results(folder), metric="greedy/acuracy")
    with pytest.raises(ValueError, match=r"energy_j was not measured in any cell; there are .*greedy/accuracy"):
        show_tables(load_results(folder), metric="energy_j")


def test_the_reward_is_shown_where_nothing_tells_right_from_wrong(folder: Path) -> None:
    for path in folder.glob("cells/*/*/*/points.jsonl"):
        path.write_text(re.sub(r'"greedy/accuracy": [0-9.]+', '"greedy/accuracy": null', path.read_text()))
    cells = shown(show_tables(load_results(folder)))
    assert cells["greedy/reward over sums", "grpo", "interquartile mean"] == "0.700 [0.600, 0.800]"
    with pytest.raises(ValueError, match="greedy/accuracy was not measured in any cell"):
        show_tables(load_results(folder), metric="greedy/accuracy")


# Learning curves


def test_who_was_only_evaluated_is_not_the_start_that_thresholds_are_told_from(folder: Path) -> None:
    for seed in range(3):
        write_cell(folder, "best-of-n", seed, (0.9,))
    tables = show_tables(load_results(folder))
    assert "to the best end: sums 45.0%" in captions(tables)  # from 0 to 0.9
    cells = shown(tables)
    assert cells["greedy/accuracy over sums", "best-of-n", "budget to the threshold"] == "0% [0%, 0%]"
    assert cells["greedy/accuracy over sums", "best-of-n", "area under the curve"] == "90.0% [90.0%, 90.0%]"


def test_nobody_improved_and_so_there_is_no_threshold(tmp_path: Path) -> None:
    folder = write_suite(tmp_path)
    for seed in range(2):
        write_cell(folder, "grpo", seed, (0.5, 0.4))
    tables = show_tables(load_results(folder))
    assert "none, as nobody improved" in captions(tables)
    assert shown(tables)["greedy/accuracy over sums", "grpo", "budget to the threshold"] == "–"


def test_who_was_only_evaluated_has_a_flat_curve(tmp_path: Path) -> None:
    write_cell(write_suite(tmp_path), "start", 0, (0.3,))
    (cell,) = load_results(tmp_path).cells
    assert area(cell, "greedy/accuracy") == 0.3
    assert share_to(0.3, cell, "greedy/accuracy") == 0.0
    assert share_to(0.4, cell, "greedy/accuracy") == float("inf")


def test_an_ungraded_point_is_no_zero_of_the_curve(tmp_path: Path) -> None:
    path = write_cell(write_suite(tmp_path), "grpo", 0, (0.5, 0.5, 0.5)) / "points.jsonl"
    path.write_text(path.read_text().replace('"greedy/accuracy": 0.5', '"greedy/accuracy": null', 1))
    (cell,) = load_results(tmp_path).cells
    assert area(cell, "greedy/accuracy") == 0.5


def test_figures_by_problem() -> None:
    measured = point(1.0, 0.5, HALF_RIGHT)
    assert by_problem(measured, "greedy/accuracy") == HALF_RIGHT
    assert by_problem(measured, "greedy/reward") == HALF_RIGHT
    assert by_problem(measured, "sampled/accuracy") == pytest.approx([1 / 3, 1.0])
    assert by_problem(measured, "sampled/pass@2") == pytest.approx([1 - 1 / 3, 1.0])
    assert by_problem(measured, "sampled/pass@4") == [None, 1.0]
    assert by_problem(measured, "sampled/kl") == []
    assert by_problem(Point(0.0, 0, 0, 0, 0.0), "greedy/accuracy") == []


def test_seeds_are_paired_by_their_number_and_not_their_place(folder: Path) -> None:
    results = load_results(folder)
    ours, theirs = results.done("sums", "grpo"), results.done("sums", "ppo")
    backwards = dict(reversed(theirs.items()))
    assert paired(ours, backwards, "greedy/accuracy") == paired(ours, theirs, "greedy/accuracy")


# What may be compared


def other(tmp_path: Path, **provenance: str) -> Path:
    folder = write_suite(tmp_path / "other", ("dapo",))
    for seed, end in enumerate((0.5, 0.9, 0.9)):
        write_cell(folder, "dapo", seed, (0.0, 0.5, end), provenance=provenance)
    return folder


def test_agents_of_several_folders_are_held_against_the_first(folder: Path, tmp_path: Path) -> None:
    tables = compare_tables([load_results(folder), load_results(other(tmp_path, settings="another"))])
    cells = shown(tables)
    wanted = statistics.paired_difference([[0.5, 0.9, 0.9]], [[0.6, 0.7, 0.8]]).difference.text("+.1%")
    assert cells["greedy/accuracy against grpo, over sums", "dapo", "less grpo"] == wanted


def test_the_folder_is_named_where_both_have_an_agent(folder: Path, tmp_path: Path) -> None:
    again = write_suite(tmp_path / "again", ("grpo",))
    for seed in range(3):
        write_cell(again, "grpo", seed)
    labels = [str(cell) for cell in compare_tables([load_results(folder), load_results(again)])[0].columns[0].cells]
    assert labels == [f"grpo ({folder})", "ppo", f"grpo ({again})"]


@pytest.mark.parametrize("part", ["environment", "task", "reward", "model", "budget", "evaluation", "verifier"])
def test_what_was_not_run_alike_is_refused_with_both_values_and_how_to_allow_it(
    folder: Path, tmp_path: Path, part: str
) -> None:
    both = [load_results(folder), load_results(other(tmp_path, **{part: "something else"}))]
    with pytest.raises(ValueError, match=f"cannot be compared: {part} is .* but something else") as refused:
        compare_tables(both)
    assert f"--allow {part}" in str(refused.value)
    assert f"dapo on sums, seed 0 in {tmp_path / 'other'}" in str(refused.value)
    tables = compare_tables(both, allow=[part])
    assert f"Allowed: {part} is" in captions(tables)


def test_a_part_that_one_side_does_not_tell_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"verifier is not told for grpo on sums, seed 0 in .* but exact"):
        compare_tables([load_results(folder), load_results(other(tmp_path, verifier="exact"))])


def test_of_long_lists_only_what_differs_is_told(folder: Path, tmp_path: Path) -> None:
    first = write_suite(tmp_path / "first")
    write_cell(first, provenance={"libraries": "python 3.11, torch 2.12, numpy 2.1"})
    second = other(tmp_path, libraries="python 3.11, torch 2.13, numpy 2.1")
    tables = compare_tables([load_results(first), load_results(second)])
    assert "libraries is torch 2.12 for grpo" in captions(tables)
    assert "but torch 2.13 for dapo" in captions(tables)


@pytest.mark.parametrize("part", ["libraries", "hardware"])
def test_another_machine_is_a_footnote_but_not_for_times(folder: Path, tmp_path: Path, part: str) -> None:
    both = [load_results(folder), load_results(other(tmp_path, **{part: "another"}))]
    assert f"Should not matter here: {part} is" in captions(compare_tables(both))
    for metric in ("seconds", "peak_memory_mb"):
        with pytest.raises(ValueError, match=f"--allow {part}"):
            compare_tables(both, metric=metric)
        assert compare_tables(both, metric=metric, allow=[part])


def test_another_machine_is_no_footnote_where_the_budget_is_a_time(tmp_path: Path) -> None:
    first = write_suite(tmp_path / "first")
    write_cell(first, provenance={"budget": "60 seconds"})
    second = other(tmp_path, budget="60 seconds", hardware="a larger one")
    with pytest.raises(ValueError, match="--allow hardware"):
        compare_tables([load_results(first), load_results(second)])


def test_seeds_of_one_agent_with_different_settings_are_refused(folder: Path) -> None:
    write_cell(folder, "ppo", 3, provenance={"settings": "clip=0.3"})
    with pytest.raises(ValueError, match=r"settings is group_size=8 for ppo on sums, seed 0 .* but clip=0\.3 for ppo"):
        compare_tables([load_results(folder)])
    assert "Not all was run alike: settings is" in captions(show_tables(load_results(folder)))


def test_fewer_points_are_compared_where_that_is_allowed(folder: Path, tmp_path: Path) -> None:
    second = write_suite(tmp_path / "second", ("dapo",))
    for seed in range(3):
        write_cell(second, "dapo", seed, (0.0, 0.7), provenance={"evaluation": "2 points"})
    both = [load_results(folder), load_results(second)]
    with pytest.raises(ValueError, match=r"evaluation is 3 points .* but 2 points"):
        compare_tables(both)
    cells = shown(compare_tables(both, allow=["evaluation"]))
    assert cells["greedy/accuracy over sums", "dapo", "area under the curve"] == "35.0% [35.0%, 35.0%]"


def test_an_unknown_part_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(ValueError, match="no part of the provenance 'hardwear'; did you mean hardware"):
        compare_tables([load_results(folder)], allow=["hardwear"])


def test_environments_that_not_all_folders_have_are_left_out_by_name(folder: Path, tmp_path: Path) -> None:
    write_cell(folder, "grpo", 0, environment="words")
    tables = compare_tables([load_results(folder), load_results(other(tmp_path))])
    assert "words is not in all folders, and left out" in captions(tables)
    apart = write_suite(tmp_path / "apart")
    write_cell(apart, environment="letters")
    with pytest.raises(ValueError, match="no environment in common: sums, words, letters"):
        compare_tables([load_results(folder), load_results(apart)])


# Files


def test_the_csv_holds_every_point_as_it_was_measured(folder: Path, tmp_path: Path) -> None:
    write_cell(folder, "raft", 0, (0.25,), error="no")
    write_csv(load_results(folder), tmp_path / "points.csv")
    with open(tmp_path / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 3 + 1
    assert {key: rows[2][key] for key in ("environment", "agent", "seed", "state", "share", "greedy/accuracy")} == {
        "environment": "sums",
        "agent": "grpo",
        "seed": "0",
        "state": "done",
        "share": "1.0",
        "greedy/accuracy": "0.6",
    }
    assert (rows[-1]["agent"], rows[-1]["state"], rows[-1]["greedy/accuracy"]) == ("raft", "failed", "0.25")


def test_markdown_tables_have_a_cell_for_every_column(folder: Path) -> None:
    write_cell(folder, "a|b", 0)
    text = markdown(show_tables(load_results(folder)))
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        widths = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(widths)) == 1
    assert "| a\\|b |" in text
    assert "### sums: what was learned" in text


def test_tables_do_not_depend_on_when_they_are_made(folder: Path) -> None:
    texts = [markdown(show_tables(load_results(folder))) for _ in range(2)]
    assert all(first == second for first, second in itertools.pairwise(texts))
