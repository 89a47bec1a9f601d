"""GRPO: its loss and advantages by hand, what it learns, and that a run killed goes on as if it had not been."""

import dataclasses
import json
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import textenv
from agents.core.advantages import group_advantages
from agents.core.learner import Scored
from agents.core.losses import count_denominators
from agents.core.policy_gradient import policy_loss
from agents.core.rollout import Rollout
from agents.grpo import GRPO, GRPOConfig
from rewards import RewardError, Score, ungraded

# Two sequences of three and two tokens; the last entry of the second row is padding and holds junk.
SAMPLED_BT = torch.tensor([[True, True, True], [True, True, False]])
OLD_BT = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, -9.0]])
REFERENCE_BT = torch.tensor([[-1.1, -2.0, -0.6], [-1.2, -0.8, -9.0]])
ADVANTAGE_B = torch.tensor([1.0, -0.5])


def loss_and_gradient(**changes):
    logp_BT = torch.tensor([[-0.7, -2.4, -0.5], [-1.0, -0.9, -9.0]], requires_grad=True)
    loss, metrics = policy_loss(
        Scored(torch.arange(2), SAMPLED_BT, logp_BT, torch.zeros(2, 3)),
        **{
            "config": GRPOConfig(),
            "advantage": ADVANTAGE_B,
            "old_BT": OLD_BT,
            "reference_BT": None,
            "denominators": count_denominators(SAMPLED_BT, 4),
        }
        | changes,
    )
    loss.backward()
    return loss.item(), logp_BT.grad, metrics


def test_the_loss_is_the_papers():
    # r = exp(.3), exp(-.4), 1 | exp(.5), exp(-.2); clipped at .8 and 1.2:
    # row 1, A = 1: -(1.2 + .670320 + 1)/3; row 2, A = -.5: (.824361 + .409365)/2; their mean
    loss, gradient, _ = loss_and_gradient()
    assert loss == pytest.approx(-0.169955, abs=1e-6)
    expected = torch.tensor([[0.0, -0.670320 / 6, -1 / 6], [0.824361 / 4, 0.409365 / 4, 0.0]])
    assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_the_kl_term_is_k3_times_its_coefficient():
    loss, gradient, metrics = loss_and_gradient(kl_loss_coef=0.04, reference_BT=REFERENCE_BT)
    assert loss == pytest.approx(-0.168603, abs=1e-6)
    expected = torch.tensor([[0.002198, -0.114999, -0.166032], [0.207903, 0.101290, 0.0]])
    assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    # k3 by hand: .070320 + .091825 + .004837 and .018731 + .005171, a sequence
    assert metrics["kl_k3"].item() == pytest.approx((0.166982 + 0.023902) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"aggregation": "token_mean"}, -0.327319),
        ({"aggregation": "token_mean", "clip_high": 0.28}, -0.343319),
        ({"aggregation": "constant"}, -0.204574),
    ],
    ids=["PPO", "DAPO", "Dr. GRPO"],
)
def test_its_settings_reach_the_losses_of_its_relatives(changes, expected):
    assert loss_and_gradient(config=GRPOConfig(**changes))[0] == pytest.approx(expected, abs=1e-6)


def test_a_batch_that_is_fresh_has_ratio_one():
    loss, gradient, metrics = loss_and_gradient(old_BT=None)
    assert loss == pytest.approx(-(1.0 - 0.5) / 2)
    assert_close(gradient, torch.tensor([[-1 / 6] * 3, [0.125, 0.125, 0.0]]))
    assert metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0


def test_the_advantage_of_an_ungraded_completion_is_zero():
    reward_B = torch.tensor([1.0, 0.0, torch.nan, 1.0, 1.0], dtype=torch.float64)
    advantage_B = group_advantages(reward_B, torch.tensor([0, 0, 0, 1, 1]))
    half = 0.5 / (0.5**0.5 + 1e-6)
    assert_close(advantage_B, torch.tensor([half, -half, 0.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("task_id", "family", "lr", "episodes", "at_least"),
    [
        ("textenv/ProbeOneHot-v0", "llama", 1e-2, 1500, 0.95),
        ("textenv/ProbeDelayedCopy-v0", "llama", 5e-3, 8000, 0.9),
        ("textenv/ProbeLength-v0", "llama", 1e-2, 1500, 0.95),
        # Rotary positions alone cannot tell the prompt "a" from the prompt and its answer "aa".
        ("textenv/ProbeSubstring-v0", "gpt2", 2e-3, 4000, 0.95),
    ],
)
def test_it_learns_the_probes(fresh_model, config, task_id, family, lr, episodes, at_least):
    settings = config(
        fresh_model(task_id, family),
        total_episodes=episodes,
        prompts_per_step=8,
        group_size=8,
        learning_rate=lr,
        eval_episodes=64,
        checkpoint_every=10**6,
    )
    assert GRPO(task_id, settings).learn().evaluate().reward >= at_least


def test_a_constant_reward_moves_no_weight(fresh_model, config):
    agent = GRPO("textenv/ProbeConstant-v0", config(fresh_model("textenv/ProbeConstant-v0")))
    before = {name: p.clone() for name, p in agent.policy.state_dict().items()}
    agent.learn()
    assert all(torch.equal(p, before[name]) for name, p in agent.policy.state_dict().items())


def test_with_a_learning_rate_of_next_to_nothing_engine_and_learner_stay_together(fresh_model, config):
    agent = GRPO(
        "textenv/ProbeDelayedCopy-v0",
        config(fresh_model("textenv/ProbeDelayedCopy-v0"), learning_rate=1e-30, total_episodes=160),
    ).learn()
    gaps = [line["logp_gap_max"] for line in metrics_of(agent.config.run_dir) if "logp_gap_max" in line]
    assert len(gaps) >= 5
    assert max(gaps) < 1e-4


def metrics_of(folder):
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


CHANGES = {
    "env_options": {"delay": 1},
    "reward": "exact",
    "max_new_tokens": 4,
    "seed": 1,
    "total_episodes": 64,
    "prompts_per_step": 3,
    "learning_rate": 2e-2,
    "learning_rate_decay": "constant",
    "warmup_steps": 3,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "group_size": 3,
    "temperature": 0.7,
    "scale_rewards": "none",
    "updates_per_batch": 2,
    "epochs_per_batch": 2,
    "aggregation": "token_mean",
    "kl_loss_coef": 0.5,
    "kl_reward_coef": 0.5,
    "lora_rank": 2,
    "min_group_std": 10.0,
}
ELSEWHERE = {
    "model": "every test here names another one",
    "max_tokens": "size of the context, a result only where it binds: tests/textenv/test_episodes.py",
    "device": "tested where there is a GPU",
    "tokens_per_microbatch": "memory, and never results: tests/agents/test_learner.py",
    "eval_episodes": "test_a_run_keeps_what_it_did",
    "checkpoint_every": "test_a_run_keeps_what_it_did",
    "run_dir": "test_a_run_keeps_what_it_did",
    "max_ungraded": "tests/agents/test_rollout.py",
    "max_logp_gap": "tests/agents/test_learner.py",
    "clip_low": "test_clipping_changes_a_second_update",
    "clip_high": "test_clipping_changes_a_second_update",
    "clip_ratio_max": "test_clipping_changes_a_second_update",
    "kl_target": "test_a_kl_target_moves_the_coefficient",
}


def trained_weights(agent):
    agent.learn()
    return torch.cat([p.flatten() for p in agent.policy.parameters()])


@pytest.fixture
def weights_with(fresh_model, config):
    model = fresh_model("textenv/ProbeDelayedCopy-v0")

    def train(**changes):
        settings = config(model, **{"env_options": {"delay": 0}, "total_episodes": 96} | changes)
        return trained_weights(GRPO("textenv/ProbeDelayedCopy-v0", settings))

    return train


def test_every_setting_is_accounted_for():
    assert set(CHANGES) | set(ELSEWHERE) == {field.name for field in dataclasses.fields(GRPOConfig)}


def test_no_setting_is_a_no_op(weights_with):
    usual = weights_with()
    assert torch.equal(usual, weights_with()), "a run is a function of its settings"
    same = [name for name, value in CHANGES.items() if torch.equal(usual, weights_with(**{name: value}))]
    assert not same, f"these settings change nothing: {same}"


def test_clipping_changes_a_second_update(weights_with):
    many = {"epochs_per_batch": 4, "learning_rate": 3e-3}
    usual = weights_with(**many)
    for name, value in {"clip_low": 0.01, "clip_high": 0.01, "clip_ratio_max": 1.21}.items():
        assert not torch.equal(usual, weights_with(**many, **{name: value})), name


def test_a_kl_target_moves_the_coefficient(fresh_model, config):
    settings = config(fresh_model("textenv/ProbeDelayedCopy-v0"), kl_loss_coef=0.1, kl_target=1e-6, total_episodes=96)
    GRPO("textenv/ProbeDelayedCopy-v0", settings).learn()
    lines = metrics_of(settings.run_dir)
    factor = 1.0
    for line in lines:
        assert line["kl_factor"] == pytest.approx(factor)
        factor *= 1 + (0.2 if line["kl"] > 0 else -0.2) * 16 / 10_000
    assert lines[-1]["kl"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size must be 2 or more, since a lone completion"),
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"prompts_per_step": 0}, "prompts_per_step must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0"),
        ({"kl_loss_coef": -1.0}, "the KL coefficients"),
        ({"max_ungraded": 1.0}, "max_ungraded"),
    ],
)
def test_settings_that_cannot_train_are_refused_when_written(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)


def test_a_run_keeps_what_it_did(fresh_model, config, tmp_path):
    settings = config(fresh_model("textenv/ProbeOneHot-v0"), checkpoint_every=2, eval_episodes=5)
    agent = GRPO("textenv/ProbeOneHot-v0", settings).learn()
    folder = tmp_path / settings.run_dir
    assert json.loads((folder / "config.json").read_text())["settings"]["group_size"] == 4
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 3]
    assert [line["episodes"] for line in metrics_of(folder)] == [16, 32, 48]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["000002", "000003"]
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == [f"00000{i}.jsonl.gz" for i in (1, 2, 3)]
    assert any((folder / "tensorboard").iterdir())
    saved = load_file(folder / "checkpoints" / "000003" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, agent.policy.model.state_dict()[name])
    assert json.loads((folder / "evaluation_after.json").read_text())["episodes"] == 5


def test_the_logged_reward_is_that_of_the_stored_episodes(fresh_model, config):
    import gzip

    settings = config(fresh_model("textenv/ProbeLength-v0"))
    GRPO("textenv/ProbeLength-v0", settings).learn()
    for line in metrics_of(settings.run_dir):
        with gzip.open(f"{settings.run_dir}/rollouts/{line['step']:06d}.jsonl.gz", "rt") as file:
            rows = [json.loads(row) for row in file]
        assert line["reward"] == pytest.approx(np.mean([row["return"] for row in rows]))
        for row in rows:
            assert row["return"] == pytest.approx(sum(row["reward"]))


def test_an_agent_saves_loads_and_predicts_the_same(fresh_model, config, tmp_path):
    import gymnasium as gym

    agent = GRPO("textenv/ProbeDelayedCopy-v0", config(fresh_model("textenv/ProbeDelayedCopy-v0"))).learn()
    agent.save(tmp_path / "saved")
    again = GRPO.load(tmp_path / "saved")
    envs = gym.make_vec("textenv/ProbeDelayedCopy-v0", num_envs=4, level="sequence")
    observation, _ = envs.reset(seed=0)
    actions, state = agent.predict(observation)
    assert state is None
    assert envs.action_space.contains(actions)
    np.testing.assert_array_equal(actions, again.predict(observation)[0])
    assert not np.array_equal(
        agent.predict(observation, deterministic=False, seed=1)[0],
        agent.predict(observation, deterministic=False, seed=2)[0],
    )
    single = {name: array[0] for name, array in observation.items()}
    np.testing.assert_array_equal(agent.predict(single)[0], actions[0])
    assert again.evaluate(16).reward == agent.evaluate(16).reward


KILLED = """
import os, signal, sys
import textenv
from agents.core import training
from agents.grpo import GRPO, GRPOConfig

config = GRPOConfig(model=sys.argv[1], run_dir=sys.argv[2], prompts_per_step=4, group_size=4, total_episodes=160,
                    eval_episodes=8, checkpoint_every=3, learning_rate=1e-2, kl_loss_coef=0.1,
                    env_options={"delay": 0})
log = training.Training.log

def log_and_die(self, batch, metrics):
    log(self, batch, metrics)
    if self.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

training.Training.log = log_and_die
GRPO("textenv/ProbeDelayedCopy-v0", config).learn()
"""


@pytest.mark.parametrize("killed_after", [2, 5])
def test_a_killed_run_ends_as_one_never_killed(fresh_model, tmp_path, killed_after):
    model = fresh_model("textenv/ProbeDelayedCopy-v0")
    settings = {
        "model": model,
        "prompts_per_step": 4,
        "group_size": 4,
        "total_episodes": 160,
        "eval_episodes": 8,
        "checkpoint_every": 3,
        "learning_rate": 1e-2,
        "kl_loss_coef": 0.1,
        "env_options": {"delay": 0},
    }
    whole = tmp_path / "whole"
    expected = trained_weights(GRPO("textenv/ProbeDelayedCopy-v0", GRPOConfig(run_dir=str(whole), **settings)))
    killed = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, model, str(killed), str(killed_after)], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert len(metrics_of(killed)) == killed_after
    assert metrics_of(killed)[0]["grad_norm"] > 0, "a run that moves before it is killed was wanted"
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rewa')  # killed in the middle of a line
    (killed / "checkpoints" / "000006.new").mkdir()  # and of a checkpoint

    resumed = GRPO("textenv/ProbeDelayedCopy-v0", GRPOConfig(run_dir=str(killed), **settings), resume=True)
    assert torch.equal(trained_weights(resumed), expected)

    def timeless(line):
        return {name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")}

    assert list(map(timeless, metrics_of(killed))) == list(map(timeless, metrics_of(whole)))


def test_a_run_folder_that_is_taken_is_refused_before_a_model_loads(fresh_model, config, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    started = time.monotonic()
    with pytest.raises(ValueError, match="holds another run; choose another --run-dir, or go on with it by --resume"):
        GRPO("textenv/ProbeOneHot-v0", config("no/such-model", run_dir=str(tmp_path / "taken")))
    assert time.monotonic() - started < 5
    with pytest.raises(ValueError, match="no run to resume in"):
        GRPO("textenv/ProbeOneHot-v0", config("no/such-model", run_dir=str(tmp_path / "empty")), resume=True)


def test_a_run_is_not_resumed_with_other_settings(fresh_model, config):
    settings = config(fresh_model("textenv/ProbeOneHot-v0"))
    GRPO("textenv/ProbeOneHot-v0", settings).learn()
    other = dataclasses.replace(settings, group_size=8)
    with pytest.raises(ValueError, match="resume it with the settings it was started with"):
        GRPO("textenv/ProbeOneHot-v0", other, resume=True).learn()


def test_more_steps_on_a_finished_run_are_evaluated_anew(fresh_model, config):
    settings = config(fresh_model("textenv/ProbeOneHot-v0"), total_episodes=16, eval_episodes=32)
    before = GRPO("textenv/ProbeOneHot-v0", settings).learn().last_training.after
    again = GRPO("textenv/ProbeOneHot-v0", settings, resume=True).learn(total_episodes=800)
    assert again.last_training.after.reward == again.evaluate().reward
    assert again.last_training.after.reward > before.reward


def test_a_start_that_failed_does_not_block_the_next(fresh_model, config):
    settings = config(fresh_model("textenv/ProbeOneHot-v0"), reward="numeric")
    with pytest.raises(RewardError):
        GRPO("textenv/ProbeOneHot-v0", settings).learn()
    GRPO("textenv/ProbeOneHot-v0", dataclasses.replace(settings, reward=None)).learn()


def test_a_start_that_failed_leaves_no_figure_to_the_next(fresh_model, config, monkeypatch):
    settings = config(fresh_model("textenv/ProbeLength-v0"))
    monkeypatch.setattr(
        GRPO, "update", lambda *arguments, **options: 1 / 0
    )  # after the first evaluation, before a step is kept
    with pytest.raises(ZeroDivisionError):
        GRPO("textenv/ProbeLength-v0", settings).learn()
    monkeypatch.undo()
    other = dataclasses.replace(settings, model=fresh_model("textenv/ProbeLength-v0", "gpt2"))
    agent = GRPO("textenv/ProbeLength-v0", other)
    expected = agent.evaluate()
    agent.learn()
    assert agent.last_training.before == expected


def test_a_start_killed_before_it_had_written_anything_does_not_block_the_next(fresh_model, config, tmp_path):
    settings = config(fresh_model("textenv/ProbeOneHot-v0"))
    (tmp_path / settings.run_dir / "rollouts").mkdir(parents=True)
    GRPO("textenv/ProbeOneHot-v0", settings).learn()


def test_references_and_parts_of_numpys_types_are_kept(fresh_model, config, tmp_path):
    class Next(textenv.Task):
        """The next letter's number."""

        holdout = 0
        max_new_tokens, max_tokens = 2, 16

        def draw(self, rng):
            number = rng.integers(4)
            return textenv.Problem("abcd"[number], number)

        def reward(self, prompt, completion, reference):
            return Score(np.float32(len(completion)), {"length": np.float32(len(completion))})

        def tokenizer(self):
            return textenv.make_task("textenv/ProbeOneHot-v0").tokenizer()

    textenv.register("test/Next-v0", Next)
    try:
        GRPO("test/Next-v0", config(fresh_model("textenv/ProbeOneHot-v0"))).learn()
    finally:
        del textenv.registry["test/Next-v0"], gymnasium.registry["test/Next-v0"]


def test_the_denominators_are_those_of_the_whole_batch_and_all_turns(fresh_model, config, monkeypatch):
    settings = config(fresh_model("textenv/GuessNumber-v0"), prompts_per_step=2, group_size=3, max_tokens=64)
    agent = GRPO("textenv/GuessNumber-v0", settings)
    seen = []
    monkeypatch.setattr(
        agent.learner,
        "step",
        lambda batch, rows, loss, beside: seen.append((rows.tolist(), loss)) or {"logp_gap": 0.0, "logp_gap_max": 0.0},
    )
    batch = agent.rollout().collect(0, 2, 3, temperature=1.0, seed=(0,))
    advantage_B = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    agent.update(batch, policy_loss, 0, trained_B=advantage_B != 0)
    ((rows, loss),) = seen
    assert sorted(rows) == [0, 1]
    assert loss.keywords["denominators"].sequences == 6
    assert loss.keywords["denominators"].tokens == batch.sampled_BT.sum()
    assert loss.keywords["denominators"].max_new_tokens == agent.task.max_new_tokens * agent.task.turns


def test_an_ungraded_episode_has_no_gradient_with_a_kl_term_either(fresh_model, config, monkeypatch):
    agent = GRPO(
        "textenv/ProbeOneHot-v0", config(fresh_model("textenv/ProbeOneHot-v0"), kl_loss_coef=0.1, total_episodes=16)
    )
    seen = []
    step, collect = agent.learner.step, Rollout.collect

    def collect_with_one_ungraded(*arguments, **options):
        batch = collect(*arguments, **options)
        batch.scores[1] = ungraded("time-out")
        return batch

    monkeypatch.setattr(Rollout, "collect", collect_with_one_ungraded)
    monkeypatch.setattr(
        agent.learner,
        "step",
        lambda batch, rows, *rest, **more: seen.extend(rows.tolist()) or step(batch, rows, *rest, **more),
    )
    agent.learn()
    assert sorted(seen) == [0, *range(2, 16)]
