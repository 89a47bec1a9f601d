"""`textenv bench`: its commands, and what they say."""

import json

import pytest

from benchmarks.claims import __main__ as claims
from benchmarks.harness import runner
from benchmarks.harness.records import CLAIMS, Cell
from benchmarks.harness.suite import shipped_suites
from tests.benchmarks.harness.test_runner import start_toy
from textenv.cli import imported, main

SUITE = """\
title = "toys"
seeds = [0, 1]
[budget]
episodes = 1_000
[environments.here]
id = "textenv/Copy-v0"
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working folder, in which cells are toys."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(runner, "start_cell", start_toy)
    yield tmp_path
    imported.clear()


@pytest.fixture
def suite(workplace):
    """Makes a suite of toys, in which an agent does what its name says."""

    def make(*agents):
        path = workplace / "toys.toml"
        path.write_text(SUITE + "".join(f'[agents.{agent}]\nkind = "grpo"\n' for agent in agents))
        return str(path)

    return make


def run(capsys, *arguments):
    """Exit status, stdout and stderr of a command."""
    try:
        main(["bench", *arguments])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_is_a_map(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    for command in ("list", "run", "show", "compare", "speed"):
        assert f"\n    {command} " in out
    assert "textenv bench run quick " in out


@pytest.mark.parametrize("command", ["run", "show", "compare", "speed"])
def test_every_command_has_help(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"usage: textenv bench {command}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "no command 'rnu' of bench; did you mean run? there are list, run, show, compare, speed"),
        (["run", "quikc"], "no suite 'quikc'; did you mean quick?"),
        (["run", "quick", "--at-once", "0"], "at least one cell runs at a time, got at_once=0"),
        (["show", "nowhere"], "nowhere is no folder"),
        (["compare", "one"], "name two results folders or more; one alone is shown by `textenv bench show`"),
        (["speed", "--only", "genration"], "no part 'genration'; did you mean generation?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line_and_status_2(capsys, workplace, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(workplace.iterdir()) == []


def test_list_shows_suites_and_agents(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    for name in shipped_suites():
        assert f"│ {name} " in out
    agents = out[out.index("agents: ") :]
    for agent in ("grpo", "ppo", "sb3-ppo", "trl-grpo", "best-of-n", "sft", "module:Class"):
        assert agent in agents


def test_run_fills_a_folder_named_as_the_suite(capsys, workplace, suite):
    status, out, _ = run(capsys, "run", suite("a", "b"))
    assert status == 0
    assert "a on here, seed 1: done after 0:00; " in out
    assert "All 4 are done. textenv bench show results/toys" in out
    assert (workplace / "results/toys/cells/here/b/1/done.json").exists()


def test_run_tells_each_failure_and_how_to_go_on(capsys, workplace, suite):
    path = suite("fails", "a")
    status, out, err = run(capsys, "run", path, "--out", "kept here", "--at-once", "1")
    assert (status, err) == (1, "")
    for seed in (0, 1):
        cell = f"kept here/cells/here/fails/{seed}"
        assert f"failed fails on here, seed {seed}: ValueError: no such thing ({cell})" in out
    assert out.endswith(
        f"To run what has failed again: textenv bench run {path} --out 'kept here' --at-once 1 --retry\n"
    )
    assert json.loads((workplace / "kept here/cells/here/a/1/done.json").read_text())
    (workplace / "kept here/ran.txt").unlink()
    assert run(capsys, "run", path, "--out", "kept here")[0] == 1
    assert not (workplace / "kept here/ran.txt").exists()
    assert run(capsys, "run", path, "--out", "kept here", "--retry")[0] == 1
    assert sorted((workplace / "kept here/ran.txt").read_text().splitlines()) == ["fails 0", "fails 1"]


def test_an_interrupted_run_says_how_to_go_on(capsys, monkeypatch, suite):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "start_cell", interrupt)
    path = suite("a")
    status, out, err = run(capsys, "run", path)
    assert (status, err) == (2, "textenv: interrupted\n")
    assert out == f"What is done is kept in results/toys. To go on: textenv bench run {path}\n"


def test_a_suite_names_its_own_modules(capsys, workplace, suite, monkeypatch):
    (workplace / "my_tasks.py").write_text("")
    monkeypatch.syspath_prepend(workplace)
    status, _, err = run(capsys, "run", suite("a"), "--import", "my_tasks")
    assert status == 2
    assert "a suite itself names the modules that it needs, in place of --import: imports = ['my_tasks']" in err


@pytest.mark.slow
def test_a_real_suite_is_run_shown_and_compared(capsys, workplace, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    text = SUITE.replace("1_000", "64") + "[evaluation]\npoints = 2\nproblems = 8\nsamples = 2\n"
    for name, group in (("one", 2), ("two", 4)):
        settings = f"settings = {{ prompts_per_step = 16, group_size = {group} }}\n"
        (workplace / f"{name}.toml").write_text(f"{text}[agents.grpo]\n{settings}[agents.start]\n")
        assert run(capsys, "run", f"{name}.toml")[0] == 0
    assert (workplace / "results/one/cells/here/grpo/1/points.jsonl").read_text().count("\n") == 2
    status, out, _ = run(capsys, "show", "results/one")
    assert status == 0
    assert "grpo" in out
    status, out, err = run(capsys, "compare", "results/one", "results/two")
    assert (status, err) == (0, "")
    assert "grpo" in out


def test_the_verdicts_on_claims_are_shown(tmp_path, capsys):
    folder = tmp_path / "results"
    for seed in (0, 1):
        claims.run(claims.find_claim("views_agree"), seed, folder / Cell(CLAIMS, "views_agree", seed).path, quick=True)
    (folder / "suite.toml").write_text('title = "t"\nseeds = [0, 1]\n[claims]\nnames = ["views_agree"]\n')
    main(["bench", "show", str(folder)])
    shown = capsys.readouterr().out
    assert "views_agree" in shown
    assert "2" in next(line for line in shown.splitlines() if "views_agree" in line).split("│")[3]
    assert (folder / "verdicts.json").exists()
