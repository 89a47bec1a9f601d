"""The arena: one start for all, one budget for all, and a record of what became of it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import arena as arena_module
from benchmarks.harness.energy import Energy
from benchmarks.harness.records import state
from benchmarks.harness.suite import Budget
from tests.benchmarks.harness.playground import BROKEN, STEPS, arena, points, read_json, run

UNSTEADY = ("tokens_per_second", "memory_peak_mb")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))


def weights(policy):
    return torch.cat([parameter.flatten() for parameter in policy.parameters()])


def test_points_come_at_the_start_where_they_are_due_and_at_the_end(tmp_path):
    found = run(tmp_path, STEPS, {"each": 20})
    assert [point.share for point in found] == [0, 0.6, 1]
    assert [(point.episodes, point.tokens, point.updates) for point in found] == [
        (0, 0, 0),
        (60, 120, 3),
        (100, 200, 5),
    ]


def test_a_step_longer_than_the_way_to_the_next_point_leaves_that_out(tmp_path):
    assert [point.episodes for point in run(tmp_path, STEPS, {"each": 40}, points=6)] == [0, 40, 80, 120]


@pytest.mark.parametrize(
    ("budget", "updates"),
    [(Budget(episodes=100), 4), (Budget(tokens=100), 2), (Budget(updates=3), 3)],
    ids=["episodes", "tokens", "updates"],
)
def test_a_training_ends_when_its_budget_is_spent_whatever_it_counts(tmp_path, budget, updates):
    last = run(tmp_path, STEPS, points=2, budget=budget)[-1]
    assert (last.updates, last.share) == (updates, 1)


def test_the_clock_of_training_stands_still_while_it_is_measured(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(arena_module.time, "perf_counter", lambda: now[0])
    playground = arena(tmp_path, budget=Budget(seconds=10), points=2)
    measure = arena_module.measure

    def slowly(*given):
        now[0] += 1000
        return measure(*given)

    monkeypatch.setattr(arena_module, "measure", slowly)
    now[0] += 50  # setting up
    playground.begin()
    goes_on = []
    for step in (1, 2, 3):
        now[0] += 4
        goes_on.append(playground.spent(playground.start, episodes=step, tokens=step, updates=step))
    assert goes_on == [True, True, False]
    assert [(point.seconds, point.share) for point in playground.points] == [(0, 0), (12, 1)]
    assert playground.measuring_seconds == 2000


def test_a_contender_that_ends_before_its_budget_is_measured_where_it_ended(tmp_path):
    found = run(tmp_path, STEPS, {"each": 20, "at_most": 4})
    assert [point.share for point in found] == [0, 0.6, 0.8]
    assert read_json(tmp_path / "done.json")["seconds"] == found[-1].seconds > 0


def test_a_training_without_updates_does_not_wait_for_a_budget_of_them_for_ever(tmp_path):
    playground = arena(tmp_path, budget=Budget(updates=10))
    step = 0
    while playground.spent(playground.start, episodes=step + 1, tokens=step + 1, updates=min(step, 5)):
        step += 1
    assert step == 5 + arena_module.STALLED


def test_what_is_never_trained_has_the_start_for_its_only_point(tmp_path):
    (point,) = run(tmp_path)
    assert (point.share, point.seconds, point.metrics["sampled/kl"]) == (0, 0, 0)


def test_a_cell_that_is_run_twice_has_the_same_points(tmp_path):
    found = [run(tmp_path / name, STEPS, {"each": 50}) for name in "ab"]
    steady = [
        [{**vars(p), "seconds": 0, "metrics": {k: v for k, v in p.metrics.items() if k not in UNSTEADY}} for p in each]
        for each in found
    ]
    assert steady[0] == steady[1]
    written = [(tmp_path / name / "completions" / "002.jsonl.gz").read_bytes() for name in "ab"]
    assert written[0] == written[1]


def test_the_start_is_one_for_all_seeds_and_training_leaves_it_alone(tmp_path):
    first, second = (arena(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    trained = first.policy()
    with torch.no_grad():
        trained.model.model.norm.weight.add_(1)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert torch.equal(weights(first.policy()), weights(second.start))


def test_the_folder_of_the_start_holds_the_start(tmp_path):
    from agents.core.models import load_model

    playground = arena(tmp_path)
    assert torch.equal(weights(load_model(playground.start_folder())), weights(playground.start))


def test_held_out_problems_are_the_same_for_all_seeds_and_their_samples_are_not(tmp_path):
    rows = []
    for seed in (0, 1):
        run(tmp_path / str(seed), seed=seed)
        text = gzip.decompress((tmp_path / str(seed) / "completions" / "000.jsonl.gz").read_bytes()).decode()
        rows.append([json.loads(line) for line in text.splitlines()])
    assert len(rows[0]) == 4
    for one, other in zip(*rows, strict=True):
        assert (one["prompt"], one["reference"], one["greedy"]) == (
            other["prompt"],
            other["reference"],
            other["greedy"],
        )
    assert [row["sampled"] for row in rows[0]] != [row["sampled"] for row in rows[1]]


def test_a_cell_that_is_done_says_what_it_took(tmp_path):
    run(tmp_path, STEPS)
    done = read_json(tmp_path / "done.json")
    assert set(done) == {"seconds", "measuring_seconds", "start_seconds", "peak_memory_mb", "energy_j"}
    assert done["start_seconds"] > 0
    assert state(tmp_path) == "done"
    cell = read_json(tmp_path / "cell.json")
    assert (cell["environment"], cell["agent"], cell["seed"], cell["kind"]) == ("toy", "agent", 0, STEPS)
    assert cell["provenance"]["settings"].startswith(STEPS)
    assert not list(tmp_path.rglob("*.new"))


def test_a_contender_that_fails_leaves_its_error_and_no_success(tmp_path):
    with pytest.raises(RuntimeError, match="on fire"):
        run(tmp_path, BROKEN)
    failed = read_json(tmp_path / "failed.json")
    assert failed["error"] == "RuntimeError: the disk is on fire"
    assert "in train" in failed["traceback"]
    assert state(tmp_path) == "failed"


def test_a_contender_that_nobody_knows_fails_before_a_model_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(arena_module, "load_policy", lambda *given: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match="did you mean start"):
        run(tmp_path, "strat")
    assert state(tmp_path) == "failed"


def test_another_try_begins_anew_but_keeps_the_log(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, BROKEN)
    (tmp_path / "log.txt").write_text("the first try")
    (tmp_path / "points.jsonl").write_text("half a li")
    (tmp_path / "run").mkdir()
    run(tmp_path)
    assert (state(tmp_path), len(points(tmp_path))) == ("done", 1)
    assert not (tmp_path / "failed.json").exists()
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "log.txt").read_text() == "the first try"


@pytest.mark.slow
def test_a_cell_of_its_own_process_ends_with_status_1_when_it_fails(tmp_path):
    toml = tmp_path / "suite.toml"
    toml.write_text(
        'title = "t"\nseeds = [0]\nimports = ["tests.benchmarks.harness.playground"]\n[budget]\nepisodes = 10\n'
        f'[environments.toy]\nid = "playground/Digits-v0"\n[agents.broken]\nkind = "{BROKEN}"\n[agents.start]\n'
    )
    for agent, status in (("broken", 1), ("start", 0)):
        words = [sys.executable, "-m", "benchmarks.harness.run_cell", str(toml), "toy", agent, "0"]
        ended = subprocess.run([*words, str(tmp_path / agent)], cwd=Path(__file__).parents[3], capture_output=True)
        assert ended.returncode == status
    assert (state(tmp_path / "broken"), state(tmp_path / "start")) == ("failed", "done")


def package(folder, name, microjoules, most="1000"):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(microjoules)
    (folder / name / "max_energy_range_uj").write_text(most)


def test_energy_is_that_of_the_packages_and_survives_a_counter_that_begins_anew(tmp_path):
    package(tmp_path, "intel-rapl:0", "900")
    package(tmp_path, "intel-rapl:0:0", "5")  # a part of the one above
    energy = Energy(tmp_path)
    package(tmp_path, "intel-rapl:0", "950")
    package(tmp_path, "intel-rapl:0:0", "500")
    energy.read()
    package(tmp_path, "intel-rapl:0", "30")
    assert energy.joules() == pytest.approx(130e-6)


def test_a_machine_that_does_not_tell_its_energy_has_none_and_not_zero(tmp_path):
    (tmp_path / "intel-rapl:0").mkdir()
    assert Energy(tmp_path).joules() is None
    assert Energy(tmp_path / "nothing").joules() is None
