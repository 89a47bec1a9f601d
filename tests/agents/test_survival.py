"""What happens to a run when a signal, a second process or a bad disk comes in between."""

import json
import signal

import pytest
import torch

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
