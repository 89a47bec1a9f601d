"""What happens to a run when a signal, a second process or a bad disk comes in between."""

import errno
import gzip
import itertools
import json
import re
import resource
import shutil
import signal
import threading

import pytest
import torch

from agents.core import run
from agents.core.records import read_lines
from agents.core.sources import SUMS_FILE, find_model
from agents.grpo import GRPO, GRPOConfig

ENV = "textenv/ProbeLength-v0"


@pytest.fixture
def agent(tmp_path, fresh_model):
    model = fresh_model(ENV)

    def agent(run="run", *, resume=False):
        sizes = {"prompts_per_step": 2, "group_size": 4, "eval_episodes": 2, "checkpoint_every": 1}
        config = GRPOConfig(model=model, run_dir=str(tmp_path / run), learning_rate=1e-2, total_episodes=48, **sizes)
        return GRPO(ENV, config, resume=resume)

    return agent


def assert_same_weights(one, other):
    for name, tensor in one.policy.model.state_dict().items():
        assert torch.equal(tensor, other.policy.model.state_dict()[name]), name


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def break_line(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace(":", ";", 1), *lines[3:]]))


def stop_at(step, number=signal.SIGINT):
    """A callback that sends a signal when a step is logged."""
    return lambda training: signal.raise_signal(number) if training.step == step else None


# --- Signals ---


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_lets_the_step_finish_and_the_run_ends_as_one_that_got_none(agent, tmp_path, capsys, number, raised):
    whole = agent("whole").learn()
    before = signal.getsignal(number)
    with pytest.raises(raised) as stopped:
        agent().learn(callback=stop_at(2, number))
    assert raised is not SystemExit or stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(number) == before
    shown = capsys.readouterr().out
    assert f"{number.name}: finishing the step under way; once more stops at once" in shown
    assert f"go on with: textenv train --resume {tmp_path / 'run'}" in shown
    assert (tmp_path / "run" / "checkpoints" / "000002").is_dir()
    assert not (tmp_path / "run" / "evaluation_after.json").exists()
    assert_same_weights(whole, agent(resume=True).learn())


def test_a_second_signal_stops_at_once(agent):
    def send(training):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt):
        agent().learn(callback=send)


# --- Two processes ---


def test_a_folder_in_which_a_training_is_at_work_is_refused_and_free_again_after_it(agent):
    def intrude(training):
        with pytest.raises(OSError, match=r"another training is at work in .*run; wait for it"):
            agent(resume=True)

    agent().learn(callback=intrude)
    agent(resume=True).learn()


def test_a_run_that_is_older_than_a_setting_goes_on(agent, tmp_path):
    whole = agent("whole").learn()
    with pytest.raises(KeyboardInterrupt):
        agent().learn(callback=stop_at(2))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["settings"]["alarms"], config["settings"]["on_alarm"]
    path.write_text(json.dumps(config))
    assert_same_weights(whole, agent(resume=True).learn())


# --- Damage ---


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda path: path.unlink()], ids=["cut", "a bit", "gone"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_goes_on_to_the_same_end(
    agent, tmp_path, capsys, file, damage
):
    whole = agent("whole").learn()
    with pytest.raises(KeyboardInterrupt):
        agent().learn(callback=stop_at(4))
    newest = tmp_path / "run" / "checkpoints" / "000004"
    damage(newest / file)
    assert find_model(tmp_path / "run") == newest.with_name("000003")
    resumed = agent(resume=True)
    assert f"{newest} is damaged and left aside: {file} is not as it was kept" in capsys.readouterr().out
    assert resumed.start == 3
    assert_same_weights(whole, resumed.learn())
    assert find_model(tmp_path / "run") == newest.with_name("000006")


def test_where_no_checkpoint_is_whole_none_is_taken(agent, tmp_path):
    agent().learn()
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        flip_a_bit(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint of .*run is whole \(000005, 000006 are damaged\)"):
        agent(resume=True)


def test_a_checkpoint_without_checksums_is_taken_and_one_with_broken_ones_is_not(agent, tmp_path):
    agent().learn()
    newest = tmp_path / "run" / "checkpoints" / "000006"
    (newest / SUMS_FILE).write_text("{")
    assert find_model(tmp_path / "run") == newest.with_name("000005")
    (newest / SUMS_FILE).unlink()
    assert find_model(tmp_path / "run") == newest


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", cut, r"config\.json is damaged: .*; bring it back from a copy"),
        ("metrics.jsonl", break_line, r"metrics\.jsonl is damaged in line 3: "),
        ("evaluation_before.json", cut, r"evaluation_before\.json is damaged: "),
    ],
)
def test_a_damaged_file_of_a_run_is_named(agent, tmp_path, file, damage, message):
    with pytest.raises(KeyboardInterrupt):
        agent().learn(callback=stop_at(5))
    damage(tmp_path / "run" / file)
    with pytest.raises(ValueError, match=message):
        agent(resume=True).learn()


def test_steps_whose_metrics_are_lost_are_named_and_the_run_goes_on(agent, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        agent().learn(callback=stop_at(5))
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:3]]))
    agent(resume=True).learn()
    assert f"{path} lacks steps from before the checkpoint, 2, 4 to 5: it was damaged since" in capsys.readouterr().out
    assert [row["step"] for row in read_lines(path)] == [1, 3, 6]


def test_what_a_kill_left_half_written_or_half_deleted_is_no_checkpoint_and_goes(agent, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        agent().learn(callback=stop_at(4))
    checkpoints = tmp_path / "run" / "checkpoints"
    left = [
        checkpoints / "000002.old",
        checkpoints / "000005.new",
        tmp_path / "run" / "rollouts" / "000005.jsonl.gz.new",
    ]
    shutil.copytree(checkpoints / "000004", left[0])
    (left[0] / SUMS_FILE).unlink()
    left[1].mkdir()
    left[2].write_bytes(b"half")
    assert find_model(tmp_path / "run") == checkpoints / "000004"
    agent(resume=True).learn()
    assert not any(path.exists() for path in left)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000005", "000006"]


def test_a_checkpoint_is_deleted_under_a_name_that_is_none(agent, tmp_path, monkeypatch):
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (removed.append(path.name), rmtree(path)))
    agent().learn()
    assert removed == ["000001.old", "000002.old", "000003.old", "000004.old"]


def test_a_training_that_cannot_begin_lets_its_folder_go(agent, tmp_path):
    def never(training):
        pytest.fail("it began")

    broken = agent()
    broken.evaluate = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError) as raised:
        broken.learn(callback=never)
    agent().learn()
    assert raised.value is not None  # which still holds the frame, and the training in it


# --- A full disk ---


@pytest.fixture
def looks_often(monkeypatch):
    monkeypatch.setattr(run, "LOOKS_EVERY", 0.01)


def files_of(folder):
    """What a run keeps, but for its checksums and times."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "memory_peak_mb", "mfu")
    same = [{k: v for k, v in row.items() if k not in timed and not k.startswith("time_")} for row in metrics]
    return same, {path.name: gzip.decompress(path.read_bytes()) for path in (folder / "rollouts").iterdir()}


def test_while_the_disk_is_full_training_waits_and_it_ends_as_one_that_had_room(
    agent, tmp_path, monkeypatch, capsys, looks_often
):
    whole = agent("whole").learn()
    usage, asked = shutil.disk_usage, itertools.count()

    def full_for_a_while(folder):
        return usage(folder)._replace(free=0) if 10 <= next(asked) < 20 else usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", full_for_a_while)
    waited = agent().learn()
    shown = capsys.readouterr().out
    assert re.search(r"the disk of \S+run is full: 0 MiB are free, and a run wants 65\. Training waits until", shown)
    assert shown.count("is full") == shown.count("there is room again")
    assert_same_weights(whole, waited)
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("work", ["_append", "_write_rollout", "checksums"])
def test_what_did_not_fit_on_the_disk_is_written_anew(agent, tmp_path, monkeypatch, capsys, looks_often, work):
    agent("whole").learn()
    write, tries = getattr(run, work), itertools.count()

    def write_half(*arguments):
        if next(tries) in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(run, work, write_half)
    agent().learn()
    assert capsys.readouterr().out.count("is full: No space left on device") == 1
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def test_a_run_that_waits_for_room_can_be_stopped_and_resumed(agent, tmp_path, monkeypatch, capsys, looks_often):
    whole = agent("whole").learn()
    usage = shutil.disk_usage

    def full(folder):
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        return usage(folder)._replace(free=0)

    with pytest.raises((KeyboardInterrupt, OSError)):  # the latter where something had still to be written
        agent().learn(callback=lambda training: monkeypatch.setattr(shutil, "disk_usage", full))
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert f"go on with: textenv train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert_same_weights(whole, agent(resume=True).learn())


def test_a_line_that_was_cut_off_is_taken_back(tmp_path):
    path = tmp_path / "lines"
    run._append(path, b"one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system then writes as much as fits, as it does on a disk that fills up.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run._append(path, b"a long one\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"one\n"


def test_what_the_system_said_of_a_checkpoint_is_an_error_of_the_system(agent, tmp_path, monkeypatch):
    save_file = run.save_file
    monkeypatch.setattr(run, "save_file", lambda tensors, path: save_file(tensors, tmp_path / "nowhere" / path.name))
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        agent().learn()
