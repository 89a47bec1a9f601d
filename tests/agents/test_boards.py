"""Where a run's metrics are shown. A real Weights & Biases writes its files without a network."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.core import boards
from agents.grpo import GRPO, GRPOConfig


@pytest.fixture
def start(tmp_path, fresh_model):
    model = fresh_model("textenv/ProbeLength-v0")

    def start(resume=False, **changes):
        settings = {"model": model, "prompts_per_step": 2, "group_size": 2, "eval_episodes": 2} | changes
        config = GRPOConfig(run_dir=str(tmp_path / "run"), **settings)
        return GRPO("textenv/ProbeLength-v0", config, resume=resume)

    return start


def test_every_metric_of_every_step_is_on_tensorboard(start, tmp_path):
    start().learn(total_episodes=8)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"reward", "entropy", "time_generate"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("entropy")] == [1, 2]


def test_a_run_and_what_resumes_it_are_one_on_weights_and_biases_where_its_project_is_named(
    start, tmp_path, monkeypatch
):
    monkeypatch.setenv(boards.WANDB, "tests")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    start().learn(total_episodes=4)
    start(resume=True).learn(total_episodes=8)
    number = (tmp_path / "run" / boards.ID_FILE).read_text()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{number}.wandb"))
    assert files
    assert all(b"new_tokens_mean" in file.read_bytes() for file in files)


def test_nothing_goes_to_weights_and_biases_unless_a_project_is_named(start, tmp_path, monkeypatch):
    monkeypatch.delenv(boards.WANDB, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start().learn(total_episodes=4)
    assert not (tmp_path / "run" / "wandb").exists()


def test_without_wandb_one_line_names_the_extra_before_a_model_loads(start, monkeypatch):
    monkeypatch.setenv(boards.WANDB, "tests")
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'textenv\[wandb\]'"):
        start(model="no/such-model")
