"""Faults injected into a training, one at a time: each is told clearly, and mended it ends as one that met none."""

import shutil
import signal
import time

import numpy as np
import pytest
import torch

from agents.core import rollout
from agents.core.engines.base import Completions, Sampling
from agents.core.policy import Policy
from agents.core.records import read_metrics, read_rollout, rollout_path
from agents.core.rollout import fault_of, naming_who_hangs
from agents.core.sources import SUMS_FILE, checkpoints
from agents.core.training import default_run_dir
from agents.grpo import GRPO, GRPOConfig
from benchmarks.reliability.injected import (
    GARBAGE,
    break_engine,
    break_reward,
    clock_going_back,
    flip_bit,
    grades_three_of_four,
    raises,
    scores_nan,
    scores_too_few,
    truncate,
    wrong_logprobs,
)
from rewards import RewardError
from tests.agents.conftest import Undecodable, make_model
from tests.agents.scripted import metrics_of
from textenv import Finish, make_task

ENV = "textenv/ProbeLength-v0"
STEPS = 6


def train(model, folder, *, resume=False):
    sizes = {"prompts_per_step": 2, "group_size": 4, "eval_episodes": 2, "checkpoint_every": 2}
    config = GRPOConfig(model=model, run_dir=str(folder), learning_rate=1e-2, total_episodes=8 * STEPS, **sizes)
    return GRPO(ENV, config, resume=resume)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = make_task(ENV).tokenizer()
    folder = tmp_path_factory.mktemp("model")
    Policy(make_model("llama", vocab_size=tokenizer.vocab_size), tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The weights at the end of a training that met no fault."""
    return train(model, tmp_path_factory.mktemp("whole")).learn().policy.state_dict()


@pytest.fixture
def agent(model, tmp_path):
    return train(model, tmp_path / "run")


@pytest.fixture
def same_end(model, whole, tmp_path):
    """Goes on with a run whose fault is mended, which must end as one that met none."""

    def same_end():
        mended = train(model, tmp_path / "run", resume=True).learn()
        assert mended.last_training.step == STEPS
        held = mended.policy.state_dict()
        for name, tensor in whole.items():
            assert torch.equal(tensor, held[name]), name

    return same_end


# --- Rewards ---


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (raises, r"(?s)left 8 of 8 episodes ungraded.*ConnectionError: the grader does not answer"),
        (scores_nan, r"(?s)left 8 of 8 episodes ungraded.*must be a finite number, got nan"),
        (scores_too_few, "must return a list with one Score a sample, in order, for 8 samples"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reward_that_breaks_stops_the_training_which_then_goes_on(agent, same_end, capsys, tmp_path, fault, said):
    break_reward(agent, fault, after=3)
    with pytest.raises(RewardError, match=said):
        agent.learn()
    assert f"stopped after step 3; go on with: textenv train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert list(read_metrics(tmp_path / "run")) == [1, 2, 3]
    same_end()


def test_a_reward_that_raises_for_some_samples_is_alarmed_and_the_training_goes_on(agent, capsys, tmp_path):
    break_reward(agent, grades_three_of_four, after=2)
    assert agent.learn().last_training.step == STEPS
    assert [line["ungraded_share"] for line in metrics_of(agent)] == [0, 0, *[0.25] * (STEPS - 2)]
    assert "ALARM in step 5: 25% of the episodes could not be graded" in capsys.readouterr().out
    errors = [row["error"] for row in read_rollout(rollout_path(tmp_path / "run", STEPS))]
    assert errors == ["the grader does not answer", None, None, None] * 2


def test_a_reward_that_does_not_answer_is_named_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(rollout, "PATIENCE", 0.01)
    printed = ""
    with naming_who_hangs("judge", 8):
        for _ in range(1000):
            printed += capsys.readouterr().out
            if "for 0.02 s" in printed:
                break
            time.sleep(0.01)
    assert (
        "the reward 'judge' has been scoring 8 episodes for 0.01 s; if it hangs, end the run by Ctrl-C twice" in printed
    )


def test_a_reward_that_answers_is_not_named(agent, capsys):
    agent.learn()
    assert "has been scoring" not in capsys.readouterr().out


def test_a_reward_that_hangs_is_ended_by_a_second_signal_and_the_training_goes_on(agent, same_end):
    def hangs(scores):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    break_reward(agent, hangs, after=3)
    with pytest.raises(KeyboardInterrupt):
        agent.learn()
    same_end()


# --- Engines ---


@pytest.mark.parametrize(
    ("fault", "said"),
    [*GARBAGE.items(), (wrong_logprobs, "the engine sampled from another distribution than the learner scores")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_an_engine_never_may_give_stops_the_training_which_then_goes_on(agent, same_end, tmp_path, fault, said):
    break_engine(agent, fault, after=3)
    with pytest.raises(RuntimeError, match=said):
        agent.learn()
    assert list(read_metrics(tmp_path / "run")) == [1, 2, 3]
    same_end()


def completions(*tokens):
    arrays = [np.array(row) for row in tokens]
    return Completions(
        arrays, [np.full(len(row), -1.0, dtype=np.float32) for row in arrays], [Finish.EOS] * len(tokens)
    )


def said_of(*tokens, budget=4, **sampling):
    budget_B = np.full(len(tokens), budget)
    return fault_of(completions(*tokens), budget_B, Sampling(max_new_tokens=budget, **sampling), Undecodable())


def test_an_id_without_text_is_a_fault_though_it_is_in_the_vocabulary():
    assert said_of([1, 2, 0], [1, 5, 0]).startswith("the id 5 in completion 1, which stands for no text")
    assert said_of([1, 2, 0], [1, 4, 0]) is None


def test_a_completion_ends_with_an_end_or_with_its_budget():
    assert said_of([1, 2, 4, 0], [1, 2, 4, 6], [0]) is None
    assert said_of([1, 2]) == "2 tokens as completion 0, which neither end nor fill their budget of 4"
    assert said_of([1, 2], stop_ids=(2,)) is None
    assert said_of([1, 2, 0], stop_ids=(2,)) == "tokens after the end of completion 0"
    assert said_of([1, 2], stop_texts=("1",)) is None  # of which the tokens alone say nothing


def test_rounding_above_zero_is_no_fault():
    rounded = Completions([np.array([0])], [np.array([1e-6], dtype=np.float32)], [Finish.EOS])
    assert fault_of(rounded, np.array([4]), Sampling(max_new_tokens=4), Undecodable()) is None


# --- Files and clocks; checkpoints, full disks and second processes are in test_survival.py ---


@pytest.mark.parametrize("damage", [truncate, flip_bit])
def test_damaged_episodes_are_told_by_their_file(agent, tmp_path, damage):
    agent.learn()
    path = rollout_path(tmp_path / "run", 2)
    damage(path)
    with pytest.raises(ValueError, match=r"000002\.jsonl\.gz is not a whole gzip file"):
        read_rollout(path)


def test_nothing_is_left_of_an_old_checkpoint_whose_removal_was_broken_off(agent, same_end, tmp_path, monkeypatch):
    def remove_half(folder):
        for file in sorted(folder.iterdir())[:2]:
            file.unlink()
        raise OSError("the machine went down")

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(OSError, match="the machine went down"):
            agent.learn()
    assert all((checkpoint / SUMS_FILE).exists() for checkpoint in checkpoints(tmp_path / "run"))
    same_end()
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"000004", "000006"}


def test_a_clock_that_goes_back_changes_no_number_no_order_and_no_duration(agent, same_end, tmp_path):
    def end_at_3(training):
        if training.step == 3:
            raise ZeroDivisionError

    with clock_going_back():
        with pytest.raises(ZeroDivisionError):
            agent.learn(callback=end_at_3)
        same_end()
    lines = metrics_of(agent)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["seconds"] > 0 for line in lines)


def test_two_runs_that_start_in_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-120000")
    names = []
    for _ in range(3):
        folder = default_run_dir("grpo", ENV)
        folder.mkdir(parents=True)
        names.append(folder.name)
    start = "grpo-textenv-ProbeLength-v0-20260101-120000"
    assert names == [start, f"{start}-2", f"{start}-3"]
