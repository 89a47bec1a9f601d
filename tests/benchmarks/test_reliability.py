"""The proof that a run survives would see a run that did not."""

import gzip
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.reliability import faults, kill
from benchmarks.reliability.injected import flip_bit
from benchmarks.reliability.soak import measured
from benchmarks.reliability.still import same_bits
from benchmarks.reliability.trainings import EVERY_AGENT, differences, make_agent


@pytest.fixture
def run(tmp_path):
    """A run's folder with something of each kind."""
    folder = tmp_path / "run"
    for name in ("rollouts", "checkpoints/000002", "tensorboard"):
        (folder / name).mkdir(parents=True)
    lines = [{"step": step, "reward": 0.5, "loss": None, "seconds": 0.1, "time_log": 0.01} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rollouts" / "000001.jsonl.gz").write_bytes(gzip.compress(b'{"value": 1.0}\n'))
    save_file({"w": torch.ones(64)}, folder / "checkpoints/000002/model.safetensors")
    save_file({"0/step": torch.ones(64)}, folder / "checkpoints/000002/optimizer.safetensors")
    for name in ("alarms.jsonl", "evaluation_after.json", "config.json", "tensorboard/events", "lock"):
        (folder / name).write_text("{}")
    return folder


def rewrite(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def flip(name):
    return lambda folder: flip_bit(folder / name)


def pack(content, level):
    return lambda folder: (folder / "rollouts/000001.jsonl.gz").write_bytes(gzip.compress(content, level))


SEEN = {
    "a weight": (flip("checkpoints/000002/model.safetensors"), "checkpoints/000002/model.safetensors"),
    "the optimiser": (flip("checkpoints/000002/optimizer.safetensors"), "checkpoints/000002/optimizer.safetensors"),
    "a metric": (rewrite("metrics.jsonl", "0.5", "0.5000001"), "metrics of step 1"),
    "a metric more": (rewrite("metrics.jsonl", '"loss"', '"kl": 0.0, "loss"'), "metrics of step 1"),
    "a step more": (rewrite("metrics.jsonl", '{"step": 1', '{"step": 3}\n{"step": 1'), "metrics of step 3"),
    "a rollout": (pack(b'{"value": 0.0}\n', 9), "rollouts/000001.jsonl.gz"),
    "a file more": (lambda folder: (folder / "checkpoints/000004.new").write_text(""), "checkpoints/000004.new"),
    "no evaluation": (lambda folder: (folder / "evaluation_after.json").unlink(), "evaluation_after.json"),
    "an alarm": (rewrite("alarms.jsonl", "{}", '{"rule": "length"}'), "alarms.jsonl"),
}


@pytest.mark.parametrize(("change", "name"), SEEN.values(), ids=SEEN)
def test_what_a_resumed_run_does_not_have_in_common_is_seen(run, tmp_path, change, name):
    other = shutil.copytree(run, tmp_path / "other")
    assert differences(run, other) == []
    change(other)
    assert differences(run, other) == differences(other, run) == [name]


def test_times_and_packing_are_no_difference(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    rewrite("metrics.jsonl", '"seconds": 0.1, "time_log": 0.01', '"seconds": 0.2, "time_log": 0.02')(other)
    pack(b'{"value": 1.0}\n', 1)(other)
    rewrite("tensorboard/events", "{}", "other")(other)
    assert differences(run, other) == []


def test_memory_that_grows_is_not_flat_and_what_fills_up_at_first_is():
    steps = np.arange(2000)
    noise = np.random.default_rng(0).normal(size=2000)
    leaking = measured("memory, MiB", 500 + 0.01 * steps + noise)
    assert leaking.growth == pytest.approx(10, rel=0.05)
    assert not leaking.flat
    filling = measured("memory, MiB", 500 - 50 * (steps < 200) + noise)
    assert filling == measured("memory, MiB", 500 + noise)
    assert filling.flat
    assert not measured("open files", 8 + steps // 200).flat
    assert measured("step, ms", 40 + noise).flat
    assert not measured("step, ms", 40 + 0.01 * steps + noise).flat


def test_a_weight_moved_even_if_only_the_sign_of_a_zero_did():
    assert same_bits(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert not same_bits(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))


def test_a_kill_that_did_not_end_exactly_is_counted_as_such():
    killed = [
        kill.Killed("ppo", inside=True, early=False, unstarted=False, missed=0, apart=[]),
        kill.Killed("ppo", inside=False, early=True, unstarted=True, missed=2, apart=["metrics of step 1"]),
        kill.Killed("raft", inside=False, early=True, unstarted=False, missed=0, apart=[]),
    ]
    rows = list(zip(*(column.cells for column in kill.table(killed).columns), strict=True))
    assert rows == [
        ("ppo", "2", "1", "1", "1", "1"),
        ("raft", "1", "0", "1", "0", "1"),
        ("all", "3", "1", "2", "1", "2"),
    ]


@pytest.mark.parametrize("name", EVERY_AGENT)
def test_the_trainings_have_state_of_all_kinds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path))
    monkeypatch.setattr("agents.warmup.MAX_STEPS", 1)
    agent = make_agent(name, tmp_path / "run")
    assert agent.name == name
    state, config = agent.reward.state_dict(), agent.config
    assert (name == "ppo") == (agent.learner.critic is not None)
    assert (name == "grpo") == bool(state) == (config.staleness == 1)
    assert (name == "grpo") == (config.kl_target is None)
    assert max(config.updates_per_batch, config.epochs_per_batch) > 1


@pytest.mark.slow
def test_kills_leave_runs_that_end_as_one_never_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path / "cache"))
    killed, _ = kill.kill_all(["grpo"], 2, 0, tmp_path)
    assert [each.apart for each in killed] == [[], []]
    assert killed[0].inside


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a disk of one's own is mounted in a namespace, which Linux has")
def test_every_fault_is_met_as_promised(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEXTENV_CACHE", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        faults.main()
    assert ended.value.code == 0, capsys.readouterr().out
