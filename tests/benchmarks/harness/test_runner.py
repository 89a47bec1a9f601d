"""Filling a results folder, with cells that do what their agent's name says. See toy.py."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import runner
from benchmarks.harness.board import Board
from benchmarks.harness.processes import PRELOADED, start_module
from benchmarks.harness.records import Cell, state
from benchmarks.harness.runner import Overhead, read_error, run_suite
from benchmarks.harness.suite import AgentSpec, EnvironmentSpec, Suite

TOY = "tests.benchmarks.harness.toy"
ROOT = Path(__file__).parents[3]


def start_toy(suite, cell, folder):
    return start_module(TOY, [str(folder), cell.environment, cell.agent, str(cell.seed)], folder / "log.txt")


def toy_suite(folder, *agents, seeds=(0, 1), programs=None, text='title = "toys"\n'):
    path = folder / "toys.toml"
    path.write_text(text)
    return Suite(
        title="toys",
        path=path,
        seeds=seeds if agents else (),
        environments={"here": EnvironmentSpec(id="textenv/Copy-v0")} if agents else {},
        agents={agent: AgentSpec(kind="grpo") for agent in agents},
        programs=programs or {},
    )


def fill(suite, folder, **options):
    return run_suite(suite, folder, start=start_toy, **options)


def ran(folder):
    """Agents and seeds of the cells that have begun, in this order."""
    return (folder / "ran.txt").read_text().split("\n")[:-1]


def states(suite, folder):
    return {f"{cell.agent} {cell.seed}": state(folder / cell.path) for cell in suite.cells}


def ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing came of it in ten seconds")


# What is run


def test_every_cell_is_run_once_and_its_output_kept(tmp_path):
    suite, out = toy_suite(tmp_path, "a", "b"), tmp_path / "out"
    assert fill(suite, out) == []
    assert sorted(ran(out)) == ["a 0", "a 1", "b 0", "b 1"]
    assert set(states(suite, out).values()) == {"done"}
    assert (out / "cells/here/b/1/log.txt").read_text() == "b begins\n"
    assert (out / "suite.toml").read_text() == suite.path.read_text()
    fill(suite, out)
    assert len(ran(out)) == 4


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path):
    suite, out = toy_suite(tmp_path, "fails", "crashes", "dies", "good", seeds=(0,)), tmp_path / "out"
    failed = fill(suite, out)
    assert [cell.agent for cell in failed] == ["fails", "crashes", "dies"]
    assert states(suite, out)["good 0"] == "done"
    errors = {cell.agent: read_error(out / cell.path) for cell in failed}
    assert errors["fails"] == "ValueError: no such thing"
    assert errors["crashes"] == "its process ended with status 1; the log ends: RuntimeError: nothing is left of it"
    assert "was ended by SIGKILL, perhaps for want of memory" in errors["dies"]
    assert "Traceback" in json.loads((out / "cells/here/crashes/0/failed.json").read_text())["traceback"]


def test_failed_cells_run_again_only_when_asked_for(tmp_path):
    suite, out = toy_suite(tmp_path, "fails", "good", seeds=(0,)), tmp_path / "out"
    for retry in (False, False, True):
        assert len(fill(suite, out, retry=retry)) == 1
    assert sorted(ran(out)) == ["fails 0", "fails 0", "good 0"]


def test_a_cell_that_was_killed_is_emptied_and_run_again(tmp_path):
    suite, out = toy_suite(tmp_path, "a", seeds=(0,)), tmp_path / "out"
    fill(suite, out)
    cell = out / "cells/here/a/0"
    (cell / "done.json").unlink()
    (cell / "half.txt").write_text("half")
    assert state(cell) == "killed"
    fill(suite, out)
    assert state(cell) == "done"
    assert not (cell / "half.txt").exists()


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_run_at_once_than_were_allowed(tmp_path, at_once):
    suite, out = toy_suite(tmp_path, "naps", seeds=(0, 1, 2, 3)), tmp_path / "out"
    fill(suite, out, at_once=at_once)
    now = most = 0
    for line in ran(out):
        now += -1 if line.startswith("end") else 1
        most = max(most, now)
    assert most == at_once


def test_cells_wait_for_memory(tmp_path, monkeypatch):
    memory = namedtuple("Memory", "available")(1.5 * runner.MEMORY_MB * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    suite, out = toy_suite(tmp_path, "naps", seeds=(0, 1)), tmp_path / "out"
    fill(suite, out, at_once=2)
    assert [line.split()[0] for line in ran(out)] == ["naps", "end", "naps", "end"]


def test_fewer_than_one_at_once_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one cell runs at a time, got at_once=0"):
        fill(toy_suite(tmp_path, "a"), tmp_path / "out", at_once=0)


# Programs


def program(code):
    return ("python", "-c", code)


def test_programs_run_one_at_a_time_before_agents(tmp_path):
    out = tmp_path / "out"
    code = "import time; time.sleep(0.1); open(r'{}', 'a').write('{}\\n'); print('seen')"
    programs = {name: program(code.format(out / "ran.txt", name)) for name in ("first", "second")}
    programs["first"] = program(programs["first"][2].replace("0.1", "0.5"))  # which does not let the other pass
    suite = toy_suite(tmp_path, "a", seeds=(0,), programs=programs)
    assert (
        run_suite(suite, out, start=lambda *given: (start_toy if given[1].agent == "a" else runner.start_cell)(*given))
        == []
    )
    assert ran(out) == ["first", "second", "a 0"]
    cell = out / "cells/programs/second/0"
    assert (cell / "log.txt").read_text() == "seen\n"
    done = json.loads((cell / "done.json").read_text())
    assert done["status"] == 0
    assert done["seconds"] > 0
    assert json.loads((cell / "cell.json").read_text())["agent"] == "second"


def test_imports_of_agents_are_asked_for_before_the_first_process(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "preload", lambda: calls.append("preload"))
    monkeypatch.setattr(runner, "start_program", lambda *arguments: calls.append("program"))
    for agents, expected in ((("a",), ["preload", "program"]), ((), ["program"])):
        calls.clear()
        suite = toy_suite(tmp_path, *agents, programs={"p": ("true",)})
        runner.start_cell(suite, Cell("programs", "p", 0), tmp_path)
        assert calls == expected


def test_a_program_that_fails_says_why(tmp_path):
    programs = {"bad": program("import sys; print('too bad'); sys.exit(4)"), "none": ("no-such-program",)}
    suite = toy_suite(tmp_path, programs=programs)
    failed = run_suite(suite, tmp_path / "out")
    errors = [read_error(tmp_path / "out" / cell.path) for cell in failed]
    assert errors[0] == "its process ended with status 4; the log ends: too bad"
    assert "No such file or directory: 'no-such-program'" in errors[1]


# The folder


def test_a_folder_of_another_suite_is_refused(tmp_path):
    text = 'title = "toys"\nseeds = [0, 1]\n[agents.a]\nsettings = { group_size = 8 }\n'
    fill(toy_suite(tmp_path, "a", text=text), tmp_path / "out")
    other = text.replace("8", "4").replace("[0, 1]", "[0]") + "[agents.b]\n"
    expected = (
        "out holds results of another suite: seeds is [0, 1] there and [0] here; agents.a.settings.group_size is 8 there "
        "and 4 here; agents.b is nothing there and {} here; name another folder with --out"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        fill(toy_suite(tmp_path, "a", text=other), tmp_path / "out")
    commented = text + "# another comment\n"
    assert fill(toy_suite(tmp_path, "a", text=commented), tmp_path / "out") == []


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("…")
    with pytest.raises(ValueError, match="out is not empty and holds no results; name a new folder with --out"):
        fill(toy_suite(tmp_path, "a"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_being_filled_is_refused(tmp_path):
    suite, out = toy_suite(tmp_path, "a", seeds=(0,)), tmp_path / "out"
    fill(suite, out)
    with (out / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"out is being filled by process {os.getpid()}; wait for it"):
            fill(suite, out)
    fill(suite, out)


# Being stopped


def test_an_interrupt_ends_what_runs_and_the_rest_can_go_on(tmp_path):
    suite, out = toy_suite(tmp_path, "hangs", "a", seeds=(0,)), tmp_path / "out"
    pids = out / "cells/here/hangs/0/pids.txt"

    def start(suite, cell, folder):
        if cell.agent == "hangs":
            return start_toy(suite, cell, folder)
        wait_for(lambda: pids.exists() and pids.read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, out, at_once=2, start=start)
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: ended(pid))
    assert states(suite, out) == {"hangs 0": "killed", "a 0": "waiting"}
    assert run_suite(toy_suite(tmp_path, "a", seeds=(0,)), out, start=start_toy) == []


def test_a_runner_that_is_killed_takes_its_cells_along_and_loses_only_those(tmp_path):
    suite, out = toy_suite(tmp_path, "a", "hangs", seeds=(0,)), tmp_path / "out"
    code = (
        "from pathlib import Path\nfrom tests.benchmarks.harness.test_runner import fill, toy_suite\n"
        f"if __name__ == '__main__':\n    folder = Path({str(tmp_path)!r})\n"
        "    fill(toy_suite(folder, 'a', 'hangs', seeds=(0,)), folder / 'out', at_once=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    pids = out / "cells/here/hangs/0/pids.txt"
    wait_for(lambda: pids.exists() and pids.read_text())
    with pytest.raises(ValueError, match=f"is being filled by process {process.pid}"):
        fill(suite, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: ended(pid))
    assert states(suite, out) == {"a 0": "done", "hangs 0": "killed"}
    fill(toy_suite(tmp_path, "a", seeds=(0,)), out)
    assert ran(out) == ["a 0", "hangs 0"]


@pytest.mark.slow
def test_what_is_imported_for_all_cells_leaves_the_gpu_to_them(tmp_path):
    # A process that was forked after the driver was asked for anything cannot use it.
    code = (
        "import torch\n\ndef asked(*arguments):\n    raise RuntimeError('the GPU was asked for')\n\n"
        "for name in ('is_available', 'device_count', '_lazy_init', 'get_device_properties', 'current_device'):\n"
        f"    setattr(torch.cuda, name, asked)\nimport {PRELOADED}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# What is told


def test_the_share_of_the_budget_is_that_of_the_last_whole_point(tmp_path):
    assert runner._share(tmp_path) == 0.0
    (tmp_path / "points.jsonl").write_text('{"share": 0.0}\n{"share": 0.25}\n{"share": 0.')
    assert runner._share(tmp_path) == 0.25


def test_overhead_is_what_neither_trains_nor_measures(tmp_path):
    suite, out = toy_suite(tmp_path, "a", seeds=(0,)), tmp_path / "out"
    fill(suite, out)
    (cell,) = suite.cells
    overhead = Overhead(out)
    overhead.add(cell, 1.0)
    kept = json.loads((out / "overhead.json").read_text())
    told = {"training_seconds": 0.25, "measuring_seconds": 0.5, "start_seconds": 0.125}
    expected = {"wall_seconds": 1.0, **told, "other_seconds": 0.125}
    assert kept["cells"] == {"cells/here/a/0": expected}
    assert kept["share"] == pytest.approx((kept["runner_seconds"] + 0.125) / (kept["runner_seconds"] + 1.0))
    assert overhead.largest_mb() == 100.0
    assert Overhead(out).wall_seconds(suite.cells) == {cell: 1.0}


def test_imports_of_agents_are_counted_apart(tmp_path):
    overhead = Overhead(tmp_path)
    for seconds in (5.0, 0.25, 0.5):  # only the first process waits for them
        overhead.count_start(seconds)
    overhead.save()
    kept = json.loads((tmp_path / "overhead.json").read_text())
    assert kept["imports_seconds"] == 5.0
    assert 0.75 <= kept["runner_seconds"] < 5.0


CELLS = [Cell("sums", agent, seed) for seed in (0, 1) for agent in ("grpo", "ppo")]


def board(states, seconds, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    return Board("title", dict(zip(CELLS, states, strict=True)), seconds, at_once=2)


def test_the_time_left_goes_by_what_is_most_alike(monkeypatch):
    # Each as with seed 0, two at a time: the longer one decides.
    seconds = {CELLS[0]: 10.0, CELLS[1]: 30.0}
    shown = board(["done", "done", "waiting", "waiting"], seconds, monkeypatch)
    assert shown.seconds_left() == 30.0
    assert shown.summary() == "2 of 4 done, 0 running, about 0:30 left"
    # One as with seed 1, the others as anyone in the environment: three of 8 s on two places.
    shown = board(["waiting", "waiting", "done", "waiting"], {CELLS[2]: 8.0}, monkeypatch)
    assert shown.seconds_left() == (8.0 + 8.0 + 8.0) / 2
    assert board(["waiting"] * 4, {}, monkeypatch).seconds_left() is None


def test_the_time_left_of_a_running_cell_goes_by_its_share(monkeypatch):
    shown = board(["waiting", "done", "done", "done"], dict.fromkeys(CELLS[1:], 50.0), monkeypatch)
    shown.start(CELLS[0])
    monkeypatch.setattr(time, "monotonic", lambda: 120.0)
    assert shown.seconds_left() == 50.0 - 20.0
    shown.show({CELLS[0]: 0.5})
    assert shown.seconds_left() == 40.0 - 20.0


def test_the_table_has_a_row_an_agent_and_a_column_a_seed(monkeypatch):
    shown = board(["done", "failed", "waiting", "waiting"], {}, monkeypatch)
    shown.start(CELLS[2])
    monkeypatch.setattr(time, "monotonic", lambda: 175.0)
    shown.show({CELLS[2]: 0.25})
    table = shown.table()
    assert [column.header for column in table.columns] == ["", "", "seed 0", "seed 1"]
    assert [list(column.cells) for column in table.columns[1:]] == [
        ["grpo", "ppo"],
        ["[green]done[/green]", "[red]failed[/red]"],
        ["[bold]25%[/bold] 1:15", "·"],
    ]
    # A quarter has taken 75 s, so that 225 are left, and 300 of the one that waits.
    assert table.caption == "1 of 4 done, 1 failed, 1 running, about 5:00 left"
